"""A study: its design, and what its networks said of the same patients, read from the cells of its grid.

A family is what differs by its training seeds alone."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
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
from classified import LEVELS, positional_nulls, stored_number
from dataset import TASKS, Pack, task_targets
from dose import DOSE_MODELS
from inference import Network

PRIMARY_LEVEL = LEVELS[1]  # a patient is missed by scan, not by slice


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
        self.answer, self.family_targets = map(functools.cache, (self._answer, self._family_targets))
        self.reading, self.null = map(functools.cache, (self._reading, self._null))
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
        return [cell for denoiser in self.images() for cell in self._classified(condition, denoiser)]

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
                found += self._classified(condition, denoiser) + self._outlined(condition, denoiser)
        for condition in self.design.stressed():
            for denoiser in self.images():
                if self.subset(denoiser) is None:
                    found += self._classified(condition, denoiser)
        return found

    def _classified(self, condition: Condition, denoiser: Network | None) -> list[Cell]:
        readers = [arm.classifier for arm in self.arms if arm.denoiser is denoiser]
        return [Cell(condition, denoiser, "classifier", one, self.subset(denoiser)) for one in readers]

    def _outlined(self, condition: Condition, denoiser: Network | None) -> list[Cell]:
        readers = [one.segmenter for one in self.outlines if one.denoiser is denoiser]
        return [Cell(condition, denoiser, "segmenter", one, self.subset(denoiser)) for one in readers]

    def places(self, few: int | None, level: str) -> np.ndarray:
        """Which slices, or scans, are those of a subset."""
        rows = self.cells.rows(few)
        return rows if level == "slice" else np.unique(self.pack.series_of[rows])

    # ------------------------------------------------------------ what was read

    def _answer(self, arm: Arm, condition: Condition) -> dict[str, np.ndarray]:
        """level -> probability of the finding, of every slice (N,) and scan (series,); NaN: not asked."""
        few = self.subset(arm.denoiser)
        content = self.cells.load(Cell(condition, arm.denoiser, "classifier", arm.classifier, few))
        found = {}
        for level in LEVELS:
            found[level] = np.full(len(self.patients[level]), math.nan)
            values = TASKS[arm.task].positive(np.array(content[f"{level}s"], np.float64))
            found[level][self.places(few, level)] = values
        return found

    def _family_targets(self, family: Family, level: str) -> np.ndarray:
        """1, 0 or NaN for every slice or scan; NaN: unknown, or not asked, being outside the subset."""
        first = self.families[family][0]
        known = self.pack.labels if level == "slice" else [one["labels"] for one in self.pack.series]
        targets = task_targets(family.task, known, first.classifier.facts["assume_absent"])
        found = np.full(len(known), math.nan)
        places = self.places(self.subset(first.denoiser), level)
        found[places] = TASKS[family.task].positive(targets[places])
        return found

    def seeds(self, family: Family) -> tuple[int, ...]:
        """With which its networks were trained, each once and in order."""
        return tuple(sorted({arm.classifier.facts["seed"] for arm in self.families[family]}))

    def of_seed(self, family: Family, seed: int) -> list[Arm]:
        """Its arms of a training seed: several where denoisers have seeds of their own."""
        return [arm for arm in self.families[family] if arm.classifier.facts["seed"] == seed]

    def _reading(self, members: tuple[tuple[Arm, Condition], ...], level: str) -> comparisons.Reading:
        """The scores of arms of one family, a row for each of them and its condition."""
        targets = self.family_targets(members[0][0].family, level)
        scores = np.array([self.answer(arm, condition)[level] for arm, condition in members])
        scores[:, np.isnan(targets)] = 0
        thresholds = [threshold(arm.classifier, level) for arm, _ in members]
        return comparisons.read(targets, scores, self.patients[level], thresholds, self.design.seed)

    def family_reading(self, family: Family, shown: tuple[Condition, ...], level: str) -> comparisons.Reading:
        """The scores of a family, a row for each of its arms and each noise.

        shown: conditions that are alike but for the noise."""
        arms = [arm for seed in self.seeds(family) for arm in self.of_seed(family, seed)]
        return self.reading(tuple(itertools.product(arms, shown)), level)

    def pair(self, one: Shown, other: Shown, level: str) -> tuple[comparisons.Reading, comparisons.Reading]:
        """Two readings of the same rows, row by row of the same noise and training seed.

        Seeds that one alone has are left out; without a common one see _matched."""
        seeds = self.seeds(one.family), self.seeds(other.family)
        common = [seed for seed in seeds[0] if seed in seeds[1]]
        rows = [
            ((arm, condition), (other_arm, other_condition))
            for seed, other_seed in (zip(common, common, strict=True) if common else _matched(*seeds))
            for arm, other_arm in _matched(
                self.of_seed(one.family, seed), self.of_seed(other.family, other_seed)
            )
            for condition, other_condition in zip(one.conditions, other.conditions, strict=True)
        ]
        a, b = (self.reading(members, level) for members in zip(*rows, strict=True))
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
        facts = self.families[family][0].classifier.facts
        null = self.null(family.task, tuple(facts["assume_absent"]))
        if level == "scan":
            null = metrics.scan_scores(null, self.pack.series_of)
        return metrics.auc(*known_rows(self.family_targets(family, level), null))

    def _null(self, task: str, assume_absent: tuple[str, ...]) -> np.ndarray:
        """(N,) how often training was positive at a slice's height; NaN without training data."""
        facts = {"task": task, "assume_absent": assume_absent}
        return TASKS[task].positive(positional_nulls(self.data, "test", facts))

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
        mask = np.asarray(self.pack.mask[np.flatnonzero(self.pack.series_of == number)])
        return lesions.size_name(lesions.volume_ml(mask > 0, self.pack.spacing_mm(number))) or ""

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


def _matched(one: Sequence, other: Sequence) -> Iterator[tuple]:
    """Pairs in order; of different numbers each with each, so that the mean of differences is that of all."""
    return zip(one, other, strict=True) if len(one) == len(other) else itertools.product(one, other)


def threshold(classifier: Network, level: str) -> float:
    """That of the checkpoint; NaN where validation chose none."""
    return stored_number(classifier.facts, "thresholds", level)


def dose_facts(dose_model: str, dose: float) -> dict[str, Any]:
    model = DOSE_MODELS[dose_model]
    return {
        "dose_model": dose_model,
        "dose": dose,
        "dose_fraction": model.fraction(dose),
        "sigma_hu": model.sigma_hu(dose),
    }
