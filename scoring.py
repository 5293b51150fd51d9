"""What networks that are scored alone have in common: what they are shown, their tables and figures."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import checkpoints
import stage
from dataset import Pack
from dose import DOSE_MODELS


class Shown(NamedTuple):
    """What a network is shown. input: clean, noisy or denoised; dose_model, dose: None where clean."""

    input: str
    dose_model: str | None = None
    dose: float | None = None

    @property
    def title(self) -> str:
        return "clean" if self.dose is None else f"dose {self.dose:g}"

    @property
    def folder(self) -> str:
        """Where its files lie, if there are several."""
        return self.title.replace(" ", "_")


def about(shown: Shown, seed: int) -> dict[str, Any]:
    """What a row says of the images. seed: of their noise."""
    model = None if shown.dose is None else DOSE_MODELS[shown.dose_model]
    return {
        **shown._asdict(),
        "dose_fraction": None if model is None else model.fraction(shown.dose),
        "sigma_hu": None if model is None else model.sigma_hu(shown.dose),
        "noise_seed": None if model is None else seed,
    }


def manifest(
    path: Path, facts: dict, pack: Pack, *, data: Path, split: str, seen: int, seed: int, command: str
) -> dict[str, Any]:
    """What figures were made of. path, facts: of the checkpoint. seen: patients known from its training."""
    return {
        "data": str(data),
        "split": split,
        "split_hash": pack.split_hash,
        "size": pack.size,
        "n_patients": len(set(pack.patient_ids().tolist())),
        "n_scans": len(pack.series),
        "n_slices": len(pack),
        "checkpoint": {"path": str(path), "sha256": checkpoints.file_sha256(path)},
        "parents": facts["parents"],
        "thresholds": facts["thresholds"],
        "patients_seen_in_training_or_validation": seen,
        "noise_seed": seed,
        "train_seed": facts["seed"],
        "versions": checkpoints.versions(),
        "command": command,
    }


def write_table(path: Path, names: Sequence[str], rows: Iterable[dict]) -> None:
    """A CSV table with a header; what is not known is an empty cell."""
    with stage.atomic_write(path) as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(stage.plain(row) for row in rows)


PANEL_INCHES = (4.6, 3.8)  # at 150 dpi two of them fill a screen


def panels(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side."""
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * len(titles), height), layout="constrained")
    axes = list(figure.subplots(1, len(titles), squeeze=False)[0])
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
    return figure, axes


def write_figures(folder: Path, figures: dict[str, Figure]) -> None:
    """Each as <folder>/<name>.png."""
    for name, figure in figures.items():
        with stage.atomic_write(folder / f"{name}.png", "wb") as file:
            figure.savefig(file, dpi=150, format="png")
