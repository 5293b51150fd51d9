"""A study in words: its answer in a few sentences, and numbers as the report writes them.

All numbers come from the tables of tables.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import comparisons
import figures
from figures import NAMES, dose_words, known
from metrics import shown
from study import PRIMARY_LEVEL, Study

SIGNIFICANT = 0.05  # of p after Holm's correction

# ---------------------------------------------------------------- the answer


class Standing(NamedTuple):
    """What the verdicts of an arm say together. dose: the lowest at which all are non-inferior, NaN if none.
    limiting: those that stopped first, on the way down; none where all were non-inferior at every dose."""

    arm: str
    denoises: bool
    dose: float
    limiting: list[dict]

    @property
    def failed_dose(self) -> float:
        return self.limiting[0]["failed_dose"] if self.limiting else math.nan


def answer(study: Study, found: dict[str, list[dict]]) -> list[str]:
    """How far the dose can be cut and whether denoising helps: two sentences for each task and dose model."""
    rows = [row for row in found["verdicts"] if (row["stratum"], row["level"]) == ("all", PRIMARY_LEVEL)]
    lines = []
    for task, model in dict.fromkeys((row["task"], row["dose_model"]) for row in rows):
        own = [row for row in rows if (row["task"], row["dose_model"]) == (task, model)]
        reference = next(
            row["reference"]
            for row in found["against_reference"]
            if (row["task"], row["dose_model"]) == (task, model)
        )
        lines.append(_dose_sentence(task, model, own, reference, study.design.reference(model)))
        lines += _denoising_sentence(task, model, found["between_arms"])
    return lines or [_image_sentence(found["image_quality"])]


def _standings(rows: Sequence[dict]) -> list[Standing]:
    result = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        stops = [row for row in own if row["how"]]
        first = max((row["failed_dose"] for row in stops), default=math.nan)
        dose = float(np.max([known(row["dose"]) for row in own]))  # NaN if one is
        limiting = [row for row in stops if row["failed_dose"] == first]
        result.append(Standing(arm, _denoises(own[0]), dose, limiting))
    return result


def _denoises(row: dict) -> bool:
    return row["denoiser"] is not None or row["pipeline"] == "2j"


def _dose_sentence(task: str, model: str, rows: Sequence[dict], reference: str, reference_dose: float) -> str:
    standings = _standings(rows)
    first = next(one for one in standings if one.arm == reference)
    others = [one for one in standings if one is not first]
    who = f"arm {first.arm} ({'with' if first.denoises else 'no'} denoising)"
    ends = [_clause(who, first, model, reference_dose)]
    denoising = [one for one in others if one.denoises]
    if denoising:
        best = min(denoising, key=_rank)
        choice = f"the best of {len(denoising)} " if len(denoising) > 1 else ""
        ends.append(_clause(f"arm {best.arm} ({choice}with denoising)", best, model, reference_dose))
    margins = {row["kind"]: row["margin"] for row in rows}
    allowed = ", ".join(f"{NAMES[kind]} {margin:g}" for kind, margin in margins.items())
    return f"{task.capitalize()}, per scan ({model}; margins: {allowed}): {'; '.join(ends)}."


def _rank(standing: Standing) -> tuple[float, float]:
    """Less is better: the lowest dose shown, then how far down it came."""
    unshown = math.inf if math.isnan(standing.dose) else standing.dose
    return unshown, -math.inf if math.isnan(standing.failed_dose) else standing.failed_dose


def _clause(who: str, standing: Standing, model: str, reference_dose: float) -> str:
    if not standing.limiting:
        if standing.dose == reference_dose:
            return f"{who} was read at one dose only, so no cut was tried"
        return f"{who} was non-inferior down to {dose_words(model, standing.dose)}, the lowest dose tried"
    reasons = " and ".join(_reasons(standing.limiting))
    at = dose_words(model, standing.failed_dose)
    if math.isnan(standing.dose):
        return f"for {who} no dose was shown to be non-inferior: at {at} {reasons}"
    if standing.dose == reference_dose:
        return f"for {who} no cut of the dose was shown to be non-inferior: at {at} {reasons}"
    return f"{who} was non-inferior down to {dose_words(model, standing.dose)}; at {at} {reasons}"


def _reasons(rows: Sequence[dict]) -> list[str]:
    """Why verdicts stopped; of what is inconclusive with the power of what takes most patients."""
    found = []
    for how in ("inferior", "inconclusive", "unknown"):
        own = [row for row in rows if row["how"] == how]
        if not own:
            continue
        names = " and ".join(NAMES[row["kind"]] for row in own)
        text = f"its {names} {'is' if len(own) == 1 else 'are'} {how}"
        if how == "inferior":
            text += f" ({', '.join(signed(row['failed_estimate']) for row in own)})"
        if how == "inconclusive":
            worst = max(own, key=lambda row: np.nan_to_num(row["patients_needed"]))
            about = f"for the {NAMES[worst['kind']]} " if len(own) > 1 else ""
            text += f" ({about}{worst['patients']} patients give a power of {shown(worst['power'], 2)}"
            if worst["power"] < comparisons.POWER:
                text += f", and {100 * comparisons.POWER:g} % would take {shown(worst['patients_needed'], 0)}"
            text += ")"
        found.append(text)
    return found


def _denoising_sentence(task: str, model: str, rows: Sequence[dict]) -> list[str]:
    own = [
        row for row in rows if (row["task"], row["dose_model"], row["level"]) == (task, model, PRIMARY_LEVEL)
    ]
    own = [row for row in own if _denoises(row)]
    if not own:
        return []
    parts = []
    for arm in dict.fromkeys(row["arm"] for row in own):
        mine = [row for row in own if row["arm"] == arm]
        shown_at: dict[str, list[str]] = {}
        for row in mine:
            if row["p_holm"] < SIGNIFICANT:
                what = f"{NAMES[row['kind']]} {'higher' if row['estimate'] > 0 else 'lower'}"
                at = f"{dose_words(model, row['dose'])} ({signed(row['estimate'])})"
                shown_at.setdefault(what, []).append(at)
        changes = [f"{what} at {', '.join(at)}" for what, at in shown_at.items()]
        rest = "no other difference was shown" if changes else "no difference was shown at any dose"
        parts.append(f"{arm} against arm {mine[0]['against']}: {'; '.join([*changes, rest])}")
    return [
        f"Does denoising help? {task.capitalize()}, arm {'. Arm '.join(parts)} (Holm, p < {SIGNIFICANT:g})."
    ]


def _image_sentence(rows: Sequence[dict]) -> str:
    model = rows[0]["dose_model"]
    lowest = min(row["dose"] for row in rows if row["dose_model"] == model)
    own = [row for row in rows if (row["dose_model"], row["dose"]) == (model, lowest)]
    errors = {figures.image_words(row): f"{shown(row['rmse_hu'], 1)} HU" for row in reversed(own)}
    words = ", ".join(f"{error} for {name}" for name, error in reversed(errors.items()))
    return (
        "No classifier was tried, so this study says nothing of what can be read: "
        f"at {dose_words(model, lowest)} the error of the image is {words}."
    )


# ---------------------------------------------------------------- numbers in words


def rounded(value: float | None, digits: int = 2) -> str:
    """As metrics.shown, without a sign of what is rounded to nothing."""
    return shown(round(known(value), digits) + 0.0, digits)


def signed(value: float, digits: int = 2) -> str:
    text = rounded(value, digits)
    return f"+{text}" if known(value) > 0 and float(text) else text


def range_of(row: dict, name: str, digits: int) -> str:
    return f"{shown(row[f'{name}_low'], digits)} to {shown(row[f'{name}_high'], digits)}"


def with_interval(row: dict, name: str, digits: int = 3) -> str:
    """A number with its interval, and where there is one the SD over training seeds."""
    if math.isnan(known(row[name])):
        return "n/a"
    text = f"{shown(row[name], digits)} ({range_of(row, name, digits)})"
    spread = known(row.get(f"{name}_seed_sd"))
    return text if math.isnan(spread) else f"{text} ± {shown(spread, digits)}"


def p_value(value: float) -> str:
    return "n/a" if math.isnan(known(value)) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def dose_of(row: dict) -> str:
    return dose_words(row["dose_model"], row["dose"])
