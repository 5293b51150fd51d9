"""Scans that a classifier got right at one dose and wrong at another: what it saw, and where it looked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import display
import stage
from anatomy import LESION_CLASSES
from arms import Family
from batches import neighbours
from dataset import BRAIN_WINDOW, TASKS
from explain import grad_cam, overlay, scan_grad_cam
from figures import Tile, dose_words
from inference import denoise, read
from lesion_reading import outline_lesions
from sequences import SequenceModel
from study import Study


def finding(labels: dict) -> str:
    """Labels of a scan in words."""
    names = [name for name in LESION_CLASSES if labels.get(name) == 1]
    if not names and labels.get("any") == 1:
        return "haemorrhage"
    unknown = labels.get("any") is None and labels.get("ischemia") is None
    return ", ".join(names) or ("unknown finding" if unknown else "no lesion")


def failure_tiles(study: Study, flip: dict) -> list[Tile]:
    """A slice of a scan that flips, at the reference dose and at the lower one, as it is and as it is read.

    flip: a row of tables.flips. The slice with most lesion, or without one the most suspicious."""
    arm = study.families[Family(*(flip[name] for name in ("task", "pipeline", "denoiser", "classifier")))][0]
    pack, model, reader = study.pack, flip["dose_model"], arm.classifier.network
    doses = study.design.reference(model), flip["dose"]
    outline = next(
        (one for before in (arm.denoiser, None) for one in study.outlines if one.denoiser is before), None
    )
    rows = np.flatnonzero(pack.series_of == flip["row"])
    truth = None if pack.mask is None else np.asarray(pack.mask[rows]) > 0
    # where the scan was called positive
    called = doses[0] if (flip["change"] == "lost") == (flip["target"] == 1) else doses[1]
    suspicion = study.answer(arm, study.at(model, called)[0])["slice"][rows]
    place = int(np.argmax(suspicion if truth is None or not truth.any() else truth.sum((1, 2))))
    # neighbours are all that networks of slices need, which saves minutes
    if outline is None and not isinstance(reader, SequenceModel):
        networks = [reader, *([arm.denoiser.network] if arm.denoiser else [])]
        reach = sum(network.slices // 2 for network in networks)
        first, last = max(place - reach, 0), place + reach + 1
        rows, place = rows[first:last], place - first
        truth = None if truth is None else truth[first:last]
    low, seen, outlined = {}, {}, {}
    for dose in doses:
        low[dose], levels = study.cells.images(study.at(model, dose)[0], rows)
        seen[dose] = low[dose] if arm.denoiser is None else denoise(arm.denoiser.network, low[dose], levels)
        if outline is not None:
            images = low[dose] if outline.denoiser is None else seen[dose]
            segmenter, spacing_mm = outline.segmenter, pack.spacing_mm(flip["row"])
            rule = segmenter.facts["thresholds"]["lesion"]
            outlined[dose] = outline_lesions(segmenter.network, rule, images, spacing_mm) > 0
    name = _called_class(arm.task, reader, seen[called])
    affine = pack.series[flip["row"]]["affine"]

    def tile(words: str, picture: np.ndarray, *masks: np.ndarray | None) -> Tile:
        turned = (None if mask is None else display.radiological(mask[place], affine) for mask in masks)
        return Tile(words, display.radiological(picture, affine), *turned)

    tiles = []
    for words, images, dose in [
        *(("", low, dose) for dose in doses),
        *([(", denoised", seen, doses[1])] if arm.denoiser is not None else []),
    ]:
        grey = display.to_grey(images[dose][place], *BRAIN_WINDOW)
        picture = np.repeat(grey[..., None], 3, axis=2)
        tiles.append(tile(f"{dose_words(model, dose)}{words}", picture, truth, outlined.get(dose)))
    for dose in doses:
        heat = _heat(reader, seen[dose], place, name)
        if heat is not None:
            picture = overlay(seen[dose][place], heat)
            tiles.append(tile(f"{dose_words(model, dose)}, Grad-CAM", picture, truth))
    return tiles


def _called_class(task: str, network: Any, images: np.ndarray) -> str:
    """What a scan is likeliest to be ill of."""
    ill = np.flatnonzero(TASKS[task].positive(np.eye(len(network.classes))))
    return network.classes[ill[read(network, images).scans[0, ill].argmax()]]


def _heat(network: Any, images: np.ndarray, place: int, name: str) -> np.ndarray | None:
    """Grad-CAM of a class in one slice (H, W); None of a network without feature maps."""
    hu = torch.from_numpy(images[neighbours(np.zeros(len(images), int), network.slices)])
    try:
        if isinstance(network, SequenceModel):
            return scan_grad_cam(network, hu, name, of_slice=place)[place]
        return grad_cam(network, hu[[place]], name)[0]
    except stage.InputError:
        return None
