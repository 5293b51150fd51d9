"""Pages Training and Models: what runs and ran, from the logs and cards beside the checkpoints."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path

import altair as alt
import pandas as pd
import streamlit as st

import stage
from app_files import Folders, Stamp, malformed, stamp
from app_words import plain_text, quoted

EVERY_S = 3  # a look at the logs; epochs take seconds at least
RUNNING_S = 600  # a log that was written to in this time may still grow
NOT_CURVES = {"epoch", "seconds", "seconds_left", "images_per_s", "memory_gb", "gpu_memory_gb"}
FIRST_CURVES = ("train_loss", "loss", "auc", "auc_scan", "rmse_hu", "psnr", "ssim", "dice", "lr")


@st.cache_data(show_spinner=False, max_entries=64)
def read_log(file: Stamp) -> pd.DataFrame:
    """One row per epoch. A last line that is being written is left for the next look. Raises InputError."""
    lines = Path(file.path).read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        # of whole lines alone: what follows the last line break is not finished
        return pd.DataFrame([dict(json.loads(line)) for line in lines[:-1] if line.strip()])
    except (ValueError, TypeError, AttributeError) as error:
        raise malformed(file.path, error, "train again") from None


def training_page(folders: Folders) -> None:
    """Curves of every run, drawn anew while they grow."""
    st.fragment(show_runs, run_every=EVERY_S)(folders)


def show_runs(folders: Folders) -> None:
    paths = sorted(folders.models.glob("*.jsonl"), key=lambda path: -path.stat().st_mtime)
    if not paths:
        st.info(f"No training log in {plain_text(folders.models)} yet. This writes one:")
        st.code(
            f"python train_denoiser.py --data {quoted(folders.data)} --out {quoted(folders.models)}",
            language="bash",
        )
        return
    names = [path.stem for path in paths]
    chosen = st.multiselect("Runs, latest first", names, names[:1], key="runs", persist_state="session")
    logs = {}
    for path in paths:
        if path.stem not in chosen:
            continue
        try:
            logs[path.stem] = read_log(stamp(path))
        except stage.StageError as error:
            st.error(plain_text(error))
    logs = {name: log for name, log in logs.items() if {"epoch"} <= set(log.columns) and len(log)}
    if not logs:
        st.caption("No finished epoch yet.")
        return
    show_state(folders, logs)
    curves = list(dict.fromkeys(name for log in logs.values() for name in log.columns))
    curves = [name for name in curves if name not in NOT_CURVES and any_number(logs, name)]
    curves.sort(key=lambda name: FIRST_CURVES.index(name) if name in FIRST_CURVES else len(FIRST_CURVES))
    cells = [cell for _ in range(0, len(curves), 3) for cell in st.columns(3)]
    for cell, name in zip(cells, curves, strict=False):
        with cell, st.container(border=True):
            st.altair_chart(curve(logs, name), width="stretch")


def any_number(logs: dict[str, pd.DataFrame], name: str) -> bool:
    return any(name in log and pd.api.types.is_numeric_dtype(log[name]) for log in logs.values())


def show_state(folders: Folders, logs: dict[str, pd.DataFrame]) -> None:
    """Where each run stands."""
    rows = []
    for name, log in logs.items():
        last = log.iloc[-1]
        age = time.time() - (folders.models / f"{name}.jsonl").stat().st_mtime
        left = last.get("seconds_left")
        running = age < RUNNING_S and left is not None and left > 0
        rows.append(
            {
                "Run": name,
                "State": "running" if running else "ended",
                "Epochs": int(last["epoch"]),
                "Left": str(timedelta(seconds=round(left))) if running else "",
                "Seconds an epoch": last.get("seconds"),
                "Images a second": last.get("images_per_s"),
                "Last written": pd.Timestamp.now() - pd.Timedelta(seconds=age),
            }
        )
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        placeholder="n/a",
        column_config={
            "Seconds an epoch": st.column_config.NumberColumn(format="%.1f"),
            "Images a second": st.column_config.NumberColumn(format="%.0f"),
            "Last written": st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm:ss"),
        },
    )


def curve(logs: dict[str, pd.DataFrame], name: str) -> alt.Chart:
    """One number against the epoch, a line per run."""
    frame = pd.concat(
        log[["epoch", name]].assign(run=run) for run, log in logs.items() if name in log
    ).dropna()
    legend = alt.Legend(orient="top", title=None) if len(logs) > 1 else None
    return (
        alt.Chart(frame, title=name.replace("_", " "))
        .mark_line(point=alt.OverlayMarkDef(size=18), strokeWidth=2)
        .encode(
            x=alt.X("epoch:Q", title="epoch", axis=alt.Axis(tickMinStep=1, format="d", grid=False)),
            y=alt.Y(f"{name}:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(format="~g")),
            color=alt.Color("run:N", legend=legend),
            tooltip=["run", "epoch", alt.Tooltip(f"{name}:Q", format=".4g")],
        )
        .properties(height=210)
    )


# ---------------------------------------------------------------- page Models


def models_page(folders: Folders) -> None:
    """The model card of every checkpoint."""
    paths = sorted(folders.models.glob("*.card.json"))
    if not paths:
        st.info(f"No model card in {plain_text(folders.models)} yet. Training writes one:")
        st.code(
            f"python train_denoiser.py --data {quoted(folders.data)} --out {quoted(folders.models)}",
            language="bash",
        )
        return
    cards = {}
    for path in paths:
        name = path.name.removesuffix(".card.json")
        try:
            cards[name] = card_facts(path)
        except stage.StageError as error:
            st.error(plain_text(error))
    if not cards:
        return
    summary = pd.DataFrame(summary_row(name, card) for name, card in cards.items())
    st.dataframe(summary, hide_index=True, placeholder="n/a")
    name = st.segmented_control("Card", list(cards), default=next(iter(cards)), required=True, key="card")
    show_card(folders, name, cards[name])


def card_facts(path: Path) -> dict:
    """Raises InputError for a card that is damaged."""
    card = stage.read_json(path, "train again")
    try:
        if not isinstance(card["model"]["name"], str):
            raise TypeError("the model has no name")
        return dict(card) | {"validation": dict(card["validation"]), "config": dict(card["config"])}
    except (KeyError, TypeError, ValueError) as error:
        raise malformed(path, error, "train again") from None


def summary_row(name: str, card: dict) -> dict:
    values = {key: value for key, value in card["validation"].items() if isinstance(value, float)}
    return {
        "Name": name,
        "Kind": card.get("stage"),
        "Network": card["model"]["name"],
        "Parameters": card.get("parameters"),
        "Input": card.get("input"),
        "Task": card.get("task"),
        "Size": card.get("size"),
        "Dose model": card.get("dose_model"),
        "Validation": ", ".join(f"{key} {value:.3g}" for key, value in list(values.items())[:4]),
        "Split": str(card.get("split_hash"))[:8],
        "Seed": card.get("seed"),
    }


def show_card(folders: Folders, name: str, card: dict) -> None:
    left, right = st.columns(2, gap="medium")
    with left, st.container(border=True):
        st.markdown(f"**{plain_text(name)}** · {plain_text(card.get('stage', ''))}")
        st.caption("Best epoch on validation patients. Research use only; not a medical device.")
        facts = {
            key: value
            for key, value in card.items()
            if key not in ("config", "validation", "versions", "trained_on", "thresholds", "parents")
        }
        facts["trained_on"] = f"{len(card.get('trained_on', []))} patients"
        st.dataframe(as_table(facts), hide_index=True)
        for level, threshold in (card.get("thresholds") or {}).items():
            value, origin = threshold.get("value"), threshold.get("origin", "")
            chosen = "none could be chosen" if value is None else f"{value:.3f}"
            st.caption(f"Threshold per {level}: {chosen} · {plain_text(origin)}")
    with right, st.container(border=True):
        st.markdown("**Validation**")
        st.dataframe(as_table(card["validation"]), hide_index=True)
        st.markdown("**Settings**")
        st.dataframe(as_table(card["config"]), hide_index=True, height=260)
        versions = card.get("versions", {})
        st.caption(" · ".join(f"{plain_text(key)} {plain_text(value)}" for key, value in versions.items()))
        st.download_button(
            "Download card",
            (folders.models / f"{name}.card.json").read_bytes(),
            f"{name}.card.json",
            "application/json",
            on_click="ignore",
            icon=":material/download:",
        )


def as_table(facts: dict) -> pd.DataFrame:
    """Names and values as text, for whatever a card holds."""

    def text(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        if value is None or value == []:
            return "none"
        return value if isinstance(value, str) else json.dumps(value)

    rows = [(key.replace("_", " "), text(value)) for key, value in facts.items()]
    return pd.DataFrame(rows, columns=["Name", "Value"])
