"""Pages Overview and Experiments: what the study measured, from the files in results/.

What needs torch is imported where it is used: without results these pages open at once."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import altair as alt
import pandas as pd
import streamlit as st

import metrics
import stage
from app_files import LEVELS, Folders, Stamp, file_hash, load_results, load_table, stamp
from app_words import arm_colours, arm_labels, dose_text, plain_text, quoted

CARDS_IN_A_ROW = 7  # four pipelines and three image metrics, at 1280 px
FIRST_TABLES = ("verdicts", "dose_response", "between_arms")  # what a reader asks for first

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


# ---------------------------------------------------------------- page Overview


def overview_page(folders: Folders) -> None:
    """The answer, its curves, and what ran when on which data."""
    path = folders.results / "experiments.json"
    if not path.exists():
        no_results(folders)
        return
    file = stamp(path)
    manifest, rows = load_results(file)
    given = "answer" in manifest
    with st.container(border=True):
        for sentence in answer(manifest, rows):
            st.markdown(f":primary[**{plain_text(sentence)}**]" if given else plain_text(sentence))
        st.caption("Measured on the test patients of these data; see Experiments for every number.")
    show_headline(folders, file, manifest, rows)
    level = next((level for level in LEVELS if level in set(rows["level"])), None)
    chosen = one_study(rows, level)
    show_curves(chosen, level)
    show_legend(chosen["arm"].unique())


def no_results(folders: Folders) -> None:
    """What to type where there are no results yet."""
    st.info(f"No results in {plain_text(folders.results)} yet. This makes them:")
    st.code(
        f"python run_experiments.py --data {quoted(folders.data)} --models {quoted(folders.models)} "
        f"--out {quoted(folders.results)}\n"
        "# or everything on a synthetic phantom, from nothing:\nmake demo",
        language="bash",
    )
    st.caption("The page Own scan shows a synthetic head at once, without any of this.")


def answer(manifest: dict, rows: pd.DataFrame) -> list[str]:
    """The study's own answer where it gives one, else what its rows say at the lowest and highest dose."""
    given = manifest.get("answer")
    if given:
        return [str(line) for line in (given if isinstance(given, list) else [given])]
    level = next((level for level in LEVELS if level in set(rows["level"])), None)
    own = one_study(rows, level)
    own = own[own["auc"].notna()] if "auc" in own else own.iloc[:0]
    if own.empty:
        row = rows.sort_values("dose").iloc[0]
        noisy, denoised = (metrics.shown(row.get(name), 1) for name in ("rmse_hu_noisy", "rmse_hu"))
        return [
            f"At {dose_text(row['dose_model'], row['dose'])} the error of the image is {noisy} HU, and "
            f"{denoised} HU after denoising."
        ]
    doses = sorted(own["dose"].unique())
    sentences = []
    for dose in dict.fromkeys((doses[0], doses[-1])):
        at = own[own["dose"] == dose]
        labels = arm_labels(list(at["arm"]), list(at["classifier"]))
        parts = [
            f"{metrics.shown(row['auc'], 2)} ({metrics.shown(row['auc_low'], 2)} to "
            f"{metrics.shown(row['auc_high'], 2)}) with pipeline {label}"
            for label, (_, row) in zip(labels, at.iterrows(), strict=True)
        ]
        sentences.append(
            f"At {dose_text(at['dose_model'].iloc[0], dose)} the AUC per {level} is {', '.join(parts)}."
        )
    return sentences


def one_study(rows: pd.DataFrame, level: str | None) -> pd.DataFrame:
    """Rows of the first dose model, noise seed and task, of one level. What has no level is an image without
    a classifier and belongs to all."""
    first = rows.iloc[0]
    own = (rows["dose_model"] == first["dose_model"]) & (rows["noise_seed"] == first["noise_seed"])
    task = next((task for task in rows["task"] if isinstance(task, str)), None)
    own &= rows["level"].isna() | (rows["level"] == level)
    return rows[own & (rows["task"].isna() | (rows["task"] == task))]


def show_headline(folders: Folders, file: Stamp, manifest: dict, rows: pd.DataFrame) -> None:
    """What was measured, on whom, with what, when."""
    from dose import DOSE_MODELS

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


# ---------------------------------------------------------------- page Experiments


def experiments_page(folders: Folders) -> None:
    """Every number of the study, its curves, tables and figures."""
    path = folders.results / "experiments.json"
    if path.exists():
        show_experiments(load_results(stamp(path))[1])
    else:
        no_results(folders)
    show_tables(folders.results / "tables")
    show_figures(folders.results)
    report = folders.results / "report.html"
    if report.exists():
        st.download_button(
            "Download report.html",
            report.read_bytes(),
            "report.html",
            "text/html",
            on_click="ignore",
            icon=":material/description:",
        )


def show_experiments(rows: pd.DataFrame) -> None:
    """The rows of experiments.json: at a glance at one dose, as curves and as a table."""
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        chosen = rows
        choices = {"dose_model": "Dose model", "noise_seed": "Noise seed", "task": "Task"}
        for column, label in choices.items():
            values = [value for value in chosen[column].unique() if not pd.isna(value)]
            if len(values) > 1:
                value = st.segmented_control(label, values, default=values[0], required=True, key=column)
                chosen = chosen[chosen[column].isna() | (chosen[column] == value)]
        levels = [level for level in LEVELS if level in set(chosen["level"])]
        level = levels[0] if levels else None
        if levels:
            level = st.segmented_control("Level", levels, default=level, required=True, key="level")
        # what has no level is an image without a classifier: it belongs to both
        chosen = chosen[chosen["level"].isna() | (chosen["level"] == level)]
        dose = choose_result_dose(chosen)
    show_at_dose(chosen[chosen["dose"] == dose])
    show_curves(chosen, level)
    show_legend(chosen["arm"].unique())
    st.subheader("All numbers")
    show_table(chosen)
    st.download_button(
        "Download CSV (all levels, full precision)",
        rows.to_csv(index=False),
        "experiments.csv",
        "text/csv",
        on_click="ignore",
        icon=":material/download:",
    )


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
    from inference import LEGEND

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
    st.dataframe(rows.reindex(columns=list(TABLE)), hide_index=True, column_config=config, placeholder="n/a")


def show_legend(arms: Sequence[str]) -> None:
    """What the pipelines in sight are."""
    from inference import LEGEND

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


def colours(labels: Sequence[str]) -> alt.Scale:
    """The same colour for the same pipeline in every chart."""
    return alt.Scale(domain=list(labels), range=arm_colours(labels))


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


def show_tables(folder: Path) -> None:
    """Whatever other tables the study wrote."""
    paths = sorted(folder.glob("*.csv"), key=lambda path: (path.stem not in FIRST_TABLES, path.stem))
    if not paths:
        return
    st.subheader("Tables of the study")
    names = {path.stem.replace("_", " "): path for path in paths}
    name = st.selectbox("Table", list(names), key="table")
    try:
        table = load_table(stamp(names[name]))
    except stage.StageError as error:
        st.error(plain_text(error))
        return
    st.dataframe(table, hide_index=True, placeholder="n/a")
    st.download_button(
        f"Download {names[name].name}",
        names[name].read_bytes(),
        names[name].name,
        "text/csv",
        on_click="ignore",
        icon=":material/download:",
    )


def show_figures(results: Path) -> None:
    """The figures that the study drew."""
    paths = sorted((results / "figures").glob("*.png")) or sorted(results.glob("*.png"))
    if not paths:
        return
    st.subheader("Figures of the study")
    names = {path.stem.replace("_", " "): path for path in paths}
    name = st.selectbox("Figure", list(names), key="figure")
    st.image(str(names[name]), output_format="PNG", caption=name)
