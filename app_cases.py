"""Page Cases: every prepared series in a table; a click opens it; on demand what the networks say of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import streamlit as st

import stage
from app_data import (
    SPLIT_NOTES,
    Arm,
    Case,
    Checkpoints,
    Noise,
    Source,
    Study,
    all_cases,
    arms_of,
    errors_hu,
    families,
    find_checkpoints,
    pick_device,
    reading,
    study_of,
)
from app_files import Folders, stamp
from app_viewer import choose_dose, no_data, say_faults
from app_words import dose_text, plain_text, truth_text, verdict
from dataset import TASKS, task_targets

READ_KEY = "cases-read"  # what the networks said: (case, noise) -> columns of the table
COLUMNS = {  # of Case -> heading
    "patient": "Patient",
    "finding": "Finding",
    "split": "Split",
    "slices": "Slices",
    "matrix": "Matrix",
    "pixel_mm": "Pixel (mm)",
    "gap_mm": "Gap (mm)",
    "noise_hu": "Noise (HU)",
    "tilt_deg": "Tilt (°)",
    "repairs": "Repaired",
    "source": "Source",
    "uid": "Series",
}
RIGHT, MISSED, INVENTED = "right", "missed", "false alarm"


def cases_page(folders: Folders, viewer: object) -> None:
    """viewer: the page of st.navigation that a click opens."""
    cases = all_cases(folders)
    if not cases:
        no_data(folders)
        return
    device = pick_device(folders.device)
    networks, study = find_checkpoints(folders, device), study_of(folders)
    say_faults(networks, study)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        words = st.text_input("Search", key="search", placeholder="patient, finding, source", width=260)
        splits = [split for split in SPLIT_NOTES if any(case.split == split for case in cases.values())]
        split = st.segmented_control("Split", ["all", *splits], default="all", required=True, key="in-split")
        lesion = st.segmented_control(
            "Lesion", ["all", "yes", "no"], default="all", required=True, key="with-lesion"
        )
    chosen = [
        case
        for case in cases.values()
        if split in ("all", case.split)
        and (lesion == "all" or case.lesion == (lesion == "yes"))
        and words.lower() in " ".join(map(str, case)).lower()
    ]
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        noise = ask_networks(chosen, networks, study, device) if networks.classifiers else None
        table = case_table(chosen, noise)
        if "Result" in table:
            result = st.segmented_control(
                "Result", ["all", RIGHT, MISSED, INVENTED], default="all", required=True, key="result"
            )
            if result != "all":
                table = table[table["Result"] == result]
    st.caption(f"{len(table)} of {len(cases)} cases. Click the left edge of a row to open it.")
    event = st.dataframe(
        table,
        hide_index=True,
        on_select="rerun",
        selection_mode="single-row",
        key="cases",
        height=min(35 * (len(table) + 1) + 3, 620),
        placeholder="n/a",
        column_config=column_config(table),
    )
    rows = event["selection"]["rows"]
    if rows and rows[0] < len(table):
        query = {"case": str(table.iloc[rows[0]]["Series"])}
        if noise is not None:
            query["dose"] = f"{noise.dose:g}"
        st.switch_page(viewer, query_params=query)
    st.download_button(
        "Download CSV",
        table.to_csv(index=False),
        "cases.csv",
        "text/csv",
        on_click="ignore",
        icon=":material/download:",
    )


def ask_networks(chosen: list[Case], networks: Checkpoints, study: Study, device: str) -> Noise:
    """Controls that ask the networks about all cases in the table, with progress."""
    read = st.session_state.setdefault(READ_KEY, {})
    noise = choose_dose(networks.found, study)
    asked = st.button(
        f"Read {len(chosen)} cases at {dose_text(noise.dose_model, noise.dose)}",
        icon=":material/neurology:",
        disabled=not chosen,
    )
    if asked:
        bar = st.progress(0.0, "Reading ...")
        denoiser = next(iter(networks.denoisers), None)
        arms = arms_of(denoiser, networks.classifiers)
        for number, case in enumerate(chosen):
            bar.progress(number / len(chosen), f"Reading case {number + 1} of {len(chosen)} ...")
            try:
                source = Source(stamp(Path(case.folder) / "metadata.json"), networks.size)
                read[case.uid, noise] = read_case(source, noise, arms, study.mask, device)
            except (stage.StageError, OSError) as error:
                st.error(plain_text(error))
        bar.empty()
    return noise


def read_case(source: Source, noise: Noise, arms: list[Arm], mask: str, device: str) -> dict:
    """Columns of one case: probability and call of each pipeline, and the error of its images.

    Of networks that differ by their seed alone the mean, and what most of them call, as in the study."""
    row: dict = {"Result": RIGHT, "Truth": None}
    for label, places in families(arms).items():
        scores, calls = [], []
        for arm in (arms[place] for place in places):
            facts = arm.classifier.facts
            task = TASKS[facts["task"]]
            said = reading(source, noise, arm.classifier.file, arm.denoiser, device)[1]
            scores.append(float(task.positive(said)[0]))
            calls.append(verdict(scores[-1], facts["thresholds"]["scan"]["value"]))
        # a tie is called negative, as by comparisons.flips
        called = max(("negative", "positive", "no threshold"), key=calls.count)
        truth = task.positive(task_targets(facts["task"], [source.series.labels], facts["assume_absent"]))[0]
        row[f"p {label}"] = float(np.mean(scores))
        row[f"call {label}"] = called
        row["Truth"] = truth_text(truth)
        # one wrong pipeline is enough to make a case worth looking at
        if (called, row["Truth"]) == ("negative", "positive"):
            row["Result"] = MISSED
        elif (called, row["Truth"]) == ("positive", "negative") and row["Result"] == RIGHT:
            row["Result"] = INVENTED
    row["RMSE low dose"] = errors_hu(source, noise, None, mask, device)[1]["rmse_hu"]
    denoiser = next((arm.denoiser for arm in arms if arm.denoiser), None)
    if denoiser is not None:
        row["RMSE denoised"] = errors_hu(source, noise, denoiser, mask, device)[1]["rmse_hu"]
    return row


def case_table(chosen: list[Case], noise: Noise | None) -> pd.DataFrame:
    """What is known of the cases, and what the networks said of them at this dose."""
    table = pd.DataFrame([case._asdict() for case in chosen], columns=list(Case._fields))
    table = table[list(COLUMNS)].rename(columns=COLUMNS)
    read = st.session_state.get(READ_KEY, {})
    if any((case.uid, noise) in read for case in chosen):
        said = pd.DataFrame([read.get((case.uid, noise), {}) for case in chosen])
        table = pd.concat([table.iloc[:, :3], said, table.iloc[:, 3:]], axis=1)
    return table


def column_config(table: pd.DataFrame) -> dict:
    config: dict = {
        "Patient": st.column_config.TextColumn("Patient", pinned=True),
        "Pixel (mm)": st.column_config.NumberColumn(format="%.2f"),
        "Gap (mm)": st.column_config.NumberColumn(format="%.1f"),
        "Noise (HU)": st.column_config.NumberColumn(format="%.1f", help="measured when it was prepared"),
        "Tilt (°)": st.column_config.NumberColumn(format="%.1f"),
        "Repaired": st.column_config.NumberColumn(help="slices in which something was repaired or assumed"),
    }
    for name in table.columns:
        if name.startswith("p "):
            config[name] = st.column_config.ProgressColumn(
                f"Pipeline {name[2:]}", format="%.2f", min_value=0.0, max_value=1.0, width="small"
            )
        elif name.startswith("call "):
            config[name] = st.column_config.TextColumn(f"{name[5:]} says", width="small")
        elif name.startswith("RMSE"):
            config[name] = st.column_config.NumberColumn(f"{name} (HU)", format="%.1f")
    return {name: value for name, value in config.items() if name in table.columns}
