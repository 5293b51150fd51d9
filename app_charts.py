"""The charts of the pages Overview and Experiments, each from rows of the study's tables."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

from app_words import arm_colours

HEIGHT = 320  # of a chart of which two stand side by side
SQUARE_HEIGHT = 430  # of one of two that is to be about as high as wide
SMALL_HEIGHT = 300  # of four
SHARES = alt.Axis(values=[0, 0.2, 0.4, 0.6, 0.8, 1])  # of what lies between 0 and 1
TRUTH_COLOURS = {"lesion": "#cc4433", "normal": "#4477aa"}  # told apart by the colour-blind, and from arms
CHANGES = {"kept": "circle", "unknown": "circle", "lost": "triangle-down", "gained": "triangle-up"}
REFERENCE_LINE = {"color": "#888888", "strokeWidth": 1}  # seen on light and dark
CALLS = {  # column of the table of counts -> (truth, call)
    **{"tp": ("lesion", "positive"), "fn": ("lesion", "negative")},
    **{"fp": ("normal", "positive"), "tn": ("normal", "negative")},
}


def colours(labels: Sequence[str]) -> alt.Scale:
    """The same colour for the same pipeline in every chart."""
    return alt.Scale(domain=list(labels), range=arm_colours(labels))


def _colour(frame: pd.DataFrame) -> alt.Color:
    lines = list(dict.fromkeys(frame["line"]))
    legend = alt.Legend(orient="top", symbolType="circle", symbolOpacity=1, labelLimit=300, columns=4)
    return alt.Color("line:N", title=None, scale=colours(lines), legend=legend)


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
    shown = [
        "line:N",
        alt.Tooltip("dose:Q", format="~g"),
        alt.Tooltip(f"{column}:Q", format=".3f", title=title),
    ]
    scale = alt.Scale(zero=False, nice=False, padding=10)
    base = alt.Chart(frame).encode(x=x, color=_colour(frame))
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
    return alt.layer(*layers).properties(height=HEIGHT)


def roc(frame: pd.DataFrame) -> alt.LayerChart:
    """frame: of tables.curves, of one dose and level, with a `line` for each arm."""
    lines = _steps(frame, "sensitivity", "step-after", "1 - specificity", "sensitivity")
    chance = pd.DataFrame({"rate": [0, 1], "sensitivity": [0, 1]})
    return _diagonal(chance, "rate", "sensitivity") + lines


def precision_recall(frame: pd.DataFrame) -> alt.Chart:
    """frame: as for roc."""
    return _steps(frame, "precision", "step-before", "recall (sensitivity)", "precision")


def _steps(frame: pd.DataFrame, column: str, steps: str, x_title: str, y_title: str) -> alt.Chart:
    share = alt.Scale(domain=[0, 1], nice=False)
    return (
        alt.Chart(frame)
        .mark_line(interpolate=steps, strokeWidth=2)
        .encode(
            x=alt.X("rate:Q", title=x_title, scale=share, axis=SHARES),
            y=alt.Y(f"{column}:Q", title=y_title, scale=share, axis=SHARES),
            color=_colour(frame),
            tooltip=[
                "line:N",
                alt.Tooltip("rate:Q", format=".2f", title=x_title),
                alt.Tooltip(f"{column}:Q", format=".3f"),
            ],
        )
        .properties(height=SQUARE_HEIGHT)
    )


def _diagonal(ends: pd.DataFrame, x: str, y: str) -> alt.Chart:
    return alt.Chart(ends).mark_line(strokeDash=[4, 4], **REFERENCE_LINE).encode(x=f"{x}:Q", y=f"{y}:Q")


def confusion(row: pd.Series) -> alt.LayerChart:
    """row: of tables.dose_response. Counts, coloured by their share of the scans or slices of that truth."""
    shares = {"tp": row["sens"], "fn": 1 - row["sens"], "tn": row["spec"], "fp": 1 - row["spec"]}
    frame = pd.DataFrame(
        {"truth": truth, "call": call, "count": row[name], "share": shares[name], "dark": shares[name] > 0.5}
        for name, (truth, call) in CALLS.items()
    )
    base = alt.Chart(frame).encode(
        x=alt.X(
            "call:N", title=None, sort=["positive", "negative"], axis=alt.Axis(orient="top", labelAngle=0)
        ),
        y=alt.Y("truth:N", title=None, sort=["lesion", "normal"]),
        tooltip=[
            "truth",
            "call",
            alt.Tooltip("count:Q", format=",.1f"),
            alt.Tooltip("share:Q", format=".1%"),
        ],
    )
    boxes = base.mark_rect(cornerRadius=3).encode(
        color=alt.Color("share:Q", scale=alt.Scale(scheme="blues", domain=[0, 1]), legend=None)
    )
    # a colour by its box, which is the same in the light and the dark theme
    ink = alt.condition(alt.datum.dark, alt.value("white"), alt.value("#222222"))
    counts = base.mark_text(fontSize=15, dy=-7).encode(text=alt.Text("count:Q", format=",.0f"), color=ink)
    percent = base.mark_text(fontSize=11, dy=10).encode(text=alt.Text("share:Q", format=".0%"), color=ink)
    return (boxes + counts + percent).properties(height=150)


def score_scatter(frame: pd.DataFrame) -> alt.LayerChart:
    """What is said of each scan, at the highest dose and at this one.

    frame: of tables.scan_scores, of one dose and arm, with `truth` in words and a `link` to the case."""
    share = alt.Scale(domain=[0, 1], nice=False)
    names = list(CHANGES)
    shape = alt.Scale(domain=names, range=list(CHANGES.values()))
    flipped = alt.FieldOneOfPredicate("change", ["lost", "gained"])
    points = (
        alt.Chart(frame)
        .mark_point(filled=True)
        .encode(
            x=alt.X("score_reference:Q", title="highest dose", scale=share, axis=SHARES),
            y=alt.Y("score:Q", title="this dose", scale=share, axis=SHARES),
            color=alt.Color(
                "truth:N",
                title=None,
                scale=alt.Scale(domain=list(TRUTH_COLOURS), range=list(TRUTH_COLOURS.values())),
                legend=alt.Legend(orient="top", symbolType="circle", symbolOpacity=1),
            ),
            shape=alt.Shape("change:N", scale=shape, legend=None),
            size=alt.condition(flipped, alt.value(90), alt.value(22)),
            opacity=alt.condition(flipped, alt.value(1), alt.value(0.45)),
            href="link:N",
            tooltip=["series_uid", "truth", "score_reference", "score", "change"],
        )
    )
    ends = pd.DataFrame({"score_reference": [0, 1], "score": [0, 1]})
    return (_diagonal(ends, "score_reference", "score") + points).properties(height=SMALL_HEIGHT)


def spectrum(frame: pd.DataFrame) -> alt.Chart:
    """frame: frequency_per_mm, power_hu2_mm2, a `line` for each image. Nothing of what has no power."""
    return (
        alt.Chart(frame[frame["power_hu2_mm2"] > 0])
        .mark_line(strokeWidth=2)
        .encode(
            x=alt.X("frequency_per_mm:Q", title="spatial frequency (1/mm)"),
            y=alt.Y("power_hu2_mm2:Q", title="noise power (HU² mm²)", scale=alt.Scale(type="log")),
            color=_colour(frame),
            tooltip=[
                "line:N",
                alt.Tooltip("frequency_per_mm:Q", format=".3f"),
                alt.Tooltip("power_hu2_mm2:Q", format=".3g"),
            ],
        )
        .properties(height=HEIGHT)
    )


def bland_altman(frame: pd.DataFrame, row: pd.Series) -> alt.LayerChart:
    """Error of the volume against the mean of true and found, with bias and 95 % limits of agreement.

    frame: of tables.volumes, of one segmenter, image and dose. row: of tables.segmentation."""
    rules = pd.DataFrame(
        {"what": ["bias", "limit", "limit"]}
        | {"ml": [row[name] for name in ("volume_error_ml", "limit_lower_ml", "limit_upper_ml")]}
    ).dropna()
    lines = (
        alt.Chart(rules)
        .mark_rule(**REFERENCE_LINE)
        .encode(
            y=alt.Y("ml:Q", title="found - true (ml)"),
            strokeDash=alt.condition(alt.datum.what == "bias", alt.value([1, 0]), alt.value([4, 4])),
            tooltip=["what", alt.Tooltip("ml:Q", format=".2f")],
        )
    )
    points = (
        alt.Chart(frame)
        .mark_circle(size=40, opacity=0.7, color=TRUTH_COLOURS["normal"])
        .encode(
            x=alt.X("mean_ml:Q", title="mean of true and found (ml)", scale=alt.Scale(zero=False)),
            y=alt.Y("error_ml:Q"),
            href="link:N",
            tooltip=[
                "series_uid",
                *(alt.Tooltip(f"{name}:Q", format=".2f") for name in ("truth_ml", "found_ml", "error_ml")),
            ],
        )
    )
    return (lines + points).properties(height=SMALL_HEIGHT)
