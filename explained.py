"""Grad-CAM of a classifier on a split: where it points, scored against lesion masks, and pictures of it."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import nn

import stage
from batches import neighbours
from dataset import LABELS, Pack
from explain import (
    STRIDE,
    change,
    energy_in_mask,
    grad_cam,
    pointing_game,
    randomised,
    scan_grad_cam,
    write_overlay,
)
from sequences import SequenceModel

SMALLEST_ML = 5.0  # of a lesion that is asked for: 2 cm across
SMALLEST_SHARE = 0.25  # of a lesion's largest section: thinner ends of it are not asked for
PICTURES = 12  # slices that are shown at every dose
RANDOM_SEED = 1
UNKNOWN = 255  # mask class of a lesion of unknown kind
BLEEDS = (1, 2, 3, 4, 5, UNKNOWN)
# class of a classifier -> classes of the mask that it stands for
MASKS_OF = {
    "stroke": (*BLEEDS, 6),
    "any": BLEEDS,
    "hemorrhagic": BLEEDS,
    "ischemic": (6,),
    **{name: (number,) for number, name in enumerate(LABELS[:5], start=1)},
}
FIGURES = ("pointing", "pointing_near", "energy")
COLUMNS = (
    *("dose", "class", "series_uid", "slice_index", "lesion_ml", "probability"),
    *(*FIGURES, "chance", *(f"{name}_random" for name in FIGURES)),
    *("correlation_first", "shift_px_first"),
)


def asked_slices(pack: Pack, name: str) -> list[tuple[int, np.ndarray, float]]:
    """[(row, mask (H, W) of the lesions in it, their volume in ml)] that a class is asked to point at.

    Lesions are 26-connected in the scan; those of SMALLEST_ML and more count, in the slices that show at
    least SMALLEST_SHARE of their largest section."""
    found = []
    for number in range(len(pack.series)):
        rows = np.flatnonzero(pack.series_of == number)
        mask = np.isin(np.asarray(pack.mask[rows]), MASKS_OF[name])
        parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
        voxel_ml = math.prod(pack.spacing_mm(number)) / 1000
        sections = np.array([np.bincount(part.ravel(), minlength=count + 1) for part in parts])
        volumes = sections.sum(0) * voxel_ml
        for place, row in enumerate(rows):
            shown = [
                lesion
                for lesion in range(1, count + 1)
                if volumes[lesion] >= SMALLEST_ML
                and sections[place, lesion] >= max(SMALLEST_SHARE * sections[:, lesion].max(), 1)
            ]
            if shown:
                found.append((int(row), np.isin(parts[place], shown), float(max(volumes[shown]))))
    return found


class Seen(NamedTuple):
    """What a classifier sees of a split at one dose, and says of it.

    images_of(rows of a whole series) -> (S, H, W) HU. probabilities: (N, classes) of the slices."""

    images_of: Callable[[np.ndarray], np.ndarray]
    probabilities: np.ndarray


def heats(
    models: Sequence[nn.Module], seen: Seen, pack: Pack, rows: Sequence[int], name: str, method: str
) -> tuple[np.ndarray, list[np.ndarray]]:
    """(slices (len(rows), H, W) HU, for each model the heat of a class in them, alike); rows: ascending.

    method: one of explain.METHODS. Of a network of scans, the heat is that of the slice's own logit, with its
    whole scan before it."""
    images, found = [], [[] for _ in models]
    for number in np.unique(pack.series_of[list(rows)]):
        scan = np.flatnonzero(pack.series_of == number)
        volume = np.asarray(seen.images_of(scan), np.float32)
        own = [int(row - scan[0]) for row in rows if pack.series_of[row] == number]
        images.append(volume[own])
        for model, heat in zip(models, found, strict=True):
            hu = torch.from_numpy(volume[neighbours(np.zeros(len(scan), int), model.slices)])
            if isinstance(model, SequenceModel):
                heat.append(
                    np.stack(
                        [scan_grad_cam(model, hu, name, of_slice=one, method=method)[one] for one in own]
                    )
                )
            else:
                heat.append(grad_cam(model, hu[own], name, method=method))
    return np.concatenate(images), [np.concatenate(heat) for heat in found]


def score(
    model: nn.Module,
    pack: Pack,
    shown: dict[str, Seen],
    names: Sequence[str],
    out: Path,
    method: str = "grad-cam",
) -> list[dict]:
    """Ask a classifier for its heat and write <out>/gradcam.csv and pictures. Returns the rows.

    shown: by dose as text, the one that others are compared with first. names: the classes to ask for.
    method: one of explain.METHODS. Raises InputError without masks, or without a lesion of SMALLEST_ML."""
    if pack.mask is None:
        raise stage.InputError("--gradcam: these data have no lesion masks to score against (leave it out)")
    rows: list[dict] = []
    noise = randomised(model, RANDOM_SEED)
    for name in names:
        asked = asked_slices(pack, name)
        places = [row for row, _, _ in asked]
        first = None
        for dose, seen in shown.items() if asked else ():
            images, (found, random) = heats((model, noise), seen, pack, places, name, method)
            first = found if first is None else first
            said = seen.probabilities[places, model.classes.index(name)]
            for number, (row, mask, volume) in enumerate(asked):
                series = pack.series[pack.series_of[row]]
                moved = change(first[number], found[number])
                rows.append(
                    {
                        "dose": dose,
                        "class": name,
                        "series_uid": series["series_uid"],
                        "slice_index": int(pack.slice_of[row]),
                        "lesion_ml": volume,
                        "probability": float(said[number]),
                        **_scores(found[number], mask, ""),
                        "chance": float(mask.mean()),
                        **_scores(random[number], mask, "_random"),
                        "correlation_first": moved.correlation,
                        "shift_px_first": moved.shift_px,
                    }
                )
            for number in np.linspace(0, len(asked) - 1, min(PICTURES, len(asked))).round().astype(int):
                row, mask, _ = asked[number]
                series = pack.series[pack.series_of[row]]
                write_overlay(
                    out
                    / f"gradcam_{name}"
                    / dose.replace(" ", "_")
                    / f"{series['series_uid']}_{pack.slice_of[row]:05d}.png",
                    images[number],
                    found[number],
                    np.array(series["affine"]),
                    f"{name} {said[number]:.2f}, {dose}",
                    lesions=mask.astype(np.uint8),
                )
    if not rows:
        raise stage.InputError(f"--gradcam: no lesion of {SMALLEST_ML:g} ml in these data (leave it out)")
    with stage.atomic_write(out / "gradcam.csv") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(stage.plain(rows))
    return rows


def _scores(heat: np.ndarray, mask: np.ndarray, end: str) -> dict[str, float]:
    return {
        f"pointing{end}": pointing_game(heat, mask),
        f"pointing_near{end}": pointing_game(heat, mask, STRIDE / 2),  # half a position of the feature map
        f"energy{end}": energy_in_mask(heat, mask),
    }


def summary(rows: Sequence[dict]) -> list[dict]:
    """Means of score's rows over slices, for each dose and class; found: called likelier than not."""
    means = []
    for dose, name in dict.fromkeys((row["dose"], row["class"]) for row in rows):
        own = [row for row in rows if (row["dose"], row["class"]) == (dose, name)]
        called = [row for row in own if row["probability"] >= 0.5]
        keys = [key for key in COLUMNS if isinstance(own[0][key], float)]
        means.append(
            {"dose": dose, "class": name, "n_slices": len(own), "n_found": len(called)}
            | {key: _mean([row[key] for row in own]) for key in keys}
            | {"pointing_found": _mean([row["pointing"] for row in called])}
        )
    return means


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def describe(row: dict) -> str:
    """A line of summary's."""
    parts = [
        f"{row['dose']}, {row['class']}: {row['n_slices']} slices with a lesion of {SMALLEST_ML:g} ml",
        f"pointing game {row['pointing']:.2f} ({row['pointing_near']:.2f} within half a position",
        f"{row['pointing_found']:.2f} where it was found)",
        f"energy in the lesion {row['energy']:.2f}",
        f"chance {row['chance']:.2f}",
        f"random weights {row['pointing_random']:.2f}",
    ]
    return ", ".join(parts)
