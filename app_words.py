"""What the app says in words: findings, doses, verdicts, pipelines; and text that stays as it is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

NOTICE = "research use only"  # as in display, which needs torch
# As in figures, which needs matplotlib
ARM_COLOURS = {"1": "#e69f00", "1n": "#cc79a7", "2": "#0072b2", "2d": "#009e73", "2j": "#d55e00"}
OTHER_COLOURS = ("#56b4e9", "#999933", "#cc6677", "#7570b3", "#44aa99", "#aa4499")


def plain_text(text: str) -> str:
    """Text for Streamlit's markdown in which a file's name stays as it is."""
    return re.sub(r"([\\`*_$\[\]<>~])", r"\\\1", " ".join(str(text).split()))


def quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def finding(labels: dict) -> str:
    """What a label dict says, in words: "haemorrhage (subdural), ischemia", "normal" or "labels unknown"."""
    import anatomy  # here, as it needs scipy, which the first page can do without

    parts = []
    if labels.get("any") == 1:
        kinds = [name for name in anatomy.LESION_CLASSES[:5] if labels.get(name) == 1]
        parts.append(f"haemorrhage ({', '.join(kinds)})" if kinds else "haemorrhage")
    if labels.get("ischemia") == 1:
        parts.append("ischemia")
    unknown = [
        word for name, word in (("any", "haemorrhage"), ("ischemia", "ischemia")) if labels.get(name) is None
    ]
    if len(unknown) == 2:
        return "labels unknown"
    parts += [f"{word} unknown" for word in unknown]
    return ", ".join(parts) or "normal"


def has_lesion(labels: dict) -> bool:
    return 1 in (labels.get("any"), labels.get("ischemia"))


def first_look(slice_labels: Sequence[dict]) -> int:
    """The slice to open a series at: the middle one of those with a lesion, else the middle one."""
    hit = [index for index, labels in enumerate(slice_labels) if has_lesion(labels)]
    return hit[len(hit) // 2] if hit else len(slice_labels) // 2


def dose_text(dose_model: str, dose: float) -> str:
    """A dose with its unit and, where the model has one, its share of a routine scan."""
    from dose import DOSE_MODELS  # here, as it needs torch, which the first page can do without

    model = DOSE_MODELS.get(dose_model)
    if model is None:
        return f"{dose:g}"
    share = model.fraction(dose)
    return f"{model.unit} {dose:g}" + ("" if share is None else f" ({100 * share:g} %)")


def verdict(score: float, threshold: float | None) -> str:
    """What a score means at a threshold; none could be chosen where validation held one class only."""
    if threshold is None:
        return "no threshold"
    return "positive" if score >= threshold else "negative"


def truth_text(target: float) -> str:
    """1, 0 or NaN in words."""
    return "unknown" if np.isnan(target) else ("positive" if target == 1 else "negative")


def arm_labels(names: Sequence[str], classifiers: Sequence[str]) -> list[str]:
    """Labels that tell arms apart: the pipeline, and its classifier where several share the pipeline."""
    users = {name: {c for n, c in zip(names, classifiers, strict=True) if n == name} for name in names}
    return [
        f"{name} {classifier}" if len(users[name]) > 1 else name
        for name, classifier in zip(names, classifiers, strict=True)
    ]


def arm_colours(labels: Sequence[str]) -> list[str]:
    """The same colour for the same pipeline wherever it is drawn."""
    spare = iter(OTHER_COLOURS * len(labels))
    return [ARM_COLOURS.get(label) or next(spare) for label in labels]
