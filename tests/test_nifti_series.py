"""The NIfTI readers against phantoms written in the layouts of the sets, with the defects that they have."""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import json
import os
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import nifti_series
from dataset import read_metadata, read_slices, write_scan
from nifti_series import HEMORRHAGES, NIFTI_READERS
from phantom import Phantom, generate_phantom
from volumes import (
    AIR_HU,
    ASSUMED_HU,
    LABEL_NAMES,
    LPS_TO_RAS,
    Rejected,
    Scan,
    ScanError,
    pseudonym,
    write_nifti,
)

CANARY = "CANARY17"
TILT_DEG = 18.5


@functools.cache
def phantom(seed: int = 1, lesions: tuple[str, ...] = ()) -> Phantom:
    return generate_phantom(seed, size=(40, 36), slices=5, lesions=lesions)


def expected_hu(made: Phantom) -> np.ndarray:
    return made.hu.clip(AIR_HU, 3071)


def write_volume(
    path: Path,
    volume: np.ndarray,
    affine_lps: np.ndarray,
    *,
    axes: str = "LPS",
    dtype=np.int16,
    slope: float | None = None,
    intercept: float | None = None,
    sform: int = 1,
    qform: int = 0,
    change=None,
    kind=nib.Nifti1Image,
) -> Path:
    """Write (S, H, W) as NIfTI whose axes point to `axes`. slope, intercept: of the stored values.

    change(header): last changes to the header fields, which no library check sees."""
    plain = kind(volume.transpose(2, 1, 0), LPS_TO_RAS @ affine_lps)
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(plain.affine), nib.orientations.axcodes2ornt(axes)
    )
    turned = plain.as_reoriented(turn)
    stored = np.asarray(turned.dataobj, np.float64)
    if slope is not None:
        stored = (stored - intercept) / slope
    image = kind(stored.astype(dtype), turned.affine)
    image.header.set_data_dtype(dtype)
    image.set_sform(turned.affine, code=sform)
    if qform:
        image.set_qform(turned.affine, code=qform)
    image.header.set_xyzt_units("mm")
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        if field in image.header.structarr.dtype.names:
            image.header[field] = CANARY.encode()
    data = bytearray(image.to_bytes())
    header = image.header.copy()
    header["vox_offset"] = 352 if kind is nib.Nifti1Image else 544
    header["scl_slope"] = 1 if slope is None else slope
    header["scl_inter"] = 0 if intercept is None else intercept
    if not sform:  # set_sform leaves the matrix, and some writers do as well
        header["sform_code"] = 0
    if not qform:
        header["qform_code"] = 0
    if change is not None:
        change(header)
    data[: len(header.binaryblock)] = header.binaryblock
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(bytes(data), 1) if path.suffix == ".gz" else bytes(data))
    return path


def write_scan_file(path: Path, made: Phantom | None = None, **kwargs) -> Path:
    made = made or phantom()
    return write_volume(path, expected_hu(made), np.asarray(made.affine, float), **kwargs)


def discover(source: str, folder: Path):
    return NIFTI_READERS[source].discover(folder)


def read_one(folder: Path, source: str = "nifti") -> Scan:
    jobs, rejected = discover(source, folder)
    assert len(jobs) == 1, (jobs, rejected)
    return NIFTI_READERS[source].read(pickle.loads(pickle.dumps(jobs[0])))


def assert_is_phantom(scan: Scan, made: Phantom) -> None:
    """HU, order, orientation and place of every voxel."""
    np.testing.assert_array_equal(scan.hu, expected_hu(made))
    corners = np.array([(x, y, z, 1) for x in (0, 35) for y in (0, 39) for z in (0, 4)], float).T
    np.testing.assert_allclose(scan.affine @ corners, np.asarray(made.affine) @ corners, atol=0.01)  # mm
    np.testing.assert_allclose(scan.spacing_mm, made.spacing_mm, atol=1e-4)
    np.testing.assert_allclose(np.diff(scan.positions_mm), made.spacing_mm[0], atol=1e-4)
    assert scan.hu.dtype == np.int16 and scan.intensity == "hu"
    assert len(scan.positions_mm) == len(scan.slice_labels) == len(scan.repairs) == 5
    assert tuple(scan.labels) == LABEL_NAMES and all(tuple(e) == LABEL_NAMES for e in scan.slice_labels)


def assert_survives_the_layout(scan: Scan, folder: Path) -> None:
    """What dataset.write_scan wrote is what the scan holds, and no header text is in it."""
    written = write_scan(scan, folder)
    metadata = read_metadata(written)
    np.testing.assert_array_equal(read_slices(written, "image", len(scan.hu)), scan.hu)
    assert metadata["has_mask"] == (scan.mask is not None)
    if scan.mask is not None:
        np.testing.assert_array_equal(read_slices(written, "mask", len(scan.hu)), scan.mask)
    assert metadata["labels"] == scan.labels
    assert [entry["labels"] for entry in metadata["slices"]] == scan.slice_labels
    assert [entry["repairs"] for entry in metadata["slices"]] == scan.repairs
    for path in written.rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes()


# ---------------------------------------------------------------- any folder: geometry and values


@pytest.mark.parametrize("axes", ["LPS", "RAS", "LAS", "LPI", "RPI", "RAI", "SLP", "PSR", "AIL"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_read_nifti_in_any_stored_orientation_gives_the_same_scan(tmp_path, axes, name):
    write_scan_file(tmp_path / "in" / name, axes=axes)
    scan = read_one(tmp_path / "in")
    assert_is_phantom(scan, phantom())
    assert scan.gantry_tilt_deg == pytest.approx(0, abs=0.01)
    assert scan.labels == dict.fromkeys(LABEL_NAMES) and scan.mask is None
    turned = any("cut into axial slices" in note for note in scan.repairs[0])
    assert turned == (axes[2] not in "SI")
    assert_survives_the_layout(scan, tmp_path / "out")


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(
    ("dtype", "slope", "intercept"),
    [
        (np.int16, None, None),
        (np.float32, None, None),
        (np.float64, 1.0, 0.0),
        (np.uint16, 1.0, -1024.0),
        (np.int16, 0.5, -100.0),
        (np.int32, -1.0, 0.0),
    ],
)
def test_read_nifti_of_any_number_type_and_scale_gives_hu(tmp_path, dtype, slope, intercept, kind):
    write_scan_file(tmp_path / "a.nii", dtype=dtype, slope=slope, intercept=intercept, kind=kind)
    assert_is_phantom(read_one(tmp_path), phantom())


@pytest.mark.parametrize("slope", [0.0, np.nan])
def test_read_nifti_with_slope_zero_or_nan_takes_values_as_they_stand(tmp_path, slope):
    def change(header):
        header["scl_slope"], header["scl_inter"] = slope, 500

    write_scan_file(tmp_path / "a.nii", change=change)
    assert_is_phantom(read_one(tmp_path), phantom())


def test_read_nifti_of_big_endian_file_gives_hu(tmp_path):
    path = write_scan_file(tmp_path / "a.nii")
    image = nib.load(path)
    swapped = nib.Nifti1Image(np.asarray(image.dataobj), None, image.header.as_byteswapped(">"))
    (tmp_path / "a.nii").write_bytes(swapped.to_bytes())
    assert path.read_bytes()[:4] == b"\0\0\1\x5c"
    assert_is_phantom(read_one(tmp_path), phantom())


def test_read_nifti_of_what_write_nifti_wrote_gives_the_scan_back(tmp_path):
    made = phantom()
    write_nifti(tmp_path / "a.nii.gz", expected_hu(made), made.affine)
    assert_is_phantom(read_one(tmp_path), made)


@pytest.mark.parametrize("tilt_deg", [TILT_DEG, -TILT_DEG])
@pytest.mark.parametrize("axes", ["LPS", "RAI"])
def test_read_nifti_with_sheared_affine_keeps_the_tilt(tmp_path, tilt_deg, axes):
    made = phantom()
    angle = np.radians(tilt_deg)
    affine = np.array(made.affine, float)
    affine[:3, 1] = made.spacing_mm[1] * np.array([0, np.cos(angle), -np.sin(angle)])
    write_volume(tmp_path / "a.nii", expected_hu(made), affine, axes=axes)
    scan = read_one(tmp_path)
    np.testing.assert_array_equal(scan.hu, expected_hu(made))
    np.testing.assert_allclose(scan.affine @ (35, 39, 4, 1), affine @ (35, 39, 4, 1), atol=0.01)
    assert scan.gantry_tilt_deg == pytest.approx(tilt_deg, abs=0.01)  # sign as of the DICOM reader's tests
    assert scan.spacing_mm[0] == pytest.approx(made.spacing_mm[0] * np.cos(angle), rel=1e-5)


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PLS"])
def test_read_nifti_with_pixels_that_are_not_square_keeps_rows_and_columns_apart(tmp_path, axes):
    made = phantom()
    affine = np.diag([0.75, 0.5, 3.0, 1.0])
    affine[:3, 3] = -40.5, 12.25, 7
    write_volume(tmp_path / "a.nii", expected_hu(made), affine, axes=axes)
    scan = read_one(tmp_path)
    np.testing.assert_array_equal(scan.hu, expected_hu(made))
    assert scan.spacing_mm == pytest.approx((3.0, 0.5, 0.75))
    np.testing.assert_allclose(scan.affine, affine, atol=1e-4)


def test_read_nifti_skips_header_extensions(tmp_path):
    path = write_scan_file(tmp_path / "a.nii.gz")
    image = nib.load(path)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", CANARY.encode() * 50))
    nib.save(image, path)
    assert nib.load(path).dataobj.offset > 352
    scan = read_one(tmp_path)
    assert_is_phantom(scan, phantom())
    assert CANARY not in repr(scan)


def test_read_nifti_without_sform_takes_the_qform(tmp_path):
    write_scan_file(tmp_path / "a.nii", sform=0, qform=1, axes="RAS")
    scan = read_one(tmp_path)
    assert_is_phantom(scan, phantom())
    assert not any("sform" in note for note in scan.repairs[0])


def test_read_nifti_whose_qform_disagrees_takes_the_sform_and_says_so(tmp_path):
    def change(header):
        header["qoffset_x"] += 3

    write_scan_file(tmp_path / "a.nii", qform=1, change=change)
    scan = read_one(tmp_path)
    assert_is_phantom(scan, phantom())
    assert all(any("sform taken" in note for note in notes) for notes in scan.repairs)


def test_read_nifti_without_any_form_says_that_left_and_right_are_unknown(tmp_path):
    write_scan_file(tmp_path / "a.nii", sform=0, axes="LAS")
    scan = read_one(tmp_path)
    np.testing.assert_array_equal(scan.hu, expected_hu(phantom()))
    np.testing.assert_allclose(scan.spacing_mm, phantom().spacing_mm, atol=1e-4)
    assert all(any("left and right are unknown" in note for note in notes) for notes in scan.repairs)


def test_read_nifti_in_metres_is_converted(tmp_path):
    def change(header):
        header["xyzt_units"] = 1
        header["pixdim"][1:4] /= 1000
        for row in ("srow_x", "srow_y", "srow_z"):
            header[row] /= 1000

    write_scan_file(tmp_path / "a.nii", change=change)
    scan = read_one(tmp_path)
    assert_is_phantom(scan, phantom())
    assert "lengths converted to mm" in scan.repairs[0]


def test_read_nifti_with_trailing_dimensions_of_one_drops_them(tmp_path):
    def change(header):
        header["dim"] = [5, 36, 40, 5, 1, 1, 1, 1]

    write_scan_file(tmp_path / "a.nii", change=change)
    assert_is_phantom(read_one(tmp_path), phantom())


def test_read_nifti_of_one_slice_takes_its_spacing_from_the_affine(tmp_path):
    made = phantom()
    write_volume(tmp_path / "a.nii", expected_hu(made)[2:3], np.asarray(made.affine, float))
    scan = read_one(tmp_path)
    assert scan.hu.shape == (1, 40, 36)
    np.testing.assert_allclose(scan.spacing_mm, made.spacing_mm, atol=1e-4)


@pytest.mark.parametrize("value", [-1500, -2000, -2048, -3024, np.nan, -np.inf])
def test_read_nifti_turns_padding_into_air_and_counts_it(tmp_path, value):
    made = phantom()
    volume = expected_hu(made).astype(np.float32)
    volume[:, :2] = value
    write_volume(tmp_path / "a.nii.gz", volume, np.asarray(made.affine, float), dtype=np.float32)
    scan = read_one(tmp_path)
    assert (scan.hu[:, :2] == AIR_HU).all() and scan.padding_count == 5 * 2 * 36
    np.testing.assert_array_equal(scan.hu[:, 2:], expected_hu(made)[:, 2:])
    assert any("no numbers" in note for note in scan.repairs[0]) == (not np.isfinite(value))


def test_read_nifti_with_values_beyond_int16_clips_them(tmp_path):
    volume = expected_hu(phantom()).astype(np.float32)
    volume[2, 20, 18:20] = 1e9, np.float32(-1e9)
    write_volume(tmp_path / "a.nii", volume, np.asarray(phantom().affine, float), dtype=np.float32)
    scan = read_one(tmp_path)
    assert scan.hu[2, 20, 18] == 3071 and scan.hu[2, 20, 19] == AIR_HU
    assert scan.padding_count == 1


# ---------------------------------------------------------------- any folder: what is refused


def set_field(name, value, index=None):
    def change(header):
        if index is None:
            header[name] = value
        else:
            header[name][index] = value

    return change


HEADER_FAULTS = {
    "two_dimensions": (set_field("dim", [2, 36, 200, 1, 1, 1, 1, 1]), "not_3d", "2-D (36 x 200)"),
    "four_dimensions": (set_field("dim", [4, 36, 10, 5, 4, 1, 1, 1]), "not_3d", "4-D (36 x 10 x 5 x 4)"),
    "colour": (set_field("datatype", 128), "colour", "a colour picture"),
    "colour_with_alpha": (set_field("datatype", 2304), "colour", "a colour picture"),
    "complex": (set_field("datatype", 32), "not_ct", "complex numbers"),
    "unknown_type": (set_field("datatype", 77), "not_ct", "datatype 77"),
    "no_dimensions": (set_field("dim", 0, 0), "damaged", "are impossible"),
    "eight_dimensions": (set_field("dim", 8, 0), "damaged", "are impossible"),
    "zero_slices": (set_field("dim", 0, 3), "damaged", "are impossible"),
    "negative_rows": (set_field("dim", -40, 2), "damaged", "are impossible"),
    "huge": (set_field("dim", [3, 32767, 32767, 32767, 1, 1, 1, 1]), "too_large", "more than 2048 MiB"),
    "long_side": (
        set_field("dim", [3, 7200, 1, 1, 1, 1, 1, 1]),
        "too_large",
        "7200 x 1 x 1 voxels are no CT",
    ),
    "larger_than_file": (set_field("dim", 400, 3), "truncated", "too small for 36 x 40 x 400"),
    "pixdim_zero": (set_field("pixdim", 0, 2), "no_geometry", "(pixdim) is impossible"),
    "pixdim_negative": (set_field("pixdim", -1, 1), "no_geometry", "(pixdim) is impossible"),
    "pixdim_nan": (set_field("pixdim", np.nan, 3), "no_geometry", "(pixdim) is impossible"),
    "affine_nan": (set_field("srow_y", np.nan, 1), "no_geometry", "not finite and invertible"),
    "affine_singular": (set_field("srow_z", 0), "no_geometry", "not finite and invertible"),
    "affine_of_planets": (set_field("srow_z", 5e6, 2), "no_geometry", "impossible in CT"),
    "affine_flat": (set_field("srow_z", [0, 30, 0.5, 0]), "no_geometry", "skewed or far away"),
    "affine_far": (set_field("srow_x", 1e30, 3), "no_geometry", "skewed or far away"),
    "affine_skewed_in_plane": (set_field("srow_x", 1.5, 1), "no_geometry", "not perpendicular"),
    "unit_unknown": (set_field("xyzt_units", 5), "no_geometry", "unknown unit"),
    "slope_infinite": (set_field("scl_slope", np.inf), "damaged", "scl_slope inf"),
    "intercept_nan": (set_field("scl_inter", np.nan), "damaged", "scl_inter nan"),
    "offset_in_header": (set_field("vox_offset", 0), "damaged", "voxels at byte 0"),
    "offset_nan": (set_field("vox_offset", np.nan), "damaged", "voxels at byte nan"),
    "offset_huge": (set_field("vox_offset", 1e12), "damaged", "voxels at byte 1e+12"),
    "pair": (set_field("magic", b"ni1"), "not_nifti", "half of a .hdr/.img pair"),
}


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_discover_nifti_refuses_a_bad_header_by_name_before_any_voxel_is_read(tmp_path, fault, name):
    change, code, what = HEADER_FAULTS[fault]
    if fault == "larger_than_file" and name.endswith("gz"):
        change = set_field("dim", 32000, 3)  # a gzip file may hold 1032 times its size, no more
        what = "too small for 36 x 40 x 32000"
    path = write_scan_file(tmp_path / name, change=change)
    jobs, (rejected,) = discover("nifti", tmp_path)
    assert jobs == [] and rejected.file == str(path) and rejected.code == code
    assert what in rejected.reason and rejected.reason.endswith(")") and "\n" not in rejected.reason


def test_qform_that_is_no_rotation_is_refused(tmp_path):
    write_scan_file(tmp_path / "a.nii", sform=0, qform=1, change=set_field("quatern_b", 3.0))
    assert discover("nifti", tmp_path)[1][0].code == "no_geometry"


CONTENTS = {
    "empty": (b"", "empty"),
    "three_bytes": (b"abc", "not_nifti"),
    "text": (b"<!DOCTYPE html><html>not found</html>" * 30, "not_nifti"),
    "packed_text": (gzip.compress(b"hello world, this is text" * 30), "not_nifti"),
    "half_a_header": (b"\x5c\x01\0\0" + bytes(200), "truncated"),
    "zeros_after_size": (b"\x5c\x01\0\0" + bytes(2000), "not_nifti"),
    "broken_gzip": (b"\x1f\x8b\x08\0" + b"\xff" * 200, "damaged"),
    "cut_gzip": (gzip.compress(bytes(400))[:11], "damaged"),
}


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("content", CONTENTS)
def test_discover_nifti_names_files_that_are_none(tmp_path, content, name):
    (tmp_path / name).write_bytes(CONTENTS[content][0])
    jobs, (rejected,) = discover("nifti", tmp_path)
    assert jobs == [] and rejected.code == CONTENTS[content][1] and "\n" not in rejected.reason


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_wrong_suffix_makes_no_difference(tmp_path, suffix):
    other = write_scan_file(tmp_path / ("x.nii.gz" if suffix == ".nii" else "x.nii"))
    other.rename(tmp_path / f"a{suffix}")
    assert_is_phantom(read_one(tmp_path), phantom())


def refusal(folder: Path, source: str = "nifti") -> ScanError:
    with pytest.raises(ScanError) as caught:
        read_one(folder, source)
    assert "\n" not in str(caught.value) and CANARY not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("kept", [400, 2000, -1, -9])
def test_read_nifti_of_a_cut_gzip_file_is_refused(tmp_path, kept):
    path = write_scan_file(tmp_path / "a.nii.gz")
    path.write_bytes(path.read_bytes()[:kept])
    jobs, rejected = discover("nifti", tmp_path)
    codes = [r.code for r in rejected] or [refusal(tmp_path).code]
    assert codes == ["damaged"]


def test_read_nifti_of_a_gzip_file_with_a_flipped_bit_is_refused(tmp_path):
    path = write_scan_file(tmp_path / "a.nii.gz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert refusal(tmp_path).code in ("damaged", "not_hu")


def test_read_nifti_of_a_cut_plain_file_is_refused_from_its_header(tmp_path):
    path = write_scan_file(tmp_path / "a.nii")
    path.write_bytes(path.read_bytes()[:-1])
    assert discover("nifti", tmp_path)[1][0].code == "truncated"


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_read_nifti_with_more_bytes_than_promised_is_refused(tmp_path, name):
    path = write_scan_file(tmp_path / name)
    more = bytes(3)
    content = path.read_bytes()
    path.write_bytes(
        gzip.compress(gzip.decompress(content) + more) if path.suffix == ".gz" else content + more
    )
    error = refusal(tmp_path)
    assert error.code == "damaged" and "more bytes than its header promises" in str(error)


def test_read_nifti_of_a_gzip_bomb_unpacks_no_more_than_the_header_promises(tmp_path, monkeypatch):
    path = write_scan_file(tmp_path / "a.nii.gz")
    plain = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(plain + bytes(50_000_000), 9))
    unpacked = 0
    read = gzip.GzipFile.read

    def counting(self, size=-1):
        nonlocal unpacked
        block = read(self, size)
        unpacked += len(block)
        return block

    monkeypatch.setattr(gzip.GzipFile, "read", counting)
    jobs, _ = discover("nifti", tmp_path)
    assert unpacked <= 540
    unpacked = 0
    with pytest.raises(ScanError, match="more bytes than its header promises"):
        NIFTI_READERS["nifti"].read(jobs[0])
    assert unpacked == len(plain) + 1


def test_limit_on_expanded_size_is_checked_in_the_header(tmp_path, monkeypatch):
    write_scan_file(tmp_path / "a.nii")
    monkeypatch.setattr(nifti_series, "MAX_EXPANDED_BYTES", 36 * 40 * 5 * 2 - 1)
    assert discover("nifti", tmp_path)[1][0].code == "too_large"
    monkeypatch.setattr(nifti_series, "MAX_EXPANDED_BYTES", 36 * 40 * 5 * 2)
    assert len(discover("nifti", tmp_path)[0]) == 1


def test_discover_nifti_follows_no_link_and_opens_no_pipe(tmp_path):
    write_scan_file(tmp_path / "in" / "a.nii")
    (tmp_path / "in" / "b.nii").symlink_to(tmp_path / "in" / "a.nii")
    (tmp_path / "in" / "d").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "in" / "c.nii")
    jobs, rejected = discover("nifti", tmp_path / "in")
    assert [job.case for job in jobs] == ["a.nii"]
    assert [(Path(r.file).name, r.code) for r in rejected] == [
        ("b.nii", "not_regular"),
        ("c.nii", "not_regular"),
        ("d", "not_regular"),
    ]


def test_discover_nifti_names_other_files_and_skips_litter(tmp_path):
    write_scan_file(tmp_path / "a.nii")
    for name in ("a.json", ".DS_Store", "._a.nii", "Thumbs.db"):
        (tmp_path / name).write_text("x")
    jobs, rejected = discover("nifti", tmp_path)
    assert len(jobs) == 1 and [(Path(r.file).name, r.code) for r in rejected] == [("a.json", "other_file")]


@pytest.mark.parametrize("source", NIFTI_READERS)
def test_discover_of_an_empty_or_missing_folder_says_so(tmp_path, source):
    jobs, rejected = discover(source, tmp_path)
    assert jobs == [] and len(rejected) == 1
    with pytest.raises(ScanError, match="no such folder"):
        discover(source, tmp_path / "absent")


def test_file_that_vanishes_after_discovery_is_refused(tmp_path):
    path = write_scan_file(tmp_path / "a.nii")
    job = discover("nifti", tmp_path)[0][0]
    path.unlink()
    with pytest.raises(ScanError, match=r"a\.nii: No such file"):
        NIFTI_READERS["nifti"].read(job)


@pytest.mark.parametrize(
    "name", ["$(touch x) 'a\".nii", "-rf.nii.gz", "new\nline.nii", b"\xff\xfe.nii", "é☃.nii"]
)
def test_odd_file_names_are_read_and_shown_on_one_line(tmp_path, name):
    path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), os.fsencode(name))))  # noqa: PTH118 bytes
    write_scan_file(path)
    (job,), rejected = discover("nifti", tmp_path)
    assert not rejected and job.case.isprintable()
    scan = NIFTI_READERS["nifti"].read(job)
    assert scan.series_uid.isalnum() and scan.patient_id.isalnum()


@pytest.mark.parametrize("shift", [1024, 1000])
def test_values_with_an_offset_are_refused_by_name(tmp_path, shift):
    made = phantom()
    shifted = (expected_hu(made) + shift).clip(0, 4095)
    write_volume(tmp_path / "a.nii", shifted, np.asarray(made.affine, float), dtype=np.uint16)
    error = refusal(tmp_path)
    assert error.code == "not_hu" and "look like HU + 1024" in str(error) and "scl_inter" in str(error)


@pytest.mark.parametrize(
    "values",
    [
        lambda hu: np.zeros_like(hu),
        lambda hu: np.full_like(hu, -1000),
        lambda hu: hu.clip(0, 80) * 255 // 80,
        lambda hu: np.where(hu < -500, 0, hu),
        lambda hu: np.where(hu < -500, -2000, hu),  # a stripped head: padding is no air
    ],
)
def test_values_that_are_no_hu_are_refused_with_their_range(tmp_path, values):
    made = phantom()
    volume = values(expected_hu(made).astype(np.int32))
    write_volume(tmp_path / "a.nii", volume, np.asarray(made.affine, float))
    error = refusal(tmp_path)
    assert error.code == "not_hu" and f"range from {volume.min()} to {volume.max()}" in str(error)
    assert "HU + 1024" not in str(error)
    (job,), _ = discover("nifti", tmp_path)
    scan = NIFTI_READERS["nifti"].read(pickle.loads(pickle.dumps(job._replace(assume_hu=True))))
    np.testing.assert_array_equal(scan.hu, np.where(volume <= -1500, -1024, volume).clip(-1024, 3071))
    assert all(ASSUMED_HU in notes for notes in scan.repairs)


@pytest.mark.parametrize(("source", "count"), [("ct-ich", 3), ("bhsd", 3)])
def test_sets_with_assumed_hu_are_read_as_they_are_and_say_so(tmp_path, monkeypatch, source, count):
    {"ct-ich": write_ct_ich, "bhsd": write_bhsd}[source](tmp_path)
    jobs, _ = discover(source, tmp_path)
    monkeypatch.setattr(nifti_series, "hu_fault", lambda _: "its values are not HU: said so")
    assert len(jobs) == count
    for job in jobs:
        with pytest.raises(ScanError, match="not HU"):
            NIFTI_READERS[source].read(job)
        scan = NIFTI_READERS[source].read(job._replace(assume_hu=True))
        assert all(ASSUMED_HU in notes for notes in scan.repairs)


def test_thick_slices_seen_from_the_edge_are_refused_as_not_axial(tmp_path):
    made = phantom()
    affine = np.array(made.affine, float)[:, [2, 1, 0, 3]]  # the slices' own axis now runs to the left
    affine[:3, 0], affine[:3, 2] = (28.2, 0, 0), (0, 0, 6.5)
    write_volume(tmp_path / "a.nii", expected_hu(made), affine)
    assert discover("nifti", tmp_path)[1][0].code == "not_axial"


# ---------------------------------------------------------------- any folder: ids and masks


def test_nifti_ids_are_stable_and_apart(tmp_path):
    for folder in ("a", "b"):
        write_scan_file(tmp_path / folder / "scan.nii", phantom(1 if folder == "a" else 2))
    write_scan_file(tmp_path / "a" / "copy.nii")
    alone = {folder: discover("nifti", tmp_path / folder)[0] for folder in ("a", "b")}
    uids = [job.series_uid for jobs in alone.values() for job in jobs]
    assert len(set(uids)) == 3  # one name in two folders is not one scan
    (tmp_path / "a").rename(tmp_path / "moved")
    assert discover("nifti", tmp_path / "moved")[0][0].series_uid == alone["a"][0].series_uid


def test_nifti_patient_is_the_bids_subject_or_else_the_file(tmp_path):
    for name in (
        "sub-01/ses-1/sub-01_ct.nii",
        "sub-01/ses-2/sub-01_ct.nii",
        "sub-02_ct.nii",
        "x.nii",
        "y.nii",
    ):
        write_scan_file(tmp_path / name)
    found = {job.case: NIFTI_READERS["nifti"].read(job) for job in discover("nifti", tmp_path)[0]}
    patients = [scan.patient_id for scan in found.values()]
    assert len(patients) == 5 and len(set(patients)) == 4
    assert len({scan.study_uid for scan in found.values()}) == 5
    said = {case for case, scan in found.items() if "no patient id" in scan.repairs[0][:1].__str__()}
    assert said == {"x.nii", "y.nii"}


@pytest.mark.parametrize("place", ["a_mask.nii", "a_mask.nii.gz", "masks/a.nii.gz", "masks/a.nii"])
@pytest.mark.parametrize("mark", [1, 255])
def test_read_nifti_takes_the_mask_beside_it_as_lesion_of_unknown_kind(tmp_path, place, mark):
    made = phantom(2, ("intraparenchymal",))
    write_scan_file(tmp_path / "in" / "a.nii.gz", made, axes="RAS")
    volume = (made.mask > 0).astype(np.uint8) * np.uint8(mark)
    assert volume.any()
    # Stored another way round than its scan: the same voxels all the same
    write_volume(tmp_path / "in" / place, volume, np.asarray(made.affine, float), axes="LPI", dtype=np.uint8)
    scan = read_one(tmp_path / "in")
    np.testing.assert_array_equal(scan.mask, (made.mask > 0) * 255)
    assert scan.mask.dtype == np.uint8 and scan.labels == dict.fromkeys(LABEL_NAMES)
    assert_survives_the_layout(scan, tmp_path / "out")


def test_read_nifti_does_not_guess_what_classes_mean(tmp_path):
    made = phantom(2, ("intraparenchymal", "subdural"))
    write_scan_file(tmp_path / "a.nii", made)
    write_volume(tmp_path / "a_mask.nii", made.mask, np.asarray(made.affine, float), dtype=np.uint8)
    scan = read_one(tmp_path)
    assert set(np.unique(scan.mask)) == {0, 255}
    assert any("nothing explains" in note for note in scan.repairs[0])


def test_discover_nifti_names_a_mask_without_its_scan(tmp_path):
    write_scan_file(tmp_path / "a.nii")
    for name in ("b_mask.nii", "masks/c.nii"):
        write_scan_file(tmp_path / name)
    jobs, rejected = discover("nifti", tmp_path)
    assert len(jobs) == 1 and [r.code for r in rejected] == ["mask_alone"] * 2


def shifted(mm: float) -> np.ndarray:
    affine = np.array(phantom().affine, float)
    affine[0, 3] += mm
    return affine


MASK_FAULTS = {
    "shape": (np.zeros((4, 40, 36)), 0.0, r"shape \(4, 40, 36\) is not that of a\.nii, \(5, 40, 36\)"),
    "affine": (np.zeros((5, 40, 36)), 0.01, r"affine is not that of a\.nii: up to 0\.010 mm"),
    "fractions": (np.full((5, 40, 36), 0.5), 0.0, "not whole numbers"),
    "negative": (np.full((5, 40, 36), -1.0), 0.0, "not whole numbers"),
    "nan": (np.full((5, 40, 36), np.nan), 0.0, "not whole numbers"),
    "inverted": (np.ones((5, 40, 36)), 0.0, "marks 100% of the volume"),
}


@pytest.mark.parametrize("fault", MASK_FAULTS)
def test_read_nifti_refuses_a_scan_whose_mask_cannot_be_its_own(tmp_path, fault):
    volume, mm, what = MASK_FAULTS[fault]
    write_scan_file(tmp_path / "a.nii")
    write_volume(tmp_path / "a_mask.nii", volume, shifted(mm), dtype=np.float32)
    with pytest.raises(ScanError, match=what) as caught:
        read_one(tmp_path)
    assert caught.value.code == "mask" and caught.value.file.endswith("a_mask.nii")


def test_read_nifti_accepts_a_mask_whose_affine_differs_by_rounding(tmp_path):
    write_scan_file(tmp_path / "a.nii")
    write_volume(tmp_path / "a_mask.nii", np.zeros((5, 40, 36)), shifted(0.0005), dtype=np.uint8)
    assert read_one(tmp_path).mask.any() == np.False_


# ---------------------------------------------------------------- CT-ICH

COLUMNS = (
    *("PatientNumber", "SliceNumber", "Intraventricular", "Intraparenchymal", "Subarachnoid"),
    *("Epidural", "Subdural", "No_Hemorrhage", "Fracture_Yes_No"),
)
PATIENTS = {49: ("subdural",), 58: (), 66: ("subdural", "intraparenchymal")}  # 59 to 65 are missing


def ct_ich_rows(number: int, made: Phantom, *, reverse: bool = False) -> list[dict[str, int]]:
    """Rows of one patient; reverse: the file's third axis runs from head to feet."""
    rows = []
    for index, labels in enumerate(made.slice_labels[:: -1 if reverse else 1], start=1):
        row = {name.capitalize(): labels[name] for name in HEMORRHAGES}
        row |= {"PatientNumber": number, "SliceNumber": index, "No_Hemorrhage": 1 - labels["any"]}
        rows.append(row | {"Fracture_Yes_No": 0})
    return rows


def write_ct_ich(
    root: Path, *, axes="LPS", columns=COLUMNS, mark=255, change=lambda rows: rows, encoding="utf-8-sig"
):
    """The layout of PhysioNet CT-ICH 1.3.1 with its known defects: a BOM, numbers that are missing."""
    rows = []
    for number, lesions in PATIENTS.items():
        made = phantom(number, lesions)
        affine = np.asarray(made.affine, float)
        write_volume(root / "ct_scans" / f"{number:03d}.nii", expected_hu(made), affine, axes=axes)
        marked = (made.mask > 0).astype(np.uint8) * np.uint8(mark)
        write_volume(root / "masks" / f"{number:03d}.nii", marked, affine, axes=axes, dtype=np.uint8)
        rows += ct_ich_rows(number, made, reverse=axes[2] == "I")
    with (root / nifti_series.LABEL_FILE).open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(change(rows))


def write_sums(root: Path) -> None:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()} {p.relative_to(root).as_posix()}" for p in files]
    (root / nifti_series.SUMS_FILE).write_text("\n".join(lines) + "\n")


def read_ct_ich(root: Path) -> tuple[dict[int, Scan], list[Rejected]]:
    jobs, rejected = discover("ct-ich", root)
    return {int(job.case): NIFTI_READERS["ct-ich"].read(job) for job in jobs}, rejected


def ct_ich_labels(labels: dict[str, int]) -> dict[str, int | None]:
    return {name: labels[name] for name in LABEL_NAMES} | {"ischemia": None}


@pytest.mark.parametrize("axes", ["LPS", "RAS", "LAI", "RPI"])
@pytest.mark.parametrize("mark", [1, 255])
def test_read_ct_ich_gives_hu_labels_and_masks_exactly(tmp_path, axes, mark):
    write_ct_ich(tmp_path / "in", axes=axes, mark=mark)
    write_sums(tmp_path / "in")
    found, rejected = read_ct_ich(tmp_path / "in")
    assert rejected == [] and sorted(found) == sorted(PATIENTS)
    several = 0
    for number, scan in found.items():
        made = phantom(number, PATIENTS[number])
        assert_is_phantom(scan, made)
        assert scan.repairs == [[]] * 5
        assert scan.slice_labels == [ct_ich_labels(labels) for labels in made.slice_labels]
        assert scan.labels == ct_ich_labels(made.labels)
        for index, labels in enumerate(made.slice_labels):
            kinds = [name for name in HEMORRHAGES if labels[name]]
            several += len(kinds) > 1
            expected = made.mask[index] if len(kinds) < 2 else (made.mask[index] > 0) * 255
            np.testing.assert_array_equal(scan.mask[index], expected)
        assert_survives_the_layout(scan, tmp_path / "out")
    assert several  # the patient with two kinds has them in one slice
    assert len({scan.patient_id for scan in found.values()}) == 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_ct_ich_columns_are_found_by_name_whatever_their_order(tmp_path, encoding):
    write_ct_ich(tmp_path, columns=tuple(sorted(COLUMNS, reverse=True)), encoding=encoding)
    found, rejected = read_ct_ich(tmp_path)
    assert rejected == []
    for number, scan in found.items():
        made = phantom(number, PATIENTS[number])
        assert scan.slice_labels == [ct_ich_labels(labels) for labels in made.slice_labels]


@pytest.mark.parametrize("missing", [*COLUMNS[:-1]])
def test_ct_ich_without_a_needed_column_is_refused_by_its_name(tmp_path, missing):
    write_ct_ich(tmp_path, columns=[name for name in COLUMNS if name != missing])
    jobs, (rejected,) = discover("ct-ich", tmp_path)
    assert jobs == [] and rejected.code == "label_file" and f"column {missing} is missing" in rejected.reason


def edit(patient: int, number: int, **cells):
    def change(rows):
        for row in rows:
            if (row["PatientNumber"], row["SliceNumber"]) == (patient, number):
                row.update(cells)
        return rows

    return change


def test_ct_ich_rows_that_contradict_themselves_count_as_unknown_and_are_named(tmp_path):
    assert phantom(58).slice_labels[2]["any"] == 0
    write_ct_ich(tmp_path, change=edit(58, 3, Subdural=1))
    found, (rejected,) = read_ct_ich(tmp_path)
    assert rejected.code == "label_conflict" and rejected.case == "058"
    assert "1 in the label file, slice 3 (line 9): No_Hemorrhage beside a haemorrhage" in rejected.reason
    scan = found[58]
    assert scan.slice_labels[2] == dict.fromkeys(LABEL_NAMES)
    assert scan.repairs[2] == ["labels unknown: No_Hemorrhage beside a haemorrhage"]
    assert scan.slice_labels[1]["any"] == 0 and scan.labels["any"] is None


def test_ct_ich_haemorrhage_of_no_kind_counts_as_unknown(tmp_path):
    write_ct_ich(tmp_path, change=edit(58, 1, No_Hemorrhage=0))
    found, (rejected,) = read_ct_ich(tmp_path)
    assert rejected.code == "label_conflict" and "of no kind" in rejected.reason
    assert found[58].slice_labels[0]["any"] is None


@pytest.mark.parametrize(
    ("cell", "code"), [("2", "label_value"), ("yes", "label_value"), ("-1", "label_value")]
)
def test_ct_ich_values_other_than_0_and_1_are_named(tmp_path, cell, code):
    write_ct_ich(tmp_path, change=edit(49, 2, Epidural=cell))
    found, (rejected,) = read_ct_ich(tmp_path)
    assert rejected.code == code and found[49].slice_labels[1] == dict.fromkeys(LABEL_NAMES)


@pytest.mark.parametrize("cell", ["", "nan", " "])
def test_ct_ich_blank_cell_is_an_unknown_label(tmp_path, cell):
    write_ct_ich(tmp_path, change=edit(58, 2, Epidural=cell))
    found, rejected = read_ct_ich(tmp_path)
    assert rejected == [] and found[58].slice_labels[1]["epidural"] is None
    assert found[58].slice_labels[1]["subdural"] == found[58].slice_labels[1]["any"] == 0


def test_ct_ich_duplicate_rows_are_dropped_if_equal_and_unknown_if_not(tmp_path):
    def change(rows):
        same = next(row for row in rows if (row["PatientNumber"], row["SliceNumber"]) == (58, 1))
        other = next(row for row in rows if (row["PatientNumber"], row["SliceNumber"]) == (58, 4))
        return [*rows, dict(same), other | {"Epidural": 1, "No_Hemorrhage": 0}]

    write_ct_ich(tmp_path, change=change)
    found, (rejected,) = read_ct_ich(tmp_path)
    assert rejected.code == "label_conflict" and "slice 4 (line 18): differs" in rejected.reason
    scan = found[58]
    assert scan.slice_labels[0]["any"] == 0 and "stands twice" in scan.repairs[0][0]
    assert scan.slice_labels[3]["any"] is None and "differs" in scan.repairs[3][0]


def test_ct_ich_missing_rows_are_unknown_and_rows_without_slices_are_named(tmp_path):
    def change(rows):
        rows = [row for row in rows if (row["PatientNumber"], row["SliceNumber"]) != (49, 5)]
        extra = [rows[0] | {"SliceNumber": number} for number in (0, 6, 7)]
        return rows + extra + [rows[0] | {"PatientNumber": 61, "SliceNumber": n} for n in range(1, 5)]

    write_ct_ich(tmp_path, change=change)
    found, rejected = read_ct_ich(tmp_path)
    assert [(r.case, r.code) for r in rejected] == [("049", "label_beyond"), ("061", "label_alone")]
    assert "3 in the label file, slice 0, the scan has 5; slice 6" in rejected[0].reason
    assert (
        "4 in the label file, slice 1: no scan; slice 2" in rejected[1].reason
        and "; ..." in rejected[1].reason
    )
    assert found[49].slice_labels[4] == dict.fromkeys(LABEL_NAMES)
    assert found[49].repairs[4][0] == "no row in the label file: labels unknown"


def test_ct_ich_row_without_patient_number_is_refused_by_line(tmp_path):
    write_ct_ich(tmp_path, change=edit(49, 2, PatientNumber="x"))
    jobs, (rejected,) = discover("ct-ich", tmp_path)
    assert jobs == [] and "line 3: PatientNumber" in rejected.reason


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00P", b"a;b\n1;2\n", b"\x00" * 100, b'"' + b"x" * 200_000]
)
def test_ct_ich_label_file_that_is_none_is_refused_in_one_line(tmp_path, content):
    write_ct_ich(tmp_path)
    (tmp_path / nifti_series.LABEL_FILE).write_bytes(content)
    jobs, (rejected,) = discover("ct-ich", tmp_path)
    assert jobs == [] and rejected.code == "label_file" and "\n" not in rejected.reason


def test_ct_ich_label_and_mask_that_disagree_are_noted(tmp_path):
    made = phantom(49, PATIENTS[49])
    blood = next(index for index, labels in enumerate(made.slice_labels) if labels["any"])
    change = edit(49, blood + 1, Subdural=0, No_Hemorrhage=1)
    write_ct_ich(tmp_path, change=change)
    scan = read_ct_ich(tmp_path)[0][49]
    assert scan.repairs[blood] == ["label and mask disagree: the mask is not empty"]
    assert set(np.unique(scan.mask[blood])) == {0, 255}


def test_ct_ich_mask_with_other_values_is_refused(tmp_path):
    write_ct_ich(tmp_path)
    made = phantom(49, PATIENTS[49])
    write_volume(tmp_path / "masks" / "049.nii", made.mask, np.asarray(made.affine, float), dtype=np.uint8)
    with pytest.raises(ScanError, match="are not 0 and 1, or 0 and 255"):
        read_ct_ich(tmp_path)


def test_ct_ich_without_masks_still_has_its_labels_and_says_so(tmp_path):
    write_ct_ich(tmp_path)
    (tmp_path / "masks" / "049.nii").unlink()
    scan = read_ct_ich(tmp_path)[0][49]
    assert scan.mask is None and scan.labels["subdural"] == 1
    assert all("no mask file" in notes[0] for notes in scan.repairs)


@pytest.mark.parametrize("folder", ["ct_scans", "masks"])
def test_ct_ich_without_one_of_its_folders_is_refused_by_name(tmp_path, folder):
    write_ct_ich(tmp_path)
    (tmp_path / folder).rename(tmp_path / "elsewhere")
    jobs, (rejected,) = discover("ct-ich", tmp_path)
    assert jobs == [] and rejected.file == str(tmp_path / folder) and rejected.code == "missing"


def test_ct_ich_mask_that_is_a_pipe_is_refused(tmp_path):
    write_ct_ich(tmp_path)
    write_sums(tmp_path)
    (tmp_path / "masks" / "049.nii").unlink()
    os.mkfifo(tmp_path / "masks" / "049.nii")
    with pytest.raises(ScanError, match="a link or a special file"):
        read_ct_ich(tmp_path)


def test_ct_ich_mask_without_scan_and_stray_files_are_named(tmp_path):
    write_ct_ich(tmp_path)
    (tmp_path / "ct_scans" / "058.nii").unlink()
    (tmp_path / "ct_scans" / "notes.txt").write_text("x")
    (tmp_path / "ct_scans" / "49.nii").write_bytes((tmp_path / "ct_scans" / "049.nii").read_bytes())
    codes = sorted((Path(r.file).name, r.code) for r in discover("ct-ich", tmp_path)[1])
    assert codes == [
        ("058.nii", "mask_alone"),
        ("49.nii", "duplicate"),
        ("hemorrhage_diagnosis_raw_ct.csv", "label_alone"),
        ("notes.txt", "other_file"),
    ]


def test_ct_ich_stored_in_sagittal_order_cannot_be_labelled(tmp_path):
    write_ct_ich(tmp_path, axes="PSR")
    jobs, rejected = discover("ct-ich", tmp_path)
    with pytest.raises(ScanError, match="no row can be told to its slice"):
        NIFTI_READERS["ct-ich"].read(jobs[0])


@pytest.mark.parametrize("name", ["ct_scans/049.nii", "masks/049.nii"])
def test_ct_ich_file_that_differs_from_its_checksum_is_refused_by_name(tmp_path, name):
    write_ct_ich(tmp_path)
    write_sums(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)
    jobs, rejected = discover("ct-ich", tmp_path)
    assert rejected == []
    with pytest.raises(ScanError, match=rf"{name}: its SHA-256 is not that of SHA256SUMS\.txt"):
        NIFTI_READERS["ct-ich"].read(next(job for job in jobs if job.case == "049"))
    assert len([NIFTI_READERS["ct-ich"].read(job) for job in jobs if job.case != "049"]) == 2


def test_ct_ich_label_file_that_differs_from_its_checksum_is_refused(tmp_path):
    write_ct_ich(tmp_path)
    write_sums(tmp_path)
    path = tmp_path / nifti_series.LABEL_FILE
    path.write_bytes(path.read_bytes() + b"\n")
    jobs, (rejected,) = discover("ct-ich", tmp_path)
    assert jobs == [] and rejected.code == "checksum"


def test_ct_ich_files_missing_from_disk_or_from_the_sums_are_named(tmp_path):
    write_ct_ich(tmp_path)
    write_sums(tmp_path)
    sums = tmp_path / nifti_series.SUMS_FILE
    kept = [line for line in sums.read_text().splitlines() if "058" not in line]
    sums.write_text("\n".join([*kept, f"{'0' * 64} *ct_scans/130.nii"]))
    found, (rejected,) = read_ct_ich(tmp_path)
    assert rejected.code == "missing" and rejected.file.endswith("ct_scans/130.nii")
    assert any("not checked" in note for note in found[58].repairs[0]) and found[49].repairs[0] == []


def test_ct_ich_damaged_sums_are_refused_by_line(tmp_path):
    write_ct_ich(tmp_path)
    (tmp_path / nifti_series.SUMS_FILE).write_text("hello world\n")
    jobs, (rejected,) = discover("ct-ich", tmp_path)
    assert jobs == [] and "line 1 is no SHA-256 sum" in rejected.reason


# ---------------------------------------------------------------- BHSD

BHSD_NAMES = {
    "ID_0219ef88_ID_e5a5e2dc0b": (3, ("intraparenchymal", "intraventricular")),
    "ID_2db7ee14_ID_2591d00dfc": (4, ("subdural",)),
    "ID_2db7ee14_ID_f27e38fdfd": (5, ("subarachnoid", "epidural")),
}


def write_bhsd(root: Path, *, images="images", masks="ground truths", axes="LPS") -> None:
    for stem, (seed, lesions) in BHSD_NAMES.items():
        made = phantom(seed, lesions)
        affine = np.asarray(made.affine, float)
        write_volume(root / images / f"{stem}.nii.gz", expected_hu(made), affine, axes=axes)
        write_volume(root / masks / f"{stem}.nii.gz", made.mask, affine, axes=axes, dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images", "ground truths"),
        ("images", "labels"),
        ("images", "masks"),
        ("imagesTr", "labelsTr"),
        ("label_192/images", "label_192/ground truths"),
    ],
)
@pytest.mark.parametrize("axes", ["LPS", "RAI", "PSR"])
def test_read_bhsd_gives_hu_masks_and_the_labels_of_the_masks(tmp_path, images, masks, axes):
    write_bhsd(tmp_path / "in", images=images, masks=masks, axes=axes)
    jobs, rejected = discover("bhsd", tmp_path / "in")
    assert rejected == [] and len(jobs) == 3
    for job in jobs:
        scan = NIFTI_READERS["bhsd"].read(pickle.loads(pickle.dumps(job)))
        made = phantom(*BHSD_NAMES[Path(job.case).name.removesuffix(".nii.gz")])
        assert_is_phantom(scan, made)
        np.testing.assert_array_equal(scan.mask, made.mask)
        assert scan.slice_labels == [ct_ich_labels(labels) for labels in made.slice_labels]
        assert scan.labels == ct_ich_labels(made.labels)
        assert_survives_the_layout(scan, tmp_path / "out")


def test_bhsd_studies_of_one_patient_share_an_id_that_is_the_one_of_rsna(tmp_path):
    write_bhsd(tmp_path)
    found = [NIFTI_READERS["bhsd"].read(job) for job in discover("bhsd", tmp_path)[0]]
    assert [scan.patient_id for scan in found[1:]] == [pseudonym("patient", "ID_2db7ee14")] * 2
    assert found[0].patient_id != found[1].patient_id
    assert found[1].study_uid == pseudonym("study", "ID_2db7ee14", "ID_2591d00dfc") != found[2].study_uid
    assert len({scan.series_uid for scan in found}) == 3


def test_bhsd_scans_found_from_another_root_keep_their_ids_and_copies_are_named(tmp_path):
    write_bhsd(tmp_path / "label_192")
    write_bhsd(tmp_path / "other")
    jobs, rejected = discover("bhsd", tmp_path)
    assert len(jobs) == 3 and [r.code for r in rejected] == ["duplicate"] * 3
    uids = {job.series_uid for job in discover("bhsd", tmp_path / "label_192")[0]}
    assert uids == {job.series_uid for job in jobs}


def test_bhsd_mask_with_a_sixth_class_is_refused(tmp_path):
    made = phantom(6, ("ischemia",))
    assert made.mask.max() == 6
    stem = "ID_00000000_ID_0000000000.nii.gz"
    write_scan_file(tmp_path / "images" / stem, made)
    write_volume(tmp_path / "labels" / stem, made.mask, np.asarray(made.affine, float), dtype=np.uint8)
    assert "its highest value is 6, BHSD has classes 0 to 5" in str(refusal(tmp_path, "bhsd"))


def test_bhsd_image_without_mask_mask_without_image_and_other_names(tmp_path):
    write_bhsd(tmp_path)
    stems = list(BHSD_NAMES)
    (tmp_path / "ground truths" / f"{stems[0]}.nii.gz").unlink()
    (tmp_path / "images" / f"{stems[1]}.nii.gz").unlink()
    for folder in ("images", "ground truths"):
        (tmp_path / folder / f"{stems[2]}.nii.gz").rename(tmp_path / folder / "patient7.nii.gz")
    jobs, rejected = discover("bhsd", tmp_path)
    assert [(Path(r.file).parent.name, r.code) for r in rejected] == [
        ("images", "no_mask"),
        ("ground truths", "mask_alone"),
    ]
    (job,) = jobs
    assert "not named by RSNA ids" in NIFTI_READERS["bhsd"].read(job).repairs[0][0]


# ---------------------------------------------------------------- what leaves, and real data


def test_header_texts_leave_the_reader_in_no_way(tmp_path, caplog):
    write_scan_file(tmp_path / "in" / "good.nii.gz")
    write_scan_file(tmp_path / "in" / "bad.nii", change=set_field("pixdim", 0, 1))
    write_volume(tmp_path / "in" / "zero.nii", np.zeros((5, 40, 36)), np.asarray(phantom().affine, float))
    assert CANARY.encode() in (tmp_path / "in" / "bad.nii").read_bytes()
    jobs, rejected = discover("nifti", tmp_path / "in")
    texts = [repr(jobs), repr(rejected), caplog.text]
    for job in jobs:
        try:
            scan = NIFTI_READERS["nifti"].read(job)
            texts.append(
                json.dumps([scan.repairs, scan.labels, scan.patient_id, scan.study_uid, scan.source])
            )
            assert_survives_the_layout(scan, tmp_path / "out")
        except ScanError as error:
            texts.append(str(error))
    assert len(texts) == 5 and not any(CANARY in text for text in texts)


@pytest.mark.parametrize("name", ["scct", "scct_stripped", "sccsf"])
def test_real_template_in_cormack_units_is_refused_as_not_hu(real_data, tmp_path, name):
    path = real_data / "head_template" / f"{name}.nii"
    if not path.is_file():
        pytest.skip(f"no {path}")
    (tmp_path / path.name).write_bytes(path.read_bytes())
    error = refusal(tmp_path)
    assert error.code == "not_hu" and "HU + 1024" not in str(error)


def test_real_template_turned_into_hu_is_read_in_place(real_data, tmp_path):
    path = real_data / "head_template" / "scct.nii"
    if not path.is_file():
        pytest.skip(f"no {path}")
    image = nib.load(path)
    cormack = image.get_fdata()
    hu = np.select(
        [cormack <= 900, cormack <= 3100], [cormack - 1024, (cormack - 900) / 11 - 124], cormack - 3024
    )
    nib.save(nib.Nifti1Image(hu.astype(np.float32), image.affine), tmp_path / "a.nii.gz")
    scan = read_one(tmp_path)
    assert scan.hu.shape == (91, 109, 91) and scan.spacing_mm == pytest.approx((2, 2, 2))
    # The anterior commissure is the origin of this space: brain there, and air far in front of it
    commissure = np.linalg.solve(scan.affine, (0, 0, 0, 1))[:3].round().astype(int)
    column, row, index = commissure
    assert 0 < scan.hu[index, row - 2 : row + 3, column - 2 : column + 3].mean() < 60
    front = np.linalg.solve(scan.affine, (0, -85, 60, 1))[:3].round().astype(int)
    assert scan.hu[front[2], front[1], front[0]] < -700
