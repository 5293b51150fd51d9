"""The two steps before the sequence model of Burduja et al. 2020: what a trained CNN says of every slice.

Principal components of its embeddings, fitted on the training slices, and probabilities from networks that
have not seen the scan (out of fold). What was worked out is kept beside the checkpoints."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import nn

import stage
from batches import neighbours
from dataset import Pack
from inference import Probabilities, probabilities

SLICES_AT_ONCE = 16


def folds_of(pack: Pack, count: int, seed: int) -> np.ndarray:
    """(N,) fold of every slice, 0 .. count - 1, by patient. Raises InputError for too few patients."""
    if count < 2:
        raise stage.InputError(f"--folds {count}: must be 2 at least, or there is nothing to learn from")
    patients, of_slice = np.unique(pack.patient_ids(), return_inverse=True)
    if len(patients) < count:
        raise stage.InputError(f"--folds {count}: there are {len(patients)} training patients (choose less)")
    order = sorted(range(len(patients)), key=lambda n: stage.stable_seed("fold", seed, str(patients[n])))
    fold = np.empty(len(patients), int)
    fold[order] = np.arange(len(patients)) % count
    return fold[of_slice]


class Said(NamedTuple):
    """What a CNN says of slices: embeddings (N, E), the probabilities that follow from them (N, classes)."""

    embeddings: np.ndarray
    probabilities: np.ndarray


@torch.inference_mode()
def ask(cnn: nn.Module, images: np.ndarray, series_of: np.ndarray) -> Said:
    """What a slice classifier says of slices (N, H, W) HU, without augmentation."""
    device, around = next(cnn.parameters()).device, neighbours(series_of, cnn.slices)
    embedded, found = [], []
    for start in stage.progress(range(0, len(images), SLICES_AT_ONCE), desc="embeddings", unit="batch"):
        hu = np.asarray(images[around[start : start + SLICES_AT_ONCE]], np.float32)
        embedded.append(cnn.embed(torch.from_numpy(hu).to(device)).float())
        found.append(cnn.head(embedded[-1]).sigmoid())
    return Said(torch.cat(embedded).cpu().numpy(), torch.cat(found).cpu().numpy())


class Components(NamedTuple):
    """Principal components of embeddings: mean (E,), axes (components, E)."""

    mean: torch.Tensor
    axes: torch.Tensor

    def features(self, said: Said) -> np.ndarray:
        """(N, components + classes) float32, as TwoStage.features_of makes them."""
        projected = (said.embeddings - self.mean.numpy()) @ self.axes.numpy().T
        return np.concatenate([projected, said.probabilities], axis=1).astype(np.float32)


def fit_pca(values: np.ndarray, components: int) -> Components:
    """The components of embeddings (N, E) that hold most of their variance.

    Raises InputError for more components than slices or features."""
    if components > min(values.shape):
        raise stage.InputError(
            f"--components {components}: {values.shape[0]} slices have embeddings of {values.shape[1]} "
            f"(choose {min(values.shape)} at most)"
        )
    found = PCA(components, svd_solver="full").fit(values.astype(np.float64))
    return Components(torch.from_numpy(found.mean_).float(), torch.from_numpy(found.components_).float())


def out_of_fold(
    cnns: Sequence[nn.Module], folds: np.ndarray, images: np.ndarray, series_of: np.ndarray
) -> np.ndarray:
    """(N, classes) probabilities, of each slice by the network that has not learnt from its fold."""
    found = None
    for number, cnn in enumerate(cnns):
        rows = np.flatnonzero(folds == number)
        own = ask(cnn, np.asarray(images[rows]), series_of[rows]).probabilities
        found = np.empty((len(folds), own.shape[1])) if found is None else found
        found[rows] = own
    return found


def kept(path: Path, key: Sequence, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays by name from make(), or from path where they were kept under the same key."""
    digest = hashlib.sha256(json.dumps(stage.plain(key)).encode()).hexdigest()
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) == digest:
                return {name: file[name] for name in file.files if name != "key"}
    arrays = make()
    with stage.atomic_write(path, "wb") as file:
        np.savez(file, key=np.array(digest), **arrays)
    return arrays


@torch.inference_mode()
def read_features(network: nn.Module, features: np.ndarray, series_of: np.ndarray) -> Probabilities:
    """As inference.read, of a TwoStage and features (N, F) of the slices."""
    device, found = next(network.parameters()).device, []
    for number in np.unique(series_of):
        own = torch.from_numpy(features[series_of == number])[None].to(device)
        scan, slices = network(own, torch.ones(own.shape[:2], dtype=torch.bool, device=device))
        found.append((slices[0], scan))
    logits = (torch.cat(part) for part in zip(*found, strict=True))
    return Probabilities(*(probabilities(one, network.classes) for one in logits))


def with_features(pack: Pack, features: np.ndarray) -> Pack:
    """A pack whose slices are rows of features, (N, F) float32, for ScanBatches."""
    other = copy.copy(pack)
    other.image, other.mask = np.ascontiguousarray(features, np.float32), None
    return other
