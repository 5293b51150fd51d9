"""The series reader against headers written here, of known geometry and pixels, and against real data."""

from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
import stat
import struct
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

import dicom_series
import prepare_dataset
from dicom_series import discover_dicom, read_dicom, read_headers
from scans import PHANTOM_NOISE_HU, READERS, discover_phantom, read_scan
from volumes import AIR_HU, EXPECTED_CODES, LABEL_NAMES, Job, Scan, ScanError, stack_geometry, write_nifti

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SIZE = 40
NAME = "Canary^Patient"
TILTED = (1.0, 0.0, 0.0, 0.0, 0.9483237, -0.3173047)  # 18.5 degrees, as GE and Philips write it
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def real(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"../shared/data/{name} is absent")
    return DATA / name


def head_hu(number: int = 0) -> np.ndarray:
    """(SIZE, SIZE - 4) int HU of a small round head; number makes every slice another one."""
    y, x = np.mgrid[:SIZE, : SIZE - 4]
    r = np.hypot(y - 19.5, x - 17.5)
    hu = np.select([r < 12, r < 15], [35 + number % 7, 900], -1000)
    hu[20, 18] = 100 + number
    return hu


def write_slice(path: Path, hu: np.ndarray, position=(0.0, 0.0, 0.0), *, drop=(), **tags) -> Path:
    """Write one CT slice, stored as unsigned HU + 1024 unless `tags` say otherwise. drop: tags left out.

    Two of tags are no tags: `stored`, the values to store, and `syntax`, the transfer syntax."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax = tags.pop("syntax", ExplicitVRLittleEndian)
    values = {
        "SOPClassUID": dicom_series.CT_IMAGE,
        "SOPInstanceUID": pydicom.uid.generate_uid(),
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "PatientName": NAME,
        "PatientBirthDate": "19700101",
        "AccessionNumber": "CANARY17",
        "PatientID": "p1",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "ImagePositionPatient": [f"{v:.6f}" for v in position],
        "ImageOrientationPatient": list(AXIAL),
        "PixelSpacing": [0.5, 0.75],
        "Rows": hu.shape[0],
        "Columns": hu.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
    } | tags
    if "stored" not in values:
        values["stored"] = (hu - values["RescaleIntercept"]) / values["RescaleSlope"]
    kind = np.dtype(np.int16 if values["PixelRepresentation"] else np.uint16)
    kind = kind if syntax.is_little_endian else kind.newbyteorder(">")
    dataset.PixelData = np.asarray(values.pop("stored")).astype(kind).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with pydicom.config.disable_value_validation():
        for name, value in values.items():
            if name not in drop:
                setattr(dataset, name, value)
        dataset.save_as(path, enforce_file_format=True)
    return path


def write_series(folder: Path, positions, **tags) -> Path:
    for index, position in enumerate(positions):
        write_slice(folder / f"{index:03d}.dcm", head_hu(index), position, **tags)
    return folder


def along_z(*heights: float) -> list[tuple[float, float, float]]:
    return [(-10.0, -20.0, float(z)) for z in heights]


def read_one(folder: Path) -> Scan:
    jobs, _ = discover_dicom(folder)
    assert len(jobs) == 1, jobs
    return read_dicom(jobs[0])


def codes(folder: Path) -> dict[str, str]:
    """File name -> rejection code."""
    return {Path(r.file).name: r.code for r in discover_dicom(folder)[1]}


# ---------------------------------------------------------------- order and geometry


def test_read_dicom_with_shuffled_names_and_instance_numbers_orders_by_position(tmp_path):
    heights = [0, 5, 10, 15, 20, 25]
    for name, instance, index in zip("fbdace", (3, 6, 1, 5, 2, 4), range(6), strict=True):
        write_slice(tmp_path / name, head_hu(index), (0, 0, heights[index]), InstanceNumber=instance)
    scan = read_one(tmp_path)
    assert scan.positions_mm == pytest.approx(heights)
    assert [int(image[20, 18]) for image in scan.hu] == [100, 101, 102, 103, 104, 105]
    assert scan.repairs == [[] for _ in heights]


@pytest.mark.parametrize(
    "orientation", [AXIAL, (1, 0, 0, 0, -1, 0), (-1, 0, 0, 0, -1, 0), (-1, 0, 0, 0, 1, 0)]
)
def test_read_dicom_in_any_axial_orientation_runs_from_the_feet_to_the_head(tmp_path, orientation):
    write_series(tmp_path, along_z(30, 20, 10), ImageOrientationPatient=list(orientation))
    scan = read_one(tmp_path)
    assert [int(image[20, 18]) for image in scan.hu] == [102, 101, 100]
    assert scan.affine[2, 2] == pytest.approx(10)
    assert scan.gantry_tilt_deg == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("orientation", [AXIAL, TILTED, (0.98, 0.199, 0, -0.199, 0.98, 0)])
def test_affine_puts_every_voxel_where_the_header_puts_it(tmp_path, orientation):
    positions = [(-120.5, -98.25 + 0.3 * i, 4.0 * i) for i in range(5)]  # steps sideways as well: sheared
    write_series(tmp_path, positions, ImageOrientationPatient=list(orientation), PixelSpacing=[0.6, 0.45])
    scan = read_one(tmp_path)
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    for s, r, c in ((0, 0, 0), (4, SIZE - 1, 0), (2, 7, 31), (3, 39, 35)):
        by_header = np.array(positions[s]) + row * 0.45 * c + column * 0.6 * r
        by_affine = (scan.affine @ (c, r, s, 1))[:3]
        np.testing.assert_allclose(by_affine, by_header, atol=0.01)  # mm
    assert scan.spacing_mm[1:] == (0.6, 0.45)


def test_affine_with_uneven_gaps_places_slices_through_their_positions(tmp_path):
    heights = [0.0, 4.0, 8.0, 9.08, 16.08, 23.08]
    write_series(tmp_path, along_z(*heights), ImageOrientationPatient=list(TILTED))
    scan = read_one(tmp_path)
    gaps = np.diff(scan.positions_mm)
    np.testing.assert_allclose(gaps, np.diff(heights) * np.cos(np.radians(18.5)), atol=1e-3)
    assert scan.spacing_mm[0] == pytest.approx(np.median(gaps))
    for position, height in zip(scan.positions_mm, heights, strict=True):
        coordinate = (position - scan.positions_mm[0]) / scan.spacing_mm[0]
        np.testing.assert_allclose((scan.affine @ (0, 0, coordinate, 1))[:3], (-10, -20, height), atol=0.01)
    assert [bool(notes) for notes in scan.repairs] == [False, False, False, True, True, True]
    assert scan.repairs[3][0].startswith("gap of 1.02 mm")


@pytest.mark.parametrize("tilt_deg", [-22.0, 0.0, 18.5])
def test_gantry_tilt_is_the_signed_angle_of_the_geometry(tmp_path, tilt_deg):
    angle = np.radians(tilt_deg)
    orientation = [1, 0, 0, 0, round(np.cos(angle), 7), round(-np.sin(angle), 7)]
    write_series(tmp_path, along_z(0, 5, 10), ImageOrientationPatient=orientation)
    assert read_one(tmp_path).gantry_tilt_deg == pytest.approx(tilt_deg, abs=0.01)


def test_gantry_tilt_of_an_oblique_stack_without_shear_is_zero():
    normal = np.cross(TILTED[:3], TILTED[3:])
    corners = np.arange(4)[:, None] * 3.0 * normal
    stack = stack_geometry(corners, TILTED, (0.5, 0.5), 5.0)
    assert stack.gantry_tilt_deg == 0
    assert stack_geometry(corners[:1], TILTED, (0.5, 0.5), 5.0).gantry_tilt_deg == pytest.approx(
        18.5, abs=0.01
    )


def test_read_dicom_of_one_slice_takes_its_thickness_or_says_that_it_assumes_one(tmp_path):
    write_slice(tmp_path / "thick" / "a", head_hu(), SliceThickness=7.5)
    write_slice(tmp_path / "bare" / "a", head_hu())
    thick, bare = read_one(tmp_path / "thick"), read_one(tmp_path / "bare")
    assert thick.spacing_mm[0] == 7.5 and thick.repairs == [[]]
    assert bare.spacing_mm[0] == 5.0 and "assumed" in bare.repairs[0][0]


def test_read_dicom_with_a_slice_beside_the_line_says_so(tmp_path):
    positions = along_z(0, 5, 10, 15, 20)
    positions[2] = (20.0, -20.0, 10.0)
    notes = read_one(write_series(tmp_path, positions)).repairs[2]
    assert any("beside the line" in note for note in notes)


@pytest.mark.parametrize(
    ("tags", "named"),
    [
        (lambda i: {"InstanceNumber": 9 - i, "SliceLocation": i * 2.0}, "InstanceNumber"),
        (lambda i: {"SliceLocation": -2.0 * i}, "SliceLocation"),
        (lambda i: {"InstanceNumber": 1, "SliceLocation": -2.0 * i}, "SliceLocation"),
        (lambda _: {}, "the file name"),
    ],
)
def test_read_dicom_without_positions_falls_back_and_records_it_on_every_slice(tmp_path, tags, named):
    for i in range(3):
        write_slice(tmp_path / f"{i}.dcm", head_hu(i), drop=("ImagePositionPatient",), **tags(i))
    scan = read_one(tmp_path)
    backwards = named != "the file name"
    expected = [102, 101, 100] if backwards else [100, 101, 102]
    assert [int(image[20, 18]) for image in scan.hu] == expected
    assert all(any(f"order from {named}" in note for note in notes) for notes in scan.repairs)
    assert (np.diff(scan.positions_mm) > 0).all()
    if named == "SliceLocation":
        assert scan.spacing_mm[0] == pytest.approx(2)


def test_discover_dicom_leaves_out_a_slice_without_position_among_others(tmp_path):
    write_series(tmp_path, along_z(0, 5, 10))
    write_slice(tmp_path / "lost.dcm", head_hu(7), drop=("ImagePositionPatient",))
    assert codes(tmp_path) == {"lost.dcm": "no_position"}
    assert len(read_one(tmp_path).hu) == 3


# ---------------------------------------------------------------- which files make a series


def test_discover_dicom_tells_patients_studies_and_series_in_one_folder_apart(tmp_path):
    kinds = [("p1", "1.1", "1.1.1"), ("p1", "1.1", "1.1.2"), ("p1", "1.2", "1.2.1"), ("p2", "1.1", "1.1.1")]
    for k, (patient, study, series) in enumerate(kinds):
        for i in range(2):
            tags = {"PatientID": patient, "StudyInstanceUID": study, "SeriesInstanceUID": series}
            write_slice(tmp_path / f"{i}{k}", head_hu(i), (0, 0, 5 * i), **tags)
    jobs, rejected = discover_dicom(tmp_path)
    found = [read_dicom(job) for job in jobs]
    assert not rejected and [len(scan.hu) for scan in found] == [2, 2, 2, 2]
    assert len({scan.series_uid for scan in found}) == 4
    assert len({scan.study_uid for scan in found}) == 3  # p2's study is another one in spite of its uid
    assert len({scan.patient_id for scan in found}) == 2
    assert len({job.case for job in jobs}) == 4


def test_discover_dicom_names_every_series_before_reading_and_always_the_same(tmp_path):
    write_series(tmp_path / "a", along_z(0, 5))
    job = discover_dicom(tmp_path)[0][0]
    assert job.case == "a"
    assert read_dicom(pickle.loads(pickle.dumps(job))).series_uid == job.series_uid
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert discover_dicom(tmp_path)[0][0].series_uid == job.series_uid


def test_discover_dicom_splits_a_series_of_mixed_shapes_and_orientations(tmp_path):
    write_series(tmp_path / "a", along_z(0, 5, 10))
    write_series(tmp_path / "b", along_z(0, 5), ImageOrientationPatient=list(TILTED))
    write_slice(tmp_path / "c", head_hu()[:, :-2], (0, 0, 50))
    jobs, _ = discover_dicom(tmp_path)
    assert sorted(len(read_dicom(job).hu) for job in jobs) == [1, 2, 3]
    assert len({job.series_uid for job in jobs}) == 3


def test_discover_dicom_splits_acquisitions_only_where_they_cover_the_same_positions(tmp_path):
    for i in range(4):  # numbered slice by slice, as GE does
        write_slice(tmp_path / "ge" / str(i), head_hu(i), (0, 0, 5 * i), AcquisitionNumber=i)
        for phase in (1, 2):  # two phases over the same range
            write_slice(
                tmp_path / "two" / f"{phase}{i}", head_hu(i + phase), (0, 0, 5 * i), AcquisitionNumber=phase
            )
    assert len(read_one(tmp_path / "ge").hu) == 4
    assert [len(read_dicom(job).hu) for job in discover_dicom(tmp_path / "two")[0]] == [4, 4]


def test_discover_dicom_splits_two_kernels_of_one_series(tmp_path):
    for i in range(3):
        for kernel in ("STANDARD", "BONE"):
            hu = head_hu(i + (kernel == "BONE"))
            write_slice(tmp_path / f"{i}{kernel}", hu, (0, 0, 5 * i), ConvolutionKernel=kernel)
    jobs, rejected = discover_dicom(tmp_path)
    assert not rejected and len({job.series_uid for job in jobs}) == 2
    assert sorted(int(read_dicom(job).hu[0, 20, 18]) for job in jobs) == [100, 101]


def test_read_dicom_drops_identical_duplicates_and_notes_them(tmp_path):
    write_series(tmp_path, along_z(0, 5, 10))
    shutil.copy(tmp_path / "001.dcm", tmp_path / "copy.dcm")
    scan = read_one(tmp_path)
    assert len(scan.hu) == 3
    assert [len(notes) for notes in scan.repairs] == [0, 1, 0] and "copy" in scan.repairs[1][0]


def test_read_dicom_refuses_different_slices_at_one_position(tmp_path):
    write_series(tmp_path, along_z(0, 5, 5.004))
    with pytest.raises(ScanError, match=r"002\.dcm: lies at the same position as 001\.dcm") as caught:
        read_one(tmp_path)
    assert caught.value.code == "conflict"


def test_discover_dicom_names_what_it_skips(tmp_path):
    write_series(tmp_path, along_z(0, 5))
    hu = head_hu()
    write_slice(tmp_path / "scout", hu, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_slice(tmp_path / "capture", hu, SOPClassUID=dicom_series.SECONDARY_CAPTURE)
    write_slice(tmp_path / "dose", hu, ImageType=["DERIVED", "SECONDARY", "DOSE_INFO"])
    write_slice(tmp_path / "mr", hu, Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    write_slice(tmp_path / "enhanced", hu, SOPClassUID=dicom_series.ENHANCED_CT[0], NumberOfFrames=2)
    write_slice(tmp_path / "coronal", hu, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    write_slice(tmp_path / "slope", hu, drop=("RescaleSlope",))
    write_slice(tmp_path / "spacing", hu, drop=("PixelSpacing",))
    write_slice(tmp_path / "huge", hu, Rows=65535, Columns=65535)
    write_slice(tmp_path / "zero", hu, stored=hu + 1024, RescaleSlope=0)
    write_slice(tmp_path / "skew", hu, ImageOrientationPatient=[1, 0, 0, 1, 1, 0])
    write_slice(tmp_path / "colour", hu, SamplesPerPixel=3, PhotometricInterpretation="RGB")
    (tmp_path / "text.dcm").write_text("PatientName: nobody")
    (tmp_path / "empty.dcm").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("hello")
    for junk in (".DS_Store", "Thumbs.db", "._000.dcm"):
        (tmp_path / junk).write_bytes(b"\0")
    assert codes(tmp_path) == {
        "scout": "localizer",
        "capture": "secondary_capture",
        "dose": "secondary_capture",
        "mr": "not_ct",
        "enhanced": "multi_frame",
        "coronal": "not_axial",
        "slope": "no_rescale",
        "spacing": "no_geometry",
        "huge": "damaged",
        "zero": "damaged",
        "skew": "no_geometry",
        "colour": "colour",
        "text.dcm": "not_dicom",
        "empty.dcm": "not_dicom",
        "notes.txt": "other_file",
    }
    assert not {"no_rescale", "damaged", "not_dicom", "multi_frame", "truncated"} & EXPECTED_CODES
    assert len(read_one(tmp_path).hu) == 2


def test_discover_dicom_of_an_empty_or_missing_folder_says_so(tmp_path):
    jobs, rejected = discover_dicom(tmp_path)
    assert not jobs and [r.code for r in rejected] == ["no_ct"] and "0 files seen" in rejected[0].reason
    with pytest.raises(ScanError, match="no such file or folder"):
        discover_dicom(tmp_path / "nowhere")


def test_discover_dicom_of_a_single_file_finds_its_slice(tmp_path):
    file = write_slice(tmp_path / "case" / "only", head_hu())
    jobs, rejected = discover_dicom(file)
    assert not rejected and jobs[0].case == "only" and len(read_dicom(jobs[0]).hu) == 1


@pytest.mark.filterwarnings("error")
def test_discover_dicom_follows_no_links_and_opens_no_pipes(tmp_path):
    write_series(tmp_path / "in", along_z(0, 5))
    write_slice(tmp_path / "outside.dcm", head_hu(3), (0, 0, 10))
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in", target_is_directory=True)
    (tmp_path / "in" / "link.dcm").symlink_to(tmp_path / "outside.dcm")
    os.mkfifo(tmp_path / "in" / "pipe")
    assert codes(tmp_path / "in") == {"loop": "not_regular", "link.dcm": "not_regular", "pipe": "not_regular"}
    assert len(read_one(tmp_path / "in").hu) == 2


@pytest.mark.filterwarnings("error")
def test_hostile_ids_and_names_never_become_paths_or_lines(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff line\nbreak $(x) -\xc3\xa9")
    write_series(folder, along_z(0, 5), PatientID="../../etc/passwd", SeriesInstanceUID="../" * 30)
    (folder / "bad\n.dcm").write_text("no")
    jobs, rejected = discover_dicom(tmp_path)
    scan = read_dicom(jobs[0])
    for name in (scan.patient_id, scan.study_uid, scan.series_uid):
        assert re.fullmatch(r"[0-9a-f]{16}", name)
    for text in (jobs[0].case, rejected[0].file, rejected[0].case, rejected[0].reason):
        assert text.isprintable() and text.encode("utf-8")


def test_blank_ids_fall_back_to_the_study_and_then_the_folder(tmp_path):
    for place in ("a", "b"):
        write_series(tmp_path / place, along_z(0, 5), PatientID="", StudyInstanceUID="", SeriesInstanceUID="")
    found = [read_dicom(job) for job in discover_dicom(tmp_path)[0]]
    assert len({scan.patient_id for scan in found}) == len({scan.series_uid for scan in found}) == 2


def test_no_identifier_leaves_the_reader(tmp_path):
    write_series(tmp_path, along_z(0, 5), PatientID="CANARY-ID")
    jobs, _ = discover_dicom(tmp_path)
    everything = repr(read_dicom(jobs[0])) + repr(jobs[0]._replace(inputs=()))
    for secret in (NAME, "Canary", "CANARY", "19700101"):
        assert secret not in everything
    assert not {"PatientName", "PatientBirthDate", "AccessionNumber"} & set(dicom_series.PIXEL_TAGS)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15, "RescaleIntercept": 0},
        {"RescaleSlope": 0.5, "BitsStored": 16, "HighBit": 15, "RescaleIntercept": -8192},
        {"RescaleSlope": 1, "RescaleIntercept": -1000.4},
    ],
)
def test_read_dicom_applies_slope_and_intercept_as_written(tmp_path, tags):
    scan = read_one(write_series(tmp_path, along_z(0, 5), **tags))
    np.testing.assert_allclose(scan.hu[1], head_hu(1), atol=0.5)
    assert scan.hu.dtype == np.int16 and scan.padding_count == 0


def test_read_dicom_takes_slope_and_intercept_slice_by_slice(tmp_path):
    write_slice(tmp_path / "a", head_hu(0), (0, 0, 0))
    write_slice(tmp_path / "b", head_hu(0), (0, 0, 5), RescaleSlope=2, RescaleIntercept=-1000)
    scan = read_one(tmp_path)
    np.testing.assert_allclose(scan.hu[1], scan.hu[0], atol=1)  # odd HU cannot be stored with slope 2


def test_read_dicom_clamps_to_the_range_of_ct(tmp_path):
    hu = head_hu()
    hu[0, 0], hu[0, 1] = 9000, -1200
    wide = {"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15, "RescaleIntercept": 0}
    scan = read_one(write_slice(tmp_path / "a", hu, **wide).parent)
    assert scan.hu[0, 0, 0] == 3071 and scan.hu[0, 0, 1] == AIR_HU and scan.padding_count == 0


@pytest.mark.parametrize(
    ("value", "tags"),
    [
        (-2000, {}),
        (-2048, {}),
        (-1500, {"PixelPaddingValue": -1500}),
        (-3024, {"RescaleIntercept": -1024, "PixelPaddingValue": -2000}),
        (-1200, {"PixelPaddingValue": -1210, "PixelPaddingRangeLimit": -1190}),
        (50, {"PixelPaddingValue": 50}),
    ],
)
def test_read_dicom_turns_padding_into_air_and_counts_it(tmp_path, value, tags):
    hu = head_hu()
    hu[:3] = value
    signed = {"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15, "RescaleIntercept": 0}
    scan = read_one(write_slice(tmp_path / "a", hu, **(signed | tags)).parent)
    assert (scan.hu[0, :3] == AIR_HU).all()
    assert scan.padding_count == 3 * hu.shape[1]
    np.testing.assert_array_equal(scan.hu[0, 3:], hu[3:])


def test_read_dicom_with_padding_zero_keeps_water(tmp_path):
    hu = head_hu()
    hu[18:22, 12:16] = 0  # inside the head
    tags = {"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15, "RescaleIntercept": 0}
    scan = read_one(write_slice(tmp_path / "a", hu, PixelPaddingValue=0, **tags).parent)
    np.testing.assert_array_equal(scan.hu[0], hu)
    assert scan.padding_count == 0


@pytest.mark.parametrize("signed", [0, 1])
def test_read_dicom_inverts_monochrome1(tmp_path, signed):
    tags = {"PhotometricInterpretation": "MONOCHROME1", "PixelRepresentation": signed}
    if signed:
        tags |= {"RescaleIntercept": 0, "stored": -1 - head_hu()}
    else:
        tags |= {"stored": 4095 - (head_hu() + 1024)}
    scan = read_one(write_slice(tmp_path / "a", head_hu(), **tags).parent)
    np.testing.assert_array_equal(scan.hu[0], head_hu())
    assert scan.repairs[0][-1] == "MONOCHROME1: inverted"


def test_read_dicom_leaves_monochrome1_alone_where_its_values_are_hu(tmp_path):
    scan = read_one(write_slice(tmp_path / "a", head_hu(), PhotometricInterpretation="MONOCHROME1").parent)
    np.testing.assert_array_equal(scan.hu[0], head_hu())
    assert "not inverted" in scan.repairs[0][-1]


def test_read_dicom_unwraps_twelve_bits_where_air_has_wrapped(tmp_path):
    wrapped = {"RescaleIntercept": 0, "stored": head_hu() % 4096}
    scan = read_one(write_slice(tmp_path / "a", head_hu(), **wrapped).parent)
    np.testing.assert_array_equal(scan.hu[0], head_hu())
    assert "wrapped" in scan.repairs[0][-1]


def test_read_dicom_does_not_unwrap_metal(tmp_path):
    """Twelve unsigned bits and an intercept above -100 are no proof that values wrapped."""
    hu = head_hu().clip(0)
    hu[18:22, 16:20] = 3096  # would become air
    with pytest.raises(ScanError, match="not HU: no air"):
        read_one(write_slice(tmp_path / "no_air" / "a", hu, RescaleIntercept=0).parent)
    hu = head_hu()
    hu[18:22, 16:20] = 3060
    scan = read_one(write_slice(tmp_path / "air" / "a", hu, RescaleIntercept=-1000, BitsStored=12).parent)
    assert scan.hu[0, 19, 17] == 3060


@pytest.mark.parametrize("offset", [1024, -1024])
def test_read_dicom_refuses_values_that_are_not_hu(tmp_path, offset):
    tags = {"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15, "RescaleIntercept": 0}
    write_series(tmp_path, along_z(0, 5), stored=head_hu() + offset, **tags)
    with pytest.raises(ScanError, match=r"000\.dcm: its values are not HU: no .* RescaleIntercept is 0"):
        read_one(tmp_path)


# ---------------------------------------------------------------- encodings and headers


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian],
    ids=lambda uid: uid.name,
)
def test_every_uncompressed_encoding_gives_the_same_scan(tmp_path, syntax):
    signed = {"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15, "RescaleIntercept": 0}
    plain = read_one(write_series(tmp_path / "plain", along_z(0, 5), **signed, PixelPaddingValue=-1000))
    other = read_one(
        write_series(tmp_path / "other", along_z(0, 5), **signed, PixelPaddingValue=-1000, syntax=syntax)
    )
    np.testing.assert_array_equal(other.hu, plain.hu)
    assert other.padding_count == plain.padding_count > 0 and other.positions_mm == plain.positions_mm
    assert (other.patient_id, other.series_uid) == (plain.patient_id, plain.series_uid)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless], ids=lambda uid: uid.name)
def test_lossless_compression_gives_the_same_scan(tmp_path, syntax):
    write_series(tmp_path, along_z(0, 5))
    for file in tmp_path.iterdir():
        dataset = pydicom.dcmread(file)
        dataset.compress(syntax, generate_instance_uid=False)
        dataset.save_as(file)
    np.testing.assert_array_equal(read_one(tmp_path).hu, [head_hu(0), head_hu(1)])


@pytest.mark.parametrize(
    ("position", "orientation"),
    [
        ("HFS", AXIAL),
        ("FFS", (-1, 0, 0, 0, 1, 0)),
        ("FFP", (1, 0, 0, 0, -1, 0)),
        ("HFP", (-1, 0, 0, 0, -1, 0)),
        ("HFDL", (0, 1, 0, -1, 0, 0)),
    ],
)
def test_read_dicom_in_any_patient_position_keeps_every_voxel_in_place(tmp_path, position, orientation):
    corners = [(20.0, -30.0, z) for z in (15.0, 10.0, 5.0)]
    tags = {"PatientPosition": position, "ImageOrientationPatient": list(orientation)}
    scan = read_one(write_series(tmp_path, corners, **tags))
    assert scan.positions_mm == pytest.approx([5, 10, 15])
    assert [int(image[20, 18]) for image in scan.hu] == [102, 101, 100]
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    expected = np.array(corners[0]) + row * 0.75 * 7 + column * 0.5 * 11
    np.testing.assert_allclose((scan.affine @ (7, 11, 2, 1))[:3], expected, atol=0.01)


def through_pydicom(path: Path, monkeypatch) -> object:
    with monkeypatch.context() as patch:
        patch.setattr(dicom_series, "_plain_tags", lambda _: None)
        return next(read_headers([str(path)]))[1]


def same(a, b) -> bool:
    return str(a) == str(b) if isinstance(a, ScanError) else a == b


def test_headers_read_fast_equal_those_read_by_pydicom(tmp_path, monkeypatch):
    odd = {
        "plain": {},
        "implicit": {"syntax": ImplicitVRLittleEndian},
        "padding": {"PixelPaddingValue": -2000, "PixelRepresentation": 1, "RescaleIntercept": 0},
        "spaces": {"PatientID": " a\\b ", "AcquisitionNumber": "3", "SliceLocation": "-2.50 "},
        "empty": {"PatientID": "", "InstanceNumber": None, "SliceThickness": ""},
        "accent": {"SpecificCharacterSet": "ISO_IR 100", "PatientID": "J\xe9r\xf4me"},
        "long": {"PatientComments": "x" * 9000, "RescaleIntercept": -1024.25},
        "report": {"Modality": "SR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"},
    }
    for name, tags in odd.items():
        file = write_slice(tmp_path / name, head_hu(), (1.5, 2, 3), **tags)
        fast = next(read_headers([str(file)]))[1]
        assert same(fast, through_pydicom(file, monkeypatch)), name
        is_plain = dicom_series._plain_tags(file.read_bytes()[: dicom_series.HEAD_BYTES]) is not None
        assert is_plain == (name not in ("accent", "long")), name


def test_real_headers_read_fast_equal_those_read_by_pydicom(monkeypatch):
    folders = ("head_ge_tilted", "head_toshiba_encodings", "skull_phantom_philips", "pydicom_files")
    files = [path for name in folders for path in real(name).rglob("*") if path.is_file()]
    assert len(files) > 80
    for file in files:
        fast = next(read_headers([str(file)]))[1]
        assert same(fast, through_pydicom(file, monkeypatch)), file


def test_read_headers_by_several_processes_keeps_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_series, "HEADERS_AT_A_TIME", 2)
    write_series(tmp_path, along_z(*range(13)))
    (tmp_path / "002.dcm").write_text("no")
    paths = sorted(str(path) for path in tmp_path.iterdir())
    one, two = list(read_headers(paths)), list(read_headers(paths, workers=2))
    assert [path for path, _ in two] == paths
    assert all(same(a[1], b[1]) for a, b in zip(one, two, strict=True))
    assert discover_dicom(tmp_path, workers=2) == discover_dicom(tmp_path)


def test_discover_dicom_with_a_limit_gives_whole_series(tmp_path):
    for name in "abc":
        write_series(tmp_path / name, along_z(0, 5), SeriesInstanceUID=f"1.2.{ord(name)}")
    jobs, _ = discover_dicom(tmp_path)
    assert discover_dicom(tmp_path, limit=2)[0] == jobs[:2] and len(jobs[1].inputs) == 2


def test_headers_of_one_series_share_what_is_equal(tmp_path):
    """The headers of 750,000 slices must fit in memory together."""
    write_series(tmp_path, along_z(0, 5, 10))
    (headers,) = dicom_series.index_series(tmp_path, dicom_series.walk(tmp_path)).series.values()
    shared = {
        name
        for name in headers[0]._fields
        if all(getattr(header, name) is getattr(headers[0], name) for header in headers)
    }
    assert set(headers[0]._fields) - shared == {"path", "corner"}


# ---------------------------------------------------------------- archives and special files


def zip_of(folder: Path, target: Path, **more: bytes) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(file, f"study/{file.relative_to(folder)}")
        for name, data in more.items():
            archive.writestr(name, data)
    return target


@pytest.mark.parametrize("as_root", [True, False])
def test_zip_of_a_study_is_read_without_unpacking(tmp_path, as_root):
    write_series(tmp_path / "raw" / "a", along_z(0, 5, 10))
    archive = zip_of(
        tmp_path / "raw", tmp_path / "in" / "Study \u0130 One.ZIP", **{"study/readme.txt": b"hello"}
    )
    shutil.rmtree(tmp_path / "raw")
    jobs, rejected = discover_dicom(archive if as_root else archive.parent)
    assert [r.code for r in rejected] == ["other_file"] and rejected[0].file.endswith("//study/readme.txt")
    scan = read_dicom(pickle.loads(pickle.dumps(jobs[0])))
    np.testing.assert_array_equal(scan.hu, [head_hu(0), head_hu(1), head_hu(2)])
    assert jobs[0].case == "Study \u0130 One.ZIP/study/a" and not any(scan.repairs)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]


def test_zip_members_that_are_odd_are_named_and_the_others_read(tmp_path, monkeypatch):
    write_series(tmp_path / "raw", along_z(0, 5))
    inner = zip_of(tmp_path / "raw", tmp_path / "inner.zip").read_bytes()
    more = {"inner.zip": inner, "__MACOSX/._000.dcm": b"x", "study/Thumbs.db": b"x", "big.dcm": bytes(99_000)}
    archive = zip_of(tmp_path / "raw", tmp_path / "in" / "x.zip", **more)
    with zipfile.ZipFile(archive, "a") as file:
        link = zipfile.ZipInfo("link.dcm")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc/passwd")
    monkeypatch.setattr(dicom_series, "MAX_INFLATED_BYTES", 50_000)
    assert codes(archive) == {
        "inner.zip": "nested_archive",
        "link.dcm": "not_regular",
        "big.dcm": "too_large",
    }
    assert len(read_one(archive).hu) == 2


def test_zip_whose_members_are_encrypted_is_refused_by_name(tmp_path):
    write_series(tmp_path / "raw", along_z(0, 5))
    archive = zip_of(tmp_path / "raw", tmp_path / "in" / "x.zip")
    data = bytearray(archive.read_bytes())
    for mark, place in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = data.find(mark)
        while at >= 0:
            data[at + place] |= 1
            at = data.find(mark, at + 4)
    archive.write_bytes(data)
    assert set(codes(archive.parent).values()) == {"encrypted", "no_ct"}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"../evil.dcm": b"x"}, "lead out of it"),
        ({"/etc/evil.dcm": b"x"}, "lead out of it"),
        ({"bomb.dcm": bytes(30_000_000)}, "times its size"),
        (None, "not a zip archive"),
    ],
)
def test_zip_that_cannot_be_trusted_is_refused_as_a_whole(tmp_path, more, reason):
    write_series(tmp_path / "raw", along_z(0, 5))
    archive = zip_of(tmp_path / "raw", tmp_path / "in" / "x.zip", **(more or {}))
    if more is None:
        archive.write_bytes(archive.read_bytes()[:-30])
    jobs, rejected = discover_dicom(archive.parent)
    assert not jobs and [r.code for r in rejected] == ["archive", "no_ct"] and reason in rejected[0].reason
    assert not (tmp_path / "evil.dcm").exists()


def test_zip_with_two_members_of_one_name_or_too_many_is_refused(tmp_path, monkeypatch):
    write_series(tmp_path / "raw", along_z(0, 5))
    archive = zip_of(tmp_path / "raw", tmp_path / "in" / "x.zip")
    with pytest.warns(UserWarning), zipfile.ZipFile(archive, "a") as file:
        file.writestr("study/000.dcm", b"another")
    assert "two members of one name" in discover_dicom(archive)[1][0].reason
    monkeypatch.setattr(dicom_series, "MAX_MEMBERS", 2)
    assert "3 members" in discover_dicom(archive)[1][0].reason


def test_zip_member_with_a_flipped_bit_is_refused_by_name(tmp_path):
    write_slice(tmp_path / "raw" / "a.dcm", head_hu())
    archive = tmp_path / "in" / "x.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        file.write(tmp_path / "raw" / "a.dcm", "a.dcm")
    data = bytearray(archive.read_bytes())
    data[2500] ^= 1  # in the pixels
    archive.write_bytes(data)
    assert codes(archive)["a.dcm"] == "damaged"
    assert discover_dicom(archive)[1][0].reason == "damaged DICOM file (BadZipFile) (copy or export it again)"


def test_dicomdir_written_by_its_class_is_named_and_its_files_are_found_without_it(tmp_path):
    write_series(tmp_path / "IMAGES", along_z(0, 5))
    directory = write_slice(tmp_path / "DICOMDIR", head_hu(), SOPClassUID=dicom_series.MEDIA_DIRECTORY)
    assert codes(tmp_path) == {directory.name: "dicomdir"} and "dicomdir" in EXPECTED_CODES
    assert len(read_one(tmp_path).hu) == 2


# ---------------------------------------------------------------- secrets

TEXT_VRS = ("PN", "LO", "SH", "LT", "ST", "UT", "UC", "UR", "AE")
PLANTED_DATE = "18990707"


def plant_canaries(path: Path) -> int:
    """Write a canary into every text and date tag of the standard that the reader does not need."""
    dataset = pydicom.dcmread(path)
    count = 0
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        if keyword in dicom_series.HEADER_TAGS or tag >> 16 in (0, 2) or not keyword:
            continue
        if vr in TEXT_VRS:
            dataset.add_new(tag, vr, f"CANARY{tag:08X}")
        elif vr == "DA":
            dataset.add_new(tag, vr, PLANTED_DATE)
        else:
            continue
        count += 1
    dataset.PatientID = "CANARY-ID"
    dataset.StudyInstanceUID = dataset.SeriesInstanceUID = "1.2.CANARY"
    dataset.ConvolutionKernel = "CANARYKERNEL"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "CANARYTYPE"]
    dataset.SpecificCharacterSet = "CANARYCHARSET"
    block = dataset.private_block(0x0009, "CANARYMAKER", create=True)
    block.add_new(1, "LO", "CANARYPRIVATE")
    dataset.save_as(path)
    return count


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nothing_planted_in_any_text_tag_reaches_outputs_or_logs(tmp_path, caplog, capfd):
    with pydicom.config.disable_value_validation():
        for file in write_series(tmp_path / "in", along_z(0, 5, 10)).iterdir():
            assert plant_canaries(file) > 800
        for name, tags in {
            "modality": {"Modality": "CANARYMODALITY"},
            "class": {"SOPClassUID": "CANARY.1.2"},
            "slope": {"RescaleSlope": 1},
            "orientation": {"ImageOrientationPatient": [1, 0, 0, 1, 1, 0]},
        }.items():
            file = write_slice(tmp_path / "in" / name, head_hu(), (0, 0, 15), **tags)
            plant_canaries(file)
        broken = (tmp_path / "in" / "slope").read_bytes()
        at = broken.index(struct.pack("<HH2s", 0x0028, 0x1053, b"DS")) + 6
        after = at + 2 + struct.unpack_from("<H", broken, at)[0]
        canary = struct.pack("<H", 6) + b"CANARY"
        (tmp_path / "in" / "slope").write_bytes(broken[:at] + canary + broken[after:])
    caplog.clear()  # of what writing the files made pydicom say
    caplog.set_level(logging.DEBUG)
    arguments = ["--source", "dicom", "--input", tmp_path / "in", "--out", tmp_path / "out"]
    prepare_dataset.main([*arguments, "--workers", 1, "--max-reject", 1])
    output = capfd.readouterr()
    assert "1 series of 1 patients, 3 slices" in output.out
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    rejected = (tmp_path / "out" / "rejected.csv").read_text()
    assert len(files) > 4
    assert all(f"/in/{name}," in rejected for name in ("modality", "class", "slope", "orientation"))
    texts = [output.out, output.err, caplog.text, *(path.read_bytes().decode("latin-1") for path in files)]
    for text in texts:
        assert "CANARY" not in text.upper() and PLANTED_DATE not in text and NAME not in text


# ---------------------------------------------------------------- damage


def test_deeply_nested_sequences_are_read_past_or_refused(tmp_path):
    """Thousands of levels end the process of whoever prints such a file."""
    good = write_slice(tmp_path / "good.dcm", head_hu()).read_bytes()
    tag = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    place = good.index(struct.pack("<HH", 0x0010, 0x0010))
    ends = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    for depth, code in ((20, None), (3000, "damaged")):
        folder = tmp_path / str(depth)
        folder.mkdir()
        (folder / "x.dcm").write_bytes(good[:place] + (tag + item) * depth + ends * depth + good[place:])
        assert codes(folder).get("x.dcm") == code
    assert len(read_one(tmp_path / "20").hu) == 1


def test_damaged_files_are_rejected_or_refused_in_one_line(tmp_path):
    """Any truncation and any flipped byte: read, rejected or refused, never another exception."""
    good = write_slice(tmp_path / "good", head_hu()).read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(150):
        data = bytearray(good[: rng.integers(1, len(good))] if trial % 2 else good)
        if not trial % 2:
            for place in rng.integers(128, 900, 3):
                data[place] = rng.integers(256)
        folder = tmp_path / f"trial{trial}"
        folder.mkdir()
        (folder / "x.dcm").write_bytes(data)
        jobs, rejected = discover_dicom(folder)
        for job in jobs:
            try:
                read_dicom(job)
            except ScanError as error:
                assert "\n" not in str(error)
        assert jobs or rejected[0].code in {
            "not_dicom",
            "damaged",
            "truncated",
            "not_ct",
        } | EXPECTED_CODES | {
            "no_rescale",
            "no_geometry",
            "multi_frame",
        }


def test_discover_dicom_rejects_a_slice_whose_pixels_are_cut_off(tmp_path):
    write_series(tmp_path, along_z(0, 5, 10))
    file = tmp_path / "001.dcm"
    file.write_bytes(file.read_bytes()[:-1000])
    assert codes(tmp_path) == {"001.dcm": "truncated"}
    assert np.diff(read_one(tmp_path).positions_mm) == pytest.approx([10])


def test_read_dicom_of_a_truncated_compressed_file_says_so(tmp_path):
    file = shutil.copy(real("head_toshiba_encodings") / "CT2_J2KR", tmp_path / "x")
    Path(file).write_bytes(Path(file).read_bytes()[:60_000])
    with pytest.raises(ScanError, match="x: truncated"):
        read_one(tmp_path)


def test_read_dicom_of_a_file_that_vanished_says_so(tmp_path):
    write_series(tmp_path, along_z(0, 5))
    job = discover_dicom(tmp_path)[0][0]
    (tmp_path / "001.dcm").unlink()
    with pytest.raises(ScanError, match=r"001\.dcm: No such file"):
        read_dicom(job)


def deflate(path: Path, body: bytes) -> None:
    import zlib

    source = pydicom.dcmread(path)
    source.file_meta.TransferSyntaxUID = dicom_series.DEFLATED
    source.save_as(path)
    meta = path.read_bytes()[: 144 + source.file_meta.FileMetaInformationGroupLength]
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    path.write_bytes(meta + packer.compress(body) + packer.flush())


def test_deflated_files_are_read_but_not_without_bound(tmp_path):
    file = write_slice(tmp_path / "a" / "x.dcm", head_hu())
    dataset = pydicom.dcmread(file)
    dataset.file_meta.TransferSyntaxUID = dicom_series.DEFLATED
    dataset.save_as(file)
    np.testing.assert_array_equal(read_one(file.parent).hu[0], head_hu())
    deflate(file, bytes(dicom_series.MAX_INFLATED_BYTES + 10_000))
    assert file.stat().st_size < 200_000
    assert codes(file.parent)["x.dcm"] == "too_large"


def test_read_dicom_without_a_decoder_names_the_package(tmp_path, monkeypatch):
    folder = real("head_toshiba_encodings")
    shutil.copy(folder / "CT2_J2KR", tmp_path)

    class Missing:
        is_available = False

    monkeypatch.setattr(dicom_series, "get_decoder", lambda _: Missing())
    with pytest.raises(
        ScanError, match=r"JPEG 2000 .* needs a decoder \(pip install pylibjpeg pylibjpeg-openjpeg\)"
    ):
        read_one(tmp_path)


def test_scan_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ScanError("a/b", "is wrong", "mend it", "code")))
    assert str(error) == "a/b: is wrong (mend it)" and error.code == "code"


# ---------------------------------------------------------------- NIfTI out


def lps_point(image: nib.Nifti1Image, column: float, row: float, index: float) -> np.ndarray:
    x, y, z, _ = image.affine @ (column, row, index, 1)
    return np.array([-x, -y, z])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_write_nifti_keeps_values_and_places_every_voxel(tmp_path, suffix):
    volume = np.arange(3 * 5 * 7).reshape(3, 5, 7).astype(np.int16)
    affine = np.array([[0.5, 0, 0, -10], [0, 0.57, 0.3, -20], [0, -0.19, 4, 30], [0, 0, 0, 1.0]])
    path = tmp_path / "deep" / f"scan{suffix}"
    assert write_nifti(path, volume, affine, [0.0, 4.0, 8.0]) is False
    image = nib.load(path)
    data = np.asarray(image.dataobj)
    assert data.shape == (7, 5, 3) and data.dtype == np.int16
    for s, r, c in ((0, 0, 0), (2, 4, 6), (1, 2, 3)):
        assert data[c, r, s] == volume[s, r, c]
        np.testing.assert_allclose(lps_point(image, c, r, s), (affine @ (c, r, s, 1))[:3], atol=1e-4)
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]


def test_write_nifti_of_the_same_volume_gives_the_same_bytes(tmp_path):
    volume = np.random.default_rng(0).integers(-1000, 1000, (2, 8, 8)).astype(np.int16)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, volume, np.eye(4))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_write_nifti_with_uneven_gaps_resamples_along_the_shear(tmp_path):
    """A field that is linear in space is reproduced exactly by linear interpolation, tilt and all."""
    positions = np.array([0.0, 4.0, 8.0, 9.0, 16.0, 23.0])
    affine = np.array([[0.5, 0, 0, -10], [0, 0.57, 1.3, -20], [0, -0.19, 4.2, 30], [0, 0, 0, 1.0]])
    step = float(np.median(np.diff(positions)))
    gradient = np.array([1.0, -2.0, 3.0])
    s, r, c = np.meshgrid(positions / step, np.arange(6), np.arange(5), indexing="ij")
    voxels = np.stack([c, r, s, np.ones_like(c)], axis=-1)
    volume = ((voxels @ affine.T)[..., :3] @ gradient).astype(np.float32)
    path = tmp_path / "tilted.nii.gz"
    assert write_nifti(path, volume, affine, positions) is True
    image = nib.load(path)
    data = np.asarray(image.dataobj)
    for index in np.ndindex(*data.shape):
        assert data[index] == pytest.approx(lps_point(image, *index) @ gradient, abs=1e-2)
    last = (affine @ (0, 0, positions[-1] / step, 1))[:3]
    np.testing.assert_allclose(lps_point(image, 0, 0, data.shape[2] - 1), last, atol=1e-4)
    assert b"resampled" in image.header["descrip"].tobytes()


def test_write_nifti_of_a_mask_with_uneven_gaps_invents_no_class(tmp_path):
    mask = np.zeros((4, 6, 6), np.uint8)
    mask[1], mask[2] = 1, 6
    path = tmp_path / "mask.nii.gz"
    assert write_nifti(path, mask, np.eye(4), [0.0, 1.0, 4.0, 5.0])
    data = np.asarray(nib.load(path).dataobj)
    assert set(np.unique(data)) == {0, 1, 6} and data.dtype == np.uint8


def test_write_nifti_refuses_what_it_cannot_place(tmp_path):
    volume = np.zeros((2, 4, 4), np.int16)
    with pytest.raises(ValueError, match="shape"):
        write_nifti(tmp_path / "x.nii", volume[0], np.eye(4))
    with pytest.raises(ValueError, match="finite and invertible"):
        write_nifti(tmp_path / "x.nii", volume, np.full((4, 4), np.nan))
    with pytest.raises(ValueError, match="ascend"):
        write_nifti(tmp_path / "x.nii", volume, np.eye(4), [1.0, 0.0])
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- phantom, registry


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


# ---------------------------------------------------------------- real scanners


def test_real_ge_head_keeps_its_tilt_gaps_and_order_and_counts_its_padding():
    folder = real("head_ge_tilted")
    scan = read_one(folder)
    assert scan.hu.shape == (28, 512, 512)
    assert abs(scan.gantry_tilt_deg) == pytest.approx(18.5, abs=0.1)
    gaps = np.diff(scan.positions_mm)
    np.testing.assert_allclose(gaps, [4.0] * 13 + [1.08] + [7.0] * 13, atol=0.01)
    assert scan.padding_count == pytest.approx(0.237 * scan.hu.size, rel=0.01)
    assert scan.hu.min() == AIR_HU and scan.noise_hu == pytest.approx(3.7, rel=0.1)
    last = pydicom.dcmread(max((folder / "dicom").iterdir()), stop_before_pixels=True)
    coordinate = (scan.positions_mm[-1] - scan.positions_mm[0]) / scan.spacing_mm[0]
    header = np.array(last.ImagePositionPatient, float)
    np.testing.assert_allclose((scan.affine @ (0, 0, coordinate, 1))[:3], header, atol=0.01)
    assert sum(bool(notes) for notes in scan.repairs) == 14


def test_real_lossless_encodings_decode_to_the_uncompressed_slice(tmp_path):
    folder = real("head_toshiba_encodings")
    found = {}
    for name in ("UNC", "J2KR", "JLSL", "JPLL", "RLE", "J2KI", "JLSN"):
        shutil.copytree(
            folder, tmp_path / name, ignore=lambda _, files, keep=f"CT2_{name}": set(files) - {keep}
        )
        found[name] = read_one(tmp_path / name)
    for name in ("J2KR", "JLSL", "JPLL", "RLE"):
        np.testing.assert_array_equal(found[name].hu, found["UNC"].hu)
    for name in ("J2KI", "JLSN"):
        assert np.abs(found[name].hu - found["UNC"].hu.astype(int)).mean() < 20
    assert found["UNC"].padding_count == pytest.approx(0.2146 * 512 * 512, rel=0.01)


def test_real_philips_folder_keeps_three_ct_series_and_names_the_rest():
    jobs, rejected = discover_dicom(real("skull_phantom_philips"))
    found = {job.case: read_dicom(job) for job in jobs}
    assert {case: len(scan.hu) for case, scan in found.items()} == {
        "S2010_stereotaxis_tilt_m18.5": 12,
        "S2020_std_1mm_kernelUB_iDose": 4,
        "S2030_bone_1mm_kernelYA": 4,
    }
    tilts = [round(abs(scan.gantry_tilt_deg), 1) for scan in found.values()]
    assert sorted(tilts) == [0, 0, 18.5]
    skipped = {f"{r.case}/{Path(r.file).name}": r.code for r in rejected if r.case.startswith("S")}
    assert skipped == {
        "S1000_localizer/I10": "localizer",
        "S4010_exam_summary/I10": "secondary_capture",
        "S4010_exam_summary/I50": "secondary_capture",
    }


def test_real_series_that_is_not_hu_is_refused_by_name():
    with pytest.raises(ScanError, match=r"CTHead1\.dcm: its values are not HU: no air near -1000"):
        read_one(real("head_not_hu"))


def test_real_siemens_and_picker_series_are_read():
    siemens, picker = read_one(real("head_phantom_siemens")), read_one(real("head_picker_slice"))
    assert siemens.hu.shape == (20, 512, 512) and siemens.spacing_mm == pytest.approx(
        (2, 0.977, 0.977), abs=1e-3
    )
    assert picker.hu.shape == (1, 512, 512) and picker.spacing_mm[0] == 10


def test_real_odd_files_are_read_or_named():
    folder = real("pydicom_files")
    jobs, rejected = discover_dicom(folder)
    read = []
    for job in jobs:
        try:
            read.append(read_dicom(job))
        except ScanError as error:
            assert "\n" not in str(error)
    names = {Path(r.file).name: r.code for r in rejected}
    assert names["DICOMDIR"] == "dicomdir" and names["eCT_Supplemental.dcm"] == "multi_frame"
    assert names["rtplan_truncated.dcm"] == names["test-SR.dcm"] == "not_ct"
    files = {str(p) for p in folder.rglob("*") if p.is_file()}
    assert files == {path for job in jobs for path in job.inputs} | {r.file for r in rejected}
    hitachi = next(scan for scan in read if abs(scan.gantry_tilt_deg) > 20)
    assert hitachi.padding_count > 50_000  # -2000 outside the circle, through the signedness mismatch
    assert np.median(hitachi.hu[0, 200:300, 200:300]) == pytest.approx(35, abs=15)  # brain


def test_real_ge_head_written_as_nifti_is_resampled_and_stays_in_place(tmp_path):
    scan = read_one(real("head_ge_tilted"))
    path = tmp_path / "ge.nii.gz"
    assert write_nifti(path, scan.hu[:, ::8, ::8], scan.affine @ np.diag([8.0, 8, 1, 1]), scan.positions_mm)
    image = nib.load(path)
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    last = (scan.positions_mm[-1] - scan.positions_mm[0]) / scan.spacing_mm[0]
    top = (scan.affine @ (0, 0, last, 1))[:3]
    np.testing.assert_allclose(lps_point(image, 0, 0, image.shape[2] - 1), top, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(image.dataobj)[..., -1].T, scan.hu[-1, ::8, ::8])
