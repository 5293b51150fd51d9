"""The report of a study."""

from __future__ import annotations

from pathlib import Path

from study import Study


def answer(study: Study, found: dict[str, list[dict]]) -> list[str]:
    """The study's answer in a sentence for each task."""
    return []


def write(out: Path, study: Study, manifest: dict, found: dict[str, list[dict]]) -> list[Path]:
    """report.html and figures/."""
    return []
