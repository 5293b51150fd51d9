"""What a segmenter alone makes of a split: the numbers of every scan, those of the study, its pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

import checkpoints
import lesions
import metrics
import scoring
import stage
import training
from anatomy import LESION_CLASSES
from dataset import Pack, load_pack
from display import Note, lesion_overlay
from inference import (
    Network,
    check_patients,
    denoise,
    fits_denoiser,
    load_denoiser,
    load_segmenter,
)
from intervals import bootstrap_sums
from lesion_reading import outline_lesions
from low_dose import LowDose, check_doses
from scoring import Shown, about, panels, write_figures, write_table

KINDS = {**dict(enumerate(LESION_CLASSES, start=1)), lesions.UNKNOWN_KIND: "unknown"}  # values of a mask
LESION = "lesion"  # class of the rows of all lesions as one
# What a row of metrics.csv is of: any lesion, in all scans and in those that have most of one class; and the
# voxels of one class, for a network that tells classes apart
ALL_SCANS, SCANS_OF_CLASS, VOXELS_OF_CLASS = "all scans", "scans of the class", "voxels of the class"
SUBJECT = (
    *("segmenter", "split", "input", "dose_model", "dose", "dose_fraction", "sigma_hu", "noise_seed"),
    *("class", "scope"),
)
GAIN = ("dice_gain", "dice_gain_low", "dice_gain_high")
CASE = ("input", "dose_model", "dose", "patient_id", "series_uid", "n_slices", "kind")
PICTURES = 6  # scans with a lesion that are shown, from the smallest to the largest
NORMAL_PICTURES = 2  # scans without

# ---------------------------------------------------------------- what it is shown


def pick_denoiser(
    path: Path, facts: dict, given: Path | None, device: torch.device | str = "cpu"
) -> Network | None:
    """The denoiser before a segmenter: the given one, its parent, or denoiser.pt beside it if there is one.

    Raises InputError as load_denoiser does, or if the segmenter was trained behind another one."""
    parent = facts["parents"].get("denoiser")
    if given is None:
        given = path.parent / ("denoiser.pt" if parent is None else parent["path"])
        if parent is None and not given.exists():
            return None
    denoiser = Network(given, *load_denoiser(given, device))
    if not fits_denoiser(facts, given):
        raise stage.InputError(f"{path}: was trained behind another denoiser than {given} (give its own)")
    return denoiser


class Doses(NamedTuple):
    """The low doses that are shown. dose_model: None without any."""

    dose_model: str | None
    doses: list[float]


def pick_doses(
    facts: dict, denoiser: Network | None, dose_model: str | None, doses: Sequence[float] | None
) -> Doses:
    """Each dose once, the highest first. None: as the segmenter was trained, else as the denoiser was.

    Raises ValueError for a dose out of range."""
    known = [facts, *([] if denoiser is None else [denoiser.facts])]
    trained = next((one for one in known if one["dose_model"] is not None), None)
    if trained is None and dose_model is None and doses is None:
        return Doses(None, [])
    chosen = dose_model or (training.DOSE_MODEL if trained is None else trained["dose_model"])
    if doses is None and trained is not None and chosen == trained["dose_model"]:
        doses = trained["doses"]
    return Doses(chosen, sorted(set(check_doses(chosen, doses)), reverse=True))


def views(
    pack: Pack, rows: np.ndarray, asked: Doses, denoiser: Network | None, seed: int
) -> Iterator[tuple[Shown, np.ndarray]]:
    """A scan as the segmenter is to see it, (S, H, W) HU: clean, then at every dose noisy and denoised.

    rows: of the whole scan. seed: of the noise, which both arms share."""
    yield Shown("clean"), pack.image[rows]
    low = None if asked.dose_model is None else LowDose(pack, asked.dose_model, asked.doses)
    for dose in asked.doses:
        same = [dose] * len(rows)
        noisy = low.evaluation(rows, same, seed)
        yield Shown("noisy", asked.dose_model, dose), noisy
        if denoiser is not None:
            images = denoise(denoiser.network, noisy, low.levels(rows, same))
            yield Shown("denoised", asked.dose_model, dose), images


# ---------------------------------------------------------------- figures in numbers


class Case(NamedTuple):
    """A scan as it was segmented. kind: of most of its lesion, one of KINDS; None without a lesion.

    report: of lesions.case_report. classes: of lesions.class_report, empty for a binary network."""

    keys: dict[str, Any]
    kind: str | None
    report: dict
    classes: dict[str, dict]

    @property
    def patient(self) -> str:
        return self.keys["patient_id"]


def main_kind(truth: np.ndarray) -> str | None:
    """Which of KINDS most voxels of a lesion are; None without a lesion. truth: (S, H, W) classes."""
    counts = {name: np.count_nonzero(truth == value) for value, name in KINDS.items()}
    largest = max(counts, key=counts.get)
    return largest if counts[largest] else None


def score(
    segmenter: Network,
    denoiser: Network | None,
    pack: Pack,
    asked: Doses,
    *,
    seed: int,
    folder: Path,
) -> dict[Shown, list[Case]]:
    """Segment every scan once in each view, and write the pictures of some, below folder.

    Masks are compared at the prepared matrix, slices being spacing_mm[0] apart and pixels pack.pixel_mm wide.
    Raises InputError without masks."""
    if pack.mask is None:
        raise stage.InputError(
            f"{pack.folder.name}: not every series has a lesion mask to score against (prepare data with "
            "masks, or choose another --split)"
        )
    network, rule = segmenter.network, segmenter.facts["thresholds"]["lesion"]
    pictured = pictured_scans(pack)
    found: dict[Shown, list[Case]] = {}
    for number in stage.progress(range(len(pack.series)), desc="evaluate", unit="scan"):
        metadata, rows = pack.series[number], np.flatnonzero(pack.series_of == number)
        spacing_mm = pack.spacing_mm(number)
        truth = np.asarray(pack.mask[rows])
        kind = main_kind(truth)
        keys = {name: metadata[name] for name in ("patient_id", "series_uid")} | {"n_slices": len(rows)}
        for shown, images in views(pack, rows, asked, denoiser, seed):
            mask = outline_lesions(network, rule, images, spacing_mm)
            case = Case(
                shown._asdict() | keys,
                kind,
                lesions.case_report(truth, mask, spacing_mm),
                lesions.class_report(truth, mask, spacing_mm) if len(network.classes) > 1 else {},
            )
            found.setdefault(shown, []).append(case)
            if number in pictured:
                place, picture = draw(images, mask, truth, metadata["affine"], shown, case)
                file = folder / shown_folder(shown) / f"{metadata['series_uid']}_{place:05d}.png"
                with stage.atomic_write(file, "wb") as opened:
                    opened.write(picture)
    return found


def rows_of(shown: Shown, cases: Sequence[Case], before: Sequence[Case] | None, seed: int) -> list[dict]:
    """The figures of one view: of any lesion, then by class.

    before: the same scans as they are without the denoiser, or None. Of denoised slices dice_gain is the mean
    difference to these, over scans with a lesion."""

    def row(name: str, scope: str, pairs: list[tuple[dict, str]], others: list[dict] | None) -> dict:
        reports, patients = [report for report, _ in pairs], [patient for _, patient in pairs]
        found = {"class": name, "scope": scope} | lesions.summarise(reports, patients, seed=seed)
        gain = [math.nan] * 3 if others is None else dice_gain(others, reports, patients, seed)
        return about(shown, seed) | found | dict(zip(GAIN, gain, strict=True))

    def both(chosen) -> tuple[list[tuple[dict, str]], list[dict] | None]:
        """What chosen(case) -> report or None says of the cases, and of those before."""
        pairs = [(chosen(case), case.patient) for case in cases if chosen(case) is not None]
        if before is None:
            return pairs, None
        return pairs, [chosen(case) for case in before if chosen(case) is not None]

    found = [row(LESION, ALL_SCANS, *both(lambda case: case.report))]
    for name in KINDS.values():
        pairs, others = both(lambda case, name=name: case.report if case.kind == name else None)
        if pairs:
            found.append(row(name, SCANS_OF_CLASS, pairs, others))
    for name in LESION_CLASSES:
        pairs, others = both(lambda case, name=name: case.classes.get(name))
        if pairs:
            found.append(row(name, VOXELS_OF_CLASS, pairs, others))
    return found


def dice_gain(
    before: Sequence[dict], after: Sequence[dict], patients: Sequence[str], seed: int
) -> tuple[float, float, float]:
    """Mean difference in Dice of the same cases, over those with a lesion, and its interval over patients."""
    values = [
        late["dice"] - early["dice"] if late["truth_ml"] > 0 else math.nan
        for early, late in zip(before, after, strict=True)
    ]
    terms = np.column_stack([np.nan_to_num(values), ~np.isnan(values)])
    total, count = terms.sum(0)
    interval = bootstrap_sums(terms, patients, lambda sums: sums[0] / sums[1], seed=seed)
    return (float(total / count) if count else math.nan, *interval)


# ---------------------------------------------------------------- pictures


def shown_folder(shown: Shown) -> str:
    """Where the pictures of a view lie."""
    return shown.folder if shown.dose is None else f"{shown.folder}/{shown.input}"


def shown_title(shown: Shown) -> str:
    return shown.title if shown.dose is None else f"{shown.title}, {shown.input}"


def pictured_scans(pack: Pack) -> set[int]:
    """The scans that are shown: PICTURES by the size of their lesion, evenly, and NORMAL_PICTURES others."""
    areas = np.zeros(len(pack.series))
    for number in range(len(areas)):
        areas[number] = np.count_nonzero(pack.mask[np.flatnonzero(pack.series_of == number)])
    order = np.argsort(areas, kind="stable")
    normal, ill = order[areas[order] == 0], order[areas[order] > 0]
    some = np.linspace(0, len(ill) - 1, min(PICTURES, len(ill))).round().astype(int)
    return {*normal[:NORMAL_PICTURES].tolist(), *ill[some].tolist()}


def draw(
    images: np.ndarray, mask: np.ndarray, truth: np.ndarray, affine: Sequence, shown: Shown, case: Case
) -> tuple[int, bytes]:
    """(which slice, its PNG): that with most of the lesion, else most of what was found, else the middle."""
    areas = [np.count_nonzero(one.reshape(len(one), -1), axis=1) for one in (truth, mask)]
    place = next((int(area.argmax()) for area in areas if area.any()), len(images) // 2)
    report = case.report
    top = (
        f"{shown_title(shown)}\nDice {metrics.shown(report['dice'])}, "
        f"{report['predicted_ml']:.1f} of {report['truth_ml']:.1f} ml"
    )
    note = Note(top, "red: found\ngreen: true")
    return place, lesion_overlay(images[place], mask[place], truth[place], affine, note)


def bland_altman_plot(shown: Shown, cases: Sequence[Case]) -> Figure:
    """Error of the volume over the mean of both, of scans with a lesion; bias and limits of agreement."""
    figure, (axis,) = panels([f"volume of lesions, {shown_title(shown)}"])
    reports = [case.report for case in cases if case.report["truth_ml"] > 0]
    true, found = (np.array([one[name] for one in reports]) for name in ("truth_ml", "predicted_ml"))
    axis.plot((true + found) / 2, found - true, "o", markersize=4, alpha=0.7)
    agreement = lesions.bland_altman(true, found)
    for value, words, style in (
        (agreement.bias, "bias", "-"),
        (agreement.lower, "95 % of differences", "--"),
        (agreement.upper, "95 % of differences", "--"),
    ):
        if not math.isnan(value):
            axis.axhline(value, color="0.3", linestyle=style, linewidth=1)
            axis.annotate(
                f"{words} {value:.1f}",
                (0.99, value),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8,
            )
    axis.axhline(0, color="0.8", linewidth=1, zorder=0)
    axis.set(xlabel=f"mean of found and true (ml), n {len(reports)} scans", ylabel="found - true (ml)")
    return figure


def _values(rows: Sequence[dict], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) figures of rows, each its name, and (2, N) how far their intervals reach below and above."""
    pairs = list(zip(rows, names, strict=True))
    value, low, high = (
        np.array([row[f"{name}{end}"] for row, name in pairs], float) for end in ("", "_low", "_high")
    )
    return value, np.stack([value - low, high - value]).clip(0)  # an end of a bootstrap may lie inside


OVER_DOSE = {"dice": "Dice of scans with a lesion", "any_recall": "share of lesions found"}


def dose_plot(overall: dict[Shown, dict]) -> Figure:
    """Dice and lesions found over dose, with intervals, noisy beside denoised."""
    figure, axes = panels(list(OVER_DOSE.values()))
    doses = list(dict.fromkeys(shown.title for shown in overall))
    for axis, name in zip(axes, OVER_DOSE, strict=True):
        for place, kind in enumerate(("noisy", "denoised")):
            own = {shown: row for shown, row in overall.items() if shown.input in ("clean", kind)}
            if len(own) == 1 and place:
                continue  # clean alone, which the other line shows
            value, reach = _values(list(own.values()), [name] * len(own))
            x = np.array([doses.index(shown.title) for shown in own]) + 0.08 * (place - 0.5)
            label = kind if len(doses) > 1 else None
            axis.errorbar(x, value, reach, fmt="o-", markersize=4, capsize=2, label=label)
        axis.set_xticks(range(len(doses)), [title.removeprefix("dose ") for title in doses])
        axis.set(ylim=(-0.02, 1.02), xlabel="dose", xlim=(-0.5, len(doses) - 0.5))
        axis.grid(axis="y", alpha=0.3)
        if len(doses) > 1:
            axis.legend(fontsize=8)
    return figure


def size_plot(overall: dict[Shown, dict]) -> Figure:
    """Dice by the volume of the lesions of a scan, with intervals, a panel for noisy and one for denoised."""
    inputs = [kind for kind in ("noisy", "denoised") if any(shown.input == kind for shown in overall)]
    figure, axes = panels([f"Dice by volume, {kind}" for kind in inputs] or ["Dice by volume"])
    counts = [next(iter(overall.values()))[f"n_{size}"] for size in lesions.SIZES]
    names = [
        f"{size.replace('_', ' ').replace(' ml', '')}\nn {count}"
        for size, count in zip(lesions.SIZES, counts, strict=True)
    ]
    for axis, kind in zip(axes, inputs or ["clean"], strict=True):
        own = {shown: row for shown, row in overall.items() if shown.input in ("clean", kind)}
        for place, (shown, row) in enumerate(own.items()):
            value, reach = _values([row] * len(names), [f"dice_{size}" for size in lesions.SIZES])
            x = np.arange(len(names)) + 0.6 * ((place + 0.5) / len(own) - 0.5)
            axis.errorbar(x, value, reach, fmt="o", markersize=4, capsize=2, label=shown.title)
        axis.set_xticks(range(len(names)), names)
        axis.set(ylim=(-0.02, 1.02), xlabel="ml", xlim=(-0.5, len(names) - 0.5))
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8)
    return figure


# ---------------------------------------------------------------- one segmenter


def describe(row: dict) -> list[str]:
    """A row of figures as lines."""

    def shown(name: str, digits: int = 2, interval: bool = True) -> str:
        text = metrics.shown(row[name], digits)
        if not interval or math.isnan(row[name]):
            return text
        low, high = (metrics.shown(row[f"{name}_{end}"], digits) for end in ("low", "high"))
        return f"{text} [{low}, {high}]"

    what = "any lesion" if row["class"] == LESION else row["class"]
    what += {SCANS_OF_CLASS: " scans", VOXELS_OF_CLASS: " voxels"}.get(row["scope"], "")
    parts = [
        f"{what:<24} n {row['n_positive']:<3}",
        f"Dice {shown('dice')}, median {shown('dice_median', interval=False)}",
    ]
    if not math.isnan(row["dice_gain"]):
        parts.append(f"gained by the denoiser {shown('dice_gain')}")
    parts += [
        f"HD95 {shown('hd95_mm', 1, False)} mm (n {row['n_hd95_mm']})",
        f"volume {shown('volume_error_ml', 1)} ml",
        f"found {shown('any_recall')} of {row['n_lesions']} lesions",
    ]
    lines = [" | ".join(parts)]
    if row["class"] != LESION:
        return lines
    sizes = [
        f"{size.replace('_', ' ')} {shown(f'dice_{size}', interval=False)} (n {row[f'n_{size}']})"
        for size in lesions.SIZES
    ]
    lines.append(f"  Dice of scans with {', '.join(sizes)}")
    lines.append(
        f"  IoU {shown('iou')} | surface Dice {shown('surface_dice')} | lesion-wise F1 {shown('any_f1')}, "
        f"at IoU {lesions.DETECTION_IOU['iou']:g} {shown('iou_f1')}"
    )
    lines.append(
        f"  volume of at least {lesions.LARGE_ML:g} ml {shown('volume_error_percent_large', 1)} %, "
        f"absolute {shown('volume_abs_error_percent_large', 1)} % (n {row['n_large']}) | "
        f"without a lesion (n {row['n_negative']}) clean {shown('clean')}, "
        f"{shown('false_positive_ml', interval=False)} ml found"
    )
    return lines


def evaluate(
    path: Path,
    *,
    denoiser: Path | None,
    data: Path,
    split: str,
    results: Path,
    dose_model: str | None,
    doses: Sequence[float] | None,
    seed: int,
    device: torch.device,
    command: str,
) -> None:
    """Score a segmenter alone, write <results>/segmenter/<name>/ and print the table.

    denoiser: see pick_denoiser. dose_model, doses: see pick_doses. seed: of noise and bootstrap. Raises
    InputError as load_segmenter does, without masks, or if it or its denoiser was trained on a test
    patient."""
    segmenter = Network(path, *load_segmenter(path, device))
    facts = segmenter.facts
    before = pick_denoiser(path, facts, denoiser, device)
    asked = pick_doses(facts, before, dose_model, doses)
    pack = load_pack(data, split, facts["size"])
    networks = [segmenter, *([before] if before is not None and asked.doses else [])]
    patients = set(pack.patient_ids().tolist())
    if split == "test":
        check_patients(patients, networks)
    seen = len(patients & {patient for network in networks for patient in network.facts["trained_on"]})
    folder = results / "segmenter" / path.stem
    with stage.lock(folder / ".lock"):
        for old in folder.glob("**/*.png"):  # of an earlier run: they would pass for this one's
            old.unlink()
        found = score(segmenter, before, pack, asked, seed=seed, folder=folder)
        rows = {}
        for shown, cases in found.items():
            noisy = found.get(shown._replace(input="noisy")) if shown.input == "denoised" else None
            rows[shown] = rows_of(shown, cases, noisy, seed)
        written = write_cases(folder, found, facts["classes"])
        overall = {shown: own[0] for shown, own in rows.items()}
        figures = {"dice_by_dose": dose_plot(overall), "dice_by_size": size_plot(overall)}
        for shown, cases in found.items():
            figures[f"{shown_folder(shown)}/bland_altman"] = bland_altman_plot(shown, cases)
        write_figures(folder, figures)
        table = [{"segmenter": path.name, "split": split} | row for own in rows.values() for row in own]
        columns = [*SUBJECT, *(name for name in table[0] if name not in SUBJECT)]
        write_table(folder / "metrics.csv", columns, table)
        manifest = scoring.manifest(
            path, facts, pack, data=data, split=split, seen=seen, seed=seed, command=command
        )
        used = None if len(networks) == 1 else before.path
        manifest |= {
            "denoiser": used and {"path": str(used), "sha256": checkpoints.file_sha256(used)},
            "surface_tolerance_mm": lesions.TOLERANCE_MM,
        }
        stage.write_json(folder / "metrics.json", {"manifest": manifest, "rows": table})
    say_results(segmenter, pack, split, seed, seen, used, rows)
    pictures = len(list(folder.glob("**/*.png")))
    stage.say(f"Wrote {folder}/: metrics.csv, metrics.json, {', '.join(written)} and {pictures} pictures")


def write_cases(folder: Path, found: dict[Shown, list[Case]], classes: Sequence[str]) -> list[str]:
    """cases.csv, and of a network of several classes classes.csv. Returns their names."""
    cases = [case for own in found.values() for case in own]
    names = list(cases[0].report)
    rows = (case.keys | {"kind": case.kind} | case.report for case in cases)
    write_table(folder / "cases.csv", [*CASE, *names], rows)
    if len(classes) == 1:
        (folder / "classes.csv").unlink(missing_ok=True)  # of an earlier run
        return ["cases.csv"]
    rows = (
        case.keys | {"kind": case.kind, "class": name} | report
        for case in cases
        for name, report in case.classes.items()
    )
    write_table(folder / "classes.csv", [*CASE, "class", *names], rows)
    return ["cases.csv", "classes.csv"]


def say_results(
    segmenter: Network,
    pack: Pack,
    split: str,
    seed: int,
    seen: int,
    denoiser: Path | None,
    rows: dict[Shown, list[dict]],
) -> None:
    """The table, with what its numbers mean."""
    facts = segmenter.facts
    what = "lesion or not" if len(facts["classes"]) == 1 else ", ".join(facts["classes"])
    rule = facts["thresholds"]["lesion"]
    stage.say(
        f"{segmenter.path}: {what}, trained on {facts['input']} slices. "
        f"{len(set(pack.patient_ids().tolist()))} {split} patients, {len(pack.series)} scans, {len(pack)} "
        f"slices of {pack.size} x {pack.size}, threshold {rule['value']:g}, nothing "
        f"with less than {rule.get('least_ml', 0):g} ml from {rule.get('sure', rule['value']):g} on, "
        f"noise seed {seed}{'' if denoiser is None else f', denoiser {denoiser}'}"
    )
    if seen:
        stage.say(f"  {seen} of these patients were seen in training or validation: no fair test")
    stage.say(
        "  Means over scans with a lesion (n), intervals of 95 % by drawing patients. HD95 of scans where "
        "something was found. A lesion is found by a voxel of it at least. n/a: there is no such scan"
    )
    for shown, own in rows.items():
        stage.say(shown_title(shown) + ("" if shown.dose is None else f" ({shown.dose_model})"))
        for row in own:
            if row["class"] != LESION and not row["n_positive"]:
                continue  # metrics.csv has what was found of a class that is nowhere
            for line in describe(row):
                stage.say(f"  {line}")
