"""Pages Overview and Experiments: what the study measured, from the files in results/.

What needs torch or scipy is imported where it is used: without results these pages open at once."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import altair as alt
import pandas as pd
import streamlit as st

import app_charts
import stage
from app_files import LEVELS, Folders, Stamp, file_hash, load_results, load_table, malformed, stamp
from app_words import arm_labels, dose_text, plain_text, quoted

SMALL_IN_A_ROW = 4  # as many as there are pipelines, mostly
ARM_KEYS = ("arm", "task", "level", "dose_model")
CURVE_COLUMNS = ("dose", "rate", "sensitivity", "precision")
SCORE_COLUMNS = (
    *("arm", "task", "dose_model", "dose", "series_uid"),
    *("target", "score_reference", "score", "change"),
)
VOLUME_COLUMNS = ("segmenter", "denoiser", "dose_model", "dose", "series_uid", "mean_ml", "error_ml")
SEGMENTATION_COLUMNS = (
    *("segmenter", "denoiser", "dose_model", "dose"),
    *("dice", "volume_error_ml", "limit_lower_ml", "limit_upper_ml"),
)
CARDS_IN_A_ROW = 7  # four pipelines and three image metrics, at 1280 px
FIRST_TABLES = ("verdicts", "dose_response", "between_arms")  # what a reader asks for first

# column of experiments.json -> heading, number format (None: text), what it means
TABLE = {
    "dose": ("Dose", "%g", "in the unit of the dose model"),
    "dose_fraction": ("Of routine", "percent", "share of the dose of a routine head scan"),
    "sigma_hu": ("Noise SD (HU)", "%.1f", "at 40 HU, from the dose model"),
    "arm": ("Pipeline", None, "see the legend below the table"),
    "task": ("Task", None, "the question put to the classifier"),
    "train_seed": ("Seed", "%d", "of the network's training"),
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


def shown(value: float | None, digits: int = 3) -> str:
    """metrics.shown, which brings half of scipy with it: not before there is a number."""
    import metrics

    return metrics.shown(value, digits)


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
    level = next((level for level in LEVELS if level in set(rows["level"])), None)
    chosen = one_study(rows, level)
    arms = arm_rows(folders.results, chosen, level)
    st.dataframe(headline_table(folders.results, chosen, arms, level), hide_index=True, placeholder="n/a")
    st.caption(f"AUC with 95 % intervals; of images: low dose → denoised. {of_fewer_patients(arms)}")
    show_legend(chosen["arm"].unique())
    show_curves(chosen, arms, level)
    show_provenance(folders, file, manifest, rows)


def of_fewer_patients(arms: pd.DataFrame) -> str:
    """Which arms were measured on a part of the patients, as those of slow denoisers may be; "" if none."""
    if "n_patients" not in arms or not len(arms):
        return ""
    counts = arms.groupby("line", sort=False)["n_patients"].min().astype(int)
    fewer = [f"{line} on {count}" for line, count in counts.items() if count < counts.max()]
    return f"Measured on fewer than the {counts.max()} patients: {', '.join(fewer)}." if fewer else ""


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
        noisy, denoised = (shown(row.get(name), 1) for name in ("rmse_hu_noisy", "rmse_hu"))
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
            f"{with_interval(row, 'auc')} with pipeline {label}"
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


def headline_table(results: Path, rows: pd.DataFrame, arms: pd.DataFrame, level: str | None) -> pd.DataFrame:
    """A row for each dose: AUC of each arm with its interval, the image before and after denoising, Dice."""
    bias = study_table(results, "image_quality", "dose_model", "dose", "denoiser", "bias_brain_hu")
    dice = study_table(results, "segmentation", *SEGMENTATION_COLUMNS)
    lines = []
    for dose, own in rows.groupby("dose"):
        model = own["dose_model"].iloc[0]
        line = {"Dose": dose_text(model, dose)}
        for _, row in arms[arms["dose"] == dose].iterrows():
            line[f"AUC per {level}, {row['line']}"] = with_interval(row, "auc")
        denoised = own[own["denoiser"].notna()]
        after = denoised.iloc[0] if len(denoised) else None
        for column, digits in (("rmse_hu", 1), ("psnr", 1), ("ssim", 2)):
            line[TABLE[column][0]] = shown(own.iloc[0][f"{column}_noisy"], digits)
            if after is not None:
                line[TABLE[column][0]] += f" → {shown(after[column], digits)}"
        behind = "none" if after is None else after["denoiser"]
        for title, table, column in (("Bias of brain (HU)", bias, "bias_brain_hu"), ("Dice", dice, "dice")):
            found = table[(table["dose_model"] == model) & (table["dose"] == dose)]
            if len(found):
                found = found.drop_duplicates("denoiser").set_index("denoiser")[
                    column
                ]  # of the first network
                parts = [found[name] for name in dict.fromkeys(("none", behind)) if name in found]
                line[title] = " → ".join(shown(round(float(part), 2) + 0.0, 2) for part in parts)  # no -0
        lines.append(line)
    return pd.DataFrame(lines)


def with_interval(row: pd.Series, column: str) -> str:
    value, low, high = (shown(row[column + end], 2) for end in ("", "_low", "_high"))
    return f"{value} ({low} to {high})"


def show_provenance(folders: Folders, file: Stamp, manifest: dict, rows: pd.DataFrame) -> None:
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
        show_experiments(folders.results, load_results(stamp(path))[1])
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


def show_experiments(results: Path, rows: pd.DataFrame) -> None:
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
    arms = arm_rows(results, chosen, level)
    show_at_dose(chosen[chosen["dose"] == dose], arms[arms["dose"] == dose])
    show_curves(chosen, arms, level)
    show_legend(chosen["arm"].unique())
    show_decisions(results, arms, level, dose)
    show_scans(results, arms, dose)
    show_volumes(results, chosen["dose_model"].iloc[0], dose)
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


def show_at_dose(rows: pd.DataFrame, arms: pd.DataFrame) -> None:
    """The numbers of one dose, large: AUC of each arm, and what denoising does to the image."""
    from inference import LEGEND

    cards = [
        (
            f"AUC, pipeline {plain_text(row['line'])}",
            shown(row["auc"]),
            f"{shown(row['auc_low'])} to {shown(row['auc_high'])}",
            f"{LEGEND.get(row['line'].split(' ')[0], '')}; below: 95 % interval",
        )
        for _, row in arms.iterrows()
    ]
    denoised = rows[rows["denoiser"].notna()]
    row = denoised.iloc[0] if len(denoised) else rows.iloc[0]
    what = "denoised" if len(denoised) else "low dose"
    for column, unit, digits in (("rmse_hu", " HU", 2), ("psnr", " dB", 2), ("ssim", "", 3)):
        before = f"low dose {shown(row[f'{column}_noisy'], digits)}" if len(denoised) else None
        value = shown(row[column], digits)
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


def study_table(results: Path, name: str, *columns: str) -> pd.DataFrame:
    """A table of the study; without rows if it was not written. Raises InputError if columns are missing."""
    path = results / "tables" / f"{name}.csv"
    if not path.exists():
        return pd.DataFrame(columns=list(columns))
    table = load_table(stamp(path))
    if missing := sorted(set(columns) - set(table.columns)):
        raise malformed(path, KeyError(", ".join(missing)), "run run_experiments.py again")
    return table


def arm_rows(results: Path, rows: pd.DataFrame, level: str | None) -> pd.DataFrame:
    """Dose, AUC and its interval, a `line` for each arm: its mean over networks, if the study wrote that.

    rows: of one dose model, task and level."""
    rows = rows[rows["auc"].notna()] if "auc" in rows else rows.iloc[:0]
    table = study_table(results, "dose_response", *ARM_KEYS, "dose", "auc", "auc_low", "auc_high")
    same = table["level"] == level
    for column in ("dose_model", "task"):
        same &= table[column].isin(rows[column])
    if same.any():
        return table[same].assign(line=table["arm"])
    return rows.assign(line=arm_labels(list(rows["arm"]), list(rows["classifier"])))


def show_curves(rows: pd.DataFrame, arms: pd.DataFrame, level: str | None) -> None:
    """AUC per arm and image quality, low dose and denoised, against dose."""
    doses, panels = sorted(rows["dose"].unique()), []
    if len(arms):
        chart = app_charts.dose_curve(arms, "auc", "AUC", doses, "auc_low", "auc_high")
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
            frame = frame.rename(columns={"value": column})
            panels.append((title, app_charts.dose_curve(frame, column, title, doses)))
    show_panels(panels)


def show_panels(panels: Sequence[tuple[str, alt.TopLevelMixin]], columns: int = 2) -> None:
    """Charts with their titles, side by side, so many at most."""
    columns = min(columns, len(panels)) or 1
    for start in range(0, len(panels), columns):
        for cell, (title, chart) in zip(st.columns(columns), panels[start : start + columns], strict=False):
            with cell, st.container(border=True):
                st.markdown(f"**{plain_text(title)}**")
                st.altair_chart(chart, width="stretch")


# ---------------------------------------------------------------- decisions, scan by scan


def show_decisions(results: Path, arms: pd.DataFrame, level: str | None, dose: float) -> None:
    """ROC and precision-recall curves at one dose, and the calls at the stored thresholds."""
    table = of_arms(study_table(results, "curves", *ARM_KEYS, *CURVE_COLUMNS), arms)
    table = table[(table["level"] == level) & (table["dose"] == dose)]
    if len(table):
        where = f"at dose {dose:g}, per {level}"
        st.subheader(f"Decisions {where}")
        show_panels(
            [
                ("ROC, mean over networks", app_charts.roc(table)),
                ("Precision and recall, mean over networks", app_charts.precision_recall(table)),
            ]
        )
    if "tp" not in arms:
        return
    counts = arms[(arms["dose"] == dose) & arms["tp"].notna()]
    if len(counts):
        st.markdown(f"**Calls at the stored threshold** · per {level}, mean over networks")
        show_panels(
            [(f"Pipeline {row['line']}", app_charts.confusion(row)) for _, row in counts.iterrows()],
            SMALL_IN_A_ROW,
        )


def of_arms(table: pd.DataFrame, arms: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table that are of the same task and dose model, with a `line` for each arm."""
    if not len(table) or "arm" not in arms or not len(arms):
        return table.iloc[:0]
    same = table["dose_model"].isin(arms["dose_model"]) & table["task"].isin(arms["task"])
    return table[same].assign(line=table["arm"])


def case_links(table: pd.DataFrame) -> pd.Series:
    """The address of each case in the viewer."""
    return "viewer?case=" + table["series_uid"] + "&dose=" + table["dose"].map("{:g}".format)


def show_scans(results: Path, arms: pd.DataFrame, dose: float) -> None:
    """What each arm says of each scan at the highest dose and at this one."""
    table = of_arms(study_table(results, "scan_scores", *SCORE_COLUMNS), arms)
    table = table[table["dose"] == dose]
    if not len(table):
        return
    table = table.assign(link=case_links(table), truth=table["target"].map({1: "lesion", 0: "normal"}))
    st.markdown(f"**Every scan** · probability at the highest dose and at {dose:g}, mean over networks")
    show_panels(
        [
            (
                f"Pipeline {line}: {(own['change'] == 'lost').sum()} calls lost, "
                f"{(own['change'] == 'gained').sum()} gained",
                app_charts.score_scatter(own),
            )
            for line, own in table.groupby("line", sort=False)
        ],
        SMALL_IN_A_ROW,
    )
    st.caption(
        "▼ right at the highest dose and wrong here (lost) · ▲ the other way round (gained). "
        "Click a point to open its case."
    )


def show_volumes(results: Path, dose_model: str, dose: float) -> None:
    """Volumes of lesions as the segmenters find them, against the truth."""
    table = study_table(results, "volumes", *VOLUME_COLUMNS)
    summary = study_table(results, "segmentation", *SEGMENTATION_COLUMNS)
    table, summary = (
        one[(one["dose_model"] == dose_model) & (one["dose"] == dose)] for one in (table, summary)
    )
    panels = []
    for _, row in summary.iterrows():
        own = table[(table["segmenter"] == row["segmenter"]) & (table["denoiser"] == row["denoiser"])]
        images = "low dose" if row["denoiser"] == "none" else f"behind {row['denoiser']}"
        if len(own):
            title = f"{row['segmenter']}, {images}: Dice {shown(row['dice'], 2)}"
            panels.append((title, app_charts.bland_altman(own.assign(link=case_links(own)), row)))
    if panels:
        st.subheader("Volumes of lesions")
        show_panels(panels, 2)
        st.caption(
            "Bland-Altman plot of scans with a lesion: bias (line) and 95 % limits of agreement (dashed)."
        )


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
