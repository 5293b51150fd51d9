"""Doses and arms compared on the same patients: differences, non-inferiority, flips, strata, decisions.

A Reading is what the networks of one condition (a dose of an arm) say of the rows; compare() sets two
readings of the same rows against each other. Arrays in, plain values out; what cannot be computed is NaN.

Two sources of error stay apart. Intervals and p are for patients drawn anew, jointly for both conditions and
all training seeds, the networks being fixed; the SD over training seeds stands beside them. Where each row is
a patient of its own, AUCs take DeLong's variance (1988); where a patient has several rows, that of the
patient bootstrap, whose draws all readings of the same rows and seed share. A difference of AUCs divided by
that error is taken for Student's t, its degrees of freedom one less than the patients of the rarer class, so
that p agrees with the interval and is not bounded by the number of replicates. A difference of sensitivities
or specificities takes Tango's score interval, its trials divided by their design effect (see
paired_proportions): it does not shrink to nothing where few calls change.

Measured at a true loss of exactly the margin (AUC 0.89, sensitivity 0.86): non-inferiority is claimed,
instead of in 2.5 % of studies, for the AUC in 3.2 % with 40 + 40 scans, 2.8 with 80 + 80 and 2.6 with
150 + 150, for the sensitivity in 1.9 to 3.0, and in 1.9 to 4.0 % with 60 or 150 patients of six slices."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from calibration import known_rows
from intervals import (
    BOOTSTRAP_REPLICATES,
    LEVEL,
    ROUNDING,
    UNKNOWN,
    Interval,
    auc_of_draws,
    clopper_pearson,
    delong_auc,
    delong_difference,
    holm,
    mcnemar,
    paired_proportions,
    patient_replicates,
    percentiles,
)
from metrics import auc, rates, threshold_at_specificity, youden_threshold

KINDS = ("auc", "sens", "spec")  # what is compared; also the order of Reading.values and replicates
OWN_CLASS = {"sens": 1, "spec": 0}  # the target of the rows that a rate counts
# How much worse still counts as no worse; stated before any result was seen
MARGINS = {
    "auc": 0.02,  # of 50 pairs of a sick and a well scan one more in the wrong order
    "sens": 0.05,  # one more lesion missed in 20
    "spec": 0.05,  # one more false alarm in 20 well scans
}
POWER = 0.8  # for which trials are planned by custom: Cohen 1988
SMALLEST = float(np.finfo(np.float64).tiny)  # a p that underflows is small, not 0
Z = float(norm.ppf((1 + LEVEL) / 2))  # either end of a 95 % interval is a one-sided test at 2.5 %


class SeedSummary(NamedTuple):
    mean: float
    sd: float  # NaN with one seed
    n: int


def seed_summary(values: np.ndarray) -> SeedSummary:
    """Mean and SD (n - 1) of a number over training seeds (K,). NaN if one is: no failed run vanishes."""
    values = np.asarray(values, np.float64)
    sd = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    return SeedSummary(float(values.mean()) if len(values) else math.nan, sd, len(values))


# ---------------------------------------------------------------- one condition


@dataclass(frozen=True, eq=False)
class Reading:
    """What K networks, one a training seed, say of N rows; made by read(), which checks it.

    All that is derived is kept, so a reading that is compared many times is drawn once."""

    targets: np.ndarray  # (N,) float64 of 0, 1 and NaN
    scores: np.ndarray  # (K, N) float64
    patients: np.ndarray  # (N,)
    thresholds: np.ndarray  # (K,) float64
    seed: int  # of the patient draws
    replicates: int

    @functools.cached_property
    def known(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """targets (n,), scores (K, n) and patients (n,) of the rows whose target is known."""
        targets, scores, patients = known_rows(self.targets, self.scores.T, self.patients)
        return targets, scores.T, patients

    @functools.cached_property
    def right(self) -> np.ndarray:
        """Which calls on the known rows are right, (K, n) bool."""
        targets, scores, _ = self.known
        return (scores >= self.thresholds[:, None]) == (targets == 1)

    @property
    def independent(self) -> bool:
        """Is each known row a patient of its own?"""
        return len(np.unique(self.known[2])) == len(self.known[2])

    @functools.cached_property
    def values(self) -> np.ndarray:
        """AUC, sensitivity and specificity of each training seed, (3, K)."""
        targets, scores, _ = self.known
        found = [
            rates(targets, own, threshold) for own, threshold in zip(scores, self.thresholds, strict=True)
        ]
        areas = [auc(targets, own) for own in scores]
        return np.array([areas, *([of_seed[kind] for of_seed in found] for kind in KINDS[1:])])

    @functools.cached_property
    def drawn(self) -> np.ndarray:
        """values averaged over the training seeds of each draw of patients, (replicates, 3)."""
        targets, scores, patients = self.known
        areas = [auc_of_draws(targets, own, patients) for own in scores]
        ids, owners = np.unique(patients, return_inverse=True)
        right = self.right.mean(axis=0)
        parts, wholes = (
            np.array([np.bincount(owners, share * (targets == own), len(ids)) for own in OWN_CLASS.values()])
            for share in (right, np.ones(len(right)))
        )
        blank = np.where(np.isnan(self.values[1:].mean(axis=1)), np.nan, 1)  # a NaN score or threshold

        def statistic(times: np.ndarray) -> np.ndarray:
            area = sum(of_draw(times) for of_draw in areas) / len(areas)
            return np.append(area, blank * (parts @ times) / (wholes @ times))

        if not len(ids):
            return np.full((self.replicates, len(KINDS)), np.nan)
        return patient_replicates(statistic, len(ids), seed=self.seed, replicates=self.replicates)

    def rows_of(self, kind: str) -> np.ndarray:
        """The known rows that kind counts, (n,) bool: positives, negatives, or for the AUC both."""
        targets = self.known[0]
        return targets == OWN_CLASS[kind] if kind in OWN_CLASS else np.ones(len(targets), bool)

    def patients_of(self, kind: str) -> int:
        """Patients that have a row of the class; for the AUC of the class that fewer patients have."""
        targets, _, patients = self.known
        classes = [OWN_CLASS[kind]] if kind in OWN_CLASS else [0, 1]
        return min(len(np.unique(patients[targets == own])) for own in classes)


def read(
    targets: np.ndarray,
    scores: np.ndarray,
    patients: np.ndarray,
    thresholds: np.ndarray | float,
    seed: int,
    replicates: int = BOOTSTRAP_REPLICATES,
) -> Reading:
    """A Reading from arrays or lists.

    targets: (N,) of 0, 1 and NaN for unknown, which counts for nothing. scores: (K, N), or (N,) of one
    network. patients: (N,). thresholds: (K,), chosen on validation, or one for all; score >= threshold is
    called positive. Readings are comparable if they share targets, patients, seed and replicates. ValueError
    where shapes disagree or a target is something else."""
    targets, scores = np.asarray(targets, np.float64), np.atleast_2d(np.asarray(scores, np.float64))
    patients, thresholds = np.asarray(patients), np.atleast_1d(np.asarray(thresholds, np.float64))
    if targets.ndim != 1 or scores.shape[1:] != targets.shape or patients.shape != targets.shape:
        shapes = f"targets {targets.shape}, scores {scores.shape}, patients {patients.shape}"
        raise ValueError(f"{shapes}: do not fit (must be (N,), (K, N), (N,))")
    if thresholds.shape not in ((1,), scores.shape[:1]):
        raise ValueError(
            f"thresholds {thresholds.shape}: do not fit (one for each of {len(scores)} networks)"
        )
    if not (np.isnan(targets) | (targets == 0) | (targets == 1)).all():
        raise ValueError("targets: must be 0, 1 or NaN")
    thresholds = np.broadcast_to(thresholds, scores.shape[:1])
    return Reading(targets, scores, patients, thresholds, seed, replicates)


class Estimate(NamedTuple):
    value: float  # mean over training seeds
    low: float  # 95 % for patients drawn anew
    high: float
    seed_sd: float  # SD over training seeds, NaN with one
    n: int  # rows that count: of the class, for the AUC all


def estimates(reading: Reading) -> dict[str, Estimate]:
    """AUC, sensitivity and specificity of one condition, by KINDS.

    Intervals where each row is a patient: DeLong's of the mean AUC; Clopper and Pearson's of the mean rate,
    conservative with several seeds. Else percentiles of the patient bootstrap; where no draw differs, such as
    with all calls right, Clopper and Pearson's of as many trials as the class has patients."""
    found = {}
    for place, kind in enumerate(KINDS):
        mean, sd, _ = seed_summary(reading.values[place])
        n = int(reading.rows_of(kind).sum())
        found[kind] = Estimate(mean, *_interval(reading, place, mean, n), sd, n)
    return found


def _interval(reading: Reading, place: int, mean: float, n: int) -> Interval:
    kind = KINDS[place]
    if math.isnan(mean):
        return UNKNOWN
    if reading.independent and kind == "auc":
        return Interval(*delong_auc(*reading.known[:2])[2:])
    if reading.independent:
        return clopper_pearson(mean * n, n)
    found = percentiles(reading.drawn[:, place])
    if found.high - found.low > ROUNDING:
        return found
    trials = reading.patients_of(kind)
    return clopper_pearson(mean * trials, trials)


# ---------------------------------------------------------------- two conditions


class Difference(NamedTuple):
    estimate: float  # a - b, each the mean over training seeds
    low: float  # 95 % for patients drawn anew
    high: float
    standard_error: float
    p: float  # two-sided
    seed_sd: float  # SD over training seeds of their differences, NaN with one
    a: float
    b: float
    n: int  # rows that count: of the class, for the AUC all


@dataclass(frozen=True)
class Comparison:
    auc: Difference
    sens: Difference
    spec: Difference
    patients: int
    method: str  # "DeLong" or "patient bootstrap"

    def rows(self) -> list[dict[str, Any]]:
        """A dict per kind for a table: kind, method, patients and the fields of its Difference."""
        shared = {"method": self.method, "patients": self.patients}
        return [{"kind": kind, **shared, **getattr(self, kind)._asdict()} for kind in KINDS]


def paired(
    targets: np.ndarray,
    scores_a: np.ndarray,
    scores_b: np.ndarray,
    patients: np.ndarray,
    thresholds_a: np.ndarray,
    thresholds_b: np.ndarray,
    seed: int,
    replicates: int = BOOTSTRAP_REPLICATES,
) -> Comparison:
    """compare() of the two readings of the same rows; see read() for the shapes."""
    return compare(
        read(targets, scores_a, patients, thresholds_a, seed, replicates),
        read(targets, scores_b, patients, thresholds_b, seed, replicates),
    )


def compare(a: Reading, b: Reading) -> Comparison:
    """What a has more than b in AUC, sensitivity and specificity.

    Both have the same training seeds in the same order, or one of them has a single network, which is then
    set against each seed of the other. Readings of the same scores and thresholds are one: 0, no width, p 1.

    Where AUCs agree in every draw though the scores differ, as with classes that both separate, the interval
    is that of as many pairs without a change as the rarer class has patients. Of a class with a single row
    DeLong knows no error: NaN. ValueError if the rows are not the same."""
    _check_rows(a, b)
    if (a.seed, a.replicates) != (b.seed, b.replicates):
        raise ValueError("readings: differ in seed or replicates (give read() the same)")
    if len(a.scores) != len(b.scores) and 1 not in (len(a.scores), len(b.scores)):
        counts = f"{len(a.scores)} and {len(b.scores)} training seeds"
        raise ValueError(f"{counts}: cannot be paired (as many of both, or one of either)")
    method = "DeLong" if a.independent else "patient bootstrap"
    found = (_difference(a, b, place) for place in range(len(KINDS)))
    return Comparison(*found, patients=len(np.unique(a.known[2])), method=method)


def _check_rows(a: Reading, b: Reading) -> None:
    same_targets = np.array_equal(a.targets, b.targets, equal_nan=True)
    if not same_targets or not np.array_equal(a.patients, b.patients):
        raise ValueError("readings: differ in targets or patients (read the same rows twice)")


def _difference(a: Reading, b: Reading, place: int) -> Difference:
    kind = KINDS[place]
    mean_a, mean_b = float(a.values[place].mean()), float(b.values[place].mean())
    _, seed_sd, _ = seed_summary(a.values[place] - b.values[place])
    same = np.array_equal(a.known[1], b.known[1]) and (
        kind == "auc" or np.array_equal(a.thresholds, b.thresholds)
    )
    if math.isnan(mean_a - mean_b):
        low, high, error, p = [math.nan] * 4
    elif same:
        low, high, error, p = 0.0, 0.0, 0.0, 1.0
    else:
        low, high, error, p = (_of_areas if kind == "auc" else _of_rates)(a, b, place)
        p = max(p, SMALLEST)
    n = int(a.rows_of(kind).sum())
    return Difference(mean_a - mean_b, low, high, error, p, seed_sd, mean_a, mean_b, n)


def _drawn_error(a: Reading, b: Reading, place: int) -> float:
    """Standard error of a difference by the patient bootstrap; draws without one class are left out."""
    values = a.drawn[:, place] - b.drawn[:, place]
    values = values[~np.isnan(values)]
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def _of_areas(a: Reading, b: Reading, place: int) -> tuple[float, float, float, float]:
    """(low, high, standard error, p)."""
    targets, scores_a, _ = a.known
    difference = float(a.values[place].mean() - b.values[place].mean())
    if a.independent:
        error = delong_difference(targets, scores_a, b.known[1]).standard_error
    else:
        error = _drawn_error(a, b, place)
    if error > ROUNDING:
        freedom = max(a.patients_of("auc") - 1, 1)
        reach, p = (
            student.ppf((1 + LEVEL) / 2, freedom) * error,
            2 * student.sf(abs(difference) / error, freedom),
        )
        return difference - float(reach), difference + float(reach), error, float(p)
    if math.isnan(error) or abs(difference) > ROUNDING:
        return math.nan, math.nan, error, math.nan
    low, high, p = paired_proportions(0, 0, a.patients_of("auc"))
    return low, high, high / Z, p


def _of_rates(a: Reading, b: Reading, place: int) -> tuple[float, float, float, float]:
    """(low, high, standard error, p). The design effect is how much larger the variance is than that of as
    many single trials that changed as often; where it cannot be told, the rows of a patient change as one."""
    kind = KINDS[place]
    own = a.rows_of(kind)
    changes = a.right[:, own].mean(axis=0) - b.right[:, own].mean(axis=0)  # in -1..1, being means over seeds
    n, gained, lost = len(changes), float(changes.clip(0).sum()), float((-changes).clip(0).sum())
    error = float(changes.std()) / math.sqrt(n) if a.independent else _drawn_error(a, b, place)
    alone = ((gained + lost) / n - changes.mean() ** 2) / n
    if alone > ROUNDING**2 and error > ROUNDING:
        seeds = max(len(a.scores), len(b.scores))
        design = max(error**2 / alone, 1 / seeds)  # no less than if seeds and rows err independently
    else:
        design = n / a.patients_of(kind)
    low, high, p = paired_proportions(gained / design, lost / design, n / design)
    return low, high, error if error > ROUNDING else (high - low) / (2 * Z), p


def with_holm(rows: Sequence[Mapping[str, Any]], family: Sequence[str]) -> list[dict[str, Any]]:
    """Copies of rows with p_holm: p adjusted for the number of rows that agree in the columns of family.

    A family is all two-sided tests of one question, fixed beforehand; p NaN stays NaN, but counts."""
    keys = [tuple(row[column] for column in family) for row in rows]
    found = [dict(row) for row in rows]
    for key in dict.fromkeys(keys):
        members = [row for row, own in zip(found, keys, strict=True) if own == key]
        for row, adjusted in zip(members, holm([row["p"] for row in members]), strict=True):
            row["p_holm"] = float(adjusted)
    return found


# ---------------------------------------------------------------- non-inferiority over a ladder of doses


def non_inferior(interval_low: float, margin: float) -> bool:
    """Is the lower end of a 95 % interval above -margin: a one-sided test at 2.5 %. NaN is not.

    ValueError unless margin is in (0, 1)."""
    if not 0 < margin < 1:
        raise ValueError(f"margin {margin}: must be in (0, 1)")
    return interval_low > -margin


def outcome(difference: Difference, margin: float) -> str:
    """What is shown: "non-inferior", "inferior" (all of the interval below -margin) or "inconclusive";
    "unknown" where the interval is NaN."""
    if non_inferior(difference.low, margin):
        return "non-inferior"
    if math.isnan(difference.low):
        return "unknown"
    return "inferior" if difference.high < -margin else "inconclusive"


def power(difference: Difference, margin: float) -> float:
    """How likely as many patients show non-inferiority if there is no true difference.

    Phi(margin / SE - 1.96), where 1.96 SE is the reach of the interval downwards, of rates the longer one. It
    describes the precision reached and excuses no failure. NaN without a standard error."""
    if difference.standard_error == 0:
        return 1.0
    reach = difference.estimate - difference.low
    return float(norm.cdf((margin - reach) / difference.standard_error))


def patients_for_power(patients: int, difference: Difference, margin: float, wanted: float = POWER) -> float:
    """How many patients of this mix it would take for power() to be wanted: the SE shrinks as 1 / sqrt(n).

    A whole number, or NaN without a standard error."""
    reach = difference.estimate - difference.low
    needed = patients * ((reach + norm.ppf(wanted) * difference.standard_error) / margin) ** 2
    return math.nan if math.isnan(needed) else float(math.ceil(needed))


class Verdict(NamedTuple):
    """What a ladder of doses shows of one kind. Of failed*: NaN, None, "" where no dose failed."""

    kind: str
    margin: float
    dose: float  # the lowest dose shown to be non-inferior, every higher one being so too; NaN if none
    difference: Difference | None  # there
    failed_dose: float  # the first dose, from the highest down, that was not shown to be
    failed: Difference | None
    how: str  # outcome() there
    power: float  # there
    patients: int  # there
    patients_needed: float  # there, for POWER


def lowest_dose(
    doses: Sequence[float],
    comparisons: Sequence[Comparison],
    kind: str,
    margin: float | None = None,
) -> Verdict:
    """The lowest dose that a fixed sequence of tests from the highest down shows to be non-inferior.

    doses: (D,), in any order, a larger number being more dose. comparisons: (D,), each of that dose against
    the reference. kind: of KINDS. margin: its MARGINS unless given.

    Testing stops at the first dose that fails, so that all tests together claim a false non-inferiority in at
    most 2.5 % of studies without correction for their number (Maurer et al. 1995; ICH E9, 2.2.5): to claim
    falsely, the first dose that is truly inferior must pass a single test. It holds for one ladder; several
    arms or kinds are several ladders. ValueError if a dose comes twice or the numbers disagree."""
    if len(doses) != len(comparisons) or len(set(doses)) != len(doses):
        raise ValueError("doses: must be as many as comparisons, and each once")
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: must be one of {', '.join(KINDS)}")
    margin = MARGINS[kind] if margin is None else margin
    dose, passed = math.nan, None
    for place in np.argsort(doses)[::-1]:
        comparison = comparisons[place]
        difference = getattr(comparison, kind)
        how = outcome(difference, margin)
        if how == "non-inferior":
            dose, passed = float(doses[place]), difference
            continue
        failed = float(doses[place]), difference, how, power(difference, margin), comparison.patients
        needed = patients_for_power(comparison.patients, difference, margin)
        return Verdict(kind, margin, dose, passed, *failed, needed)
    return Verdict(kind, margin, dose, passed, math.nan, None, "", math.nan, 0, math.nan)


# ---------------------------------------------------------------- whose call changes


class Flip(NamedTuple):
    row: int  # of the reading's arrays
    patient: Any
    target: int
    score_reference: float  # mean over training seeds
    score: float


class Flips(NamedTuple):
    """Rows whose call changed, those whose score changed most first."""

    lost: list[Flip]  # right at the reference, wrong now
    gained: list[Flip]  # wrong at the reference, right now
    p: float  # exact McNemar; NaN where a patient has several rows
    n: int  # known rows


def flips(reference: Reading, reading: Reading) -> Flips:
    """Which rows change from right to wrong and back when the condition changes from reference to reading.

    The call is that of more than half of the training seeds, each at its own threshold: with an even number,
    a tie is called negative. ValueError if the readings' rows differ or a score or threshold is NaN."""
    _check_rows(reference, reading)
    for own in (reference, reading):
        if np.isnan(own.known[1]).any() or np.isnan(own.thresholds).any():
            raise ValueError("scores, thresholds: NaN, which calls nothing (leave that network out)")
    calls = [(own.scores >= own.thresholds[:, None]).mean(axis=0) > 0.5 for own in (reference, reading)]
    before, after = (own == (reference.targets == 1) for own in calls)
    means = [own.scores.mean(axis=0) for own in (reference, reading)]
    known = ~np.isnan(reference.targets)
    patients = reference.patients.tolist()
    order = np.argsort(-np.abs(means[1] - means[0]), kind="stable")

    def listed(chosen: np.ndarray) -> list[Flip]:
        return [
            Flip(
                int(row),
                patients[row],
                int(reference.targets[row]),
                *(float(own[row]) for own in means),
            )
            for row in order[chosen[order]]
        ]

    lost, gained = listed(known & before & ~after), listed(known & ~before & after)
    p = mcnemar(len(lost), len(gained)) if reference.independent else math.nan
    return Flips(lost, gained, p, int(known.sum()))


# ---------------------------------------------------------------- strata


def within(reading: Reading, mask: np.ndarray) -> Reading:
    """The reading of the positives of mask (N,) bool and all negatives; other positives count as unknown.

    compare(within(a, mask), within(b, mask)) compares two conditions in a stratum. ValueError on a shape."""
    mask = np.asarray(mask, bool)
    if mask.shape != reading.targets.shape:
        raise ValueError(f"mask {mask.shape}: must be {reading.targets.shape}, one of each row")
    return replace(reading, targets=np.where((reading.targets == 1) & ~mask, np.nan, reading.targets))


def strata(reading: Reading, masks: Mapping[str, np.ndarray]) -> dict[str, dict[str, Estimate]]:
    """Name -> estimates() "auc" and "sens" of the positives of that stratum against all negatives.

    masks: name -> (N,) bool, such as a lesion's subtype or size; strata may overlap. Specificity is that of
    all negatives in every stratum, and left out."""
    found = {}
    for name, mask in masks.items():
        of_stratum = estimates(within(reading, mask))
        found[name] = {kind: of_stratum[kind] for kind in ("auc", "sens")}
    return found


# ---------------------------------------------------------------- decisions


def ppv(sens: np.ndarray | float, spec: np.ndarray | float, prevalence: float) -> np.ndarray:
    """Share of the sick among those called positive, at a prevalence in (0, 1); NaN where none is called.

    Shapes broadcast. ValueError on another prevalence. Source: Bayes' theorem."""
    _check_prevalence(prevalence)
    hits, alarms = np.multiply(sens, prevalence), (1 - np.asarray(spec)) * (1 - prevalence)
    return _share(hits, alarms)


def npv(sens: np.ndarray | float, spec: np.ndarray | float, prevalence: float) -> np.ndarray:
    """Share of the well among those called negative, as ppv()."""
    _check_prevalence(prevalence)
    return _share(np.multiply(spec, 1 - prevalence), (1 - np.asarray(sens)) * prevalence)


def _check_prevalence(prevalence: float) -> None:
    if not 0 < prevalence < 1:
        raise ValueError(f"prevalence {prevalence}: must be in (0, 1)")


def _share(part: np.ndarray, rest: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return part / (part + rest)


PREDICTIVE_VALUES = {"ppv": ppv, "npv": npv}


def predictive_values(reading: Reading, prevalence: float) -> dict[str, Estimate]:
    """PPV and NPV, by these names in small letters, at a stated prevalence, from the seeds' mean rates.

    The study's own share of sick is not that of a clinic, hence no counts of calls. Intervals are percentiles
    of the patient bootstrap, the prevalence being fixed; where no draw differs, as without a single false
    alarm, what the lower, and the upper, ends of both rates give. ValueError as for ppv()."""
    found, single = {}, estimates(reading)
    sens, spec = single["sens"], single["spec"]
    for name, formula in PREDICTIVE_VALUES.items():
        ends = percentiles(formula(reading.drawn[:, 1], reading.drawn[:, 2], prevalence))
        if ends.high - ends.low <= ROUNDING:
            ends = (float(formula(sens[place], spec[place], prevalence)) for place in (1, 2))
        sd = seed_summary(formula(*reading.values[1:], prevalence)).sd
        value = float(formula(sens.value, spec.value, prevalence))
        found[name] = Estimate(value, *ends, sd, len(reading.known[0]))
    return found


def retuned(reading: Reading, specificity: float | None = None, validation: Reading | None = None) -> Reading:
    """The reading with thresholds that suit its condition: Youden's, or those of at least this specificity.

    They are chosen on validation, the same networks' reading of validation's rows in this condition; without
    it on the rows themselves, which says how far the threshold has drifted and flatters the rates: never
    report those as a result. compare(retuned(r), r) says what it gains. ValueError if the networks differ."""
    chosen_on = reading if validation is None else validation
    if len(chosen_on.scores) != len(reading.scores):
        raise ValueError(f"validation: {len(chosen_on.scores)} networks, must be {len(reading.scores)}")
    targets, scores, _ = chosen_on.known
    if specificity is None:
        thresholds = [youden_threshold(targets, own) for own in scores]
    else:
        thresholds = [threshold_at_specificity(targets, own, specificity) for own in scores]
    return replace(reading, thresholds=np.array(thresholds))


class ThresholdDrift(NamedTuple):
    stored: SeedSummary  # threshold
    tuned: SeedSummary  # threshold that suits the condition
    shift: SeedSummary  # tuned - stored
    sens_stored: SeedSummary
    spec_stored: SeedSummary
    sens_tuned: SeedSummary
    spec_tuned: SeedSummary


def threshold_drift(
    reading: Reading, specificity: float | None = None, validation: Reading | None = None
) -> ThresholdDrift:
    """How far the threshold that suits a condition lies from the stored one, and the rates of both.

    Arguments and their caveats as for retuned()."""
    tuned = retuned(reading, specificity, validation)
    thresholds = reading.thresholds, tuned.thresholds, tuned.thresholds - reading.thresholds
    return ThresholdDrift(*map(seed_summary, (*thresholds, *reading.values[1:], *tuned.values[1:])))
