"""The registry of readers, and the phantom among them."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest

from phantom import generate_phantom
from scans import PHANTOM_NOISE_HU, READERS, discover, discover_phantom, read_scan
from tests.test_dicom_series import along_z, write_series
from volumes import AIR_HU, LABEL_NAMES, Job, ScanError, write_nifti


def test_discover_phantom_gives_the_same_patients_however_many_are_asked_for():
    few, many = discover_phantom(3)[0], discover_phantom(5)[0]
    assert few == many[:3]
    assert {job.series_uid for job in many}.isdisjoint(
        job.series_uid for job in discover_phantom(5, size=64)[0]
    )


def test_discover_phantom_with_neighbouring_seeds_shares_no_patient():
    seeds = [job.inputs.seed for seed in range(40, 45) for job in discover_phantom(20, seed=seed)[0]]
    assert len(set(seeds)) == len(seeds)


def test_read_phantom_gives_a_scan_with_truth_mask_and_labels():
    job = discover_phantom(1, size=64, slices=4, seed=3)[0][0]
    scan = read_scan(pickle.loads(pickle.dumps(job)))
    assert scan.hu.shape == scan.mask.shape == scan.truth.shape == (4, 64, 64)
    assert scan.hu.dtype == scan.truth.dtype == np.int16 and scan.mask.dtype == np.uint8
    assert tuple(scan.labels) == LABEL_NAMES and len(scan.slice_labels) == len(scan.repairs) == 4
    difference = (scan.hu.astype(float) - scan.truth)[scan.truth > -500]
    assert difference.std() == pytest.approx(PHANTOM_NOISE_HU, rel=0.15)
    corner = scan.affine @ (0, 0, 3, 1)
    assert corner[2] == pytest.approx(scan.positions_mm[3])
    np.testing.assert_array_equal(scan.hu, read_scan(job).hu)


def test_discover_phantom_refuses_nothing_to_make():
    with pytest.raises(ValueError, match="--patients 0"):
        discover_phantom(0)


def test_readers_hold_pairs_of_functions_and_jobs_name_their_reader(tmp_path):
    write_series(tmp_path, along_z(0, 5))
    options = {"dicom": {"input_dir": tmp_path}, "phantom": {"patients": 1, "size": 32, "slices": 2}}
    for name in options:
        reader = READERS[name]
        jobs, _ = reader.discover(**options[name])
        assert isinstance(jobs[0], Job) and jobs[0].source == name
        scan = read_scan(jobs[0])
        assert scan.source == name and scan.series_uid == jobs[0].series_uid
        assert scan.hu.min() >= AIR_HU and scan.intensity == "hu"
        assert len(scan.positions_mm) == len(scan.hu) == len(scan.repairs)


def test_discover_tells_dicom_and_nifti_apart_by_what_lies_there(tmp_path):
    write_series(tmp_path / "dicom", along_z(0, 5))
    shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path / "dicom")
    made = generate_phantom(3, size=40, slices=3)
    for name in ("a.nii.gz", "deep/b.nii"):
        write_nifti(tmp_path / "nifti" / name, made.hu.round().astype(np.int16), np.asarray(made.affine))
    sources = {
        name: [job.source for job in discover(tmp_path / name)[0]]
        for name in ("dicom", "zipped.zip", "nifti", "nifti/a.nii.gz")
    }
    assert sources == {
        "dicom": ["dicom"],
        "zipped.zip": ["dicom"],
        "nifti": ["nifti", "nifti"],
        "nifti/a.nii.gz": ["nifti"],
    }
    shutil.copy(tmp_path / "nifti" / "a.nii.gz", tmp_path / "dicom")
    jobs, rejected = discover(tmp_path / "dicom")
    assert [job.source for job in jobs] == ["dicom"] and len(rejected) == 1  # of both, and it is named
    with pytest.raises(ScanError, match="nowhere"):
        discover(tmp_path / "nowhere")
