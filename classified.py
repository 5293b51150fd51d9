"""What a classifier alone says of a split: its figures, its answers to every slice and scan, its pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_curve

import explained
import metrics
import scoring
import stage
import training
from calibration import brier, calibrated, expected_calibration_error, known_rows, reliability, rsna_log_loss
from dataset import SUBTYPES, TASKS, Pack, Task, load_pack, read_metadata, series_folders, task_targets
from inference import (
    Probabilities,
    ScanClassifier,
    check_patients,
    denoise,
    load_model,
    logits_of,
    read,
    scan_probabilities,
)
from intervals import auc_of_draws, patient_bootstrap
from low_dose import LowDose, check_doses
from scoring import Shown, about, panels, write_figures, write_table

QUESTION, ALL = "question", "all"  # rows beside those of the classes: Task.positive, and all classes together
LEVELS = ("slice", "scan")
COLUMNS = (
    *("classifier", "task", "split", "input", "dose_model", "dose", "dose_fraction", "sigma_hu"),
    *("noise_seed", "level", "class", "n", "positives", "n_patients", "acc"),
    *("auc", "auc_low", "auc_high", "auc_interval", "auc_null", "ap", "threshold"),
    *("sens", "sens_low", "sens_high", "spec", "spec_low", "spec_high", "prec", "f1"),
    *("sens_at_90_spec", "sens_at_95_spec", "temperature", "ece", "ece_calibrated"),
    *("brier", "brier_calibrated", "rsna_log_loss", "rsna_log_loss_calibrated"),
)


def conditions(facts: dict, dose_model: str | None, doses: Sequence[float] | None) -> list[Shown]:
    """What a classifier is to be shown. dose_model, doses: None as it was trained.

    One trained on clean slices sees these, and where a dose model or doses are given noisy ones as well.
    Raises ValueError for a dose out of range."""
    clean = facts["input"] == "clean"
    if clean and dose_model is None and doses is None:
        return [Shown("clean")]
    chosen = dose_model or facts["dose_model"] or training.DOSE_MODEL
    if doses is None and chosen == facts["dose_model"]:
        doses = facts["doses"]
    kind = "denoised" if facts["input"] == "denoised" else "noisy"
    low = [Shown(kind, chosen, dose) for dose in sorted(set(check_doses(chosen, doses)))]
    return [Shown("clean"), *low] if clean else low


# ---------------------------------------------------------------- answers


class Level(NamedTuple):
    """The slices, or the scans, of a split. (N, classes) each: targets, NaN where unknown; found, what the
    classifier says; calibrated, the same at the temperature of validation; null, what position alone says.
    patients: (N,)."""

    name: str
    targets: np.ndarray
    found: np.ndarray
    calibrated: np.ndarray
    null: np.ndarray
    patients: np.ndarray


Images = Callable[[np.ndarray], np.ndarray]  # rows of a whole series -> (S, H, W) HU


def images_of(model: ScanClassifier, pack: Pack, shown: Shown, seed: int) -> Images:
    """A function from the rows of a whole series to its slices as a classifier sees them, (S, H, W) HU."""
    low = None if shown.dose is None else LowDose(pack, shown.dose_model, [shown.dose])

    def images(rows: np.ndarray) -> np.ndarray:
        if low is None:
            return pack.image[rows]
        same = [shown.dose] * len(rows)
        noisy = low.evaluation(rows, same, seed)
        return noisy if model.denoiser is None else denoise(model.denoiser, noisy, low.levels(rows, same))

    return images


def read_split(
    model: ScanClassifier, pack: Pack, images: Images, title: str, mirrored: bool
) -> Probabilities:
    """What a classifier says of every slice and scan of a pack, one series after the other."""
    ends = np.cumsum(np.bincount(pack.series_of))
    series = stage.progress(np.split(np.arange(len(pack)), ends[:-1]), desc=title, unit="scan")
    found = [read(model.network, images(rows), mirrored=mirrored) for rows in series]
    return Probabilities(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def heights(data: Path, split: str) -> tuple[np.ndarray, list[dict]]:
    """(relative positions (N,) along the scans, labels) of the slices of a split, in its pack's order."""
    positions, series_of, labels = [], [], []
    for number, folder in enumerate(series_folders(data, split)):
        for entry in read_metadata(folder)["slices"]:
            positions.append(entry["position_mm"])
            series_of.append(number)
            labels.append(entry["labels"])
    return metrics.relative_positions(np.array(positions), np.array(series_of, int)), labels


def positional_nulls(data: Path, split: str, facts: dict) -> np.ndarray:
    """(N, classes) of slices: how often training was positive at their height; NaN without training data."""
    train_positions, train_labels = heights(data, "train")
    train = task_targets(facts["task"], train_labels, facts["assume_absent"])
    positions, _ = heights(data, split)
    return np.stack([metrics.positional_null(train_positions, own, positions) for own in train.T], axis=1)


def at_temperature(task: Task, probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (N, classes) as temperature scaling leaves them; NaN for a temperature of NaN."""
    logits, kind = logits_of(probabilities, task.classes)
    return calibrated(logits, temperature, kind)


def stored_number(facts: dict, kind: str, level: str, name: str = QUESTION) -> float:
    """A threshold of the question or of a class, or a temperature; NaN where validation gave none.

    kind: "thresholds" or "temperatures"."""
    own = facts.get(kind, {}).get(level, {})  # those of an earlier version lack some
    value = own.get("value") if name == QUESTION else own.get("values", {}).get(name)
    return math.nan if value is None else value


def both_levels(pack: Pack, facts: dict, found: Probabilities, null: np.ndarray) -> list[Level]:
    """The answers of a classifier beside the truth. null: (N, classes) of positional_nulls."""
    task = TASKS[facts["task"]]
    labels = pack.labels, [metadata["labels"] for metadata in pack.series]
    nulls = null, scan_probabilities(null, pack.series_of, task.classes)
    patients = pack.patient_ids(), np.array([metadata["patient_id"] for metadata in pack.series])
    return [
        Level(
            name,
            task_targets(facts["task"], labels[place], facts["assume_absent"]).astype(np.float64),
            found[place],
            at_temperature(task, found[place], stored_number(facts, "temperatures", name)),
            nulls[place],
            patients[place],
        )
        for place, name in enumerate(LEVELS)
    ]


def columns(task: Task, values: np.ndarray) -> dict[str, np.ndarray]:
    """(N, classes) of targets or probabilities by the name of the class, and that of the question."""
    return {**dict(zip(task.classes, values.T, strict=True)), QUESTION: task.positive(values)}


# ---------------------------------------------------------------- figures in numbers


def score(facts: dict, level: Level, seed: int) -> list[dict]:
    """Rows of figures: one for each class, one for the question, and of several classes one for all."""
    task = TASKS[facts["task"]]
    targets, found, warm, null = (
        columns(task, values) for values in (level.targets, level.found, level.calibrated, level.null)
    )
    common = {"level": level.name, "temperature": stored_number(facts, "temperatures", level.name)}
    rows: list[dict] = []
    for name in (*task.classes, QUESTION):
        threshold = stored_number(facts, "thresholds", level.name, name)
        twin = next((row for row in rows if np.array_equal(found[row["class"]], found[name])), None)
        if twin and name == QUESTION and twin["threshold"] == threshold:
            rows.append(twin | {"class": name})  # a class is the question: the bootstrap would say the same
            continue
        row = metrics.report(
            targets[name],
            found[name],
            level.patients,
            threshold=threshold,
            seed=seed,
            null_scores=null[name],
        )
        row |= {"positives": row["n_positive"], "auc_interval": "patient bootstrap"}
        if level.name == "scan" and row["n"] == row["n_patients"]:
            row |= {"auc_low": row["delong_low"], "auc_high": row["delong_high"], "auc_interval": "DeLong"}
        row |= {f"sens_at_{percent}_spec": row[f"sens_at_{percent}"] for percent in (90, 95)}
        row["ece_calibrated"] = expected_calibration_error(targets[name], warm[name])
        row["brier_calibrated"] = brier(targets[name], warm[name])
        if math.isnan(row["auc_low"]):
            row["auc_interval"] = None
        rows.append(common | {"class": name, "threshold": threshold} | row)
    return rows if len(task.classes) == 1 else [*rows, common | score_all(task, level, seed)]


def score_all(task: Task, level: Level, seed: int) -> dict:
    """What is said of several classes together. AUC is their mean, n/a where a class is absent."""
    any_known = ~np.isnan(level.targets).all(axis=1)

    def mean_auc(scores: np.ndarray) -> float:
        pairs = zip(level.targets.T, scores.T, strict=True)
        return float(np.mean([metrics.auc(*pair) for pair in pairs]))

    row = {
        "class": ALL,
        "n": int(any_known.sum()),
        "n_patients": len(np.unique(level.patients[any_known])),
        "auc": mean_auc(level.found),
        "auc_null": mean_auc(level.null),
    }
    if not math.isnan(row["auc"]):
        row["auc_interval"] = "patient bootstrap"
        draws = [
            auc_of_draws(own, scores, level.patients)
            for own, scores in zip(level.targets.T, level.found.T, strict=True)
        ]
        row["auc_low"], row["auc_high"] = patient_bootstrap(
            lambda times: float(np.mean([draw(times) for draw in draws])),
            len(np.unique(level.patients)),
            seed=seed,
        )
    for probabilities, end in ((level.found, ""), (level.calibrated, "_calibrated")):
        if task.exclusive:
            numbers = metrics.class_numbers(level.targets)
            found = metrics.multiclass_report(numbers, probabilities, task.classes)
            row |= {"acc": found["acc"]} if not end else {}
            row |= {f"{name}{end}": found[name] for name in ("ece", "brier")}
        elif task.classes == SUBTYPES:
            row[f"rsna_log_loss{end}"] = rsna_log_loss(level.targets, probabilities, task.classes)
    return row


# ---------------------------------------------------------------- tables


def answer_rows(facts: dict, level: Level, keys: Sequence[dict], parts: Sequence[str]) -> Iterable[dict]:
    """Each slice or scan: its keys, then targets, probabilities and calls by class, as parts asks for."""
    task = TASKS[facts["task"]]
    targets, found = columns(task, level.targets), columns(task, level.found)
    limits = {name: stored_number(facts, "thresholds", level.name, name) for name in found}
    calls = {
        name: np.full(len(scores), math.nan) if math.isnan(limits[name]) else scores >= limits[name]
        for name, scores in found.items()
    }
    kinds = {"target": targets, "probability": found, "call": calls}
    for place, key in enumerate(keys):
        row = dict(key)
        for part in parts:
            for name, values in kinds[part].items():
                value = values[place]
                row[f"{part}_{name}"] = value if part == "probability" or np.isnan(value) else int(value)
        yield row


def slice_keys(pack: Pack) -> list[dict]:
    """What names each slice of a pack."""
    return [
        {
            "series_uid": pack.series[number]["series_uid"],
            "slice_index": int(index),
            "patient_id": pack.series[number]["patient_id"],
        }
        for number, index in zip(pack.series_of.tolist(), pack.slice_of, strict=True)
    ]


def submission_rows(task: Task, level: Level, keys: Sequence[dict]) -> Iterable[dict]:
    """RSNA's `ID,Label`. The id of a slice is <series_uid>_<index>, its place in the prepared data: the ids
    of images go no further than the readers."""
    places = [task.classes.index(name) for name in SUBTYPES]
    for key, values in zip(keys, level.found, strict=True):
        for place, name in zip(places, SUBTYPES, strict=True):
            slice_id = f"{key['series_uid']}_{key['slice_index']:05d}"
            yield {"ID": f"{slice_id}_{name}", "Label": values[place]}


def write_answers(folder: Path, pack: Pack, facts: dict, answers: dict[Shown, list[Level]]) -> list[str]:
    """predictions.csv, predictions_binary.csv, scans.csv, of subtypes submissions. Returns their names."""
    names = list(columns(TASKS[facts["task"]], np.empty((0, len(facts["classes"])))))
    several = len(answers) > 1
    slices = slice_keys(pack)
    scans = [{name: series[name] for name in ("series_uid", "patient_id")} for series in pack.series]
    tables = {
        "predictions.csv": (0, slices, ("target", "probability")),
        "predictions_binary.csv": (0, slices, ("target", "call")),
        "scans.csv": (1, scans, ("target", "probability", "call")),
    }
    for file, (place, keys, parts) in tables.items():
        header = [*keys[0], *(f"{part}_{name}" for part in parts for name in names)]
        rows = (
            {"dose": shown.dose} | row if several else row
            for shown, levels in answers.items()
            for row in answer_rows(facts, levels[place], keys, parts)
        )
        write_table(folder / file, ["dose", *header] if several else header, rows)
    written = list(tables)
    if facts["task"] == "subtypes":
        for shown, levels in answers.items():
            written.append(f"{shown.folder}/submission.csv" if several else "submission.csv")
            rows = submission_rows(TASKS["subtypes"], levels[0], slices)
            write_table(folder / written[-1], ("ID", "Label"), rows)
    return written


# ---------------------------------------------------------------- pictures


def learning_curves(log: Path) -> Figure:
    """Loss and AUC by epoch, from the lines of a training. log: the checkpoint's .jsonl."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure, axes = panels(("loss", "AUC on validation"))
    losses = {"train_loss": "training", "loss": "validation"}
    aucs = {"auc": "per slice", "auc_scan": "per scan"}
    aucs |= {"auc_mean": "per slice, mean of classes", "auc_mean_scan": "per scan, mean of classes"}
    for axis, wanted in zip(axes, (losses, aucs), strict=True):
        for name, label in wanted.items():
            own = [(line["epoch"], line[name]) for line in lines if line.get(name) is not None]
            if own:
                axis.plot(*zip(*own, strict=True), ".-", label=label)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def roc_curves(task: Task, levels: Sequence[Level]) -> Figure:
    """ROC of every class. That of the question is one of them, or its mirror image."""
    figure, axes = panels([f"per {level.name}" for level in levels])
    for axis, level in zip(axes, levels, strict=True):
        for name, targets, scores in zip(task.classes, level.targets.T, level.found.T, strict=True):
            area = metrics.auc(targets, scores)
            absent = math.isnan(area)
            line = ([], []) if absent else roc_curve(*known_rows(targets, scores))[:2]
            axis.plot(*line, label=f"{name} {metrics.shown(area)}")
        axis.plot((0, 1), (0, 1), color="0.8", linewidth=1)
        axis.set(xlabel="1 - specificity", ylabel="sensitivity")
        axis.legend(fontsize=8, loc="lower right", title="AUC", title_fontsize=8)
    return figure


def reliability_diagram(task: Task, levels: Sequence[Level]) -> Figure:
    """How often the question's answer is yes where the classifier says so with some probability."""
    figure, axes = panels([f"{task.finding}, per {level.name}" for level in levels])
    for axis, level in zip(axes, levels, strict=True):
        targets = task.positive(level.targets)
        for words, values in (("as it is", level.found), ("at its temperature", level.calibrated)):
            scores = task.positive(values)
            error = expected_calibration_error(targets, scores)
            bins = [] if math.isnan(error) else [one for one in reliability(targets, scores) if one.n]
            label = f"{words}, ECE {metrics.shown(error)}"
            axis.plot([one.confidence for one in bins], [one.frequency for one in bins], "o-", label=label)
        axis.plot((0, 1), (0, 1), color="0.8", linewidth=1)
        axis.set(xlabel="mean probability", ylabel="share of positives", xlim=(0, 1), ylim=(-0.02, 1.02))
        axis.legend(fontsize=8, loc="upper left")
    return figure


def confusion(facts: dict, levels: Sequence[Level]) -> Figure:
    """Counts of true and called classes: of exclusive classes the likeliest is called, else the answer to the
    question at its threshold."""
    task = TASKS[facts["task"]]
    figure, axes = panels([f"per {level.name}" for level in levels])
    for axis, level in zip(axes, levels, strict=True):
        if task.exclusive:
            names, targets = task.classes, metrics.class_numbers(level.targets)
            called = level.found.argmax(axis=1)
        else:
            names, targets = (f"no {task.finding}", task.finding), task.positive(level.targets)
            limit = stored_number(facts, "thresholds", level.name)
            called = task.positive(level.found) >= limit
            if math.isnan(limit):
                axis.set_title(f"per {level.name}: n/a, validation chose no threshold", fontsize=10)
                axis.set_axis_off()
                continue
        counts = metrics.confusion_matrix(targets, called, len(names))
        axis.imshow(counts, cmap="Blues", vmin=0, vmax=max(1, counts.max()))
        for (row, column), count in np.ndenumerate(counts):
            dark = count > counts.max() / 2
            axis.text(column, row, str(count), ha="center", va="center", color="white" if dark else "black")
        axis.set_xticks(range(len(names)), names)
        axis.set_yticks(range(len(names)), names, rotation=90, va="center")
        axis.set(xlabel="called", ylabel="true")
    return figure


BARS = {"auc": "AUC", "sens": "sensitivity", "spec": "specificity"}


def class_bars(task: Task, rows: Sequence[dict]) -> Figure:
    """AUC, sensitivity and specificity of every class with their intervals. rows: of one of Shown."""
    figure, axes = panels([f"per {level}" for level in LEVELS])
    for axis, level in zip(axes, LEVELS, strict=True):
        own = [row for row in rows if row["level"] == level and row["class"] in task.classes]
        places = np.arange(len(own))
        for number, (name, label) in enumerate(BARS.items()):
            values, low, high = (
                np.array([row[column] for row in own]) for column in (name, f"{name}_low", f"{name}_high")
            )
            reach = np.stack([values - low, high - values]).clip(0)  # an end of a bootstrap may lie inside
            axis.bar(places + 0.27 * (number - 1), values, 0.25, yerr=reach, label=label, capsize=2)
        names = [row["class"] for row in own]
        axis.set_xticks(places, names, **({"rotation": 30, "ha": "right"} if len(own) > 3 else {}))
        axis.set(ylim=(0, 1.05), xlim=(-0.7, len(own) - 0.3))
        axis.grid(axis="y", alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(BARS), frameon=False, fontsize=8)
    return figure


def write_pictures(
    folder: Path, model: ScanClassifier, answers: dict[Shown, list[Level]], rows: dict[Shown, list[dict]]
) -> int:
    """All figures as PNG, of each of Shown its own; learning curves once. Returns how many."""
    task = TASKS[model.facts["task"]]
    figures = {}
    log = model.path.with_suffix(".jsonl")
    if log.exists():
        figures["learning_curves"] = learning_curves(log)
    for shown, levels in answers.items():
        place = f"{shown.folder}/" if len(answers) > 1 else ""
        figures |= {
            f"{place}roc": roc_curves(task, levels),
            f"{place}reliability": reliability_diagram(task, levels),
            f"{place}confusion": confusion(model.facts, levels),
            f"{place}classes": class_bars(task, rows[shown]),
        }
    write_figures(folder, figures)
    return len(figures)


# ---------------------------------------------------------------- one classifier


def describe(task: Task, row: dict) -> str:
    """A row of figures as a line."""

    def shown(name: str, digits: int = 3) -> str:
        return metrics.shown(row.get(name, math.nan), digits)

    what = f"{QUESTION}: {task.finding}?" if row["class"] == QUESTION else row["class"]
    interval = f"[{shown('auc_low', 2)}, {shown('auc_high', 2)}]"
    parts = [f"{row['level']:<5} {what:<22}"]
    if row["class"] == ALL:
        parts.append(f"n {row['n']}")
        parts.append(f"mean AUC {shown('auc')} {interval} (null {shown('auc_null')})")
        if task.exclusive:
            parts += [f"Acc {shown('acc')}", f"ECE {shown('ece')} -> {shown('ece_calibrated')}"]
        else:
            losses = f"{shown('rsna_log_loss', 4)} -> {shown('rsna_log_loss_calibrated', 4)}"
            parts.append(f"RSNA log loss {losses}")
        return " | ".join(parts)
    parts += [
        f"{row['positives']} of {row['n']}",
        f"AUC {shown('auc')} {interval} (null {shown('auc_null')})",
        f"AP {shown('ap')}",
        f"Acc {shown('acc')}",
        f"Sens {shown('sens')}",
        f"Spec {shown('spec')}",
        f"F1 {shown('f1')}",
        f"ECE {shown('ece')} -> {shown('ece_calibrated')}",
        f"Brier {shown('brier')} -> {shown('brier_calibrated')}",
    ]
    return " | ".join(parts)


def evaluate(
    path: Path,
    *,
    data: Path,
    split: str,
    results: Path,
    dose_model: str | None,
    doses: Sequence[float] | None,
    seed: int,
    mirrored: bool,
    gradcam: str | None,
    device: torch.device,
    command: str,
) -> None:
    """Score a classifier alone, write <results>/classifier/<name>/ and print the table.

    dose_model, doses: see conditions. seed: of noise and bootstrap. gradcam: method of a heat to score.
    Raises InputError as load_model does, for a classifier that was trained on a test patient, and as
    explained.score does."""
    model = load_model(path, device)
    facts = model.facts
    asked = conditions(facts, dose_model, doses)
    pack = load_pack(data, split, facts["size"])
    patients = set(pack.patient_ids().tolist())
    if split == "test":
        check_patients(patients, [model])
    seen = len(patients & set(facts["trained_on"]))
    folder = results / "classifier" / path.stem
    with stage.lock(folder / ".lock"):
        null = positional_nulls(data, split, facts)
        answers, rows, seen_at = {}, {}, {}
        for shown in asked:
            images = images_of(model, pack, shown, seed)
            found = read_split(model, pack, images, shown.title, mirrored)
            seen_at[shown.title] = explained.Seen(images, found.slices)
            answers[shown] = both_levels(pack, facts, found, null)
            rows[shown] = [row for level in answers[shown] for row in score(facts, level, seed)]
        table = stage.plain(
            [
                {column: (about(shown, seed) | row).get(column) for column in COLUMNS}
                | {"classifier": path.name, "task": facts["task"], "split": split}
                for shown, own in rows.items()
                for row in own
            ]
        )
        manifest = scoring.manifest(
            path, facts, pack, data=data, split=split, seen=seen, seed=seed, command=command
        )
        manifest |= {"temperatures": facts.get("temperatures"), "mirrored": mirrored}
        for pattern in (
            "**/*.png",
            "**/submission.csv",
            "gradcam.csv",
        ):  # of an earlier run: they would pass for this one's
            for old in folder.glob(pattern):
                old.unlink()
        written = write_answers(folder, pack, facts, answers)
        pictures = write_pictures(folder, model, answers, rows)
        write_table(folder / "metrics.csv", COLUMNS, table)
        pointed = []
        if gradcam:
            classes = [name for name in facts["classes"] if name in explained.MASKS_OF]
            pointed = explained.score(model.network, pack, seen_at, classes, folder, gradcam)
            written.append("gradcam.csv and pictures")
        stage.write_json(
            folder / "metrics.json",
            {"manifest": manifest, "rows": table, "gradcam": stage.plain(explained.summary(pointed))},
        )
    say_results(model, pack, split, seed, seen, rows)
    for row in explained.summary(pointed):
        stage.say(f"  Grad-CAM, {explained.describe(row)}")
    stage.say(f"Wrote {folder}/: metrics.csv, metrics.json, {', '.join(written)} and {pictures} figures")


def say_results(
    model: ScanClassifier, pack: Pack, split: str, seed: int, seen: int, rows: dict[Shown, list[dict]]
) -> None:
    """The table, with what its numbers mean."""
    facts, task = model.facts, TASKS[model.facts["task"]]
    stage.say(
        f"{model.path}: task {facts['task']}, trained on {facts['input']} slices. "
        f"{len(set(pack.patient_ids().tolist()))} {split} patients, {len(pack.series)} scans, {len(pack)} "
        f"slices of {pack.size} x {pack.size}, noise seed {seed}"
    )
    if seen:
        stage.say(f"  {seen} of these patients were seen in its training or validation: no fair test")
    stage.say(
        "  Intervals of 95 %: patient bootstrap of slices; DeLong of scans, or the bootstrap where a patient "
        "has several. Null: AUC of the height in the scan alone, learnt from the training slices. Thresholds "
        "and temperature (->) are those of validation. n/a: a class is absent, or validation chose none"
    )
    for shown, own in rows.items():
        named = "" if shown.dose_model is None else f" ({shown.dose_model}, {shown.input})"
        stage.say(f"{shown.title}{named}")
        for row in own:
            if row["class"] == QUESTION or len(task.classes) > 1:
                stage.say(f"  {describe(task, row)}")
