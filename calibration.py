"""How far a classifier's probabilities can be believed: calibration, proper scores, temperature scaling.

Arrays in, numbers out. Rows whose target is NaN count for nothing; what cannot be computed is NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, logsumexp, softmax

ECE_BINS = 15  # Guo et al. 2017
ROUNDING = 1e-6  # by which float32 probabilities may miss 0..1
PROBABILITY_FLOOR = 1e-15  # Kaggle's clip: a sure and wrong answer costs 34.5, not infinity
RSNA_WEIGHTS = {  # of the challenge of 2019: any haemorrhage counts twice
    "any": 2.0,
    "epidural": 1.0,
    "intraparenchymal": 1.0,
    "intraventricular": 1.0,
    "subarachnoid": 1.0,
    "subdural": 1.0,
}


def known_rows(targets: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """targets (N,) and others (N, ...) without the rows whose target is NaN."""
    known = ~np.isnan(np.asarray(targets, np.float64))
    return tuple(np.asarray(values)[known] for values in (targets, *others))


class ReliabilityBin(NamedTuple):
    """Rows whose probability lies in [low, high), the last bin closed; means are NaN where n is 0."""

    low: float
    high: float
    n: int
    confidence: float  # mean probability
    frequency: float  # share of positives


def reliability(targets: np.ndarray, scores: np.ndarray, bins: int = ECE_BINS) -> list[ReliabilityBin]:
    """The reliability diagram of probabilities (N,) as rows of a table, from 0 to 1."""
    n, confidence, frequency = _binned(targets, scores, bins)
    return [
        ReliabilityBin(
            place / bins,
            (place + 1) / bins,
            int(n[place]),
            float(confidence[place] / n[place]) if n[place] else math.nan,
            float(frequency[place] / n[place]) if n[place] else math.nan,
        )
        for place in range(bins)
    ]


def expected_calibration_error(targets: np.ndarray, scores: np.ndarray) -> float:
    """ECE over ECE_BINS equal bins: the mean |frequency - confidence|. Source: Guo et al. 2017."""
    targets, scores = known_rows(targets, scores)
    if not len(scores) or np.isnan(scores).any():
        return math.nan
    _, confidence, frequency = _binned(targets, scores, ECE_BINS)
    return float(np.abs(frequency - confidence).sum() / len(scores))


def _binned(targets: np.ndarray, scores: np.ndarray, bins: int) -> tuple[np.ndarray, ...]:
    """Per bin, (bins,): count, sum of probabilities, sum of targets."""
    targets, scores = (values.astype(np.float64) for values in known_rows(targets, scores))
    if not ((scores >= -ROUNDING) & (scores <= 1 + ROUNDING)).all():
        raise ValueError("scores: must be probabilities in 0..1")
    place = (scores * bins).astype(int).clip(0, bins - 1)
    return tuple(np.bincount(place, weights, bins) for weights in (None, scores, targets))


def brier(targets: np.ndarray, scores: np.ndarray) -> float:
    """Mean squared difference of probability and target, (N,) each; NaN without any. Source: Brier 1950."""
    targets, scores = known_rows(targets, scores)
    return float(np.square(scores.astype(np.float64) - targets).mean()) if len(targets) else math.nan


def log_loss(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean cross-entropy in nats of probabilities, (N,) each; NaN without any."""
    losses = _cross_entropy(*known_rows(targets, probabilities))
    return float(losses.mean()) if len(losses) else math.nan


def rsna_log_loss(targets: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> float:
    """The score of the RSNA 2019 challenge: mean cross-entropy, "any" counted twice, over 7.

    targets, probabilities: (N, len(classes)), columns named by classes in any order; columns of other names
    count for nothing. Unknown targets (NaN) leave both sums. NaN without any known; ValueError if one of the
    six is missing."""
    missing = [name for name in RSNA_WEIGHTS if name not in classes]
    if missing:
        raise ValueError(f"classes: {', '.join(missing)} missing (RSNA's score needs all six)")
    columns = [list(classes).index(name) for name in RSNA_WEIGHTS]
    targets, probabilities = (np.asarray(values)[:, columns] for values in (targets, probabilities))
    known = ~np.isnan(targets.astype(np.float64))
    weights = known * np.array(list(RSNA_WEIGHTS.values()))
    losses = weights[known] * _cross_entropy(targets[known], probabilities[known])
    return float(losses.sum() / weights.sum()) if known.any() else math.nan


def _cross_entropy(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    floored = probabilities.astype(np.float64).clip(PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return -np.where(targets == 1, np.log(floored), np.log1p(-floored))


# ---------------------------------------------------------------- temperature scaling

TEMPERATURE_RANGE = (0.05, 20.0)  # networks need 1 to 5 (Guo 2017); at an end validation was separable


class _Output(NamedTuple):
    """What logits mean: their losses against targets of the same shape, and their probabilities."""

    losses: Callable[[np.ndarray, np.ndarray], np.ndarray]
    probabilities: Callable[[np.ndarray], np.ndarray]


OUTPUTS = {
    "binary": _Output(lambda logits, targets: np.logaddexp(0, logits) - targets * logits, expit),
    "softmax": _Output(
        lambda logits, targets: logsumexp(logits, axis=1) - (targets * logits).sum(axis=1),
        lambda logits: softmax(logits, axis=-1),
    ),
}


def fit_temperature(logits: np.ndarray, targets: np.ndarray, kind: str) -> float:
    """The temperature in TEMPERATURE_RANGE that gives validation the smallest negative log-likelihood.

    logits, targets: of one shape, as task_targets has them. kind, of OUTPUTS: "binary", (N,) or (N, C) with
    one temperature for all columns, or "softmax", (N, C) with a single 1 in a row. Unknown targets (NaN)
    count for nothing; of softmax the whole row. 1.0 where a class is absent, since nothing then says how sure
    to be of it; NaN if a logit is.

    Dividing by a temperature keeps the order: the AUC of one binary output is unchanged, and so is the
    likeliest class of a softmax. A threshold must move along. Source: Guo et al. 2017."""
    targets, logits = np.asarray(targets, np.float64), np.asarray(logits, np.float64)
    known = ~np.isnan(targets) if kind == "binary" else ~np.isnan(targets).any(axis=1)
    targets, logits = targets[known], logits[known]
    if np.isnan(logits).any():
        return math.nan
    there = len(np.unique(targets)) == 2 if kind == "binary" else targets.any(axis=0).all()
    if not there:
        return 1.0
    best = minimize_scalar(  # over log T, in which the loss has one valley, being convex in 1 / T
        lambda log_t: OUTPUTS[kind].losses(logits * math.exp(-log_t), targets).mean(),
        bounds=np.log(TEMPERATURE_RANGE),
        method="bounded",
    )
    return float(np.exp(best.x))


def calibrated(logits: np.ndarray, temperature: float, kind: str) -> np.ndarray:
    """logits (N,) or (N, C) -> probabilities of the same shape, float64; kind as for fit_temperature."""
    return OUTPUTS[kind].probabilities(np.asarray(logits, np.float64) / temperature)
