"""The tables of a study: each a function from a study.Study to a list of flat dicts.

Numbers of a family are means over its networks (with several noises: networks times noises), and their
intervals of 95 % are of the patients; the SD over them stands beside. NAMES are those of the files."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

import comparisons
import detectability
import intervals
import lesions
import metrics
import stage
from arms import Arm, Family, Outline
from calibration import brier, expected_calibration_error
from cells import Cell, Condition
from segmented import GAIN, dice_gain
from study import LEVELS, PRIMARY_LEVEL, Shown, Study, dose_facts, threshold

DOSE_COLUMNS = ("dose_model", "dose", "dose_fraction", "sigma_hu")
ARM_COLUMNS = ("arm", "denoiser", "classifier", "task", "level", "train_seed", "noise_seed")
COUNT_COLUMNS = ("n_patients", "n_slices")
IMAGE_COLUMNS = tuple(name + end for name in metrics.IMAGE_METRICS for end in ("", "_noisy"))
COLUMNS = (  # of experiments.csv, a row for each network, dose, noise and level
    *DOSE_COLUMNS,
    *ARM_COLUMNS,
    *COUNT_COLUMNS,
    *metrics.CLASSIFICATION_METRICS,
    "threshold",
    *IMAGE_COLUMNS,
    "range_hu",
    "mask",
)


# ---------------------------------------------------------------- network by network


def network_rows(study: Study) -> list[dict]:
    """experiments.csv: each network at each dose, noise and level; without classifiers each denoiser."""
    low, high = metrics.RANGE_HU
    common = {"range_hu": f"{low:g}..{high:g}", "mask": study.design.mask}
    rows = []
    for condition in study.design.conditions():
        images = {}
        for denoiser in study.images():
            few = study.subset(denoiser)
            images[denoiser] = {
                f"{name}{end}": _number(value)
                for end, before in (("", denoiser), ("_noisy", None))
                for name, value in study.cells.load(Cell(condition, before, "quality", None, few))[
                    "means"
                ].items()
            }
        about = dose_facts(condition.dose_model, condition.dose) | {"noise_seed": condition.noise_seed}
        about |= common
        if not study.arms:
            rows += [
                about
                | _counts(study.patients["slice"][study.places(study.subset(denoiser), "slice")])
                | images[denoiser]
                | {"arm": "denoised", "denoiser": denoiser.path.name}
                for denoiser in study.networks.denoisers
            ]
        for arm in study.arms:
            for level in LEVELS:
                targets = study.family_targets(arm.family, level)
                known, own = ~np.isnan(targets), threshold(arm.classifier, level)
                slices = known if level == "slice" else known[study.pack.series_of]
                rows.append(
                    about
                    | {
                        "arm": arm.name,
                        "denoiser": arm.denoiser and arm.denoiser.path.name,
                        "classifier": arm.classifier.path.name,
                        "task": arm.task,
                        "level": level,
                        "train_seed": arm.classifier.facts["seed"],
                        "threshold": own,
                        "n_patients": len(np.unique(study.patients[level][known])),
                        "n_slices": int(slices.sum()),
                    }
                    | images[arm.denoiser]
                    | metrics.classification(
                        targets,
                        study.answer(arm, condition)[level],
                        study.patients[level],
                        threshold=own,
                        seed=study.design.seed,
                    )
                )
    return [{column: row.get(column) for column in COLUMNS} for row in rows]


def _number(value: Any) -> Any:
    """A value of a cell, in which null stands for NaN."""
    return math.nan if value is None else value


def _counts(patients: np.ndarray) -> dict[str, int]:
    return {"n_patients": len(np.unique(patients)), "n_slices": len(patients)}


# ---------------------------------------------------------------- images

SPECTRUM_TYPES = {"frequencies": float, "power": float, "cells": int}


def image_quality(study: Study) -> list[dict]:
    """Each dose and noise, as low dose and behind each denoiser: error, bias, contrast, noise, edges, d'.

    noise_sd_ratio: to the low dose at the reference dose. spectrum_distance: of the noise to that of the low
    dose. Figures of patients are means with intervals of 95 % over patients."""
    rows = []
    for condition in study.design.conditions():
        full = condition._replace(dose=study.design.reference(condition.dose_model))
        for denoiser, few in study.shown_images():
            own, low, routine = (
                study.cells.load(Cell(which, before, "quality", None, few))
                for which, before in ((condition, denoiser), (condition, None), (full, None))
            )
            figures = {name: np.array(values, float) for name, values in own["patients"].items()}
            routine_sd = np.array(routine["patients"]["noise_sd_hu"], float)
            routine_sd[routine_sd == 0] = math.nan  # without truth it is the reference, and has no error
            figures["noise_sd_ratio"] = figures["noise_sd_hu"] / routine_sd
            observed = study.cells.load(Cell(condition, denoiser, "observer", None, few))
            rows.append(
                dose_facts(condition.dose_model, condition.dose)
                | {"noise_seed": condition.noise_seed}
                | {"denoiser": "none" if denoiser is None else str(denoiser.path.name)}
                | {"n_patients": len(routine_sd), "of_subset": few is not None}
                | {name: _number(own["means"][name]) for name in metrics.IMAGE_METRICS}
                | with_intervals(figures, study.design.seed)
                | {"spectrum_distance": _distance(own["spectrum"], low["spectrum"])}
                | {
                    f"d_prime_{signal}{end}": _number(found[key])
                    for signal, found in observed.items()
                    for end, key in (("", "d_prime"), ("_low", "d_low"), ("_high", "d_high"))
                }
            )
    return rows


def with_intervals(figures: dict[str, np.ndarray], seed: int) -> dict[str, float]:
    """name -> (patients,) figures as name, name_low, name_high: the mean of those known, and its interval."""
    values = np.column_stack(list(figures.values()))
    known = ~np.isnan(values)
    filled = np.nan_to_num(values)
    with np.errstate(invalid="ignore"):
        means = filled.sum(0) / known.sum(0)
    found = intervals.patient_bootstraps(
        lambda times: (times @ filled) / (times @ known), len(values), seed=seed
    )
    rows = zip(figures, means, found, strict=True)
    return {
        name + end: float(value)
        for name, mean, interval in rows
        for end, value in (("", mean), ("_low", interval.low), ("_high", interval.high))
    }


def _spectrum(content: dict[str, Any]) -> detectability.Spectrum:
    arrays = (np.array(content[name], kind) for name, kind in SPECTRUM_TYPES.items())
    return detectability.Spectrum(*arrays, content["blocks"])


def _distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    with np.errstate(invalid="ignore"):  # without noise there is no texture: NaN
        return detectability.spectrum_distance(_spectrum(one), _spectrum(other))


def noise_spectra(study: Study) -> list[dict]:
    """Noise power by frequency: a row for each dose, denoiser and frequency, of the first noise."""
    rows = []
    for condition in study.design.conditions():
        if condition.noise_seed != study.design.noise_seeds[0]:
            continue
        for denoiser, few in study.shown_images():
            content = study.cells.load(Cell(condition, denoiser, "quality", None, few))["spectrum"]
            about = dose_facts(condition.dose_model, condition.dose) | {
                "denoiser": "none" if denoiser is None else denoiser.path.name,
                "of_subset": few is not None,
                "blocks": content["blocks"],
            }
            rows += [
                about | {"frequency_per_mm": frequency, "power_hu2_mm2": _number(power)}
                for frequency, power in zip(content["frequencies"], content["power"], strict=True)
            ]
    return rows


# ---------------------------------------------------------------- lesions outlined


def segmentation(study: Study) -> list[dict]:
    """lesions.summarise of every segmenter, dose and denoiser, of the first noise.

    dice_gain: by the denoiser, where the segmenter reads the low dose itself too."""
    rows = []
    for one, condition, names, series, reports in _outlined(study):
        patients = study.patients["scan"][series]
        plain, gain = one._replace(denoiser=None), [math.nan] * len(GAIN)
        if one.denoiser is not None and plain in study.outlines:
            before = _reports(study, plain, condition)
            own = [before[number] for number in series]
            gain = dice_gain(own, reports, patients, study.design.seed)
        rows.append(
            dose_facts(condition.dose_model, condition.dose)
            | names
            | lesions.summarise(reports, patients, seed=study.design.seed)
            | dict(zip(GAIN, gain, strict=True))
        )
    return rows


def volumes(study: Study) -> list[dict]:
    """True and found volume of scans with a lesion, their mean and difference (Bland and Altman 1986)."""
    rows = []
    for _, condition, names, series, reports in _outlined(study):
        for number, report in zip(series, reports, strict=True):
            truth_ml, found_ml = report["truth_ml"], report["predicted_ml"]
            if truth_ml > 0:
                rows.append(
                    names
                    | {"dose_model": condition.dose_model, "dose": condition.dose}
                    | {"series_uid": study.pack.series[number]["series_uid"]}
                    | {"patient": study.patients["scan"][number]}
                    | {"truth_ml": truth_ml, "found_ml": found_ml}
                    | {"mean_ml": (truth_ml + found_ml) / 2, "error_ml": found_ml - truth_ml}
                )
    return rows


def _outlined(study: Study) -> Iterator[tuple]:
    """Every segmenter, and the denoiser before it, at every dose with the first noise: itself, the condition,
    their names, which scans were read, and the reports of these."""
    for one in study.outlines:
        names = {"segmenter": one.segmenter.path.name}
        names |= {"denoiser": "none" if one.denoiser is None else one.denoiser.path.name}
        series = study.places(study.subset(one.denoiser), "scan")
        for condition in study.design.conditions():
            if condition.noise_seed == study.design.noise_seeds[0]:
                yield one, condition, names, series, _reports(study, one, condition)


def _reports(study: Study, one: Outline, condition: Condition) -> list[dict[str, Any]]:
    """lesions.case_report of each scan that is read."""
    cell = Cell(condition, one.denoiser, "segmenter", one.segmenter, study.subset(one.denoiser))
    return [
        {name: _number(value) for name, value in report.items()}
        for report in study.cells.load(cell)["reports"]
    ]


def two_stage(study: Study) -> list[dict]:
    """Classify, then outline: lesions.summarise of the masks that are left where scans that most networks of
    a family call normal are not outlined, of the first noise. called: share of the scans that are."""
    rows = []

    @functools.cache
    def nothing(number: int) -> dict[str, Any]:
        truth = np.asarray(study.pack.mask[np.flatnonzero(study.pack.series_of == number)])
        report = lesions.case_report(truth, np.zeros_like(truth), study.pack.spacing_mm(number))
        return {name: _number(value) for name, value in report.items()}

    for family, level, model, dose, shown in _each(study):
        if level != PRIMARY_LEVEL:
            continue
        condition = shown.conditions[0]
        reading = study.family_reading(family, (condition,), level)
        asked = np.flatnonzero(~np.isnan(reading.targets))
        called = (reading.scores >= reading.thresholds[:, None]).mean(axis=0) > 0.5
        for one in study.outlines:
            if one.denoiser is study.families[family][0].denoiser and not np.isnan(reading.thresholds).any():
                places = study.places(study.subset(one.denoiser), level)
                whole = dict(zip(places.tolist(), _reports(study, one, condition), strict=True))
                reports = [whole[number] if called[number] else nothing(number) for number in asked.tolist()]
                patients = study.patients[level][asked]
                rows.append(
                    {"task": family.task, "arm": study.labels[family], "segmenter": one.segmenter.path.name}
                    | dose_facts(model, dose)
                    | {"called": called[asked].mean()}
                    | lesions.summarise(reports, patients, seed=study.design.seed)
                )
    return rows


# ---------------------------------------------------------------- families across doses

HOLM_FAMILY = ("task", "dose_model", "level", "kind")  # rows that agree in these answer one question


def _each(study: Study) -> Iterator[tuple[Family, str, str, float, Shown]]:
    """Every family, level, dose model and dose."""
    for family, level, model in itertools.product(study.families, LEVELS, study.design.ladders):
        for dose, shown in study.ladder(family, model):
            yield family, level, model, dose, shown


def _estimates(found: dict[str, comparisons.Estimate]) -> dict[str, float]:
    return {
        f"{kind}{end}": value
        for kind, estimate in found.items()
        for end, value in zip(("", "_low", "_high", "_seed_sd"), estimate[:4], strict=True)
    }


def dose_response(study: Study) -> list[dict]:
    """Each family at each dose and level: AUC, sensitivity, specificity, and the AUC of position alone.

    tp, fn, tn, fp: calls of each network at its stored threshold, the mean over networks."""
    rows = []
    for family, level, model, dose, shown in _each(study):
        reading = study.family_reading(family, shown.conditions, level)
        targets, found = reading.known[0], comparisons.estimates(reading)
        (hits, _, _, _, sick), (passed, _, _, _, well) = found["sens"], found["spec"]
        rows.append(
            study.subject(family, level, model, dose)
            | {"n_networks": len(study.families[family]), "n": len(targets), "n_positive": int(targets.sum())}
            | {"n_patients": len(np.unique(reading.known[2]))}
            | _estimates(found)
            | {"tp": hits * sick, "fn": (1 - hits) * sick, "tn": passed * well, "fp": (1 - passed) * well}
            | {"auc_null": study.null_auc(family, level)}
        )
    return rows


CURVE_RATES = np.linspace(0, 1, 101)  # as fine as a screen shows; of thousands of slices no more is needed
ROUND = 4  # digits of what is drawn and not computed with


def curves(study: Study) -> list[dict]:
    """ROC and precision-recall curves of each family at each dose and level, the mean over its networks.

    At each rate: the sensitivity where at most that share of negatives is called positive, and the precision
    where at least that share of positives is. Both are steps; a class that is absent has no curve."""
    rows = []
    for family, level, model, dose, shown in _each(study):
        targets, scores, _ = study.family_reading(family, shown.conditions, level).known
        if len(set(targets.tolist())) < 2 or np.isnan(scores).any():
            continue
        about = {"task": family.task, "arm": study.labels[family], "level": level}
        about |= {"dose_model": model, "dose": dose}
        found = np.mean([_curves(targets, own) for own in scores], axis=0).round(ROUND)
        rows += [
            about | {"rate": round(rate, ROUND), "sensitivity": sensitivity, "precision": precision}
            for rate, sensitivity, precision in zip(CURVE_RATES.tolist(), *found.tolist(), strict=True)
        ]
    return rows


def _curves(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(2, rates): sensitivity at most at each rate of false positives, precision at least at each recall."""
    alarms, hits, _ = roc_curve(targets, scores, drop_intermediate=False)
    sensitivity = hits[np.searchsorted(alarms, CURVE_RATES + 1e-9, side="right") - 1]
    precision, recall, _ = precision_recall_curve(targets, scores)
    # beyond recall 0, whose precision is 1 by convention alone
    place = np.searchsorted(recall[::-1], np.maximum(CURVE_RATES - 1e-9, 1e-9))
    return np.array([sensitivity, precision[::-1][place]])


def against_reference(study: Study) -> list[dict]:
    """Each family at each dose less the reference: differences, p with Holm's correction, non-inferiority.

    The correction is for all tests of a task, dose model, level and kind of number. is_reference: the row of
    the reference itself, which is no test."""
    rows = []
    for family, level, model, dose, shown in _each(study):
        reference = study.reference(family.task, model)
        for row in study.compare(shown, reference, level).rows():
            margin = study.design.margins[row["kind"]]
            difference = comparisons.Difference(*(row[name] for name in comparisons.Difference._fields))
            rows.append(
                study.subject(family, level, model, dose)
                | {"reference": study.labels[reference.family]}
                | {"reference_dose": study.design.reference(model), "is_reference": shown == reference}
                | row
                | {"margin": margin, "outcome": comparisons.outcome(difference, margin)}
                | {"power": comparisons.power(difference, margin)}
            )
    return comparisons.with_holm(rows, (*HOLM_FAMILY, "is_reference"))


def between_arms(study: Study) -> list[dict]:
    """At each dose every other family less the first of its task: what do denoising and training on it do?"""
    rows = []
    for family, level, model, dose, shown in _each(study):
        first = study.reference(family.task, model).family
        if family == first:
            continue
        for row in study.compare(shown, Shown(first, shown.conditions), level).rows():
            against = {"against": study.labels[first]}
            rows.append(study.subject(family, level, model, dose) | against | row)
    return comparisons.with_holm(rows, HOLM_FAMILY)


def verdicts(study: Study) -> list[dict]:
    """The lowest dose that is not inferior: per family, level and kind of number, and by stratum."""
    rows = []
    for family, level, model in itertools.product(study.families, LEVELS, study.design.ladders):
        reference, ladder = study.reference(family.task, model), study.ladder(family, model)
        pairs = [study.pair(shown, reference, level) for _, shown in ladder]
        masks = {"all": None} | (study.strata if level == PRIMARY_LEVEL else {})
        for stratum, mask in masks.items():
            found = [
                comparisons.compare(*(one if mask is None else comparisons.within(one, mask) for one in pair))
                for pair in pairs
            ]
            for kind in ("auc", "sens"):
                margin = study.design.margins[kind]
                verdict = comparisons.lowest_dose([dose for dose, _ in ladder], found, kind, margin)
                about = study.subject(family, level, model, verdict.dose)
                rows.append(about | {"stratum": stratum} | _flat(verdict))
    return rows


def _flat(verdict: comparisons.Verdict) -> dict[str, Any]:
    """A verdict as columns; its doses' differences as <name>_estimate, _low, _high and _p."""
    found = verdict._asdict()
    for name in ("difference", "failed"):
        difference = found.pop(name)
        for column in ("estimate", "low", "high", "p"):
            found[f"{name}_{column}"] = math.nan if difference is None else getattr(difference, column)
    return found


def strata(study: Study) -> list[dict]:
    """AUC and sensitivity by lesion subtype and size of the scan, against all normal scans."""
    rows = []
    for family, level, model, dose, shown in _each(study):
        if level != PRIMARY_LEVEL:
            continue
        reading = study.family_reading(family, shown.conditions, level)
        for stratum, found in comparisons.strata(reading, study.strata).items():
            about = study.subject(family, level, model, dose)
            rows.append(about | {"stratum": stratum, "n": found["sens"].n} | _estimates(found))
    return rows


CHANGES = ("lost", "gained")  # of comparisons.Flips


def _lower(study: Study) -> Iterator[tuple]:
    """Every family, dose model and dose below the highest; its scans as read there and here; what flips.

    No flips, None, where a network has no threshold, and so calls nothing."""
    for family, level, model, dose, shown in _each(study):
        if level == PRIMARY_LEVEL and dose != study.design.reference(model):
            both = study.ladder(family, model)[0][1], shown
            readings = [study.family_reading(family, one.conditions, level) for one in both]
            uncalled = np.isnan(readings[0].thresholds).any()
            yield family, model, dose, readings, None if uncalled else comparisons.flips(*readings)


def flips(study: Study) -> list[dict]:
    """Scans whose call changes between the highest dose and a lower one, within each family."""
    rows = []
    for family, model, dose, _, found in _lower(study):
        for change in CHANGES if found else ():
            for flip in getattr(found, change):
                series = study.pack.series[flip.row]["series_uid"]
                about = study.subject(family, PRIMARY_LEVEL, model, dose)
                about |= {"change": change, "series_uid": series}
                rows.append(about | flip._asdict() | {"mcnemar_p": found.p})
    return rows


def scan_scores(study: Study) -> list[dict]:
    """What each family says of every scan, at each lower dose beside the highest: means over its networks.

    change: of the call, as in flips; kept: it is the same, unknown: there is no threshold."""
    rows = []
    for family, model, dose, readings, found in _lower(study):
        changes = {flip.row: name for name in CHANGES if found for flip in getattr(found, name)}
        high, low = (own.scores.mean(axis=0).round(ROUND).tolist() for own in readings)
        targets = readings[0].targets
        rows += [
            {"task": family.task, "arm": study.labels[family], "dose_model": model, "dose": dose}
            | {"series_uid": study.pack.series[row]["series_uid"], "target": int(targets[row])}
            | {"score_reference": high[row], "score": low[row]}
            | {"change": changes.get(row, "kept") if found else "unknown"}
            for row in np.flatnonzero(~np.isnan(targets)).tolist()
        ]
    return rows


def calibration(study: Study) -> list[dict]:
    """ECE, Brier score, drift of the threshold, and predictive values at the stated prevalence."""
    rows = []
    for family, level, model, dose, shown in _each(study):
        reading = study.family_reading(family, shown.conditions, level)
        targets, scores, _ = reading.known
        drift = comparisons.threshold_drift(reading)
        row = study.subject(family, level, model, dose)
        row |= {"ece": np.mean([expected_calibration_error(targets, own) for own in scores])}
        row |= {"brier": np.mean([brier(targets, own) for own in scores])}
        row |= {f"threshold_{name}": getattr(drift, name).mean for name in ("stored", "tuned", "shift")}
        row |= {
            f"{kind}_{name}": getattr(drift, f"{kind}_{name}").mean
            for kind in ("sens", "spec")
            for name in ("stored", "tuned")
        }
        row |= {"prevalence": study.design.prevalence}
        found = comparisons.predictive_values(reading, study.design.prevalence)
        rows.append(row | _estimates(found))
    return rows


SEED_COLUMNS = (
    *("dose", "seed", "acc", "auc", "sens", "spec", "prec", "f1"),
    *("dose_model", "arm", "denoiser", "classifier", "task", "level", "noise_seed"),
)


def seeds(rows: list[dict]) -> list[dict]:
    """SEED_COLUMNS of every network, at each dose and level. rows: of network_rows."""
    named = ({"seed": row["train_seed"], **row} for row in rows if row["level"] is not None)
    return [{name: row[name] for name in SEED_COLUMNS} for row in named]


def stress(study: Study) -> list[dict]:
    """Each family on each artifact at the highest dose, and how much it loses to the same images without."""
    rows = []
    design = study.design
    dose = design.reference(design.main_model)
    for family, level in itertools.product(study.families, LEVELS):
        if any(study.subset(arm.denoiser) is not None for arm in study.families[family]):
            continue
        plain = Shown(family, study.at(design.main_model, dose))
        for artifact, severities in design.stress.items():
            for severity in severities:
                shown = Shown(
                    family,
                    tuple(one._replace(artifact=artifact, severity=severity) for one in plain.conditions),
                )
                for row in study.compare(shown, plain, level).rows():
                    about = study.subject(family, level, design.main_model, dose)
                    rows.append(about | {"artifact": artifact, "severity": severity} | row)
    return rows


TABLES: dict[str, Callable[[Study], list[dict]]] = {
    "experiments": network_rows,
    "dose_response": dose_response,
    "curves": curves,
    "against_reference": against_reference,
    "verdicts": verdicts,
    "between_arms": between_arms,
    "strata": strata,
    "flips": flips,
    "scan_scores": scan_scores,
    "calibration": calibration,
    "image_quality": image_quality,
    "noise_spectra": noise_spectra,
    "segmentation": segmentation,
    "volumes": volumes,
    "two_stage": two_stage,
    "stress": stress,
}
NAMES = (*TABLES, "seeds", "external")


def all_tables(sets: dict[str, Study]) -> dict[str, list[dict]]:
    """Every table of NAMES. sets: as for external, their grids full; the other tables are of the first."""
    study, *others = sets.values()
    found = {name: make(study) for name, make in stage.progress(TABLES.items(), desc="tables", unit="table")}
    return found | {"seeds": seeds(found["experiments"]), "external": external(sets) if others else []}


# ---------------------------------------------------------------- other test sets


def external(sets: dict[str, Study]) -> list[dict]:
    """Each classifier on every set at the highest dose, and what it loses to the set that it was trained on.

    sets: name -> its study, of the same classifiers. home: the name of the set whose split the checkpoint was
    trained with, None if it is not among them. drop: AUC at home less AUC there, of other patients, so that
    its error is that of both (DeLong's; of one scan a patient)."""
    rows = []
    studies = list(sets.values())
    for arm in studies[0].arms:
        split = arm.classifier.facts["split_hash"]
        home = next((name for name, one in sets.items() if one.pack.split_hash == split), None)
        areas = {name: _area(one, arm) for name, one in sets.items()}
        for name, one in sets.items():
            area, own = areas[name], areas.get(home)
            drop = math.nan if own is None else own.auc - area.auc
            error = math.nan if own is None else math.sqrt(own.variance + area.variance)
            reach = 0.0 if name == home else comparisons.Z * error
            rows.append(
                {"task": arm.task, "pipeline": arm.name, "classifier": arm.classifier.path.name}
                | {"denoiser": arm.denoiser and arm.denoiser.path.name}
                | {"home": home, "data": name, "level": PRIMARY_LEVEL}
                | {"n_scans": int((~np.isnan(one.family_targets(arm.family, PRIMARY_LEVEL))).sum())}
                | {"auc": area.auc, "auc_low": area.low, "auc_high": area.high}
                | {"drop": drop, "drop_low": drop - reach, "drop_high": drop + reach}
            )
    return rows


def _area(study: Study, arm: Arm) -> intervals.Auc:
    model = study.design.main_model
    condition = study.at(model, study.design.reference(model))[0]
    targets = study.family_targets(arm.family, PRIMARY_LEVEL)
    return intervals.delong_auc(targets, study.answer(arm, condition)[PRIMARY_LEVEL])
