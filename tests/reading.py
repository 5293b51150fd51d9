"""Reading a set back as prepare_dataset.py does, for the tests of the readers."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from scans import READERS
from volumes import EXPECTED_CODES, Scan, ScanError


def read_all(source: str, folder: Path) -> dict[str, Scan]:
    """Case -> scan; jobs survive pickling, and nothing is rejected but what a healthy set holds as well."""
    jobs, rejected = READERS[source].discover(folder)
    assert {entry.code for entry in rejected} <= EXPECTED_CODES, rejected
    assert len({job.series_uid for job in jobs}) == len(jobs)
    return {job.case: READERS[source].read(pickle.loads(pickle.dumps(job))) for job in jobs}


def read_one(source: str, folder: Path) -> Scan:
    (scan,) = read_all(source, folder).values()
    return scan


def codes(source: str, folder: Path) -> dict[str, str]:
    """Path below folder -> rejection code."""
    rejected = READERS[source].discover(folder)[1]
    return {os.path.relpath(entry.file, folder): entry.code for entry in rejected}


def read_error(source: str, folder: Path) -> ScanError:
    """The error of reading the only job; one printable line, and it survives pickling."""
    (job,), _ = READERS[source].discover(folder)
    with pytest.raises(ScanError) as caught:
        READERS[source].read(job)
    assert str(caught.value).isprintable() and str(pickle.loads(pickle.dumps(caught.value)))
    return caught.value


def refused_unless_assumed(source: str, folder: Path, note: str) -> Scan:
    """The scan of the only job with assumed HU, the note on every slice; without it, it is no HU."""
    assert read_error(source, folder).code == "not_hu"
    (job,), _ = READERS[source].discover(folder)
    scan = READERS[source].read(pickle.loads(pickle.dumps(job._replace(assume_hu=True))))
    assert scan.intensity == "hu" and all(note in notes for notes in scan.repairs)
    return scan
