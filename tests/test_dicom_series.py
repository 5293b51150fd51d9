"""The series reader against headers written here, of known geometry and pixels, and against real data."""

from __future__ import annotations

import logging
import os
import re
import shutil
import struct
from pathlib import Path

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

import dicom_headers
import dicom_series
import prepare_dataset
from dataset import all_series, read_metadata
from dicom_series import discover_dicom, read_dicom
from stage import StageError
from volumes import AIR_HU, ASSUMED_HU, EXPECTED_CODES, MAX_HU, Scan, ScanError

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
        "SOPClassUID": dicom_headers.CT_IMAGE,
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


def test_no_identifier_leaves_the_reader(tmp_path):
    write_series(tmp_path, along_z(0, 5), PatientID="CANARY-ID")
    jobs, _ = discover_dicom(tmp_path)
    everything = repr(read_dicom(jobs[0])) + repr(jobs[0]._replace(inputs=()))
    for secret in (NAME, "Canary", "CANARY", "19700101"):
        assert secret not in everything
    assert not {"PatientName", "PatientBirthDate", "AccessionNumber"} & set(dicom_headers.PIXEL_TAGS)


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
    (job,), _ = discover_dicom(tmp_path)
    scan = read_dicom(job._replace(assume_hu=True))
    expected = head_hu() + offset
    np.testing.assert_array_equal(
        scan.hu[0], np.where(expected <= -1500, AIR_HU, expected).clip(AIR_HU, MAX_HU)
    )
    assert all(ASSUMED_HU in notes for notes in scan.repairs)


def test_read_dicom_of_hu_with_assumed_hu_says_nothing(tmp_path):
    (job,), _ = discover_dicom(write_series(tmp_path, along_z(0, 5)))
    assert read_dicom(job._replace(assume_hu=True)).repairs == read_dicom(job).repairs == [[], []]


def test_prepare_with_assumed_hu_records_it_in_metadata_and_summary(tmp_path, capsys):
    tags = {"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15, "RescaleIntercept": 0}
    for name in "ab":  # two workers
        ids = {"SeriesInstanceUID": f"1.{name}"}
        write_series(tmp_path / "in" / name, along_z(0, 5), stored=head_hu() + 1024, **tags, **ids)
    prepare = ["--source", "dicom", "--input", tmp_path / "in", "--out", tmp_path / "out"]
    with pytest.raises(StageError, match="2 broken cases"):
        prepare_dataset.main(prepare)
    prepare_dataset.main([*prepare, "--assume-hu"])
    assert f"repaired or assumed in 4 slices: {ASSUMED_HU}" in capsys.readouterr().out
    series = [read_metadata(folder) for folder in all_series(tmp_path / "out")]
    assert len(series) == 2
    assert all(entry["repairs"] == [ASSUMED_HU] for metadata in series for entry in metadata["slices"])


def test_assumed_hu_of_phantoms_is_refused_as_having_no_effect(tmp_path):
    with pytest.raises(StageError, match="--assume-hu: --source phantom is in HU"):
        prepare_dataset.main(["--source", "phantom", "--assume-hu", "--out", tmp_path])


# ---------------------------------------------------------------- encodings


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


# ---------------------------------------------------------------- secrets

TEXT_VRS = ("PN", "LO", "SH", "LT", "ST", "UT", "UC", "UR", "AE")
PLANTED_DATE = "18990707"


def plant_canaries(path: Path) -> int:
    """Write a canary into every text and date tag of the standard that the reader does not need."""
    dataset = pydicom.dcmread(path)
    count = 0
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        if keyword in dicom_headers.HEADER_TAGS or tag >> 16 in (0, 2) or not keyword:
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
    source.file_meta.TransferSyntaxUID = dicom_headers.DEFLATED
    source.save_as(path)
    meta = path.read_bytes()[: 144 + source.file_meta.FileMetaInformationGroupLength]
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    path.write_bytes(meta + packer.compress(body) + packer.flush())


def test_deflated_files_are_read_but_not_without_bound(tmp_path):
    file = write_slice(tmp_path / "a" / "x.dcm", head_hu())
    dataset = pydicom.dcmread(file)
    dataset.file_meta.TransferSyntaxUID = dicom_headers.DEFLATED
    dataset.save_as(file)
    np.testing.assert_array_equal(read_one(file.parent).hu[0], head_hu())
    deflate(file, bytes(dicom_headers.MAX_INFLATED_BYTES + 10_000))
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


def test_real_series_that_is_not_hu_is_read_as_it_stands_where_it_is_assumed():
    (job,), _ = discover_dicom(real("head_not_hu"))
    scan = read_dicom(job._replace(assume_hu=True))
    assert scan.hu.shape == (93, 64, 64) and (scan.hu.min(), scan.hu.max()) == (0, MAX_HU)
    assert all(ASSUMED_HU in notes for notes in scan.repairs)


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
