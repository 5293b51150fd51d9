"""A study: its design, and what its networks said of the same patients, read from the cells of its grid.

A family is what differs by its training seeds alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import anatomy
import comparisons
import lesions
import metrics
from arms import Arm, Family, Networks, Outline, is_classical, labels
from calibration import known_rows
from cells import Cell, Cells, Condition
from classified import positional_nulls
from dataset import TASKS, Pack, task_targets
from dose import DOSE_MODELS
from inference import Network

LEVELS = ("slice", "scan")
PRIMARY_LEVEL = "scan"  # a patient is missed by scan, not by slice


@dataclass(frozen=True)
class Design:
    """What a study compares, stated before it is run.

    ladders: dose model -> its doses, the highest first, which is the reference. stress: artifact ->
    severities. classical_patients: of how many test patients classical denoisers are tried, which take
    seconds a slice. margins: of comparisons.KINDS. prevalence: of the finding among those who are scanned."""

    ladders: dict[str, list[float]]
    noise_seeds: list[int]
    seed: int
    mask: str
    margins: dict[str, float]
    prevalence: float
    classical_patients: int
    stress: dict[str, list[float]] = field(default_factory=dict)

    @property
    def main_model(self) -> str:
        return next(iter(self.ladders))

    def reference(self, dose_model: str) -> float:
        return self.ladders[dose_model][0]

    def facts(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    def conditions(self) -> list[Condition]:
        return [
            Condition(model, dose, seed)
            for model, doses in self.ladders.items()
            for dose in doses
            for seed in self.noise_seeds
        ]

    def stressed(self) -> list[Condition]:
        """Artifacts at the reference dose of the first dose model."""
        model = self.main_model
        return [
            Condition(model, self.reference(model), seed, artifact, severity)
            for artifact, severities in self.stress.items()
            for severity in severities
            for seed in self.noise_seeds
        ]


class Shown(NamedTuple):
    """A family and the images that it is shown, which are alike but for their noise."""

    family: Family
    conditions: tuple[Condition, ...]


class Study:
    """One test set read by all arms of a design. data: its prepared folder."""

    def __init__(
        self,
        data: Path,
        cells: Cells,
        design: Design,
        networks: Networks,
        arms: Sequence[Arm],
        outlines: Sequence[Outline],
    ):
        self.data, self.cells, self.design = Path(data), cells, design
        self.pack: Pack = cells.pack
        self.networks, self.arms = networks, list(arms)
        self.outlines = list(outlines) if self.pack.mask is not None else []
        self.families: dict[Family, list[Arm]] = {}
        for arm in self.arms:
            self.families.setdefault(arm.family, []).append(arm)
        self.labels = labels(list(self.families))
        # JSON is parsed, and replicates are drawn, once
        self.answer, self.targets = functools.cache(self._answer), functools.cache(self._targets)
        self.reading, self.null = functools.cache(self._reading), functools.cache(self._null)
        self.patients = {
            "slice": self.pack.patient_ids(),
            "scan": np.array([metadata["patient_id"] for metadata in self.pack.series]),
        }

    # ------------------------------------------------------------ the grid

    def subset(self, denoiser: Network | None) -> int | None:
        """Of how many patients images behind a denoiser are made; None: of all."""
        few = denoiser is not None and is_classical(denoiser)
        return self.design.classical_patients if few else None

    def images(self) -> list[Network | None]:
        """Low dose as it is, then behind each denoiser."""
        return [None, *self.networks.denoisers]

    def external_grid(self) -> list[Cell]:
        """What is asked of a set beside the first: its classifiers at the highest dose, under one noise."""
        model = self.design.main_model
        condition = self.at(model, self.design.reference(model))[0]
        cells = [cell for denoiser in self.images() for cell in self._read(condition, denoiser)]
        return [cell for cell in cells if cell.kind == "classifier"]

    def shown_images(self) -> list[tuple[Network | None, int | None]]:
        """Images whose quality is measured, and of how many patients: for a subset the low dose again."""
        found = [(denoiser, self.subset(denoiser)) for denoiser in self.images()]
        return found + ([(None, self.design.classical_patients)] if any(few for _, few in found) else [])

    def grid(self) -> list[Cell]:
        """Every cell, images after images."""
        found = []
        for condition in self.design.conditions():
            for denoiser, few in self.shown_images():
                found += [Cell(condition, denoiser, kind, None, few) for kind in ("quality", "observer")]
            for denoiser in self.images():
                found += self._read(condition, denoiser)
        for condition in self.design.stressed():
            for denoiser in self.images():
                if self.subset(denoiser) is None:
                    found += self._read(condition, denoiser)
        return found

    def _read(self, condition: Condition, denoiser: Network | None) -> list[Cell]:
        few = self.subset(denoiser)
        readers = {arm.classifier: "classifier" for arm in self.arms if arm.denoiser is denoiser}
        readers |= {one.segmenter: "segmenter" for one in self.outlines if one.denoiser is denoiser}
        return [Cell(condition, denoiser, kind, reader, few) for reader, kind in readers.items()]

    # ------------------------------------------------------------ what was read

    def _answer(self, arm: Arm, condition: Condition) -> dict[str, np.ndarray]:
        """level -> probability of the finding, of every slice (N,) and scan (series,); NaN: not asked."""
        few = self.subset(arm.denoiser)
        content = self.cells.load(Cell(condition, arm.denoiser, "classifier", arm.classifier, few))
        rows = self.cells.rows(few)
        places = {"slice": rows, "scan": np.unique(self.pack.series_of[rows])}
        found = {}
        for level, key in (("slice", "slices"), ("scan", "scans")):
            values = np.full(len(self.patients[level]), math.nan)
            values[places[level]] = TASKS[arm.task].positive(np.array(content[key], np.float64))
            found[level] = values
        return found

    def _targets(self, task: str, assume_absent: tuple[str, ...], level: str) -> np.ndarray:
        """1, 0 or NaN for every slice or scan."""
        known = self.pack.labels if level == "slice" else [one["labels"] for one in self.pack.series]
        return TASKS[task].positive(task_targets(task, known, assume_absent)).astype(np.float64)

    def family_targets(self, family: Family, level: str) -> np.ndarray:
        facts = self.families[family][0].classifier.facts
        return self.targets(family.task, tuple(facts["assume_absent"]), level)

    def seeds(self, family: Family) -> tuple[int, ...]:
        """With which its networks were trained, each once and in order."""
        return tuple(sorted({arm.classifier.facts["seed"] for arm in self.families[family]}))

    def _reading(
        self, family: Family, shown: tuple[Condition, ...], level: str, seeds: tuple[int, ...]
    ) -> comparisons.Reading:
        """The scores of a family, one row for each network of these seeds and each noise.

        shown: conditions that are alike but for the noise."""
        arms = sorted(self.families[family], key=lambda arm: arm.classifier.facts["seed"])
        members = [
            (arm, condition) for arm in arms if arm.classifier.facts["seed"] in seeds for condition in shown
        ]
        scores = np.array([self.answer(arm, condition)[level] for arm, condition in members])
        targets = np.where(np.isnan(scores).any(axis=0), math.nan, self.family_targets(family, level))
        thresholds = [threshold(arm.classifier, level) for arm, _ in members]
        return comparisons.read(
            targets, np.nan_to_num(scores), self.patients[level], thresholds, self.design.seed
        )

    def family_reading(self, family: Family, shown: tuple[Condition, ...], level: str) -> comparisons.Reading:
        return self.reading(family, shown, level, self.seeds(family))

    def pair(self, one: Shown, other: Shown, level: str) -> tuple[comparisons.Reading, comparisons.Reading]:
        """Two readings of the same rows by networks of the same training seeds, as far as there are such."""
        seeds = [self.seeds(shown.family) for shown in (one, other)]
        common = tuple(sorted(set(seeds[0]) & set(seeds[1])))
        if common:
            seeds = [common, common]
        elif 1 not in map(len, seeds):
            fewest = min(map(len, seeds))
            seeds = [own[:fewest] for own in seeds]
        a, b = (
            self.reading(shown.family, shown.conditions, level, own)
            for shown, own in zip((one, other), seeds, strict=True)
        )
        if np.array_equal(a.targets, b.targets, equal_nan=True):
            return a, b
        targets = np.where(np.isnan(a.targets), math.nan, b.targets)
        return replace(a, targets=targets), replace(b, targets=targets)

    def compare(self, one: Shown, other: Shown, level: str) -> comparisons.Comparison:
        """What one has more than other."""
        return comparisons.compare(*self.pair(one, other, level))

    def reference(self, task: str, dose_model: str) -> Shown:
        """What all arms of a task are held against: its first arm at the highest dose."""
        first = next(family for family in self.families if family.task == task)
        return Shown(first, self.at(dose_model, self.design.reference(dose_model)))

    def ladder(self, family: Family, dose_model: str) -> list[tuple[float, Shown]]:
        """A family at every dose, the highest first."""
        doses = self.design.ladders[dose_model]
        return [(dose, Shown(family, self.at(dose_model, dose))) for dose in doses]

    def null_auc(self, family: Family, level: str) -> float:
        """AUC of the slices' position alone; of scans that of the position that is likeliest ill."""
        null = self.null(family.task, self.families[family][0].classifier)
        if level == "scan":
            null = metrics.scan_scores(null, self.pack.series_of)
        return metrics.auc(*known_rows(self.family_targets(family, level), null))

    def _null(self, task: str, classifier: Network) -> np.ndarray:
        """(N,) how often training was positive at a slice's height; NaN without training data."""
        return TASKS[task].positive(positional_nulls(self.data, "test", classifier.facts))

    @functools.cached_property
    def strata(self) -> dict[str, np.ndarray]:
        """Subtypes and, where masks are known, sizes of the lesion: name -> (series,) bool."""
        known = [metadata["labels"] for metadata in self.pack.series]
        found = {name: np.array([one.get(name) == 1 for one in known]) for name in anatomy.LESION_CLASSES}
        if self.pack.mask is not None:
            sizes = np.array([self._lesion_size(number) for number in range(len(known))])
            found |= {size: sizes == size for size in lesions.SIZES}
        return {name: mask for name, mask in found.items() if mask.any()}

    def _lesion_size(self, number: int) -> str:
        rows = np.flatnonzero(self.pack.series_of == number)
        pixel_mm = float(self.pack.pixel_mm[rows[0]])
        spacing_mm = (self.pack.series[number]["spacing_mm"][0], pixel_mm, pixel_mm)
        return lesions.size_name(lesions.volume_ml(np.asarray(self.pack.mask[rows]) > 0, spacing_mm)) or ""

    def at(self, dose_model: str, dose: float) -> tuple[Condition, ...]:
        """A dose under each noise."""
        return tuple(Condition(dose_model, dose, seed) for seed in self.design.noise_seeds)

    def subject(self, family: Family, level: str, dose_model: str, dose: float) -> dict[str, Any]:
        """What a row is about."""
        return {
            "task": family.task,
            "arm": self.labels[family],
            "pipeline": family.name,
            "denoiser": family.denoiser,
            "classifier": family.classifier,
            "level": level,
            **dose_facts(dose_model, dose),
        }


def threshold(classifier: Network, level: str) -> float:
    """That of the checkpoint; NaN where validation chose none."""
    value = classifier.facts["thresholds"][level]["value"]
    return math.nan if value is None else value


def dose_facts(dose_model: str, dose: float) -> dict[str, Any]:
    model = DOSE_MODELS[dose_model]
    return {
        "dose_model": dose_model,
        "dose": dose,
        "dose_fraction": model.fraction(dose),
        "sigma_hu": model.sigma_hu(dose),
    }
