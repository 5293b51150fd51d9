"""What classifiers and segmenters learn from and are validated on: clean, noisy, or denoised slices."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import checkpoints
import stage
import training
from batches import Batch, augment, augment_mask, views
from dataset import Pack
from inference import denoise, load_denoiser
from low_dose import LowDose, check_doses

INPUTS = ("clean", "noisy", "denoised")
DENOISED = ("denoised", "joint")  # a classifier may train its denoiser along with it
VALIDATION_SEED = 0  # of the noise in validation: the same in every epoch and run


class ReadingInputs:
    """Slices of a pack as a classifier or segmenter is to see them.

    dose_model, doses, realisations: as for LowDose; dose_model None is clean. denoiser: what stands before
    it, or None."""

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
        full dose (B, 1, H, W)), HU on the batch's device. slices: neighbours that the network sees."""
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

    def mask(self, batch: Batch) -> torch.Tensor:
        """The lesion classes of a training batch, moved as draw moves its slices: (B, 1, H, W) uint8."""
        return augment_mask(batch.mask, batch.moves)

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


# ---------------------------------------------------------------- from the options of a stage


class Asked(NamedTuple):
    """What --input asks for. dose_model: None is clean. denoiser: network and facts, or None. seen: patients
    that it was trained on. facts: of the checkpoint."""

    dose_model: str | None
    doses: list[float]
    denoiser: tuple[nn.Module, dict] | None
    seen: list[str]
    facts: dict


def check_input_options(args: argparse.Namespace) -> None:
    """Refuse options that --input leaves without effect. Raises InputError."""
    if args.input == "clean":
        for option in ("dose_model", "doses", "noise_realisations"):
            if getattr(args, option) is not None:
                words = option.replace("_", "-")
                raise stage.InputError(f"--{words}: clean slices have no low dose (leave it out)")
    if args.denoiser is not None and args.input not in DENOISED:
        raise stage.InputError(f"--denoiser: {args.input} slices pass none (leave it out)")


def asked_for(args: argparse.Namespace, device: torch.device) -> Asked:
    """Before any pack is built. Raises InputError for a denoiser or doses that are not."""
    dose_model = None if args.input == "clean" else args.dose_model or training.DOSE_MODEL
    doses = [] if dose_model is None else check_doses(dose_model, args.doses)
    denoiser, parents, seen = None, {}, []
    if args.input in DENOISED:
        path = args.denoiser or args.out / "denoiser.pt"
        denoiser = load_denoiser(path, device)
        parents["denoiser"] = {"path": path.name, "sha256": checkpoints.file_sha256(path)}
        seen += denoiser[1]["trained_on"]
    facts = {"input": args.input, "dose_model": dose_model, "doses": doses, "parents": parents}
    return Asked(dose_model, doses, denoiser, seen, facts)


def make_inputs(
    args: argparse.Namespace, asked: Asked, packs: Mapping[str, Pack], device: torch.device
) -> dict[str, ReadingInputs]:
    """By split, val without stored noise. A denoiser that learns too (--input joint) is not among them."""
    denoiser = asked.denoiser[0] if args.input == "denoised" else None
    inputs = {}
    for split, pack in packs.items():
        stored = 0 if args.input == "clean" or split == "val" else training.noise_realisations(args, device)
        inputs[split] = ReadingInputs(
            pack, asked.dose_model, asked.doses, realisations=stored, denoiser=denoiser
        )
    return inputs
