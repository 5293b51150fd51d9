"""What a classifier learns from and is validated on: clean slices, noisy ones, or denoised ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from dataset import Batch, Pack, augment, views
from inference import denoise
from low_dose import LowDose

INPUTS = ("clean", "noisy", "denoised")
VALIDATION_SEED = 0  # of the noise in validation: the same in every epoch and run


class ReadingInputs:
    """Slices of a pack as a classifier is to see them.

    dose_model, doses, realisations: as for LowDose; dose_model None is clean. denoiser: what stands before
    the classifier, or None."""

    def __init__(
        self,
        pack: Pack,
        dose_model: str | None = None,
        doses: Sequence[float] = (),
        *,
        realisations: int = 0,
        denoiser: nn.Module | None = None,
    ):
        self.pack, self.doses, self.denoiser = pack, list(doses), denoiser
        self.low = None if dose_model is None else LowDose(pack, dose_model, doses, realisations)

    def draw(self, batch: Batch, slices: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """A training batch moved at random, with its noise: (input (B, slices, H, W), its middle slices at
        full dose (B, 1, H, W)), HU on the batch's device. slices: neighbours that the classifier sees."""
        if self.low is None:
            hu = views(self.pack, batch, augment, slices)
            return hu, hu[:, slices // 2 : slices // 2 + 1]
        reach = 1 if self.denoiser is None else self.denoiser.slices
        full, low, doses = self.low.pair(batch, augment, slices + reach - 1)
        if self.denoiser is None:
            return low, full
        levels = torch.tensor(self.low.levels(batch.rows, doses), dtype=torch.float32, device=low.device)
        with torch.no_grad():
            parts = [self.denoiser(low[:, place : place + reach], levels) for place in range(slices)]
        return torch.cat(parts, dim=1), full

    def fixed(self) -> np.ndarray:
        """All slices, (N, H, W) HU, each at one of the doses in turn, with noise that is always the same."""
        if self.low is None:
            return self.pack.image
        rows = np.arange(len(self.pack))
        turns = [self.doses[row % len(self.doses)] for row in rows]
        images = self.low.evaluation(rows, turns, VALIDATION_SEED)
        if self.denoiser is not None:
            images = denoise(self.denoiser, images, self.low.levels(rows, turns), self.pack.series_of)
        return images

    def describe(self) -> str:
        """What `fixed` holds, in words."""
        kind = "clean" if self.low is None else "noisy" if self.denoiser is None else "denoised"
        if self.low is None:
            return f"{kind} slices"
        return f"{kind} slices, {self.low.name} {' '.join(f'{dose:g}' for dose in self.doses)} in turn"
