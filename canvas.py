"""The viewer of a scan in the browser: what it is given, packed for canvas.js, which draws it.

All volumes go at once, so that neither the wheel nor a window asks Python for anything."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import streamlit as st

import stage
from display import NOTICE, radiological
from explain import FULL_HEAT, heat_rgb

PRESETS = (  # name, width, level in HU, on the keys 1 to 6 as in other viewers
    ("Brain", 80, 40),
    ("Subdural", 200, 80),
    ("Stroke", 40, 40),
    ("Bone", 2800, 600),
    ("Soft", 400, 40),
    ("Wide", 2000, 300),
)
ALIGNMENT = 8  # of arrays in the message: browsers read int16 at even offsets only
MOST_BYTES = 400 << 20  # a message of server.maxMessageSize, in .streamlit/config.toml, with room to spare


class Layer(NamedTuple):
    """A volume to show. hu: (S, H, W) HU. name: for machines; "truth" comes last, behind the differences.
    dose, model: what is written on it."""

    name: str
    label: str
    hu: np.ndarray
    dose: str = ""
    model: str = ""


class Heat(NamedTuple):
    """Grad-CAM of a class. values: (S, H, W) nats."""

    values: np.ndarray
    of_class: str


class Scores(NamedTuple):
    """A line under the slices. values: (S,) probabilities. colour: of CSS."""

    label: str
    values: Sequence[float]
    threshold: float | None
    colour: str


@dataclass(frozen=True, eq=False, kw_only=True)
class View:
    """A scan as it is to be seen. All volumes: (S, H, W), on the same pixels."""

    key: str  # of the scan: while it stays, so do slice, window and zoom
    title: str
    layers: Sequence[Layer]
    affine: np.ndarray  # (4, 4), (column, row, slice, 1) -> LPS mm
    spacing_mm: Sequence[float]  # (slice, row, column)
    truth: np.ndarray | None = None  # lesions, all values but 0 alike
    found: np.ndarray | None = None
    heat: Heat | None = None
    scores: Sequence[Scores] = ()
    scores_title: str = ""
    truth_slices: Sequence[bool] | None = None  # with a lesion, by the labels
    notes: Sequence[str] = ()  # of each slice
    start: int = 0  # the first slice to show
    go: tuple[int, str] | None = None  # (slice, why): go there once for every why
    differences: Sequence[tuple[str, str]] = ()  # names of layers but the truth's: what, less what
    range_hu: float = 20.0  # of differences, at full colour
    panes: Sequence[str] = ()  # names of layers and differences to open with; none: the first layer
    link: bool = False  # keep the slice in the address of the page
    presets: Sequence[tuple[str, float, float]] = field(default=PRESETS)


def upright(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The affine of a volume whose slices went through display.radiological. shape: (S, H, W) before."""
    affine = np.asarray(affine, float)
    # old column and row of the corner pixel and of its neighbours, in a slice of 2 x 2
    columns, rows = (radiological(axis, affine) for axis in np.indices((2, 2))[::-1])
    steps = [(columns[at] - columns[0, 0], rows[at] - rows[0, 0], 0, 0) for at in ((0, 1), (1, 0))]
    corner = (columns[0, 0] * (shape[2] - 1), rows[0, 0] * (shape[1] - 1), 0, 1)
    return affine @ np.array([*steps, (0, 0, 1, 0), corner]).T


def _turned(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(S, H, W) in radiological view."""
    return np.ascontiguousarray(radiological(volume.transpose(1, 2, 0), affine).transpose(2, 0, 1))


def pack(view: View) -> bytes:
    """View -> the message to canvas.js: length of the header (uint32), header (JSON), arrays one by one.

    Slices are turned so that the patient's right is at the left edge and the nose up, the affine with them.
    Layers are int16 HU, masks and heat uint8; offsets count from the end of the header. Raises ValueError for
    volumes of different shapes, InputError where all of them are more than a browser is sent at once."""
    shape = view.layers[0].hu.shape
    parts: list[np.ndarray] = []
    offset = 0

    def add(volume: np.ndarray, kind: type) -> int:
        nonlocal offset
        if volume.shape != shape:
            raise ValueError(f"volumes of shape {volume.shape} and {shape} cannot be shown together")
        parts.append(_turned(volume, view.affine).astype(kind, copy=False))
        before = offset
        offset += -(-parts[-1].nbytes // ALIGNMENT) * ALIGNMENT
        return before

    layers: list[dict[str, Any]] = []
    for layer in view.layers:
        hu = np.round(layer.hu) if layer.hu.dtype.kind == "f" else layer.hu
        place = add(np.clip(hu, -32768, 32767), np.int16)
        layers.append(layer._asdict() | {"hu": None, "offset": place})
    names = [layer.name for layer in view.layers]
    differences = []
    for what, less in view.differences:
        of, minus = names.index(what), names.index(less)
        label = f"{layers[of]['label']} - {layers[minus]['label'].lower()}"
        differences.append({"name": f"{what}-{less}", "label": label, "of": of, "minus": minus})
    place = names.index("truth") if "truth" in names else len(names)
    layers[place:place] = differences
    overlays: dict[str, Any] = {}
    for name in ("truth", "found"):
        mask = getattr(view, name)
        overlays[name] = None if mask is None else {"offset": add(mask, np.uint8)}
    if view.heat is not None:
        share = np.clip(view.heat.values / FULL_HEAT, 0, 1)
        overlays["heat"] = {
            "offset": add(np.round(255 * share), np.uint8),
            "label": f"{FULL_HEAT:g} nats {view.heat.of_class}",
            "colours": np.round(255 * heat_rgb(np.linspace(0, 1, 256))).astype(int).tolist(),
        }
    if offset > MOST_BYTES:
        raise stage.InputError(
            f"{view.title}: {offset >> 20} MB of images, a browser is sent {MOST_BYTES >> 20} MB at most "
            "(use thicker slices)"
        )
    swapped = abs(view.affine[1][0]) > abs(view.affine[0][0])
    gap, row_mm, column_mm = view.spacing_mm
    header = {
        "key": view.key,
        "title": view.title,
        "file": "".join(c if c.isalnum() else "_" for c in view.title),
        "shape": parts[0].shape,
        "spacing_mm": [gap, column_mm, row_mm] if swapped else [gap, row_mm, column_mm],
        "affine": upright(view.affine, shape).tolist(),
        "layers": layers,
        **overlays,
        "scores": [line._asdict() | {"values": np.asarray(line.values).tolist()} for line in view.scores],
        "scores_title": view.scores_title,
        "truth_slices": view.truth_slices,
        "notes": view.notes,
        "start": view.start,
        "go": view.go,
        "range_hu": view.range_hu,
        "panes": [[layer["name"] for layer in layers].index(name) for name in view.panes],
        "link": view.link,
        "presets": view.presets,
        "notice": NOTICE.upper(),
    }
    text = json.dumps(stage.plain(header)).encode()
    text = text.ljust(-(-(4 + len(text)) // ALIGNMENT) * ALIGNMENT - 4)
    arrays = [part.tobytes().ljust(-(-part.nbytes // ALIGNMENT) * ALIGNMENT, b"\0") for part in parts]
    return b"".join([struct.pack("<I", len(text)), text, *arrays])


def _source(ending: str) -> str:
    return Path(__file__).with_suffix(ending).read_text(encoding="utf-8")


_viewer = st.components.v2.component(
    "viewer", html='<div class="viewer" tabindex="0"></div>', css=_source(".css"), js=_source(".js")
)


def show(message: bytes, key: str) -> None:
    """Put the viewer on the page. message: of pack. key: of the place on the page, the same for all scans."""
    _viewer(data=message, key=key)
