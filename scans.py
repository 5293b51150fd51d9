"""Raw files -> a Scan in HU. READERS holds every source by its command-line name.

A reader has two halves: `discover` looks at headers only and lists the jobs and what it rejects, `read` turns
one job into a Scan. Jobs are small and picklable, so that worker processes can share them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from array_sets import ARRAY_READERS
from dicom_series import DICOM_READERS
from dicom_sets import DICOM_SET_READERS
from nifti_series import NIFTI_READERS, NIFTI_SUFFIX
from picture_sets import PICTURE_READERS
from stage import stable_seed
from volumes import (
    AIR_HU,
    ASSUMED_WINDOW,
    LABEL_NAMES,
    MAX_HU,
    Job,
    Reader,
    Rejected,
    Scan,
    measured_scan,
    pseudonym,
)

GREY_LEVELS = 255  # the highest of 8 bits, at the upper end of a window

# ---------------------------------------------------------------- phantom


class _PhantomPatient(NamedTuple):
    name: str
    seed: int
    size: int
    slices: int


PHANTOM_NOISE_HU = 4.0  # a routine head scan, the dose that every dose model starts from


def discover_phantom(
    patients: int, size: int = 128, slices: int = 24, seed: int = 42
) -> tuple[list[Job], list[Rejected]]:
    """Jobs for synthetic patients; patient i is the same however many are asked for.

    size: pixels along both sides. Seeds are hashed, so that neighbouring seeds share no patient.
    Raises ValueError if patients, size or slices is below 1."""
    for name, value in (("patients", patients), ("size", size), ("slices", slices)):
        if value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    jobs = []
    for index in range(patients):
        name = f"phantom-{seed}-{index:04d}"
        inputs = _PhantomPatient(name, stable_seed("phantom", seed, index), size, slices)
        jobs.append(Job("phantom", pseudonym("phantom", name, str(size), str(slices)), name, inputs))
    return jobs, []


def read_phantom(job: Job) -> Scan:
    """Generate one synthetic patient, with its mask and its noise-free truth."""
    from phantom import generate_phantom  # here, so that reading real files needs no phantom

    patient = job.inputs
    made = generate_phantom(patient.seed, size=patient.size, slices=patient.slices, noise_hu=PHANTOM_NOISE_HU)
    count = len(made.hu)
    positions = np.asarray(made.affine)[2, 3] + made.spacing_mm[0] * np.arange(count)
    return measured_scan(
        hu=made.hu.round().clip(AIR_HU, MAX_HU).astype(np.int16),
        affine=np.asarray(made.affine, np.float64),
        positions_mm=tuple(float(p) for p in positions),
        spacing_mm=tuple(float(s) for s in made.spacing_mm),
        gantry_tilt_deg=0.0,
        source="phantom",
        patient_id=pseudonym("patient", patient.name),
        study_uid=pseudonym("study", patient.name),
        series_uid=job.series_uid,
        labels={name: made.labels.get(name) for name in LABEL_NAMES},
        slice_labels=[{name: labels.get(name) for name in LABEL_NAMES} for labels in made.slice_labels],
        repairs=[[] for _ in range(count)],
        mask=made.mask.astype(np.uint8),
        truth=made.truth.round().clip(AIR_HU, MAX_HU).astype(np.int16),
    )


PHANTOM_READERS = {"phantom": Reader(discover_phantom, read_phantom)}
READERS: dict[str, Reader] = {
    **DICOM_READERS,
    **DICOM_SET_READERS,
    **NIFTI_READERS,
    **ARRAY_READERS,
    **PICTURE_READERS,
    **PHANTOM_READERS,
}


def discover(path: str | Path) -> tuple[list[Job], list[Rejected]]:
    """The scans in a folder of DICOM series, a zip of them, a NIfTI file, or a folder of NIfTI files; of a
    folder with both the DICOM series. Returns (jobs, rejected). Raises ScanError if there is no such path."""
    path = Path(path)
    if path.is_file() and NIFTI_SUFFIX.search(path.name):
        return READERS["nifti"].discover(path)
    found = READERS["dicom"].discover(path)
    if not found[0] and path.is_dir() and any(NIFTI_SUFFIX.search(entry.file) for entry in found[1]):
        return READERS["nifti"].discover(path)
    return found


def read_scan(job: Job) -> Scan:
    """Read one job with the reader that discovered it. Raises ScanError if the series cannot be used.

    With job.assume_window 8-bit pictures become HU of that window; what it cut off is lost all the same."""
    scan = READERS[job.source].read(job)
    if job.assume_window is None or scan.intensity == "hu":
        return scan
    center, width = job.assume_window
    hu = (center - width / 2 + scan.hu * (width / GREY_LEVELS)).round().astype(np.int16)
    repairs = [[*notes, ASSUMED_WINDOW] for notes in scan.repairs]
    return replace(scan, hu=hu, intensity="hu", repairs=repairs)
