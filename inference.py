"""A checkpoint applied to HU volumes: denoise, classify. What the study, predict.py and the app share."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import checkpoints
import stage
from dataset import neighbours, to_tensor
from tiling import tiled

# Pipelines by what a classifier was trained on: (on the low dose itself, after the denoiser)
PIPELINES = {"clean": ("1", "2"), "noisy": ("1n", None), "denoised": (None, "2d")}
LEGEND = {
    "1": "low dose -> classifier trained on clean slices",
    "1n": "low dose -> classifier trained on noisy slices",
    "2": "low dose -> denoiser -> classifier trained on clean slices",
    "2d": "low dose -> denoiser -> classifier trained on denoised slices",
}
PIXELS_AT_ONCE = 2**20  # 16 slices of 256 x 256: a few hundred MB of activations in the U-Net


ROUTINE_NOISE_HU = 4.0  # of a scan in which none could be measured


@dataclass(frozen=True, eq=False)
class Network:
    """A denoiser or classifier, and what its checkpoint says."""

    path: Path
    network: nn.Module
    facts: dict


def _batches(volume: np.ndarray, tile: int | None = None) -> range:
    rows, columns = volume.shape[1:]
    pixels = rows * columns if tile is None else min(tile, rows) * min(tile, columns)
    return range(0, len(volume), max(1, PIXELS_AT_ONCE // pixels))


@torch.inference_mode()
def denoise(
    model: nn.Module,
    volume: np.ndarray,
    sigma_hu: float | np.ndarray,
    series_of: np.ndarray | None = None,
    tile: int | None = None,
) -> np.ndarray:
    """Denoise slices. volume: (S, H, W) HU. Returns (S, H, W) float32 HU.

    sigma_hu: noise SD, of all or of each, for networks that know the dose. series_of: (S,) ascending, which
    slices belong together, for networks that see neighbours; None: all. tile: side in pixels of the tiles,
    where memory is short, see tiling.tiled; None: whole slices."""
    device = next(model.parameters(), torch.empty(0)).device  # the classical methods have none
    levels = torch.from_numpy(np.broadcast_to(np.asarray(sigma_hu, np.float32), len(volume)).copy()).to(
        device
    )
    around = neighbours(np.zeros(len(volume), int) if series_of is None else series_of, model.slices)
    out = np.empty(volume.shape, np.float32)
    apply = model if tile is None else functools.partial(tiled, model, tile=tile)
    starts = _batches(volume, tile)
    for start in starts:
        some = slice(start, start + starts.step)
        batch = torch.from_numpy(volume[around[some]].astype(np.float32)).to(device)
        out[some] = apply(batch, levels[some])[:, 0].cpu().numpy()
    return out


@torch.inference_mode()
def classify(model: nn.Module, volume: np.ndarray) -> np.ndarray:
    """Probabilities of every slice. volume: (S, H, W) HU at the training size. Returns (S, classes)."""
    device = next(model.parameters()).device
    starts = _batches(volume)
    parts = [
        torch.sigmoid(model(to_tensor(volume[start : start + starts.step], device))).cpu().numpy()
        for start in starts
    ]
    return np.concatenate(parts)


def load_denoiser(path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """A denoiser checkpoint as (network, facts). Raises InputError as checkpoints.load does."""
    return checkpoints.load_network(path, "denoiser", device)


def load_classifier(path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """A classifier checkpoint as (network, facts). Raises InputError as checkpoints.load does."""
    return checkpoints.load_network(path, "classifier", device)


def check_patients(patients: Iterable[str], networks: Sequence[Network]) -> None:
    """Raise InputError if a network, or a parent of it, was trained on one of the test patients."""
    own = set(patients)
    for network in networks:
        known = own & set(network.facts["trained_on"])
        if known:
            raise stage.InputError(
                f"{network.path}: was trained on {len(known)} of the {len(own)} test patients, e.g. "
                f"{min(known)}; it belongs to another split (train again)"
            )


def fits_denoiser(facts: dict, denoiser_path) -> bool:
    """Whether a classifier may follow a denoiser; one trained on denoised slices only behind its own."""
    parent = facts["parents"].get("denoiser")
    return parent is None or parent["sha256"] == checkpoints.file_sha256(denoiser_path)
