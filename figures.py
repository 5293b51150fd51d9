"""The figures of a study, from its tables: as wide as a journal's page, as PNG and as SVG.

Each function takes rows and looks (label -> Look) and gives a Figure. One colour and one marker stand for an
arm in all of them. Ink and grid have colours of their own, INK and FAINT, so that a page can set others."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from sklearn.metrics import roc_curve

import stage
from calibration import reliability
from comparisons import KINDS
from display import FOUND_RGB, TRUE_RGB
from dose import DOSE_MODELS
from study import LEVELS

WIDTH_INCHES = {1: 3.5, 2: 5.2}  # by panels side by side: one column of a journal, one and a half
PAGE_INCHES = 7.2  # both columns
SLICE_DPI = 150  # of slices in an SVG, whose lines have none: 216 pixels a slice
DPI = 300  # of PNG: what journals ask of pictures that mix lines and grey
INK, FAINT = "#26282b", "#d8dadd"
GREY = "#8a8d91"  # seen on white and on black
STYLE = {
    **{"font.size": 7.5, "axes.titlesize": 8, "axes.labelsize": 7.5, "legend.fontsize": 7.5},
    **{"xtick.labelsize": 7, "ytick.labelsize": 7, "lines.linewidth": 1.3, "lines.markersize": 4},
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6},
    **{"axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.5, "axes.axisbelow": True},
    **{"axes.facecolor": "none", "legend.frameon": False, "xtick.major.width": 0.6, "ytick.major.width": 0.6},
    **{"svg.hashsalt": "study", "svg.fonttype": "path"},  # the same bytes from the same rows, on any machine
}
styled = matplotlib.rc_context(STYLE)

# Okabe and Ito 2008 and Tol's muted scheme, told apart by the colour-blind, seen on white and on black
ARM_COLOURS = {"1": "#e69f00", "1n": "#cc79a7", "2": "#0072b2", "2d": "#009e73", "2j": "#d55e00"}
OTHER_COLOURS = ("#56b4e9", "#999933", "#cc6677", "#7570b3", "#44aa99", "#aa4499")
MARKERS = "osD^vPX<>*h"
NAMES = {"auc": "AUC", "sens": "sensitivity", "spec": "specificity"}
SCORES = {"acc": "accuracy", **NAMES, "prec": "precision", "f1": "F1"}
NOISY = "none"  # denoiser of the low dose as it is


class Look(NamedTuple):
    colour: str
    marker: str


def arm_looks(labels: Sequence[str]) -> dict[str, Look]:
    """A look for each arm: its pipeline's colour for the first of a pipeline, others for the rest."""
    spare, found = iter(OTHER_COLOURS * len(labels)), {}
    taken = set()
    for number, label in enumerate(labels):
        pipeline = label.split(" ")[0]
        own = None if pipeline in taken else ARM_COLOURS.get(pipeline)
        taken.add(pipeline)
        found[label] = Look(own or next(spare), MARKERS[number % len(MARKERS)])
    return found


def image_looks(denoisers: Iterable[str]) -> dict[str, Look]:
    """A look for each denoiser; NOISY is drawn in ink."""
    others = [name for name in dict.fromkeys(denoisers) if name != NOISY]
    # from the other end than arms, so that hardly a colour means both
    looks = zip(OTHER_COLOURS[::-1] * len(others), MARKERS[1:] * len(others), strict=False)
    return {NOISY: Look(INK, MARKERS[0])} | dict(zip(others, (Look(*one) for one in looks), strict=False))


# ---------------------------------------------------------------- what all figures share


@styled
def save(folder: Path, name: str, figure: Figure) -> str:
    """Write <folder>/<name>.png and .svg, the same bytes every time. Returns the text of the SVG."""
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)
        figure.set_layout_engine("none")  # laid out once, not for each file
    picture, drawing = io.BytesIO(), io.StringIO()
    figure.savefig(picture, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    figure.savefig(
        drawing, format="svg", dpi=SLICE_DPI, facecolor="none", metadata={"Date": None, "Creator": None}
    )
    for end, content in (("png", picture.getvalue()), ("svg", drawing.getvalue().encode())):
        with stage.atomic_write(Path(folder) / f"{name}.{end}", "wb") as file:
            file.write(content)
    return drawing.getvalue()


def _grid(titles: Sequence[str], columns: int = 3, height: float = 1.9) -> tuple[Figure, list[Axes]]:
    """A panel for each title. height: of a panel in inches."""
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    size = WIDTH_INCHES.get(columns, PAGE_INCHES), rows * height + 0.3
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(titles) :]:
        axis.remove()
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title)
    return figure, axes[: len(titles)]


def _legend(figure: Figure, title: str | None = None) -> None:
    """One legend below all panels."""
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if not handles:
        return
    columns = min(len(handles), max(1, int(figure.get_figwidth() * 13 / max(map(len, handles)))), 6)
    figure.legend(
        handles.values(),
        handles,
        loc="outside lower center",
        ncols=columns,
        title=title,
        title_fontsize=7.5,
        handlelength=2.4,
    )


def known(value: float | None) -> float:
    """A number of a table, NaN where there is none."""
    return math.nan if value is None else float(value)


def place(row: dict) -> float:
    """Where a dose stands on its axis: per cent of routine, or in the unit of a model without routine."""
    share = known(row["dose_fraction"])
    return row["dose"] if math.isnan(share) else 100 * share


def dose_words(dose_model: str, dose: float) -> str:
    """A dose in words, e.g. "25 %" of routine; "none" where it is NaN."""
    if math.isnan(known(dose)):
        return "none"
    model = DOSE_MODELS[dose_model]
    share = model.fraction(dose)
    return f"{model.unit} {dose:g}" if share is None else f"{100 * share:g} %"


def _column(rows: Sequence[dict], name: str) -> np.ndarray:
    return np.array([known(row.get(name)) for row in rows])


def _dose_axis(axis: Axes, rows: Sequence[dict]) -> None:
    ticks = sorted({place(row) for row in rows})
    shared = all(math.isnan(known(row["dose_fraction"])) for row in rows)
    axis.set_xscale("log")
    axis.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if len(ticks) > 6:
        axis.tick_params(axis="x", labelrotation=90)
    axis.set_xlabel("dose, lambda" if shared else "dose, % of routine")


def _curve(
    axis: Axes, x: np.ndarray, rows: Sequence[dict], name: str, look: Look, label: str, **line
) -> None:
    """A column of rows with its interval, as a band, or as bars where there is one place only."""
    y, low, high = (_column(rows, name + end) for end in ("", "_low", "_high"))
    axis.plot(x, y, color=look.colour, marker=look.marker, label=label, **line)
    if len(x) > 1:
        axis.fill_between(x, low, high, color=look.colour, alpha=0.13, linewidth=0)
    else:
        _bars(axis, x, y, low, high, look)


def _bars(axis: Axes, x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, look: Look) -> None:
    reach = np.stack([y - low, high - y]).clip(0)  # an end of a bootstrap may lie inside
    axis.errorbar(x, y, reach, fmt="none", ecolor=look.colour, elinewidth=0.9, capsize=2)


def _beside(number: int, count: int) -> float:
    """Factor of a dose by which the marks of an arm stand beside those of others."""
    return 1.03 ** (number - (count - 1) / 2)


def of_arm(rows: Sequence[dict], **wanted: Any) -> dict[str, list[dict]]:
    """Rows with these values, by arm, the lowest dose first."""
    own = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return {
        arm: sorted((row for row in own if row["arm"] == arm), key=lambda row: row["dose"])
        for arm in dict.fromkeys(row["arm"] for row in own)
    }


# ---------------------------------------------------------------- doses and arms


@styled
def dose_response(rows: Sequence[dict], looks: dict[str, Look]) -> Figure:
    """AUC, sensitivity and specificity against dose. rows: of tables.dose_response, of a task and model."""
    levels = [level for level in reversed(LEVELS) if any(row["level"] == level for row in rows)]
    figure, axes = _grid([f"{name}, per {level}" for level in levels for name in NAMES.values()])
    for number, axis in enumerate(axes):
        level, kind = levels[number // len(KINDS)], KINDS[number % len(KINDS)]
        arms = of_arm(rows, level=level)
        for nth, (arm, own) in enumerate(arms.items()):
            x = np.array([place(row) for row in own]) * _beside(nth, len(arms))
            _curve(axis, x, own, kind, looks[arm], f"arm {arm}")
            sd, y = _column(own, f"{kind}_seed_sd"), _column(own, kind)
            axis.errorbar(
                x, y, np.nan_to_num(sd), fmt="none", ecolor=looks[arm].colour, elinewidth=0.6, capsize=1.5
            )
        if kind == "auc":
            for null in {known(row["auc_null"]) for own in arms.values() for row in own}:
                axis.axhline(null, color=GREY, linestyle="--", linewidth=0.9, label="position alone")
        _dose_axis(axis, rows)
        bottom, top = axis.get_ylim()
        axis.set_ylim(max(bottom, -0.02), min(top, 1.02))
    _legend(figure)
    return figure


@styled
def non_inferiority(rows: Sequence[dict], looks: dict[str, Look]) -> Figure:
    """Differences to the reference with intervals, against the margin.

    rows: of tables.against_reference, of a task, model and level. Marks: filled where non-inferior, a cross
    where inferior, else open."""
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    doses = sorted({row["dose"] for row in rows}, reverse=True)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = len(doses) * (len(arms) + 1)
    titles = [f"difference of {NAMES[kind]}" for kind in kinds]
    figure, axes = _grid(titles, height=0.16 * lines + 0.5)
    for axis, kind in zip(axes, kinds, strict=True):
        for row in (row for row in rows if row["kind"] == kind):
            look = looks[row["arm"]]
            y = -doses.index(row["dose"]) * (len(arms) + 1) - arms.index(row["arm"])
            axis.plot([known(row["low"]), known(row["high"])], [y, y], color=look.colour, linewidth=1.1)
            shape = "X" if row["outcome"] == "inferior" else look.marker
            filled = row["outcome"] in ("non-inferior", "inferior")
            axis.plot(
                known(row["estimate"]),
                y,
                shape,
                color=look.colour,
                markerfacecolor=look.colour if filled else "none",
                markersize=5 if shape == "X" else 4,
                label=f"arm {row['arm']}" if filled and shape != "X" else None,
            )
        margin = next(row["margin"] for row in rows if row["kind"] == kind)
        axis.axvline(0, color=INK, linewidth=0.7)
        axis.axvline(-margin, color="#d55e00", linewidth=1, linestyle="--")
        left, right = axis.get_xlim()
        left = min(left, -1.5 * margin)
        axis.axvspan(left, -margin, color="#d55e00", alpha=0.07, linewidth=0)
        axis.set_xlim(left, right)
        middle = (len(arms) - 1) / 2
        places = [-number * (len(arms) + 1) - middle for number in range(len(doses))]
        axis.set_yticks(places, [dose_words(rows[0]["dose_model"], dose) for dose in doses])
        axis.set_ylim(-lines + 1.3, 0.7)
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel(f"arm - reference; margin {margin:g}")
    axes[0].set_ylabel("dose")
    for arm in arms:  # also those without a filled mark
        axes[0].plot([], [], looks[arm].marker, color=looks[arm].colour, label=f"arm {arm}")
    _legend(figure)
    return figure


@styled
def strata(rows: Sequence[dict], looks: dict[str, Look]) -> Figure:
    """Sensitivity by subtype and size of the lesion against dose.

    rows: of tables.strata, of a task and model."""
    names = list(dict.fromkeys(row["stratum"] for row in rows))
    counts = {row["stratum"]: row["n"] for row in rows}
    figure, axes = _grid([f"{stratum_words(name)}, n = {counts[name]}" for name in names], 4, 1.6)
    for axis, name in zip(axes, names, strict=True):
        arms = of_arm(rows, stratum=name)
        for nth, (arm, own) in enumerate(arms.items()):
            x = np.array([place(row) for row in own]) * _beside(nth, len(arms))
            _curve(axis, x, own, "sens", looks[arm], f"arm {arm}")
        _dose_axis(axis, rows)
        axis.set_ylim(-0.03, 1.03)
    for axis in axes[::4]:
        axis.set_ylabel("sensitivity per scan")
    _legend(figure)
    return figure


def stratum_words(name: str) -> str:
    """A stratum in words: under_1_ml is "under 1 ml"."""
    return name.replace("_", " ")


# ---------------------------------------------------------------- images

QUALITY = {
    **{"rmse_hu": "RMSE, HU", "psnr": "PSNR, dB", "ssim": "SSIM"},
    **{"noise_sd_ratio": "noise SD / at highest dose", "spectrum_distance": "change of texture"},
    "edge_sharpness_brain": "sharpness of edges in brain",
    **{"contrast_kept_blood": "contrast kept, blood", "cnr_blood": "CNR, blood"},
    "d_prime_bleed": "d', bleed of 8 mm and 10 HU",
    **{"contrast_kept_infarct": "contrast kept, infarct", "cnr_infarct": "CNR, infarct"},
    "d_prime_infarct": "d', infarct of 12 mm and -5 HU",
}
TISSUE_WORDS = {"brain": "brain", "csf": "CSF", "bone": "bone", "skin": "soft tissue"}
TISSUES = {
    f"{name}_{tissue}_hu": f"{words} in {TISSUE_WORDS[tissue]}, HU"
    for name, words in (("rmse", "RMSE"), ("bias", "bias"))
    for tissue in TISSUE_WORDS
}


def image_words(row: dict) -> str:
    """What images a row of the tables of images is about."""
    name = "noisy input" if row["denoiser"] == NOISY else row["denoiser"].removesuffix(".pt")
    return f"{name} (subset)" if row["of_subset"] else name


def _of_images(rows: Sequence[dict], *more: str) -> dict[tuple, list[dict]]:
    """Rows by denoiser, subset and more columns."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        key = (row["denoiser"], row["of_subset"], *(row[name] for name in more))
        found.setdefault(key, []).append(row)
    return found


@styled
def image_quality(rows: Sequence[dict], looks: dict[str, Look], panels: dict[str, str]) -> Figure:
    """Figures of images against dose. rows: of tables.image_quality, of a dose model.

    panels: column -> words; what no row knows is left out."""
    panels = {name: words for name, words in panels.items() if not np.isnan(_column(rows, name)).all()}
    figure, axes = _grid(list(panels.values()), 4 if panels.keys() <= TISSUES.keys() else 3, 1.7)
    for axis, name in zip(axes, panels, strict=True):
        for (denoiser, subset, _), own in _of_images(rows, "noise_seed").items():
            own = sorted(own, key=lambda row: row["dose"])
            x = np.array([place(row) for row in own])
            line = {"linestyle": ":" if subset else "-"}
            _curve(axis, x, own, name, looks[denoiser], image_words(own[0]), **line)
        if name.startswith("bias"):
            axis.axhline(0, color=INK, linewidth=0.6)
        _dose_axis(axis, rows)
    _legend(figure)
    return figure


@styled
def noise_spectra(rows: Sequence[dict], looks: dict[str, Look]) -> Figure:
    """Noise power by frequency, a panel for each dose. rows: of tables.noise_spectra, of a dose model."""
    doses = sorted({row["dose"] for row in rows}, reverse=True)
    figure, axes = _grid([f"dose {dose_words(rows[0]['dose_model'], dose)}" for dose in doses])
    for axis, dose in zip(axes, doses, strict=True):
        of_dose = [row for row in rows if row["dose"] == dose]
        for (denoiser, subset), own in _of_images(of_dose).items():
            power = _column(own, "power_hu2_mm2")
            seen = power > 0  # blocks have no mean, and so no power at 0
            axis.plot(
                _column(own, "frequency_per_mm")[seen],
                power[seen],
                color=looks[denoiser].colour,
                linestyle=":" if subset else "-",
                label=image_words(own[0]),
            )
        axis.set(yscale="log", xlabel="frequency, 1/mm", ylabel="power, HU² mm²")
    _legend(figure)
    return figure


# ---------------------------------------------------------------- probabilities


class Answers(NamedTuple):
    """What the networks of an arm say. targets: (n,) of 0 and 1. scores: (K, n), K networks and noises."""

    panel: str
    arm: str
    targets: np.ndarray
    scores: np.ndarray

    @property
    def usable(self) -> bool:
        return len(set(self.targets.tolist())) == 2 and not np.isnan(self.scores).any()


def _of_panels(answers: Sequence[Answers]) -> tuple[Figure, list[tuple[Axes, Answers]]]:
    names = list(dict.fromkeys(one.panel for one in answers))
    figure, axes = _grid(names, height=2.2)
    for axis in axes:
        axis.plot((0, 1), (0, 1), color=GREY, linewidth=0.8, linestyle="--")
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    pairs = [(axes[names.index(one.panel)], one) for one in answers if one.usable]
    return figure, pairs


@styled
def roc(answers: Sequence[Answers], looks: dict[str, Look]) -> Figure:
    """ROC curves, one of each network and noise."""
    figure, pairs = _of_panels(answers)
    for axis, one in pairs:
        for scores in one.scores:
            line = roc_curve(one.targets, scores)[:2]
            axis.plot(*line, color=looks[one.arm].colour, linewidth=0.9, alpha=0.85, label=f"arm {one.arm}")
    for axis in figure.axes:
        axis.set(xlabel="1 - specificity", ylabel="sensitivity")
    _legend(figure)
    return figure


RELIABILITY_BINS = 10  # half of calibration.ECE_BINS would hide overconfidence, all of them be mostly empty


@styled
def reliability_diagram(answers: Sequence[Answers], looks: dict[str, Look]) -> Figure:
    """Share of positives by probability, of all networks and noises together."""
    figure, pairs = _of_panels(answers)
    for axis, one in pairs:
        targets = np.tile(one.targets, len(one.scores))
        bins = [found for found in reliability(targets, one.scores.ravel(), RELIABILITY_BINS) if found.n]
        look = looks[one.arm]
        axis.plot(
            [found.confidence for found in bins],
            [found.frequency for found in bins],
            color=look.colour,
            marker=look.marker,
            markersize=3.5,
            label=f"arm {one.arm}",
        )
    for axis in figure.axes:
        axis.set(xlabel="mean probability", ylabel="share of positives")
    _legend(figure)
    return figure


@styled
def calibration(rows: Sequence[dict], looks: dict[str, Look]) -> Figure:
    """ECE, Brier score, drift of the threshold and predictive values. rows: of a task, model and level."""
    panels = {
        **{"ece": "ECE", "brier": "Brier score", "threshold_shift": "best threshold - stored"},
        **{"ppv": "PPV", "npv": "NPV"},
    }
    prevalence = rows[0]["prevalence"]
    titles = [
        f"{words} at prevalence {prevalence:g}" if name in ("ppv", "npv") else words
        for name, words in panels.items()
    ]
    figure, axes = _grid(titles)
    for axis, name in zip(axes, panels, strict=True):
        for arm, own in of_arm(rows).items():
            x = np.array([place(row) for row in own])
            _curve(axis, x, own, name, looks[arm], f"arm {arm}")
        if name == "threshold_shift":
            axis.axhline(0, color=INK, linewidth=0.6)
        _dose_axis(axis, rows)
    _legend(figure)
    return figure


# ---------------------------------------------------------------- lesions, stress, other sets


@styled
def segmentation(rows: Sequence[dict], looks: dict[str, Look]) -> Figure:
    """Dice, lesions found and volume against dose. rows: of tables.segmentation, of a dose model."""
    panels = {"dice": "Dice of scans with a lesion", "any_recall": "share of lesions found"}
    panels |= {"false_positive_ml": "false volume in normal scans, ml"}
    figure, axes = _grid(list(panels.values()))
    segmenters = list(dict.fromkeys(row["segmenter"] for row in rows))
    for axis, name in zip(axes, panels, strict=True):
        for segmenter in segmenters:
            for denoiser in dict.fromkeys(row["denoiser"] for row in rows):
                own = [row for row in rows if (row["segmenter"], row["denoiser"]) == (segmenter, denoiser)]
                own.sort(key=lambda row: row["dose"])
                words = "noisy input" if denoiser == NOISY else denoiser.removesuffix(".pt")
                label = words if len(segmenters) == 1 else f"{segmenter.removesuffix('.pt')}, {words}"
                line = {"linestyle": ("-", "--", ":", "-.")[segmenters.index(segmenter) % 4]}
                if own:
                    x = np.array([place(row) for row in own])
                    _curve(axis, x, own, name, looks[denoiser], label, **line)
        _dose_axis(axis, rows)
    _legend(figure)
    return figure


class Volumes(NamedTuple):
    """Volumes of the lesions of scans, (n,) ml each, and what the table says of their agreement."""

    panel: str
    denoiser: str
    truth_ml: np.ndarray
    found_ml: np.ndarray
    bias_ml: float
    lower_ml: float
    upper_ml: float


@styled
def bland_altman(volumes: Sequence[Volumes], looks: dict[str, Look]) -> Figure:
    """Error of the volume against the mean of both, with bias and 95 % limits of agreement."""
    figure, axes = _grid([one.panel for one in volumes])
    for axis, one in zip(axes, volumes, strict=True):
        look = looks[one.denoiser]
        axis.plot(
            (one.truth_ml + one.found_ml) / 2,
            one.found_ml - one.truth_ml,
            look.marker,
            color=look.colour,
            markersize=3,
            alpha=0.8,
        )
        axis.axhline(one.bias_ml, color=INK, linewidth=0.9)
        for limit in (one.lower_ml, one.upper_ml):
            axis.axhline(limit, color=INK, linewidth=0.8, linestyle="--")
        axis.set(xlabel="mean of true and found, ml", ylabel="found - true, ml")
    return figure


@styled
def stress(rows: Sequence[dict], looks: dict[str, Look]) -> Figure:
    """What an artifact costs, against its severity. rows: of tables.stress, of a task and level."""
    artifacts = list(dict.fromkeys(row["artifact"] for row in rows))
    kinds = KINDS
    figure, axes = _grid([f"{NAMES[kind]}, {artifact}" for artifact in artifacts for kind in kinds])
    for number, axis in enumerate(axes):
        artifact, kind = artifacts[number // len(kinds)], kinds[number % len(kinds)]
        arms = of_arm(rows, artifact=artifact, kind=kind)
        for nth, (arm, own) in enumerate(arms.items()):
            own = sorted(own, key=lambda row: row["severity"])
            # the table calls the ends of a difference low and high
            shown = [{"y": row["estimate"], "y_low": row["low"], "y_high": row["high"]} | row for row in own]
            x = _column(own, "severity") + 0.008 * (nth - (len(arms) - 1) / 2)
            _curve(axis, x, shown, "y", looks[arm], f"arm {arm}")
        axis.axhline(0, color=INK, linewidth=0.6)
        axis.set(xlabel="severity", ylabel="change", xlim=(0, 1.05))
    _legend(figure)
    return figure


@styled
def external(rows: Sequence[dict], names: dict[str, str]) -> Figure:
    """AUC of each classifier on each set, and its drop. rows: of tables.external. names: of the sets."""
    arms = list(dict.fromkeys((row["pipeline"], row["classifier"], row["denoiser"]) for row in rows))
    size = min(PAGE_INCHES, 3.2 + 1.3 * len(names)), 0.9 + 0.42 * len(arms)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    values = np.full((len(arms), len(names)), math.nan)
    for row in rows:
        at = arms.index((row["pipeline"], row["classifier"], row["denoiser"])), list(names).index(row["data"])
        values[at] = known(row["auc"])
        drop = known(row["drop"])
        words = "home" if row["home"] == row["data"] else f"drop {drop:.3f}" if not math.isnan(drop) else ""
        auc = "n/a" if math.isnan(values[at]) else f"{values[at]:.3f}"
        # not INK, which a page may turn light while the cell stays as it is
        ink = "white" if values[at] > 0.8 else "black"
        axis.text(at[1], at[0], f"{auc}\n{words}", ha="center", va="center", color=ink, fontsize=7)
    axis.imshow(np.ma.masked_invalid(values), cmap="Blues", vmin=0.5, vmax=1, aspect="auto")
    axis.set_xticks(range(len(names)), names.values())
    labels = [
        ", ".join(filter(None, (f"arm {pipeline}", denoiser, classifier))).replace(".pt", "")
        for pipeline, classifier, denoiser in arms
    ]
    axis.set_yticks(range(len(arms)), labels)
    axis.grid(visible=False)
    axis.set_title("AUC per scan")
    return figure


# ---------------------------------------------------------------- training seeds


@styled
def seed_bars(rows: Sequence[dict], looks: dict[str, Look]) -> Figure:
    """Mean and SD over training seeds. rows: of tables.dose_response, of a task, model and level."""
    doses = sorted({row["dose"] for row in rows})
    arms = of_arm(rows)
    figure, axes = _grid(list(NAMES.values()))
    width = 0.8 / len(arms)
    for axis, kind in zip(axes, NAMES, strict=True):
        for number, (arm, own) in enumerate(arms.items()):
            x = [doses.index(row["dose"]) + (number - (len(arms) - 1) / 2) * width for row in own]
            axis.bar(x, _column(own, kind), 0.9 * width, color=looks[arm].colour, label=f"arm {arm}")
            spread = np.nan_to_num(_column(own, f"{kind}_seed_sd"))
            axis.errorbar(x, _column(own, kind), spread, fmt="none", ecolor=INK, elinewidth=0.8, capsize=2)
        _dose_groups(axis, rows[0]["dose_model"], doses)
        axis.set_ylim(0, 1.05)
    _legend(figure)
    return figure


@styled
def seed_boxes(rows: Sequence[dict], looks: dict[str, Look]) -> Figure:
    """Numbers of the single networks as boxes.

    rows: of tables.seeds, of a task, model and level, with the label of its family as arm."""
    doses = sorted({row["dose"] for row in rows})
    arms = of_arm(rows)
    figure, axes = _grid(list(SCORES.values()))
    width = 0.8 / len(arms)
    for axis, kind in zip(axes, SCORES, strict=True):
        for number, (arm, own) in enumerate(arms.items()):
            colour = looks[arm].colour
            ink = {"color": colour, "linewidth": 0.9}
            for nth, dose in enumerate(doses):
                values = _column([row for row in own if row["dose"] == dose], kind)
                values = values[~np.isnan(values)]
                x = nth + (number - (len(arms) - 1) / 2) * width
                axis.boxplot(
                    [values],
                    positions=[x],
                    widths=0.8 * width,
                    showfliers=False,
                    manage_ticks=False,
                    **dict.fromkeys(("boxprops", "medianprops", "whiskerprops", "capprops"), ink),
                )
                label = f"arm {arm}" if nth == 0 else None
                axis.plot(
                    np.full(len(values), x),
                    values,
                    looks[arm].marker,
                    color=colour,
                    markersize=2.2,
                    label=label,
                )
        _dose_groups(axis, rows[0]["dose_model"], doses)
    _legend(figure)
    return figure


def _dose_groups(axis: Axes, dose_model: str, doses: Sequence[float]) -> None:
    axis.set_xticks(range(len(doses)), [dose_words(dose_model, dose) for dose in doses])
    axis.grid(visible=False, axis="x")
    axis.set_xlabel("dose")


# ---------------------------------------------------------------- scans that were lost


class Tile(NamedTuple):
    """A slice in radiological view. picture: (H, W, 3) uint8. truth, found: (H, W) bool, or None."""

    title: str
    picture: np.ndarray
    truth: np.ndarray | None = None
    found: np.ndarray | None = None


TILES = 5  # beside each other, so that all slices are of one size


@styled
def failure(tiles: Sequence[Tile]) -> Figure:
    """Slices side by side, true lesions outlined green and found ones red."""
    side = PAGE_INCHES / TILES
    height = side + 0.2
    figure = Figure(figsize=(PAGE_INCHES, height))
    axes = figure.subplots(1, TILES)
    for axis in axes[len(tiles) :]:
        axis.remove()
    for axis, tile in zip(axes, tiles, strict=False):
        axis.imshow(tile.picture, interpolation="hanning")
        for mask, colour in ((tile.found, FOUND_RGB), (tile.truth, TRUE_RGB)):
            if mask is not None and mask.any():
                inside = np.pad(mask, 1)  # closed at the border
                at = [np.arange(-1, length - 1) for length in inside.shape]
                axis.contour(*at[::-1], inside, [0.5], colors=[np.divide(colour, 255)], linewidths=0.8)
        axis.set(xlim=(-0.5, tile.picture.shape[1] - 0.5), ylim=(tile.picture.shape[0] - 0.5, -0.5))
        axis.set_title(tile.title, fontsize=7, pad=2)
        axis.axis("off")
    figure.subplots_adjust(0.002, 0.002, 0.998, 1 - 0.2 / height, 0.02, 0)
    return figure
