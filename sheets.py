"""Contact sheets: the slices of a scan side by side, in the brain window and in radiological view, as PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

import stage
from dataset import BRAIN_WINDOW
from display import FOUND_RGB, NOTICE, TRUE_RGB, paint, radiological, to_grey
from explain import FULL_HEAT, overlay
from volumes import Scan

COLUMNS = 7  # four rows for a routine scan of 28 slices
MOST_SLICES = 42  # of a longer scan evenly spaced ones are shown
HEADING_INCHES = 0.55  # two lines, and the titles of the first row
HEADING_TOP_INCHES = 0.08  # above the heading
OUTLINE_POINTS = 0.8  # seen at the size of these pictures, and does not hide a lesion of some pixels


class Band(NamedTuple):
    """Rows of a sheet. picture, title: of a slice by its index, (H, W) or (H, W, 3) uint8 as stored.

    outline: (S, H, W), around whose values other than 0 a green line is drawn."""

    picture: Callable[[int], np.ndarray]
    title: Callable[[int], str]
    outline: np.ndarray | None = None


def contact_sheet(
    path: Path, scan: Scan, given: np.ndarray, denoised: np.ndarray, finding: str, scores: Sequence[float]
) -> None:
    """PNG of the input above its denoised version, each slice with number and probability of a finding.

    given, denoised: (S, H, W) HU."""
    count = len(given)
    bands = [
        Band(
            lambda index: to_grey(given[index], *BRAIN_WINDOW),
            lambda index: f"{index + 1}/{count}  {finding} {scores[index]:.2f}",
        ),
        Band(
            lambda index: to_grey(denoised[index], *BRAIN_WINDOW),
            lambda index: f"{index + 1}/{count}  denoised",
        ),
    ]
    write_sheet(path, scan, bands, evenly(np.arange(count)), "given above, denoised below")


def heat_sheet(
    path: Path, scan: Scan, given: np.ndarray, heat: np.ndarray, finding: str, scores: Sequence[float]
) -> None:
    """PNG of where a classifier looked: each slice in grey with its heat, and its probability of a finding.

    given: (S, H, W) HU. heat: (S, H, W) of explain.grad_cam, on an absolute scale."""
    count = len(given)
    band = Band(
        lambda index: overlay(given[index], heat[index]),
        lambda index: f"{index + 1}/{count}  {finding} {scores[index]:.2f}",
    )
    heading = f"Grad-CAM, full colour at {FULL_HEAT:g} nats; where the network looked, not where a lesion is"
    write_sheet(path, scan, [band], evenly(np.arange(count)), heading)


def lesion_sheet(path: Path, scan: Scan, given: np.ndarray, found: np.ndarray, percent: Sequence) -> None:
    """PNG of what a segmenter found, in red, around what is known to be true a green line.

    given: (S, H, W) HU. found: (S, H, W) uint8. percent: of each slice, how much of the brain it is, or None.
    Of a scan with lesions the slices that show them."""
    count, truth = len(given), scan.mask
    shown = found.any((1, 2)) if truth is None else (found.any((1, 2)) | truth.any((1, 2)))

    def picture(index: int) -> np.ndarray:
        grey = to_grey(given[index], *BRAIN_WINDOW)
        return paint(np.repeat(grey[..., None], 3, axis=2), found[index] > 0, FOUND_RGB)

    def title(index: int) -> str:
        return f"{index + 1}/{count}" + ("" if percent[index] is None else f"  {percent[index]:.1f} %")

    chosen = np.flatnonzero(shown) if shown.any() else np.arange(count)
    heading = "lesions: found in red" + ("" if truth is None else ", true outlined in green")
    heading += ", % of the brain" + ("" if shown.any() else "; none in any slice")
    write_sheet(path, scan, [Band(picture, title, truth)], evenly(chosen), heading)


def evenly(indices: np.ndarray, most: int = MOST_SLICES) -> list[int]:
    """At most so many of some indices, both ends among them."""
    places = np.linspace(0, len(indices) - 1, min(most, len(indices))).round().astype(int)
    return indices[np.unique(places)].tolist()


def write_sheet(path: Path, scan: Scan, bands: Sequence[Band], chosen: Sequence[int], heading: str) -> None:
    """PNG of the chosen slices of each band, the bands below each other, the patient's right at the left."""
    row_mm, column_mm = scan.spacing_mm[1:]
    turned = abs(scan.affine[1, 0]) > abs(scan.affine[0, 0])  # its columns run from front to back
    aspect = column_mm / row_mm if turned else row_mm / column_mm
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    width, height = max(1.7 * columns, 5.0), 1.75 * rows * len(bands) + HEADING_INCHES
    figure = Figure(figsize=(width, height), facecolor="black")
    axes = figure.subplots(rows * len(bands), columns, squeeze=False)
    for number, band in enumerate(bands):
        for place, axis in enumerate(axes[number * rows : (number + 1) * rows].flat):
            axis.axis("off")
            if place >= len(chosen):
                continue
            index = chosen[place]
            axis.imshow(
                radiological(band.picture(index), scan.affine), cmap="gray", vmin=0, vmax=255, aspect=aspect
            )
            if band.outline is not None and band.outline[index].any():
                inside = np.pad(radiological(band.outline[index] > 0, scan.affine), 1)  # closed at the border
                at = [np.arange(-1, side - 1) for side in inside.shape]
                axis.contour(
                    *at[::-1], inside, [0.5], colors=[np.divide(TRUE_RGB, 255)], linewidths=OUTLINE_POINTS
                )
            axis.set_title(band.title(index), color="white", fontsize=6, pad=2)
    window = "brain window, centre {:g}, width {:g} HU".format(*BRAIN_WINDOW)
    top = 1 - HEADING_TOP_INCHES / height
    figure.suptitle(f"{heading}\n{window}; {NOTICE.upper()}", y=top, color="white", fontsize=8)
    figure.subplots_adjust(0.005, 0.005, 0.995, 1 - HEADING_INCHES / height, 0.02, 0.12)
    with stage.atomic_write(path, "wb") as file:
        figure.savefig(file, dpi=110, format="png", facecolor="black")
