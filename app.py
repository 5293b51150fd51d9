"""Stage 8: look at the results and at single scans in a browser.

Reads:   <results>/experiments.json, <data>/{test,val,train,unsplit}/, <models>/denoiser.pt, classifier*.pt
Writes:  nothing
Example: streamlit run app.py
         streamlit run app.py -- --data dataset --models saved_models --results results

Whatever is missing is left out, with the command that makes it. Research use only."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st
from PIL import Image, ImageDraw
from torch import nn

import anatomy
import checkpoints
import metrics
import stage
import training
from dataset import (
    TASKS,
    fit_to_square,
    neighbours,
    read_metadata,
    read_slices,
    read_splits,
    series_folders,
    square_pixel_mm,
    task_targets,
    to_tensor,
)
from display import NOTICE, Note, annotate, difference_rgb, draw_outlines, enlarge, radiological, to_grey
from dose import DOSE_MODELS, SIMULATED
from inference import LEGEND, PIPELINES, denoise, fits_denoiser, load_classifier, load_denoiser, read
from low_dose import evaluation_seed, noise_level, scan_flux
from volumes import AIR_HU

LEVELS = ("slice", "scan")
NOISE_SEED = 42  # of run_experiments.py by default; results that are there say their own

WINDOWS = {  # centre and width in HU, as head CT is read
    "Brain": (40, 80),
    "Subdural": (80, 200),
    "Stroke": (40, 40),
    "Bone": (600, 2800),
    "Soft": (40, 400),
}
OWN_WINDOW = "Own"
DIFFERENCE_RANGES_HU = (10, 20, 50, 100)
SPLIT_NOTES = {
    "test": "test patients: kept out of training",
    "val": "validation patients: checkpoints and thresholds were chosen on them",
    "train": "training patients: the networks have seen them, so this says nothing about new ones",
    "unsplit": "not split yet: no network was trained with them here",
}

CARDS_IN_A_ROW = 7  # four pipelines and three image metrics, at 1280 px
STYLE = """<style>
.stMainBlockContainer { padding: 3.6rem 2rem 2rem; }
[data-testid="stMetricValue"] { font-size: 1.5rem; }
</style>"""  # of a screen 1280 px wide, as much as possible for the images
VIEW_PX = 512  # smaller matrices are enlarged to it, so that outlines and letters stay fine
ARM_COLOURS = {"1": "#e69f00", "1n": "#cc79a7", "2": "#0072b2", "2d": "#009e73"}
OTHER_COLOURS = ("#56b4e9", "#d55e00", "#999999", "#882255", "#117733", "#332288")

# column of experiments.json -> heading, number format (None: text), what it means
TABLE = {
    "dose": ("Dose", "%g", "in the unit of the dose model"),
    "dose_fraction": ("Of routine", "percent", "share of the dose of a routine head scan"),
    "sigma_hu": ("Noise SD (HU)", "%.1f", "at 40 HU, from the dose model"),
    "arm": ("Pipeline", None, "see the legend below the table"),
    "task": ("Task", None, "the question put to the classifier"),
    "auc": ("AUC", "%.3f", "area under the ROC curve"),
    "auc_low": ("95 % low", "%.3f", "of the AUC; bootstrap over patients"),
    "auc_high": ("95 % high", "%.3f", "of the AUC; bootstrap over patients"),
    "acc": ("Accuracy", "%.3f", "at the threshold chosen on validation patients"),
    "sens": ("Sensitivity", "%.3f", "at the threshold chosen on validation patients"),
    "spec": ("Specificity", "%.3f", "at the threshold chosen on validation patients"),
    "prec": ("Precision", "%.3f", "at the threshold chosen on validation patients"),
    "f1": ("F1", "%.3f", "at the threshold chosen on validation patients"),
    "ece": ("ECE", "%.3f", "expected calibration error, 15 bins"),
    "threshold": ("Threshold", "%.3f", "largest Youden index on validation patients"),
    "rmse_hu": ("RMSE (HU)", "%.2f", "of the image that the classifier sees, inside the mask of the study"),
    "rmse_hu_noisy": ("RMSE low dose (HU)", "%.2f", "of the low dose, inside the mask of the study"),
    "psnr": ("PSNR (dB)", "%.2f", "of the image that the classifier sees, inside the mask of the study"),
    "psnr_noisy": ("PSNR low dose (dB)", "%.2f", "of the low dose, inside the mask of the study"),
    "ssim": ("SSIM", "%.3f", "of the image that the classifier sees, inside the mask of the study"),
    "ssim_noisy": ("SSIM low dose", "%.3f", "of the low dose, inside the mask of the study"),
    "classifier": ("Classifier", None, "checkpoint"),
    "denoiser": ("Denoiser", None, "checkpoint"),
}
IMAGE_PANELS = {"rmse_hu": "RMSE (HU)", "psnr": "PSNR (dB)", "ssim": "SSIM"}


# ---------------------------------------------------------------- words


def plain_text(text: str) -> str:
    """Text for Streamlit's markdown in which a file's name stays as it is."""
    return re.sub(r"([\\`*_$\[\]<>~])", r"\\\1", " ".join(str(text).split()))


def finding(labels: dict) -> str:
    """What a label dict says, in words: "haemorrhage (subdural), ischemia", "normal" or "labels unknown"."""
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


def series_title(metadata: dict) -> str:
    """One line to choose a series by: patient pseudonym, finding, number of slices."""
    return f"{metadata['patient_id']} - {finding(metadata['labels'])} - {len(metadata['slices'])} slices"


def has_lesion(labels: dict) -> bool:
    return 1 in (labels.get("any"), labels.get("ischemia"))


def first_look(slice_labels: Sequence[dict]) -> int:
    """The slice to open a series at: the middle one of those with a lesion, else the middle one."""
    hit = [index for index, labels in enumerate(slice_labels) if has_lesion(labels)]
    return hit[len(hit) // 2] if hit else len(slice_labels) // 2


def dose_text(dose_model: str, dose: float) -> str:
    """A dose with its unit and, where the model has one, its share of a routine scan."""
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


# ---------------------------------------------------------------- what lies on disk, cached


class Stamp(NamedTuple):
    """A file or folder as it is now: the key of everything made from it."""

    path: str
    mtime_ns: int
    size: int


def stamp(path: Path) -> Stamp:
    """Raises FileNotFoundError."""
    found = Path(path).stat()
    return Stamp(str(path), found.st_mtime_ns, found.st_size)


def malformed(path: str | Path, error: Exception, remedy: str) -> stage.InputError:
    """A file that opens but does not hold what this version reads."""
    return stage.InputError(
        f"{path}: not as this version writes it, {type(error).__name__}: {error} ({remedy})"
    )


def quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def results_commands(folders: Folders) -> str:
    """What to type where there are no results yet."""
    return (
        f"python run_experiments.py --data {quoted(folders.data)} --models {quoted(folders.models)} "
        f"--out {quoted(folders.results)}\n"
        "# or everything on a synthetic phantom, from nothing:\nmake demo"
    )


@st.cache_data(show_spinner=False, max_entries=4)
def load_results(file: Stamp) -> tuple[dict, pd.DataFrame]:
    """experiments.json as (manifest, rows). Raises InputError if it is damaged or not of this version."""
    remedy = "run run_experiments.py again"
    content = stage.read_json(file.path, remedy)
    try:
        manifest, rows = dict(content["manifest"]), pd.DataFrame(content["rows"])
        wanted = {*TABLE, "level", "dose_model", "noise_seed", "n_patients", "n_slices", "range_hu"}
        missing = sorted(wanted - set(rows.columns))
        if missing or rows.empty:
            raise KeyError(", ".join(missing) or "no rows")
        numbers = [name for name, (_, form, _) in TABLE.items() if form]
        rows[numbers] = rows[numbers].astype(float)
        counts = ["n_patients", "n_slices", "noise_seed"]
        rows[counts] = rows[counts].astype(int)
        if not (rows["dose"] > 0).all():
            raise ValueError("a dose that is not positive")
        checkpoints_used = {str(name): str(sha) for name, sha in manifest["checkpoints"].items()}
        manifest |= {"checkpoints": checkpoints_used, "left_out": [str(x) for x in manifest["left_out"]]}
        manifest |= {key: str(manifest[key]) for key in ("data", "split_hash", "command")}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise malformed(file.path, error, remedy) from None
    return manifest, rows


@st.cache_data(show_spinner=False, max_entries=32)
def file_hash(file: Stamp) -> str:
    return checkpoints.file_sha256(Path(file.path))


@st.cache_data(show_spinner=False, max_entries=8)
def has_series(split_folder: Stamp) -> bool:
    folder = Path(split_folder.path)
    return bool(series_folders(folder.parent, folder.name))


@st.cache_data(show_spinner="Reading the list of series ...", max_entries=8)
def list_series(split_folder: Stamp) -> dict[str, tuple[str, bool]]:
    """Series of a split: folder -> (title, has a lesion). One that cannot be read is listed as such."""
    folder = Path(split_folder.path)
    found = {}
    for path in series_folders(folder.parent, folder.name):
        try:
            metadata = read_metadata(path)
            found[str(path)] = (series_title(metadata), has_lesion(metadata["labels"]))
        except (stage.StageError, OSError, KeyError, TypeError, AttributeError):
            found[str(path)] = (f"{path.name} - unreadable", False)
    return found


class Series(NamedTuple):
    """One series at the matrix of the networks, as run_experiments.py sees it. Nobody may write into it."""

    uid: str
    labels: dict
    slice_labels: list[dict]
    affine: np.ndarray  # (4, 4), (column, row, slice, 1) -> LPS mm
    matrix: tuple[int, int]  # rows and columns on disk
    image: np.ndarray  # (S, n, n) int16 HU
    truth: np.ndarray | None  # (S, n, n) int16 HU without noise
    lesions: np.ndarray | None  # (S, n, n) uint8 classes
    spacing_mm: tuple[float, float, float]  # (slice, row, column) of image
    noise_hu: float  # as measured when it was prepared, or NaN
    flux: dict[str, float]  # by dose model, see low_dose.scan_flux

    @property
    def reference(self) -> np.ndarray:
        """What image quality is scored against."""
        return self.image if self.truth is None else self.truth


def read_series(folder: Path, size: int | None) -> Series:
    """Read a prepared series. size: of the square matrix; None for the longer side of its own.

    Raises InputError naming the file that is damaged, or for windowed 8-bit images."""
    metadata = read_metadata(folder)
    try:
        if metadata["intensity"] != "hu":
            raise stage.InputError(f"{folder}: windowed 8-bit images have no HU (prepare a source with HU)")
        count, rows, columns = metadata["shape"]
        spacing = metadata["spacing_mm"]
        size = size or max(rows, columns)
        fills = {"image": AIR_HU}
        fills |= {"truth": AIR_HU} if metadata["has_truth"] else {}
        fills |= {"mask": 0} if metadata["has_mask"] else {}
        volumes = {
            kind: fit_to_square(read_slices(folder, kind, count), spacing, size, fill)
            for kind, fill in fills.items()
        }
        pixel_mm = square_pixel_mm((rows, columns), spacing, size)
        square = (spacing[0], pixel_mm, pixel_mm)
        noise = math.nan if metadata["noise_hu"] is None else metadata["noise_hu"]
        own_mm = math.sqrt(spacing[1] * spacing[2])
        return Series(
            uid=metadata["series_uid"],
            labels=dict(metadata["labels"]),
            slice_labels=[dict(metadata["slices"][index]["labels"]) for index in range(count)],
            affine=np.asarray(metadata["affine"], float).reshape(4, 4),
            matrix=(rows, columns),
            image=volumes["image"],
            truth=volumes.get("truth"),
            lesions=volumes.get("mask"),
            spacing_mm=square,
            noise_hu=noise,
            flux={name: scan_flux(volumes["image"], square, noise, name, own_mm) for name in SIMULATED},
        )
    except stage.StageError:
        raise
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise malformed(folder / "metadata.json", error, "prepare the series again") from None


@st.cache_resource(show_spinner="Reading the series ...", max_entries=4)
def load_series(metadata_file: Stamp, size: int | None) -> Series:
    return read_series(Path(metadata_file.path).parent, size)


@st.cache_resource(show_spinner=False, max_entries=4)
def load_inside(metadata_file: Stamp, size: int | None, mask: str) -> np.ndarray:
    """(S, n, n) bool, where image quality is measured. mask: a key of anatomy.MASKS."""
    series = load_series(metadata_file, size)
    return anatomy.MASKS[mask](series.reference, series.spacing_mm)


@st.cache_resource(show_spinner="Loading the networks ...", max_entries=16)
def load_network(kind: str, file: Stamp, device: str) -> tuple[nn.Module, dict]:
    load = {"denoiser": load_denoiser, "classifier": load_classifier}[kind]
    return load(Path(file.path), device)


@st.cache_resource(show_spinner=False)
def pick_device(name: str) -> str:
    return str(training.pick_device(name))


# ---------------------------------------------------------------- what the networks make of a slice, cached


class Noise(NamedTuple):
    """A simulated dose, and the seed of its noise."""

    dose_model: str
    dose: float
    seed: int


class Place(NamedTuple):
    """One slice of one series at the matrix of the networks."""

    series: Stamp
    size: int | None
    index: int


def low_dose_slice(series: Series, index: int, noise: Noise) -> np.ndarray:
    """(n, n) float32 HU: the very noise that every arm of run_experiments.py sees in this slice."""
    seed = evaluation_seed(noise.seed, series.uid, index, noise.dose_model, noise.dose)
    simulate = DOSE_MODELS[noise.dose_model].simulate
    hu, flux = to_tensor(series.image[index : index + 1]), series.flux[noise.dose_model]
    return simulate(hu, [noise.dose], [seed], series.spacing_mm[1], flux)[0, 0].numpy()


@st.cache_data(show_spinner=False, max_entries=256)  # 256 MB at 512 x 512
def denoised_slice(place: Place, noise: Noise, denoiser: Stamp, device: str) -> np.ndarray:
    """(n, n) float32 HU."""
    series, model = load_series(place.series, place.size), load_network("denoiser", denoiser, device)[0]
    around = neighbours(np.zeros(len(series.image), int), model.slices)[place.index]
    low = np.stack([low_dose_slice(series, index, noise) for index in around])
    level = noise_level(noise.dose_model, noise.dose, series.noise_hu)
    return denoise(model, low, level)[model.slices // 2]


@st.cache_data(show_spinner=False, max_entries=500)  # a few numbers a slice
def reading(
    place: Place, noise: Noise, classifier: Stamp, denoiser: Stamp | None, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities of slices (S, classes), of the scan (1, classes)), after the denoiser if there is one.

    place: any slice of the series."""
    series = load_series(place.series, place.size)
    if denoiser is None:
        images = [low_dose_slice(series, index, noise) for index in range(len(series.image))]
    else:
        images = [
            denoised_slice(place._replace(index=index), noise, denoiser, device)
            for index in range(len(series.image))
        ]
    return tuple(read(load_network("classifier", classifier, device)[0], np.stack(images)))


class Checkpoint(NamedTuple):
    """A checkpoint that opened."""

    file: Stamp
    facts: dict

    @property
    def name(self) -> str:
        return Path(self.file.path).name


class Arm(NamedTuple):
    """One pipeline with its checkpoints."""

    name: str  # key of LEGEND
    classifier: Checkpoint
    denoiser: Stamp | None


def arms_of(denoiser: Checkpoint | None, classifiers: Sequence[Checkpoint]) -> list[Arm]:
    """What run_experiments.py would measure with these checkpoints, in the order of LEGEND."""
    arms = []
    for classifier in classifiers:
        direct, through = PIPELINES[classifier.facts["input"]]
        if direct:
            arms.append(Arm(direct, classifier, None))
        if through and denoiser is not None and fits_denoiser(classifier.facts, denoiser.file.path):
            arms.append(Arm(through, classifier, denoiser.file))
    return sorted(arms, key=lambda arm: list(LEGEND).index(arm.name))


def arm_labels(names: Sequence[str], classifiers: Sequence[str]) -> list[str]:
    """Labels that tell arms apart: the pipeline, and its classifier where several share the pipeline."""
    users = {name: {c for n, c in zip(names, classifiers, strict=True) if n == name} for name in names}
    return [
        f"{name} {classifier}" if len(users[name]) > 1 else name
        for name, classifier in zip(names, classifiers, strict=True)
    ]


def colours(labels: Sequence[str]) -> alt.Scale:
    """The same colour for the same pipeline in every chart."""
    spare = iter(OTHER_COLOURS * len(labels))
    return alt.Scale(domain=list(labels), range=[ARM_COLOURS.get(label) or next(spare) for label in labels])


# ---------------------------------------------------------------- page 1: results


class Folders(NamedTuple):
    """Where things are, from the command line."""

    data: Path
    models: Path
    results: Path
    device: str


def results_page(folders: Folders) -> None:
    """The result table and its curves."""
    path = folders.results / "experiments.json"
    st.header("Results")
    if not path.exists():
        st.info(f"No results in {plain_text(folders.results)} yet. This makes them:")
        st.code(results_commands(folders), language="bash")
        return
    file = stamp(path)
    manifest, rows = load_results(file)
    show_headline(folders, file, manifest, rows)
    with control_row():
        dose = choose_result_dose(rows)
        tasks = [task for task in rows["task"].unique() if task]
        levels = [level for level in LEVELS if level in set(rows["level"])]
        level = (
            st.segmented_control("Level", levels, default=levels[0], required=True, key="level")
            if levels
            else None
        )
        task = tasks[0] if tasks else None
        if len(tasks) > 1:
            task = st.segmented_control("Task", tasks, default=task, required=True, key="task")
    # what has no level is an image without a classifier: it belongs to both
    chosen = rows[
        (rows["level"].isna() | (rows["level"] == level)) & (rows["task"].isna() | (rows["task"] == task))
    ]
    show_at_dose(chosen[chosen["dose"] == dose])
    st.subheader("Table")
    show_table(chosen)
    st.download_button(
        "Download CSV (all levels, full precision)",
        rows.to_csv(index=False),
        "experiments.csv",
        "text/csv",
        on_click="ignore",
        icon=":material/download:",
    )
    show_legend(chosen["arm"].unique())
    st.subheader("Against dose")
    show_curves(chosen, level)


def show_headline(folders: Folders, file: Stamp, manifest: dict, rows: pd.DataFrame) -> None:
    """What was measured, on whom, with what, when."""
    first = rows.iloc[0]
    doses = ", ".join(f"{dose:g}" for dose in sorted(rows["dose"].unique()))
    model = DOSE_MODELS.get(first["dose_model"])
    measured = datetime.fromtimestamp(file.mtime_ns / 1e9).astimezone()
    with st.container(border=True):
        cells = st.columns((1, 1, 2.2, 1.3, 2))
        cells[0].metric("Test patients", f"{first['n_patients']:,}")
        cells[1].metric("Test slices", f"{first['n_slices']:,}")
        cells[2].metric(f"Doses ({model.unit if model else 'as typed'})", doses)
        cells[3].metric("Dose model", first["dose_model"])
        cells[4].metric("Measured", f"{measured:%Y-%m-%d %H:%M}")
        st.caption(
            f"Image quality inside the {plain_text(first['mask'])}; PSNR and SSIM over "
            f"{plain_text(first['range_hu'])} HU. AUC with "
            "95 % intervals from a bootstrap over patients. Thresholds were chosen on validation patients. "
            f"Data {plain_text(manifest['data'])} · split {plain_text(manifest['split_hash'][:8])} · "
            f"noise seed {first['noise_seed']}"
        )
        st.code(f"python {manifest['command']}", language="bash", wrap_lines=True)
        used = [
            f"{plain_text(name)} `{sha[:8]}` {checkpoint_state(folders.models / name, sha)}"
            for name, sha in manifest["checkpoints"].items()
        ]
        st.caption("Checkpoints: " + " · ".join(used))
    for reason in manifest["left_out"]:
        st.info(f"Left out: {plain_text(reason)}")


def checkpoint_state(path: Path, sha256: str) -> str:
    """Whether the checkpoint that was measured is the one that is there now."""
    try:
        return "(as it is now)" if file_hash(stamp(path)) == sha256 else "(**changed since**)"
    except OSError:
        return "(no longer there)"


def choose_result_dose(rows: pd.DataFrame) -> float:
    """The dose whose numbers are shown large."""
    doses = sorted(rows["dose"].unique())
    dose_model = rows["dose_model"].iloc[0]
    return st.segmented_control(
        "At a glance, at dose (share of routine)",
        doses,
        default=doses[0],
        required=True,
        format_func=lambda dose: dose_text(dose_model, dose),
        key="glance",
    )


def show_at_dose(rows: pd.DataFrame) -> None:
    """The numbers of one dose, large: AUC of each pipeline, and what denoising does to the image."""
    classified = rows[rows["level"].notna()]
    names = arm_labels(list(classified["arm"]), list(classified["classifier"]))
    cards = [
        (
            f"AUC, pipeline {plain_text(name)}",
            metrics.shown(row["auc"]),
            f"{metrics.shown(row['auc_low'])} to {metrics.shown(row['auc_high'])}",
            f"{LEGEND.get(row['arm'], '')}; below: 95 % interval",
        )
        for name, (_, row) in zip(names, classified.iterrows(), strict=True)
    ]
    denoised = rows[rows["denoiser"].notna()]
    row = denoised.iloc[0] if len(denoised) else rows.iloc[0]
    what = "denoised" if len(denoised) else "low dose"
    for column, unit, digits in (("rmse_hu", " HU", 2), ("psnr", " dB", 2), ("ssim", "", 3)):
        before = f"low dose {metrics.shown(row[f'{column}_noisy'], digits)}" if len(denoised) else None
        value = metrics.shown(row[column], digits)
        name = column.removesuffix("_hu").upper()
        cards.append((f"{name}, {what}", value + (unit if value != "n/a" else ""), before, TABLE[column][2]))
    for start in range(0, len(cards), CARDS_IN_A_ROW):
        cells = st.columns(CARDS_IN_A_ROW if len(cards) > CARDS_IN_A_ROW else len(cards))
        for cell, (label, value, below, meaning) in zip(cells, cards[start:], strict=False):
            cell.metric(label, value, below, delta_color="off", delta_arrow="off", border=True, help=meaning)


def show_table(rows: pd.DataFrame) -> None:
    """Every number of one level, sortable."""
    config = {}
    for column, (heading, form, meaning) in TABLE.items():
        if form is None:
            config[column] = st.column_config.TextColumn(heading, help=meaning)
        else:
            config[column] = st.column_config.NumberColumn(heading, help=meaning, format=form)
    for column in ("dose", "arm"):
        config[column]["pinned"] = True
    st.dataframe(rows[list(TABLE)], hide_index=True, column_config=config, placeholder="n/a")


def show_legend(arms: Sequence[str]) -> None:
    """What the pipelines in sight are."""
    lines = [f"**{arm}** {LEGEND[arm]}" for arm in LEGEND if arm in arms]
    if lines:
        st.caption("Pipelines: " + " · ".join(lines).replace("->", "→"))


def show_curves(rows: pd.DataFrame, level: str | None) -> None:
    """AUC per pipeline and image quality, low dose and denoised, against dose."""
    doses, panels = sorted(rows["dose"].unique()), []
    classified = rows[rows["auc"].notna()]
    if len(classified):
        names = arm_labels(list(classified["arm"]), list(classified["classifier"]))
        frame = classified[["dose", "auc", "auc_low", "auc_high"]].assign(line=names)
        chart = dose_curve(frame, "auc", "AUC", doses, "auc_low", "auc_high")
        panels.append((f"AUC per {level}, 95 % band", chart))
    for column, title in IMAGE_PANELS.items():
        lines = [rows[["dose"]].assign(value=rows[f"{column}_noisy"], line="low dose")]
        denoised = rows[rows["denoiser"].notna()]
        lines.append(denoised[["dose"]].assign(value=denoised[column], line="denoised"))
        if denoised["denoiser"].nunique() > 1:
            lines[-1]["line"] = denoised["denoiser"]
        # arms that share a denoiser share their images
        frame = pd.concat(lines).dropna().drop_duplicates(["dose", "line"])
        if len(frame):
            panels.append((title, dose_curve(frame.rename(columns={"value": column}), column, title, doses)))
    cells = [*st.columns(2), *st.columns(2)]
    for cell, panel in zip(cells, panels, strict=False):
        with cell, st.container(border=True):
            title, chart = panel
            st.markdown(f"**{title}**")
            st.altair_chart(chart, width="stretch")


def dose_curve(
    frame: pd.DataFrame,
    column: str,
    title: str,
    doses: Sequence[float],
    low: str | None = None,
    high: str | None = None,
) -> alt.LayerChart:
    """A column against dose on a log axis, one line per `line`, with a band from low to high."""
    x = alt.X(
        "dose:Q",
        title="dose, log scale",
        scale=alt.Scale(type="log", domain=[doses[0] / 1.15, doses[-1] * 1.15], nice=False),
        axis=alt.Axis(values=doses, format="~g", grid=True),
    )
    colour = alt.Color(
        "line:N",
        title=None,
        scale=colours(list(dict.fromkeys(frame["line"]))),
        legend=alt.Legend(orient="top", symbolType="circle", symbolOpacity=1),
    )
    shown = [
        "line:N",
        alt.Tooltip("dose:Q", format="~g"),
        alt.Tooltip(f"{column}:Q", format=".3f", title=title),
    ]
    scale = alt.Scale(zero=False, nice=False, padding=10)
    base = alt.Chart(frame).encode(x=x, color=colour)
    layers = []
    if low is not None:
        shown += [alt.Tooltip(f"{end}:Q", format=".3f") for end in (low, high)]
        layers.append(
            base.mark_area(opacity=0.1).encode(y=alt.Y(f"{low}:Q", title=title, scale=scale), y2=f"{high}:Q")
        )
    layers.append(
        base.mark_line(point=alt.OverlayMarkDef(size=50, filled=True), strokeWidth=2).encode(
            y=alt.Y(f"{column}:Q", title=title, scale=scale), tooltip=shown
        )
    )
    return alt.layer(*layers).properties(height=320)


# ---------------------------------------------------------------- page 2: one scan


def scan_page(folders: Folders) -> None:
    """One series: full dose, low dose, denoised and difference, and what the classifiers say."""
    st.header("Scan")
    splits = {split: folders.data / split for split in SPLIT_NOTES}
    splits = {split: path for split, path in splits.items() if path.is_dir() and has_series(stamp(path))}
    if not splits:
        st.info(f"No prepared data in {plain_text(folders.data)} yet. This makes some:")
        st.code(
            f"python prepare_dataset.py --source phantom --patients 40 --out {quoted(folders.data)}\n"
            f"python split_dataset.py --data {quoted(folders.data)}\n"
            "# or everything on a synthetic phantom, results included:\nmake demo",
            language="bash",
        )
        return
    device = pick_device(folders.device)
    denoiser, classifiers = find_checkpoints(folders, device)
    seed, mask = study_settings(folders)
    folder = choose_series(splits)
    found = [*([denoiser] if denoiser else []), *classifiers]
    size = found[0].facts["size"] if found else None
    file = stamp(folder / "metadata.json")
    series = load_series(file, size)
    with control_row():
        noise = choose_dose(found, seed)
        window = choose_window()
    with control_row():
        index = choose_slice(series)
        display = choose_display(series)
    place = Place(file, size, index)
    full, low = series.image[index].astype(np.float32), low_dose_slice(series, index, noise)
    denoised = denoised_slice(place, noise, denoiser.file, device) if denoiser else None
    inside = load_inside(file, size, mask)[index]
    show_views(series, index, inside, noise, Images(full, low, denoised), window, display)
    sides = (
        f"{len(full)} x {len(full)} pixels{', the matrix of the networks and of the study' if found else ''}"
    )
    against = "the full dose" if series.truth is None else "the noise-free truth"
    st.caption(
        f"All images at {sides} (this series has {series.matrix[0]} x {series.matrix[1]}). The noise is that "
        f"of the study: seed {noise.seed}, this series, slice and dose. RMSE inside the {mask}, against "
        f"{against}."
    )
    show_scores(series, place, noise, arms_of(denoiser, classifiers), device)


def find_checkpoints(folders: Folders, device: str) -> tuple[Checkpoint | None, list[Checkpoint]]:
    """Open what run_experiments.py would use; say in one line each what is missing, damaged or unfit."""
    paths = [("denoiser", folders.models / "denoiser.pt")]
    own = checkpoints.finished(folders.models, "classifier") or [folders.models / "classifier.pt"]
    paths += [("classifier", path) for path in own]
    found: dict[str, list[Checkpoint]] = {"denoiser": [], "classifier": []}
    missing = []
    for kind, path in paths:
        if not path.exists():
            missing.append(
                f"python train_{kind}.py --data {quoted(folders.data)} --out {quoted(folders.models)}"
            )
            continue
        try:
            file = stamp(path)
            found[kind].append(Checkpoint(file, fit_facts(path, kind, load_network(kind, file, device)[1])))
        except stage.StageError as error:
            st.error(plain_text(error))
    if missing:
        st.info("No checkpoint for what follows; shown is what goes without. This trains it:")
        st.code("\n".join(missing), language="bash")
    usable = []
    for checkpoint in [*found["denoiser"], *found["classifier"]]:
        if usable and checkpoint.facts["size"] != usable[0].facts["size"]:
            st.error(
                plain_text(
                    f"{checkpoint.file.path}: size {checkpoint.facts['size']}, but {usable[0].name} has "
                    f"{usable[0].facts['size']}; left out (train them alike)"
                )
            )
            continue
        usable.append(checkpoint)
    warn_of_split(folders, usable)
    return (
        next((c for c in usable if c.facts["stage"] == "denoiser"), None),
        [c for c in usable if c.facts["stage"] == "classifier"],
    )


def fit_facts(path: Path, kind: str, facts: dict) -> dict:
    """The facts of a checkpoint if all that the app needs is there. Raises InputError."""
    needed = {"stage", "size", "dose_model", "doses", "split_hash"}
    try:
        if kind == "classifier":
            needed |= {"input", "task", "classes", "assume_absent", "thresholds", "parents"}
            task_targets(facts["task"], [], facts["assume_absent"])
            if facts["input"] not in PIPELINES:
                raise KeyError(f"input {facts['input']}")
            needed |= {f"threshold per {name}" for name in LEVELS if "value" not in facts["thresholds"][name]}
        if missing := sorted(needed - set(facts)):
            raise KeyError(", ".join(missing))
    except (KeyError, TypeError) as error:
        raise malformed(path, error, "train again") from None
    return facts


def warn_of_split(folders: Folders, found: Sequence[Checkpoint]) -> None:
    """A checkpoint of another split may have been trained on the very patient that is shown."""
    try:
        split_hash = read_splits(folders.data)["hash"]
    except (stage.StageError, KeyError, TypeError):
        return  # nothing is split yet: there is nothing to compare with
    others = [checkpoint.name for checkpoint in found if checkpoint.facts["split_hash"] != split_hash]
    if others:
        st.warning(
            plain_text(
                f"{', '.join(others)}: trained on another split than {folders.data}/splits.json; "
                "patients shown here as test may have been in training."
            )
        )


def control_row():
    """A row of controls, as wide as they need."""
    return st.container(horizontal=True, vertical_alignment="bottom", gap="medium")


def choose_series(splits: dict[str, Path]) -> Path:
    """The split and the series in it; opens at the first one with a lesion."""
    with control_row():
        names = list(splits)
        split = st.segmented_control(
            "Split", names, default=names[0], required=True, key="split", persist_state="session"
        )
        series = list_series(stamp(splits[split]))
        names = list(series)
        first = next((number for number, name in enumerate(names) if series[name][1]), 0)
        name = st.selectbox(
            f"Series ({len(names)} in {split}; {SPLIT_NOTES[split]})",
            names,
            first,
            format_func=lambda name: series[name][0],
            key=f"series-{split}",
            persist_state="session",
        )
    return Path(name)


def study_settings(folders: Folders) -> tuple[int, str]:
    """Noise seed and mask of the results, or the study's defaults where there are none."""
    path = folders.results / "experiments.json"
    if path.exists():
        try:
            first = load_results(stamp(path))[1].iloc[0]
            if first["mask"] in anatomy.MASKS:
                return int(first["noise_seed"]), first["mask"]
        except stage.StageError as error:
            st.warning(plain_text(f"{error}; noise seed {NOISE_SEED} is used"))
    return NOISE_SEED, anatomy.DEFAULT_MASK


def choose_dose(found: Sequence[Checkpoint], seed: int) -> Noise:
    """Dose model and dose, as the checkpoints were trained where they say so."""
    models = sorted(SIMULATED)
    trained = next((c.facts["dose_model"] for c in found if c.facts["dose_model"] in models), models[0])
    dose_model = st.selectbox(
        "Dose model", models, models.index(trained), key="dose-model", persist_state="session"
    )
    own = [c.facts["doses"] for c in found if c.facts["dose_model"] == dose_model and c.facts["doses"]]
    doses = sorted(float(dose) for dose in (own[0] if own else DOSE_MODELS[dose_model].doses))
    dose = st.segmented_control(
        f"Dose ({DOSE_MODELS[dose_model].unit})",
        doses,
        default=doses[len(doses) // 2],
        required=True,
        format_func=lambda dose: f"{dose:g}",
        key=f"dose-{dose_model}-{doses}",
        persist_state="session",
    )
    return Noise(dose_model, dose, seed)


def choose_window() -> tuple[float, float]:
    """Centre and width in HU."""
    names = [*WINDOWS, OWN_WINDOW]
    name = st.segmented_control(
        "Window, centre / width (HU)",
        names,
        default=names[0],
        required=True,
        format_func=lambda name: "{} {}/{}".format(name, *WINDOWS[name]) if name in WINDOWS else name,
        key="window",
        persist_state="session",
    )
    if name in WINDOWS:
        return WINDOWS[name]
    center = st.number_input("Centre", -1024, 3071, 40, 5, key="centre", width=130, persist_state="session")
    width = st.number_input("Width", 1, 4096, 80, 5, key="width", width=130, persist_state="session")
    return float(center), float(width)


class Display(NamedTuple):
    """How the four views are drawn."""

    range_hu: float  # of the difference, at full colour
    large: bool  # two rows of two
    outlines: bool


def choose_display(series: Series) -> Display:
    """The outlines can be switched where the series has a mask."""
    range_hu = st.segmented_control(
        "Difference, full colour at (HU)",
        DIFFERENCE_RANGES_HU,
        default=20,
        required=True,
        format_func=lambda value: f"±{value}",
        key="difference",
        persist_state="session",
    )
    large = st.toggle("Large views", key="large", persist_state="session")
    outlines = series.lesions is not None and st.toggle(
        "Lesion outline", value=True, key="outline", persist_state="session"
    )
    return Display(range_hu, large, outlines)


def choose_slice(series: Series) -> int:
    """Index of the slice, from a slider that counts from 1."""
    count = len(series.image)
    if count == 1:
        st.caption("Slice 1/1")
        return 0
    return (
        st.slider(
            "Slice, from the feet to the head",
            1,
            count,
            first_look(series.slice_labels) + 1,
            format=f"%d/{count}",
            key=f"slice-{series.uid}",
            persist_state="session",
        )
        - 1
    )


class Images(NamedTuple):
    """One slice, (n, n) float32 HU each, as stored."""

    full: np.ndarray
    low: np.ndarray
    denoised: np.ndarray | None


def show_views(
    series: Series,
    index: int,
    inside: np.ndarray,
    noise: Noise,
    images: Images,
    window: tuple[float, float],
    display: Display,
) -> None:
    """Full dose, low dose, denoised and difference side by side, with their errors."""
    affine = series.affine
    reference = series.reference[index]
    side = max(VIEW_PX, len(images.full))
    number = f"{index + 1}/{len(series.image)}"
    lesions = radiological(series.lesions[index], affine) if display.outlines else None

    def picture(rgb: np.ndarray, note: Note) -> bytes:
        rgb = enlarge(radiological(rgb, affine), side)
        return annotate(rgb if lesions is None else draw_outlines(rgb, lesions), note)

    def grey(hu: np.ndarray) -> bytes:
        shown = to_grey(hu, *window)
        note = Note(number, f"C {window[0]:g} W {window[1]:g}")
        return picture(np.repeat(shown[..., None], 3, axis=2), note)

    def error(hu: np.ndarray) -> str:
        return f"RMSE **{metrics.shown(metrics.rmse_hu(hu, reference, inside), 2)} HU**"

    views = [
        (
            "Full dose",
            error(images.full) if series.truth is not None else "as prepared",
            grey(images.full),
        ),
        (f"Low dose, {dose_text(noise.dose_model, noise.dose)}", error(images.low), grey(images.low)),
    ]
    last, what = images.low, "low dose"
    if images.denoised is not None:
        last, what = images.denoised, "denoised"
        views.append(("Denoised", error(last), grey(last)))
    span = f"{display.range_hu:g}"
    note = Note(number, f"-{span} to +{span} HU", display.range_hu)
    views.append(
        (
            "Difference",
            f"{what} - full dose, blue -{span}, red +{span} HU",
            picture(difference_rgb(last - images.full, display.range_hu), note),
        )
    )
    cells = [*st.columns(2), *st.columns(2)] if display.large else st.columns(4)
    for cell, (title, below, png) in zip(cells, views, strict=False):
        cell.markdown(f"**{title}**")
        cell.image(png, output_format="PNG", width="stretch", alt=f"{title}, slice {number}")
        cell.caption(below)
    if lesions is not None:
        kinds = dict(enumerate(anatomy.LESION_CLASSES, 1))
        seen = [kinds.get(int(value), "lesion of unknown kind") for value in np.unique(lesions) if value]
        st.caption("Outlined in this slice: " + (", ".join(seen) if seen else "no lesion"))


def show_scores(series: Series, place: Place, noise: Noise, arms: list[Arm], device: str) -> None:
    """The slice's truth, what every pipeline says of slice and scan, and all slices in a strip."""
    one_series = np.zeros(len(series.image), int)
    st.markdown(
        f"**Truth** · slice {place.index + 1}: {finding(series.slice_labels[place.index])} · "
        f"scan: {finding(series.labels)}"
    )
    if not arms:
        st.caption("No classifier, no probabilities.")
        return
    labels = arm_labels([arm.name for arm in arms], [arm.classifier.name for arm in arms])
    scores = all_scores(place, noise, arms, device)
    table, strips = [], {}
    for arm, label, (values, scan) in zip(arms, labels, scores, strict=True):
        facts = arm.classifier.facts
        task, absent = TASKS[facts["task"]], facts["assume_absent"]
        targets = task.positive(task_targets(facts["task"], series.slice_labels, absent))
        levels = {
            "slice": (values[place.index], targets[place.index]),
            "scan": (scan, metrics.scan_scores(targets, one_series)[0]),
        }
        row = {"Pipeline": label, "Task": facts["task"]}
        for level, (score, target) in levels.items():
            threshold = facts["thresholds"][level]["value"]
            row |= {
                f"{level} probability": score,
                f"{level} threshold": threshold,
                f"{level} verdict": verdict(score, threshold),
                f"{level} truth": truth_text(target),
            }
        table.append(row | {"Classifier": arm.classifier.name})
        strips.setdefault(facts["task"], []).append((label, values, row["slice threshold"], targets))
    show_score_table(table)
    show_legend([arm.name for arm in arms])
    for task, lines in strips.items():
        with st.container(border=True):
            st.altair_chart(score_strip(task, lines, place.index), width="stretch")
    st.caption(
        "Probability of every slice at this dose. Shaded: slices with a lesion of the task. Dashed: "
        "threshold of the pipeline's classifier. The scan's probability is that of its highest slice."
    )


def all_scores(
    place: Place, noise: Noise, arms: Sequence[Arm], device: str
) -> list[tuple[np.ndarray, float]]:
    """What each arm answers to its task's question: (probabilities of the slices (S,), of the scan)."""
    scores = []
    with st.spinner("Reading the scan"):
        for arm in arms:
            slices, scan = reading(place._replace(index=0), noise, arm.classifier.file, arm.denoiser, device)
            positive = TASKS[arm.classifier.facts["task"]].positive
            scores.append((positive(slices), float(positive(scan)[0])))
    return scores


def show_score_table(table: list[dict]) -> None:
    """One row per pipeline: slice and scan."""
    config: dict[str, Any] = {}
    for level in LEVELS:
        config[f"{level} probability"] = st.column_config.ProgressColumn(
            f"{level.capitalize()} probability", format="%.3f", min_value=0.0, max_value=1.0
        )
        config[f"{level} threshold"] = st.column_config.NumberColumn("Threshold", format="%.3f")
        config[f"{level} verdict"] = st.column_config.TextColumn("Verdict")
        config[f"{level} truth"] = st.column_config.TextColumn("Truth")
    frame = pd.DataFrame(table).astype({f"{level} threshold": float for level in LEVELS})
    st.dataframe(frame, hide_index=True, column_config=config, placeholder="n/a")


def score_strip(task: str, lines: Sequence[tuple], index: int) -> alt.LayerChart:
    """Probability against slice. lines: per pipeline label, (S,) scores, threshold or None, (S,) targets."""
    labels = [label for label, *_ in lines]
    count = len(lines[0][1])
    colour = alt.Color("pipeline:N", title=None, scale=colours(labels), legend=alt.Legend(orient="top"))
    frame = pd.concat(
        pd.DataFrame({"slice": np.arange(1, count + 1), "probability": scores, "pipeline": label})
        for label, scores, *_ in lines
    )
    x = alt.X(
        "slice:Q",
        title="slice",
        scale=alt.Scale(domain=[0.5, count + 0.5], nice=False),
        axis=alt.Axis(values=list(range(1, count + 1, 1 + count // 40)), format="d", grid=False),
    )
    y = alt.Y(
        "probability:Q",
        title=f"{task} probability",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(values=[0, 0.5, 1]),
    )
    hit = 1 + np.flatnonzero(lines[0][3] == 1)
    layers = [
        alt.Chart(pd.DataFrame({"from": hit - 0.5, "to": hit + 0.5}))
        .mark_rect(color="#d6604d", opacity=0.15)
        .encode(x=alt.X("from:Q", title="slice"), x2="to:Q"),
        alt.Chart(pd.DataFrame({"slice": [index + 1]})).mark_rule(color="#888888", strokeWidth=2).encode(x=x),
        alt.Chart(frame)
        .mark_line(point=True, strokeWidth=2)
        .encode(
            x=x, y=y, color=colour, tooltip=["pipeline", "slice", alt.Tooltip("probability", format=".3f")]
        ),
    ]
    known = [(label, value) for label, _, value, _ in lines if value is not None]
    if known:
        thresholds = pd.DataFrame(known, columns=["pipeline", "probability"])
        layers.append(
            alt.Chart(thresholds).mark_rule(strokeDash=[5, 4], strokeWidth=1).encode(y=y, color=colour)
        )
    return alt.layer(*layers).properties(height=280)


# ---------------------------------------------------------------- the app


def get_parser() -> stage.StageParser:
    parser = stage.StageParser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("dataset"), help="prepared data (default: dataset)")
    parser.add_argument(
        "--models", type=Path, default=Path("saved_models"), help="checkpoints (default: saved_models)"
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="results (default: results)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


def show(page: Callable[[Folders], None], folders: Folders) -> None:
    """A page under the notice; whatever goes wrong in it becomes one line."""
    st.caption(f"Low-dose head CT · **{NOTICE}**, not a medical device")
    try:
        page(folders)
    except stage.StageError as error:
        st.error(plain_text(error))
    except OSError as error:
        st.error(plain_text(f"{error.filename or 'file'}: {error.strerror or error}"))
    except Exception as error:  # noqa: BLE001 the border: the page ends in one line, the server's log has the rest
        stage.log.exception("%s failed", page.__name__)
        st.error(plain_text(f"{type(error).__name__}: {error}"))


def main(argv: list[str] | None = None) -> None:
    st.set_page_config("Low-dose head CT", icon(), layout="wide")
    st.html(STYLE)
    try:
        args = get_parser().parse_args(argv)
    except stage.StageError as error:
        st.error(plain_text(error))
        return
    except SystemExit:  # --help
        st.code(get_parser().format_help(), language=None)
        return
    folders = Folders(args.data, args.models, args.results, args.device)
    pages = [
        st.Page(
            lambda: show(results_page, folders),
            title="Results",
            icon=":material/analytics:",
            url_path="results",
            default=True,
        ),
        st.Page(lambda: show(scan_page, folders), title="Scan", icon=":material/radiology:", url_path="scan"),
    ]
    st.navigation(pages, position="top").run()


def icon() -> Image.Image:
    """A skull from above. Streamlit would fetch the icon of a page from a foreign host."""
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((12, 4, 52, 60), fill=(90, 90, 90), outline=(230, 159, 0), width=6)
    return image


def start() -> None:
    """What `python app.py` does: a browser needs Streamlit's server."""
    get_parser().parse_args()
    raise stage.InputError("the app runs in Streamlit: streamlit run app.py -- --data dataset")


if __name__ == "__main__":
    if st.runtime.exists():
        main()
    else:
        stage.run(start)
