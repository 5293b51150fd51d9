"""Contact sheets: which slices, in which colours, upright."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import sheets
from scans import discover_phantom, read_phantom


@pytest.fixture(scope="module")
def scan():
    """A phantom of 5 slices of 48 x 48."""
    (job,), _ = discover_phantom(1, size=48, slices=5, seed=1)
    return read_phantom(job)


def test_evenly_keeps_both_ends_and_no_more_than_asked_for():
    assert sheets.evenly(np.array([3, 4, 8]), 5) == [3, 4, 8]
    found = sheets.evenly(np.arange(10, 210), 7)
    assert found[0] == 10 and found[-1] == 209 and len(found) == 7 and found == sorted(set(found))


def lesion_sheet(scan, found, path):
    sheets.lesion_sheet(path, scan, scan.hu, found, [1.0, None, 1.0, 1.0, 1.0])
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def is_red(picture):
    return (picture[..., 0] > 60) & (picture[..., 0] > 1.5 * picture[..., 1:].max(-1))


def is_green(picture):
    return (picture[..., 1] > 120) & (picture[..., 1] > 1.5 * picture[..., ::2].max(-1))


def test_lesion_sheet_is_red_where_found_and_green_around_the_truth(scan, tmp_path):
    none, some = np.zeros(scan.hu.shape, np.uint8), np.zeros(scan.hu.shape, np.uint8)
    some[2, 20:28, 30:38] = 6
    for truth in (None, none, some):
        for found in (none, some):
            picture = lesion_sheet(replace(scan, mask=truth), found, tmp_path / "x.png")
            assert is_red(picture).any() == found.any()
            assert is_green(picture).any() == (truth is not None and bool(truth.any()))


def test_lesion_sheet_shows_the_slices_with_lesions_and_the_right_of_the_patient_at_the_left(scan, tmp_path):
    found = np.zeros(scan.hu.shape, np.uint8)
    found[3, 20:28, 34:42] = 1  # columns run to the left of the patient
    one = lesion_sheet(replace(scan, mask=None), found, tmp_path / "one.png")
    all_ = lesion_sheet(replace(scan, mask=None), 0 * found, tmp_path / "all.png")
    assert one.shape[1] < all_.shape[1]
    assert np.argwhere(is_red(one))[:, 1].mean() > one.shape[1] / 2
    mirrored = replace(scan, mask=None, affine=scan.affine @ np.diag([-1.0, 1, 1, 1]))
    assert np.argwhere(is_red(lesion_sheet(mirrored, found, tmp_path / "m.png")))[:, 1].mean() < (
        one.shape[1] / 2
    )


def test_contact_sheet_shows_given_above_denoised(scan, tmp_path):
    bright = np.full(scan.hu.shape, 80.0)
    sheets.contact_sheet(tmp_path / "x.png", scan, bright, bright - 80, "stroke", [0.5] * 5)
    picture = np.asarray(Image.open(tmp_path / "x.png").convert("L")).astype(float)
    half = len(picture) // 2
    assert picture[:half].mean() > 100 > picture[half:].mean()


@pytest.mark.parametrize("count", [1, 42])
def test_heading_lies_inside_the_sheet_and_above_the_titles(scan, tmp_path, monkeypatch, count):
    drawn = []
    monkeypatch.setattr(sheets.Figure, "savefig", lambda figure, *_args, **_more: drawn.append(figure))
    pictures = np.repeat(scan.hu[:1], count, axis=0)
    sheets.contact_sheet(tmp_path / "x.png", scan, pictures, pictures, "stroke", [0.5] * count)
    (figure,) = drawn
    heading = figure._suptitle.get_window_extent()
    titles = max(axis.title.get_window_extent().y1 for axis in figure.axes)
    assert titles < heading.y0 < heading.y1 <= figure.bbox.y1
