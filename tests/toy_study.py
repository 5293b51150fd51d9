"""A study whose networks say what a test tells them to: for what is done with the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arms import Networks, plan_arms
from cells import Cell, Cells
from denoised import load
from inference import Network
from study import Design, Study

SPLIT = "a split"
CUT = 0.5


class ToyPack:
    """What a study asks of a dataset.Pack. targets: (series,) 1, 0 or None of any haemorrhage.

    patients: whose scans they are (default: each its own). kinds: which subtype positives have."""

    def __init__(
        self,
        targets: Sequence[int | None],
        slices: int = 1,
        patients: Sequence[str] | None = None,
        kinds: Sequence[str] = ("subdural",),
        mask: np.ndarray | None = None,
    ):
        names = [f"p{number:04d}" for number in range(len(targets))] if patients is None else patients
        self.series = [
            {
                "series_uid": f"s{number:04d}",
                "patient_id": name,
                "spacing_mm": [5.0, 1.0, 1.0],
                "labels": {"any": target, kinds[number % len(kinds)]: target, "ischemia": 0},
            }
            for number, (target, name) in enumerate(zip(targets, names, strict=True))
        ]
        self.series_of = np.repeat(np.arange(len(targets)), slices)
        self.labels = [self.series[number]["labels"] for number in self.series_of]
        self.image = np.zeros((len(self.series_of), 4, 4), np.int16)
        self.truth, self.mask, self.size, self.low = None, mask, 4, {}
        self.pixel_mm = np.ones(len(self.series_of))
        self.key, self.split_hash = "a pack", SPLIT

    def __len__(self) -> int:
        return len(self.series_of)

    def patient_ids(self) -> np.ndarray:
        return np.array([metadata["patient_id"] for metadata in self.series])[self.series_of]


Tell = Callable[[Cell], np.ndarray]  # a probability for each slice of the pack


class ToldCells(Cells):
    """Cells of classifiers that say what tell says, of a scan what they say of its worst slice."""

    def __init__(self, pack: ToyPack, tell: Tell, seed: int = 1):
        super().__init__(Path("nowhere"), pack, "brain", seed)
        self.tell = tell

    def load(self, cell: Cell) -> dict[str, Any]:
        if cell.kind == "quality":
            return {"means": dict.fromkeys(("mse", "psnr", "ssim", "rmse_hu"), 1.0)}
        rows = self.rows(cell.patients)
        said, series_of = self.tell(cell)[rows], self.pack.series_of[rows]
        scans = [[said[series_of == number].max()] for number in np.unique(series_of)]
        return {"slices": [[value] for value in said], "scans": scans}


def classifier(name: str = "classifier", **facts: Any) -> Network:
    """A network without weights. facts: others than those of a classifier of haemorrhage, clean, seed 1."""
    threshold = {"value": facts.pop("threshold", CUT), "origin": "given"}
    known = {
        **{"stage": "classifier", "task": "hemorrhage", "classes": ["any"], "input": "clean", "seed": 1},
        **{"assume_absent": [], "parents": {}, "size": 4, "split_hash": SPLIT, "trained_on": []},
        **{"thresholds": {"slice": threshold, "scan": threshold}, "dose_model": None, "doses": []},
    }
    return Network(Path(f"{name}.pt"), None, known | facts)


def denoiser(name: str = "denoiser") -> Network:
    """A network without weights, or a classical one by its name."""
    if "denoiser" not in name:
        return load(name)
    return Network(Path(f"{name}.pt"), None, {"dose_model": "projection", "size": 4, "trained_on": []})


def toy_design(**options: Any) -> Design:
    margins = {"auc": 0.02, "sens": 0.05, "spec": 0.05}
    usual = {"ladders": {"projection": [1.0, 0.5, 0.1]}, "noise_seeds": [1], "seed": 1, "mask": "brain"}
    return Design(**usual | {"margins": margins, "prevalence": 0.1, "classical_patients": 6} | options)


def toy_study(
    pack: ToyPack,
    tell: Tell,
    classifiers: Sequence[Network] = (),
    denoisers: Sequence[Network] = (),
    **options: Any,
) -> Study:
    """A study of classifiers (default: one) on the low dose and behind denoisers. options: of the design."""
    networks = Networks(True, list(denoisers), list(classifiers) or [classifier()], [])
    design = toy_design(**options)
    arms, _ = plan_arms(networks)
    study = Study(Path("nowhere"), ToldCells(pack, tell, design.seed), design, networks, arms, [])
    study.null = lambda *_: np.linspace(0, 1, len(pack))
    return study
