"""What canvas.js is given: volumes turned with their affine, where each array lies, what is refused."""

from __future__ import annotations

import itertools
import json
import struct

import numpy as np
import pytest

import canvas
import stage
from display import radiological
from explain import FULL_HEAT

SHAPE = (3, 5, 7)  # odd and unequal on purpose
RNG = np.random.default_rng(0)


def unpack(message: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """(header, arrays by name), as canvas.js reads them."""
    (length,) = struct.unpack_from("<I", message)
    header = json.loads(message[4 : 4 + length])
    count = int(np.prod(header["shape"]))

    def array(offset: int, kind: str) -> np.ndarray:
        assert (4 + length + offset) % canvas.ALIGNMENT == 0
        return np.frombuffer(message, kind, count, 4 + length + offset).reshape(header["shape"])

    found = {layer["name"]: array(layer["offset"], "<i2") for layer in header["layers"] if "offset" in layer}
    for name in ("truth", "found", "heat"):
        if header.get(name):
            found[f"{name} overlay"] = array(header[name]["offset"], "u1")
    return header, found


def make_view(**more) -> canvas.View:
    hu = RNG.integers(-1024, 3071, SHAPE).astype(np.int16)
    given = {"key": "k", "title": "a case", "layers": [canvas.Layer("full", "Full dose", hu)]}
    return canvas.View(**{**given, "affine": np.eye(4), "spacing_mm": (5.0, 1.0, 2.0), **more})


def orientations() -> list:
    """Affines of slices in all eight ways that they can lie, some of them with a tilt."""
    found = []
    for swapped, left, back in itertools.product((False, True), (1, -1), (1, -1)):
        affine = np.eye(4)
        columns, rows = np.array([2.0 * left, 0, 0]), np.array([0, 1.5 * back, 0])
        affine[:3, 0], affine[:3, 1] = (rows, columns) if swapped else (columns, rows)
        affine[:3, 2], affine[:3, 3] = (0.0, 0.8, 5.0), (-40.0, 30.0, 10.0)
        found.append(pytest.param(affine, id=f"{'swapped ' if swapped else ''}{left:+d}{back:+d}"))
    return found


@pytest.mark.parametrize("affine", orientations())
def test_every_voxel_of_a_turned_volume_stays_where_it_was_in_the_patient(affine):
    hu = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)  # each voxel has a value of its own
    view = make_view(affine=affine, layers=[canvas.Layer("full", "Full dose", hu)])
    header, arrays = unpack(canvas.pack(view))
    turned = np.array(header["affine"])
    for slice_, row, column in np.ndindex(*SHAPE):
        (new,) = np.argwhere(arrays["full"] == hu[slice_, row, column])
        np.testing.assert_allclose(
            turned @ [new[2], new[1], new[0], 1], affine @ [column, row, slice_, 1], atol=1e-9
        )
    assert turned[0, 0] > 0 and turned[1, 1] > 0  # columns run to the left, rows to the back
    spacing = [abs(turned[1, 1]), abs(turned[0, 0])]
    swapped = affine[0, 0] == 0
    own = make_view(affine=affine, spacing_mm=(5.0, 2.0, 1.5) if swapped else (5.0, 1.5, 2.0))
    assert unpack(canvas.pack(own))[0]["spacing_mm"][1:] == spacing


def test_arrays_of_a_message_are_what_was_given():
    low = RNG.normal(0, 300, SHAPE).astype(np.float32)
    mask = (RNG.random(SHAPE) > 0.5).astype(np.uint8) * 5
    heat = np.full(SHAPE, FULL_HEAT / 2)
    heat[0] = 10 * FULL_HEAT
    full = RNG.integers(-1024, 3071, SHAPE).astype(np.int16)
    view = make_view(
        layers=[canvas.Layer("full", "Full dose", full), canvas.Layer("low", "Low dose", low)],
        truth=mask,
        found=mask[::-1],
        heat=canvas.Heat(heat, "stroke"),
    )
    header, arrays = unpack(canvas.pack(view))
    assert np.array_equal(arrays["full"], full)
    assert np.array_equal(arrays["low"], np.round(low))
    assert np.array_equal(arrays["truth overlay"], mask)
    assert np.array_equal(arrays["found overlay"], mask[::-1])
    assert set(arrays["heat overlay"][0].ravel()) == {255} and set(arrays["heat overlay"][1].ravel()) == {128}
    assert len(header["heat"]["colours"]) == 256 and header["notice"] == "RESEARCH USE ONLY"


def test_values_beyond_int16_are_clipped_and_not_wrapped():
    hu = np.array([[[-1e6, 1e6]]], np.float32)
    _, arrays = unpack(canvas.pack(make_view(layers=[canvas.Layer("full", "Full dose", hu)])))
    assert arrays["full"].tolist() == [[[-32768, 32767]]]


def test_differences_refer_to_the_layers_that_they_name_and_stand_before_the_truth():
    names = ("full", "low", "denoised", "truth")
    layers = [canvas.Layer(name, name.title(), np.zeros(SHAPE, np.int16)) for name in names]
    panes = ["low", "denoised-full", "truth"]
    view = make_view(layers=layers, differences=[("denoised", "full"), ("low", "full")], panes=panes)
    header = unpack(canvas.pack(view))[0]
    found = header["layers"]
    assert [found[place]["name"] for place in header["panes"]] == panes
    assert [layer["name"] for layer in found] == [
        *("full", "low", "denoised"),
        *("denoised-full", "low-full"),
        "truth",
    ]
    for layer in found[3:5]:
        assert f"{found[layer['of']]['name']}-{found[layer['minus']]['name']}" == layer["name"]


def test_unknown_numbers_become_null_and_never_break_the_header():
    scores = [canvas.Scores("1", np.array([0.1, np.nan, 0.3]), None, "red")]
    header, _ = unpack(canvas.pack(make_view(scores=scores, title="äß <script> 頭", notes=["a", "b", "c"])))
    assert header["scores"][0]["values"] == [0.1, None, 0.3] and header["scores"][0]["threshold"] is None
    assert header["title"] == "äß <script> 頭"


def test_volumes_of_other_shapes_or_too_many_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="cannot be shown together"):
        canvas.pack(make_view(truth=np.zeros((3, 5, 8), np.uint8)))
    monkeypatch.setattr(canvas, "MOST_BYTES", 2 * np.prod(SHAPE) - 1)
    with pytest.raises(stage.InputError, match="at most"):
        canvas.pack(make_view())


def test_a_marked_side_of_the_patient_is_drawn_at_the_right_edge_from_any_orientation():
    for parameters in orientations():
        affine = parameters.values[0]
        place = np.indices(SHAPE[1:])[::-1].reshape(2, -1)
        x = (affine[:1, :2] @ place).reshape(SHAPE[1:])
        left = x > np.median(x)  # the patient's left half, in LPS
        mask = np.broadcast_to(left, SHAPE).astype(np.uint8)
        _, arrays = unpack(canvas.pack(make_view(affine=affine, truth=mask)))
        columns = np.flatnonzero(arrays["truth overlay"][0].any(axis=0))
        assert columns.min() > 0 and columns.max() == arrays["truth overlay"].shape[2] - 1
        assert np.array_equal(arrays["truth overlay"][0], radiological(left.astype(np.uint8), affine))
