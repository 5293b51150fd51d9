"""A study whose networks say what a test tells them to: for what is done with the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import checkpoints
import prepare_dataset
import split_dataset
from arms import Networks, plan_arms, plan_outlines
from cells import Cell, Cells
from denoised import load
from inference import Network
from study import Design, Study
from tests.toy_models import SIZE, write_models

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

    def spacing_mm(self, number: int) -> tuple[float, float, float]:
        return tuple(self.series[number]["spacing_mm"])

    def __len__(self) -> int:
        return len(self.series_of)

    def patient_ids(self) -> np.ndarray:
        return np.array([metadata["patient_id"] for metadata in self.series])[self.series_of]


Tell = Callable[[Cell], np.ndarray]  # a probability for each slice of the pack
MEANS = dict.fromkeys(("mse", "psnr", "ssim", "rmse_hu"), 1.0)


class ToldCells(Cells):
    """Cells of classifiers that say what tell says, of a scan what they say of its worst slice.

    others: what cells of other kinds hold."""

    def __init__(self, pack: ToyPack, tell: Tell, seed: int, others: Callable[[Cell], dict]):
        super().__init__(Path("nowhere"), pack, "brain", seed)
        self.tell, self.others = tell, others

    def load(self, cell: Cell) -> dict[str, Any]:
        if cell.kind != "classifier":
            return self.others(cell)
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
    classifiers: Sequence[Network],
    denoisers: Sequence[Network] = (),
    segmenters: Sequence[Network] = (),
    others: Callable[[Cell], dict] = lambda _: {"means": MEANS},
    **options: Any,
) -> Study:
    """A study of classifiers on the low dose and behind denoisers. options: of the design."""
    networks = Networks(True, list(denoisers), list(classifiers), list(segmenters))
    design = toy_design(**options)
    arms, _ = plan_arms(networks)
    cells = ToldCells(pack, tell, design.seed, others)
    study = Study(Path("nowhere"), cells, design, networks, arms, plan_outlines(networks))
    study.null = lambda *_: np.linspace(0, 1, len(pack))
    return study


def prepare_toy(folder: Path) -> Path:
    """12 phantom patients of 4 slices of 48 x 48, prepared and split: 7 are test patients."""
    size = ["--size", SIZE, "--slices", 4, "--patients", 12, "--out", folder, "--workers", 1]
    prepare_dataset.main(["--source", "phantom", *size])
    split_dataset.main(["--data", folder, "--fractions", 0.2, 0.2, 0.6])
    return folder


def train_toys(folder: Path) -> Path:
    """write_models, of classifiers two seeds and one of noisy slices; none is trained and none the same.

    Needs the fixture bright; networks that change images and say something of their own."""
    write_models(folder)
    change(folder / "denoiser.pt", folder / "denoiser.pt", "head.bias", 0.1)
    for name, facts in (
        *(("classifier.seed1", {"seed": 1}), ("classifier.seed2", {"seed": 2})),
        ("classifier_noisy", {"seed": 1, "input": "noisy", "dose_model": "calibrated"}),
    ):
        usual = {"assume_absent": [], "thresholds": dict.fromkeys(("slice", "scan"), {"value": CUT})}
        place = folder / f"{name}.pt"
        change(folder / "classifier.pt", place, "fc.bias", 0.1 * len(name), **usual | facts)
    (folder / "classifier.pt").unlink()
    return folder


def change(source: Path, target: Path, key: str, amount: float, **facts: Any) -> None:
    """Write a checkpoint again, with amount added to a parameter and with other facts."""
    content = checkpoints.load(source, source.name.split(".")[0].split("_")[0])
    content["state"][key] = content["state"][key] + amount
    checkpoints.save(target, content | facts)
