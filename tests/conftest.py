"""What the tests share: a small prepared data set, and the real scans where they are at hand."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prepare_dataset
import split_dataset

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "data"

torch.set_num_threads(1)  # bitwise repeats, and pytest-xdist brings the parallelism


@pytest.fixture
def real_data():
    """The folder of real CT scans; the test skips where it is absent."""
    if not REAL.is_dir():
        pytest.skip(f"no real scans at {REAL}")
    return REAL


@pytest.fixture(scope="session")
def split_data_once(tmp_path_factory):
    """14 phantom patients of 6 slices of 48 x 48, split; only to be copied."""
    folder = tmp_path_factory.mktemp("data")
    size = ["--size", 48, "--slices", 6]
    prepare_dataset.main(["--source", "phantom", "--patients", 14, *size, "--out", folder, "--workers", 1])
    split_dataset.main(["--data", folder])
    return folder


@pytest.fixture
def split_data(split_data_once, tmp_path):
    """A copy of the small prepared data set that a test may spoil."""
    return Path(shutil.copytree(split_data_once, tmp_path / "dataset"))


@pytest.fixture
def script():
    """Run one of the stages as a user does: script("train_denoiser.py", ...) -> CompletedProcess."""

    def run(name, *args, cwd=None, **kwargs):
        command = [sys.executable, str(ROOT / name), *(str(arg) for arg in args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, **kwargs)

    return run


@pytest.fixture
def no_report(monkeypatch):
    """A study writes its tables without the report about them, from 50 draws of every bootstrap."""
    import intervals
    import report  # with figures and torch it takes seconds
    import wording

    whole = intervals.patient_draws
    monkeypatch.setattr(intervals, "patient_draws", lambda count, seed, _: whole(count, seed, 50))
    monkeypatch.setattr(report, "write", lambda *_: [])
    monkeypatch.setattr(wording, "answer", lambda *_: ["the answer"])
