"""Where things are, and what the study wrote. Without torch, so that the first page opens at once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pandas as pd
import streamlit as st

import stage

LEVELS = ("scan", "slice")  # a patient is missed by scan: what the study answers first


class Folders(NamedTuple):
    """Where things are, from the command line."""

    data: Path
    models: Path
    results: Path
    device: str
    scans: Path | None = None  # below which scans on this machine may be opened


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


NEEDED_COLUMNS = ("dose_model", "dose", "arm", "level", "task", "n_patients", "n_slices", "noise_seed")
NAMED_IN_DIGITS = ("arm", "pipeline", "against", "reference", "series_uid", "patient")  # no numbers
TEXT_COLUMNS = ("dose_model", "arm", "denoiser", "classifier", "task", "level", "range_hu", "mask")
SHOWN_MANIFEST = ("data", "split_hash", "command")


@st.cache_data(show_spinner=False, max_entries=4)
def load_results(file: Stamp) -> tuple[dict, pd.DataFrame]:
    """experiments.json as (manifest, rows). Raises InputError if it is damaged or not of this version."""
    remedy = "run run_experiments.py again"
    content = stage.read_json(file.path, remedy)
    try:
        manifest, rows = dict(content["manifest"]), pd.DataFrame(content["rows"])
        missing = sorted({*NEEDED_COLUMNS} - set(rows.columns))
        if missing or rows.empty:
            raise KeyError(", ".join(missing) or "no rows")
        numbers = [name for name in rows.columns if name not in TEXT_COLUMNS]
        rows[numbers] = rows[numbers].astype(float)
        counts = ["n_patients", "n_slices", "noise_seed"]
        rows[counts] = rows[counts].astype(int)
        if not (rows["dose"] > 0).all():
            raise ValueError("a dose that is not positive")
        checkpoints_used = {str(name): str(sha) for name, sha in manifest["checkpoints"].items()}
        manifest |= {"checkpoints": checkpoints_used, "left_out": [str(x) for x in manifest["left_out"]]}
        manifest |= {key: str(manifest[key]) for key in SHOWN_MANIFEST}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise malformed(file.path, error, remedy) from None
    return manifest, rows


@st.cache_data(show_spinner=False, max_entries=32)
def load_table(file: Stamp) -> pd.DataFrame:
    """A table of the study. Raises InputError if it is none."""
    try:
        return pd.read_csv(file.path, dtype=dict.fromkeys(NAMED_IN_DIGITS, str))
    except (ValueError, UnicodeDecodeError) as error:  # pandas' own errors are ValueErrors
        raise malformed(file.path, error, "run run_experiments.py again") from None


@st.cache_data(show_spinner=False, max_entries=32)
def file_hash(file: Stamp) -> str:
    import checkpoints  # here, as it needs torch

    return checkpoints.file_sha256(Path(file.path))
