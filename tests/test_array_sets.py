"""The readers of arrays against sets written here from the phantom, in their exact layouts and defects."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from array_sets import (
    ARRAY_READERS,
    MAX_ARRAY_BYTES,
    discover_lodopab,
    discover_npz,
    discover_pairs,
    fingerprint,
    given_split,
    load_array,
)
from dataset import read_metadata, read_slices, window_hu, write_scan
from phantom import Phantom, generate_phantom
from tests.reading import codes, read_all, read_error, read_one, refused_unless_assumed
from volumes import AIR_HU, ASSUMED_HU, LABEL_NAMES, ScanError

SIZE = 40


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return generate_phantom(3, size=(SIZE, SIZE + 4), slices=12, lesions=["intraparenchymal"])


@pytest.fixture(scope="module")
def square() -> Phantom:
    return generate_phantom(4, size=SIZE, slices=5, lesions=[])


def write_npz(folder: Path, image: np.ndarray, key: str = "arr_0", **more: np.ndarray) -> Path:
    """folder/image.npz with one array under key, and folder/<name>.npz for the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "image.npz", **{key: image})
    for name, values in more.items():
        np.savez_compressed(folder / f"{name}.npz", values)
    return folder / "image.npz"


def write_series(folder: Path, volume: np.ndarray, masks: np.ndarray | None = None) -> Path:
    for index, image in enumerate(volume):
        more = {} if masks is None else {"mask": masks[index]}
        write_npz(folder / f"{index:05d}", image, **more)
    return folder


# ---------------------------------------------------------------- npz


def test_npz_series_comes_back_with_values_order_mask_split_and_what_was_assumed(tmp_path, phantom):
    write_series(tmp_path / "test" / "2.25.116", phantom.hu, (phantom.mask > 0).astype(np.uint8))
    (tmp_path / "test" / "2.25.116" / "metadata.json").write_text('{"what": ["ever"]}')
    scan = read_one("npz", tmp_path)
    np.testing.assert_array_equal(scan.hu, phantom.hu)
    np.testing.assert_array_equal(scan.mask, np.where(phantom.mask > 0, 255, 0))
    assert phantom.mask.any() and scan.mask.dtype == np.uint8 and scan.hu.dtype == np.int16
    assert (scan.source, scan.intensity, scan.split) == ("npz", "hu", "test")
    assert scan.positions_mm == pytest.approx([5.0 * i for i in range(12)])
    assert scan.spacing_mm == pytest.approx((5, 250 / 44, 250 / 44))
    assert all(sum("assumed" in note for note in notes) == 2 for notes in scan.repairs)
    assert scan.labels == dict.fromkeys(LABEL_NAMES) and len(scan.slice_labels) == 12


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float16, np.float32, np.float64, ">i2"])
@pytest.mark.parametrize("key", ["arr_0", "image", "slice"])
def test_npz_of_any_number_type_and_key_gives_the_same_hu(tmp_path, phantom, dtype, key):
    write_npz(tmp_path / "sample_08295", phantom.hu[6].astype(dtype), key)
    np.testing.assert_array_equal(read_one("npz", tmp_path).hu[0], phantom.hu[6])


def test_npz_prefers_the_named_keys_over_the_first_one(tmp_path, phantom):
    (tmp_path / "a").mkdir()
    np.savez(tmp_path / "a" / "image.npz", other=phantom.hu[1], image=phantom.hu[6])
    np.testing.assert_array_equal(read_one("npz", tmp_path).hu[0], phantom.hu[6])


@pytest.mark.parametrize("shape", [(1, SIZE, SIZE + 4), (SIZE, SIZE + 4, 1)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_with_an_axis_of_one_or_in_fortran_order_gives_the_same_hu(tmp_path, phantom, shape, order):
    write_npz(tmp_path / "a", np.asarray(phantom.hu[6].reshape(shape), order=order))
    np.testing.assert_array_equal(read_one("npz", tmp_path).hu[0], phantom.hu[6])


def test_npz_slices_are_ordered_by_number_and_a_missing_one_leaves_a_gap(tmp_path, phantom):
    for index in (11, 9, 10, 2, 1):
        write_npz(tmp_path / "series" / str(index), phantom.hu[index])
    scan = read_one("npz", tmp_path)
    np.testing.assert_array_equal(scan.hu, phantom.hu[[1, 2, 9, 10, 11]])
    assert scan.positions_mm == pytest.approx([0, 5, 40, 45, 50])
    assert [any("6 slices are missing" in note for note in notes) for notes in scan.repairs] == [
        *(False, False, True, False, False)
    ]


def test_npz_flat_samples_are_patients_of_their_own_and_series_in_two_splits_are_not(tmp_path, phantom):
    for split in ("train", "validation"):
        write_npz(tmp_path / split / "sample_00001", phantom.hu[len(split) - 3])
        write_series(tmp_path / split / "2.25.7", phantom.hu[2 : 2 + len(split)])
    scans = read_all("npz", tmp_path)
    samples = [scans[f"{split}/sample_00001"] for split in ("train", "validation")]
    series = [scans[f"{split}/2.25.7"] for split in ("train", "validation")]
    assert [scan.split for scan in samples] == [scan.split for scan in series] == ["train", "val"]
    assert samples[0].patient_id != samples[1].patient_id
    assert series[0].patient_id == series[1].patient_id


def test_npz_names_a_patient_that_metadata_names_and_ignores_damaged_metadata(tmp_path, phantom):
    for name, content in {
        "a": '{"patient_id": "X"}',
        "b": '{"PatientID": "X"}',
        "c": "{",
        "d": "[1]",
    }.items():
        write_npz(tmp_path / name, phantom.hu[ord(name) % 7 + 3])
        (tmp_path / name / "metadata.json").write_text(content)
    ids = {case: scan.patient_id for case, scan in read_all("npz", tmp_path).items()}
    assert ids["a"] == ids["b"] and len(set(ids.values())) == 3
    assert "X" not in ids["a"]


def test_npz_of_the_same_name_in_two_sets_are_two_series(tmp_path, phantom):
    for folder, index in (("one", 5), ("two", 6)):
        write_npz(tmp_path / folder / "sample_00001", phantom.hu[index])
    (one,), (two,) = (discover_npz(tmp_path / folder)[0] for folder in ("one", "two"))
    assert one.series_uid != two.series_uid
    assert discover_npz(tmp_path / "one")[0][0] == one


@pytest.mark.parametrize(("scale", "dtype"), [(255, np.uint8), (255, np.float32), (1, np.float32)])
def test_npz_of_grey_levels_is_flagged_as_windowed_and_kept_from_0_to_255(tmp_path, phantom, scale, dtype):
    grey = np.rint(window_hu(phantom.hu[6].astype(float), 40, 80) * 255)
    write_npz(tmp_path / "a", (grey * (scale / 255)).astype(dtype))
    scan = read_one("npz", tmp_path)
    np.testing.assert_array_equal(scan.hu[0], grey)
    assert scan.intensity == "windowed" and np.isnan(scan.noise_hu)
    assert any("scaled" in note for note in scan.repairs[0]) == (scale == 1)


def test_npz_of_one_slice_of_air_and_bone_is_hu_as_at_the_vertex(tmp_path):
    hu = np.where(np.hypot(*(np.mgrid[:SIZE, :SIZE] - 20)) < 6, 800, -1000).astype(np.int16)
    write_npz(tmp_path / "a", hu)
    scan = read_one("npz", tmp_path)
    np.testing.assert_array_equal(scan.hu[0], hu)
    assert scan.intensity == "hu"


@pytest.mark.parametrize("outside", [-2000, -3024])
def test_npz_padding_becomes_air_and_is_counted(tmp_path, phantom, outside):
    hu = phantom.hu[6].copy()
    hu[:3] = outside
    write_npz(tmp_path / "a", hu)
    scan = read_one("npz", tmp_path)
    assert scan.padding_count == 3 * (SIZE + 4)
    assert (scan.hu[0, :3] == AIR_HU).all()
    np.testing.assert_array_equal(scan.hu[0, 3:], phantom.hu[6, 3:])


def with_nan(hu):
    return np.where(np.arange(hu.size).reshape(hu.shape) == 77, np.nan, hu)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (with_nan, "not_finite", "1 values"),
        (lambda hu: hu.astype(np.float32) / np.inf * 0 + np.inf, "not_finite", "values that are not finite"),
        (lambda hu: hu / 1000, "not_hu", "not HU"),  # -1..1
        (lambda hu: hu + 1024, "not_hu", "not HU"),
        (lambda hu: hu * 0 + 7, "not_hu", "not HU"),  # one grey value
        (lambda hu: hu > 0, "dtype", "True and False"),
    ],
)
def test_read_npz_of_values_that_are_neither_hu_nor_grey_says_why(tmp_path, phantom, change, code, words):
    write_npz(tmp_path / "a", change(phantom.hu[6]))
    error = read_error("npz", tmp_path)
    assert error.code == code and words in str(error)


@pytest.mark.parametrize(("offset", "top"), [(0.5, 3), (1024, 3071)])
def test_read_npz_with_assumed_hu_takes_values_as_they_are(tmp_path, phantom, offset, top):
    hu = phantom.hu[6:8].astype(float) * (top / 3071) + offset
    write_series(tmp_path / "a", hu)
    scan = refused_unless_assumed("npz", tmp_path, ASSUMED_HU)
    np.testing.assert_array_equal(scan.hu, np.rint(hu).clip(AIR_HU, 3071))


def test_read_npz_with_assumed_hu_takes_grey_levels_as_hu_and_plausible_values_without_a_word(
    tmp_path, phantom
):
    grey = np.rint(window_hu(phantom.hu[6:8].astype(float), 40, 80) * 255)
    write_series(tmp_path / "grey", grey)
    write_series(tmp_path / "hu", phantom.hu)
    notes = {}
    for job in discover_npz(tmp_path)[0]:
        scan = ARRAY_READERS["npz"].read(job._replace(assume_hu=True))
        assert scan.intensity == "hu"
        notes[job.case] = {ASSUMED_HU in notes for notes in scan.repairs}
    assert notes == {"grey": {True}, "hu": {False}}


def npz_of(header: dict, payload: bytes = b"", version=(1, 0)) -> bytes:
    """The bytes of an npz whose array has this header."""
    member = io.BytesIO()
    write = (
        np.lib.format.write_array_header_1_0 if version == (1, 0) else np.lib.format.write_array_header_2_0
    )
    write(member, header)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", member.getvalue() + payload)
    return packed.getvalue()


HUGE = {"descr": "<i2", "fortran_order": False, "shape": (65535, 65535)}
CLAIM = {"descr": "<f8", "fortran_order": False, "shape": (4000, 4000)}


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda _: b"", "damaged"),
        (lambda _: b"<html>404</html>", "damaged"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "damaged"),
        (lambda data: data[: len(data) // 2], "damaged"),
        (lambda _: npz_of(HUGE), "shape"),
        (lambda _: npz_of(CLAIM), "truncated"),
        (lambda _: npz_of(CLAIM | {"shape": (5,)}), "shape"),
        (lambda _: npz_of(CLAIM | {"shape": (0, 5)}), "shape"),
        (lambda _: npz_of(CLAIM | {"shape": (3, 5, 5)}, bytes(600)), "shape"),
        (lambda _: npz_of(CLAIM | {"descr": "<c16", "shape": (5, 5)}, bytes(400)), "dtype"),
        (lambda _: npz_of(CLAIM | {"descr": "<U4", "shape": (5, 5)}, bytes(400)), "dtype"),
        (lambda _: npz_of(CLAIM | {"descr": [("a", "<i2")], "shape": (5, 5)}, bytes(50)), "dtype"),
        (lambda _: npz_of(CLAIM | {"descr": "|O", "shape": (5, 5)}, b"x"), "objects"),
        (lambda _: npz_of(CLAIM, bytes(4000 * 4000 * 8)), "too_large"),  # 128 MB from 125 kB
        (lambda _: npz_of(CLAIM, bytes(MAX_ARRAY_BYTES)), "too_large"),
    ],
)
def test_discover_npz_refuses_a_bad_header_by_name_before_it_unpacks_anything(tmp_path, phantom, spoil, code):
    path = write_npz(tmp_path / "bad", phantom.hu[6])
    path.write_bytes(spoil(path.read_bytes()))
    write_npz(tmp_path / "fine", phantom.hu[6])
    jobs, rejected = discover_npz(tmp_path)
    assert [job.case for job in jobs] == ["fine"]
    assert [(entry.case, entry.code) for entry in rejected] == [("bad", code)]
    assert rejected[0].file == str(path) and rejected[0].reason.isprintable()


def test_discover_npz_of_pickled_objects_runs_nothing(tmp_path, phantom):
    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "a").mkdir()
    np.savez(tmp_path / "a" / "image.npz", np.array([[Canary()]], object))
    assert codes("npz", tmp_path)["a/image.npz"] == "objects"
    assert not (tmp_path / "ran").exists()


def test_read_npz_with_a_flipped_bit_fails_on_the_checksum(tmp_path, phantom):
    path = tmp_path / "a" / "image.npz"
    path.parent.mkdir()
    np.savez(path, np.tile(phantom.hu[6], (9, 9)))  # stored as it is, so that only the CRC can tell
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert read_error("npz", tmp_path).code == "damaged"


@pytest.mark.parametrize("lie", [-100, 100])
def test_npz_in_a_zip_that_lies_about_its_size_is_refused_or_right(tmp_path, phantom, lie):
    path = write_npz(tmp_path / "a", phantom.hu[6])
    honest = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        size = archive.infolist()[0].file_size
    path.write_bytes(honest.replace(size.to_bytes(4, "little"), (size + lie).to_bytes(4, "little")))
    assert path.read_bytes() != honest
    if lie < 0:
        assert codes("npz", tmp_path)["a/image.npz"] == "damaged"  # the CRC is of the whole
    else:
        np.testing.assert_array_equal(read_one("npz", tmp_path).hu[0], phantom.hu[6])


def test_discover_npz_refuses_links_and_names_other_files_and_repeated_numbers(tmp_path, phantom):
    write_npz(tmp_path / "s" / "1", phantom.hu[5])
    write_npz(tmp_path / "s" / "001", phantom.hu[6])
    (tmp_path / "s" / "3").mkdir()
    (tmp_path / "s" / "3" / "image.npz").symlink_to(tmp_path / "s" / "1" / "image.npz")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".DS_Store").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    assert codes("npz", tmp_path) == {
        "s/1/image.npz": "duplicate",
        "s/3/image.npz": "not_regular",
        "notes.txt": "other_file",
        "pipe": "not_regular",
    }


def test_read_npz_of_slices_with_different_shapes_names_the_one_that_differs(tmp_path, phantom):
    write_npz(tmp_path / "s" / "1", phantom.hu[5])
    second = write_npz(tmp_path / "s" / "2", phantom.hu[6, 1:])
    error = read_error("npz", tmp_path)
    assert error.code == "shape" and error.file == str(second)


def test_npz_mask_of_some_slices_only_is_unknown_and_an_empty_one_is_known(tmp_path, phantom):
    nothing = np.zeros((SIZE, SIZE + 4), np.uint8)
    write_series(tmp_path / "a", phantom.hu[:3], np.stack([nothing] * 3))
    write_series(tmp_path / "b", phantom.hu[3:6], np.stack([nothing] * 3))
    (tmp_path / "b" / "00001" / "mask.npz").unlink()
    scans = read_all("npz", tmp_path)
    assert scans["a"].mask.shape == (3, SIZE, SIZE + 4) and not scans["a"].mask.any()
    assert scans["b"].mask is None
    assert all("mask.npz of 1 slices is missing: mask unknown" in notes for notes in scans["b"].repairs)


@pytest.mark.parametrize(
    "mask", [np.full((SIZE, SIZE + 4), 2), np.zeros((SIZE, SIZE)), np.full((SIZE, SIZE + 4), 0.5)]
)
def test_read_npz_with_a_mask_of_other_values_or_shape_says_so(tmp_path, phantom, mask):
    write_npz(tmp_path / "a", phantom.hu[6], mask=mask)
    error = read_error("npz", tmp_path)
    assert error.code == "mask" and error.file.endswith("mask.npz")


def test_load_array_of_the_largest_empty_mask_is_no_bomb(tmp_path):
    np.savez_compressed(tmp_path / "mask.npz", np.zeros((4096, 4096), np.uint8))  # a thousandfold
    assert not load_array(tmp_path / "mask.npz").any()


def test_given_split_is_the_first_folder_that_names_one():
    assert given_split(Path("a/Validation/b")) == ("val", Path("a/b"))
    assert given_split(Path("testing/b")) == (None, Path("testing/b"))


def test_fingerprint_differs_where_only_the_middle_does(tmp_path):
    for name, byte in (("a", 0), ("b", 1)):
        data = bytearray(100_000)
        data[50_000] = byte
        (tmp_path / name).write_bytes(data)
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    assert fingerprint(tmp_path / "a") == f"100000-{zlib.crc32(bytes(4096))}"


# ---------------------------------------------------------------- pairs


def write_pair(folder: Path, hu: np.ndarray, doses=(10, 25), dtype=np.float32) -> dict[str, np.ndarray]:
    """NDCT_hu.npy and a noisier partner per dose; returns the partners by fraction."""
    folder.mkdir(parents=True)
    np.save(folder / "NDCT_hu.npy", hu.astype(dtype))
    low = {}
    for percent in doses:
        noise = np.random.default_rng(percent).normal(0, 100 / percent, hu.shape)
        low[f"{percent / 100:g}"] = noisy = np.rint(hu + noise)
        np.save(folder / f"LDCT_{percent}_hu.npy", noisy.astype(dtype))
    return low


def test_pairs_come_back_with_every_dose_by_its_fraction(tmp_path, phantom):
    low = write_pair(tmp_path / "train" / "sample_00042", phantom.hu[6], doses=(70, 5, 25, 10))
    scan = read_one("pairs", tmp_path)
    np.testing.assert_array_equal(scan.hu, phantom.hu[6:7])
    assert list(scan.low) == ["0.05", "0.1", "0.25", "0.7"] and set(low) == set(scan.low)
    for fraction, volume in scan.low.items():
        assert volume.dtype == np.int16
        np.testing.assert_array_equal(volume[0], low[fraction].clip(-1024, 3071))
    assert (scan.source, scan.split, scan.intensity) == ("pairs", "train", "hu")
    assert any("patient unknown" in note for note in scan.repairs[0])
    assert sum("assumed" in note for note in scan.repairs[0]) == 2


def test_pairs_with_named_patients_keep_them_together(tmp_path, phantom):
    for number, patient in enumerate(["L067", "L067", "L096"]):
        write_pair(tmp_path / f"sample_{number:05d}", phantom.hu[4 + number])
        (tmp_path / f"sample_{number:05d}" / "metadata.json").write_text(json.dumps({"patient_id": patient}))
    ids = [scan.patient_id for scan in read_all("pairs", tmp_path).values()]
    assert ids[0] == ids[1] != ids[2]


def test_discover_pairs_rejects_a_sample_without_its_full_dose_and_repeated_or_unknown_doses(
    tmp_path, phantom
):
    for name in ("a", "b"):
        write_pair(tmp_path / name, phantom.hu[6])
    (tmp_path / "a" / "NDCT_hu.npy").unlink()
    for name in ("LDCT_010_hu", "LDCT_100_hu", "LDCT_0_hu", "FBP"):
        np.save(tmp_path / "b" / f"{name}.npy", phantom.hu[6])
    jobs, _ = discover_pairs(tmp_path)
    assert [job.case for job in jobs] == ["b"]
    found = codes("pairs", tmp_path)
    assert found.pop("a/NDCT_hu.npy") == "no_full_dose"
    assert sorted(found.values()) == ["duplicate", "other_file", "other_file", "other_file"]


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("LDCT_10_hu", lambda hu: hu[1:], "shape"),
        ("LDCT_10_hu", with_nan, "not_finite"),
        ("LDCT_10_hu", lambda hu: (hu + 1000) / 2000, "not_hu"),
        ("NDCT_hu", lambda hu: hu / 1000, "not_hu"),
    ],
)
def test_read_pairs_names_the_partner_that_does_not_fit(tmp_path, phantom, name, change, code):
    write_pair(tmp_path / "sample_00001", phantom.hu[6])
    np.save(tmp_path / "sample_00001" / f"{name}.npy", change(phantom.hu[6].astype(np.float32)))
    error = read_error("pairs", tmp_path)
    assert error.code == code
    assert code == "shape" or Path(error.file).stem == name


def test_read_pairs_with_assumed_hu_takes_both_doses_as_they_are(tmp_path, phantom):
    write_pair(tmp_path / "sample_00001", phantom.hu[6], doses=(10,))
    np.save(tmp_path / "sample_00001" / "LDCT_10_hu.npy", phantom.hu[6].astype(np.float32) + 1024)
    scan = refused_unless_assumed("pairs", tmp_path, ASSUMED_HU)
    np.testing.assert_array_equal(scan.hu[0], phantom.hu[6])
    np.testing.assert_array_equal(scan.low["0.1"][0], (phantom.hu[6] + 1024).clip(AIR_HU, 3071))


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda _: b"", "damaged"),
        (lambda data: data[:60], "damaged"),
        (lambda data: data[:-1], "truncated"),
        (lambda data: data.replace(b"), }", b"(, }"), "damaged"),  # a bracket that never closes
        (lambda data: data.replace(b"'<f4'", b"'|O' "), "objects"),
        (lambda data: data.replace(f"({SIZE}, {SIZE + 4})".encode(), b"(65535,9)"), "shape"),
    ],
)
def test_discover_pairs_refuses_a_damaged_npy(tmp_path, phantom, spoil, code):
    write_pair(tmp_path / "sample_00001", phantom.hu[6])
    path = tmp_path / "sample_00001" / "LDCT_25_hu.npy"
    path.write_bytes(spoil(path.read_bytes()))
    assert codes("pairs", tmp_path)["sample_00001/LDCT_25_hu.npy"] == code


# ---------------------------------------------------------------- lodopab


def lodopab_values(hu: np.ndarray, whole: bool = False) -> np.ndarray:
    """(S, N, N) HU as the set stores them: transposed, made continuous, attenuation over 81.35858 per m."""
    rng = np.random.default_rng(0)
    added = 0 if whole else rng.uniform(0.002, 0.998, hu.shape)
    mu = 20 + (hu.transpose(0, 2, 1) + added) * (20 - 0.02) / 1000
    return (mu / 81.35858).clip(0, 1).astype(np.float32)


def write_lodopab(folder: Path, name: str, values: np.ndarray, **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / name, "w") as file:
        file.create_dataset("data", data=values, **({"chunks": True} | options))
    return folder / name


@pytest.mark.parametrize("whole", [False, True])
def test_lodopab_slices_come_back_exactly_upright_and_in_their_split(tmp_path, square, whole):
    write_lodopab(tmp_path, "ground_truth_validation_000.hdf5", lodopab_values(square.hu, whole))
    scans = list(read_all("lodopab", tmp_path).values())
    assert len(scans) == 5
    for scan, hu in zip(scans, square.hu, strict=True):
        np.testing.assert_array_equal(scan.hu[0], hu.clip(-1001, 3071))  # attenuation ends at zero
        assert (scan.split, scan.source, scan.intensity) == ("val", "lodopab", "hu")
        assert scan.spacing_mm == pytest.approx((5, 260 / SIZE, 260 / SIZE))
        assert any("patient unknown" in note for note in scan.repairs[0])
    assert len({scan.patient_id for scan in scans}) == 1


def test_lodopab_patients_come_from_the_file_beside_it_by_place_in_the_split(tmp_path, square):
    values = lodopab_values(square.hu)
    write_lodopab(tmp_path, "ground_truth_test_001.hdf5", values)
    ids = [0] * 128 + [7, 8, 7, 9, 9]
    (tmp_path / "patient_ids_rand_test.csv").write_text("\n".join(map(str, ids)))
    patients = [scan.patient_id for scan in read_all("lodopab", tmp_path).values()]
    assert [patients.index(patient) for patient in patients] == [0, 1, 0, 3, 3]


def test_discover_lodopab_leaves_out_the_zeros_that_fill_the_last_file(tmp_path, square):
    values = np.concatenate([lodopab_values(square.hu), np.zeros((3, SIZE, SIZE), np.float32)])
    write_lodopab(tmp_path, "ground_truth_train_279.hdf5", values)
    write_lodopab(tmp_path, "observation_train_279.hdf5", values)
    (tmp_path / "patient_ids_rand_train.csv").write_text("not a number")
    jobs, _ = discover_lodopab(tmp_path)
    assert len(jobs) == 5
    assert codes("lodopab", tmp_path) == {
        "ground_truth_train_279.hdf5": "filler",
        "observation_train_279.hdf5": "other_file",
        "patient_ids_rand_train.csv": "patients",
    }


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "damaged"),
        (lambda path: path.write_text("<html>"), "damaged"),
    ],
)
def test_discover_lodopab_refuses_a_damaged_file(tmp_path, square, spoil, code):
    spoil(write_lodopab(tmp_path, "ground_truth_test_000.hdf5", lodopab_values(square.hu)))
    assert codes("lodopab", tmp_path)["ground_truth_test_000.hdf5"] == code


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda file: file.create_group("data"), "damaged"),
        (lambda file: file.create_dataset("values", data=np.zeros((2, 4, 4))), "damaged"),
        (lambda file: file.create_dataset("data", data=np.zeros((2, 4, 5))), "shape"),
        (lambda file: file.create_dataset("data", data=np.zeros((2, 4, 4), np.int16)), "shape"),
        (lambda file: file.create_dataset("data", (2, 65535, 65535), np.float32, chunks=(1, 9, 9)), "shape"),
        (
            lambda file: file.create_dataset("data", (99, 4000, 4000), "f4", chunks=(50, 4000, 4000)),
            "too_large",
        ),
        (
            lambda file: file.create_dataset("data", (2, 4, 4), "f4", external=[("/etc/passwd", 0, 128)]),
            "damaged",
        ),
        (lambda file: file.__setitem__("data", h5py.ExternalLink("other.hdf5", "data")), "damaged"),
        (lambda file: file.__setitem__("data", h5py.SoftLink("/data")), "damaged"),
    ],
)
def test_discover_lodopab_refuses_a_dataset_that_is_not_the_sets(tmp_path, make, code):
    with h5py.File(tmp_path / "ground_truth_test_000.hdf5", "w") as file:
        make(file)
    assert codes("lodopab", tmp_path)["ground_truth_test_000.hdf5"] == code


@pytest.mark.parametrize("value", [np.nan, -0.01, 1.01])
def test_read_lodopab_outside_its_range_names_the_slice(tmp_path, square, value):
    values = lodopab_values(square.hu[:1])
    values[0, 3, 4] = value
    write_lodopab(tmp_path, "ground_truth_test_000.hdf5", values)
    error = read_error("lodopab", tmp_path)
    assert error.code == "not_hu" and "slice 0" in str(error)


def test_lodopab_reads_slice_by_slice(tmp_path, square, monkeypatch):
    write_lodopab(tmp_path, "ground_truth_test_000.hdf5", lodopab_values(square.hu))
    asked = []
    plain = h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda data, key: asked.append(key) or plain(data, key))
    read_all("lodopab", tmp_path)
    assert asked == [4, 0, 1, 2, 3, 4]


def test_read_lodopab_with_assumed_hu_takes_a_slice_without_air(tmp_path, square):
    write_lodopab(tmp_path, "ground_truth_test_000.hdf5", lodopab_values(square.hu[2:3].clip(200)))
    scan = refused_unless_assumed("lodopab", tmp_path, ASSUMED_HU)
    np.testing.assert_array_equal(scan.hu[0], square.hu[2].clip(200))


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("source", ARRAY_READERS)
def test_discover_of_an_empty_or_missing_folder_says_so(tmp_path, source):
    discover = ARRAY_READERS[source].discover
    jobs, rejected = discover(tmp_path)
    assert not jobs and [entry.code for entry in rejected] == ["no_ct"]
    with pytest.raises(ScanError, match="no such folder"):
        discover(tmp_path / "nowhere")


def test_names_that_are_not_utf8_or_path_like_are_read_and_never_used_as_paths(tmp_path, phantom):
    name = os.fsdecode(b"..\xff $(x)\n")
    write_npz(tmp_path / name, phantom.hu[6])
    write_pair(tmp_path / "b" / name, phantom.hu[6])
    jobs = discover_npz(tmp_path)[0] + discover_pairs(tmp_path)[0]
    assert len(jobs) == 2
    for job in jobs:
        scan = ARRAY_READERS[job.source].read(job)
        assert job.case.isprintable() and "\\xff" in job.case
        assert all(uid.isalnum() for uid in (scan.series_uid, scan.patient_id, scan.study_uid))


@pytest.mark.parametrize("source", ARRAY_READERS)
def test_written_scan_holds_what_was_read(tmp_path, square, source):
    raw = tmp_path / "raw"
    if source == "npz":
        write_series(raw / "val" / "2.25.7", square.hu, square.mask)
    elif source == "pairs":
        write_pair(raw / "val" / "sample_00001", square.hu[2])
    else:
        write_lodopab(raw, "ground_truth_validation_000.hdf5", lodopab_values(square.hu[2:3]))
    scan = read_one(source, raw)
    folder = write_scan(scan, tmp_path / "out")
    metadata = read_metadata(folder)
    assert (metadata["source"], metadata["split"], metadata["intensity"]) == (source, "val", "hu")
    assert metadata["low_doses"] == (["0.1", "0.25"] if source == "pairs" else [])
    assert [entry["repairs"] for entry in metadata["slices"]] == scan.repairs
    kinds = {"image": scan.hu, "mask": scan.mask} | {f"low_{name}": low for name, low in scan.low.items()}
    for kind, volume in kinds.items():
        if volume is not None:
            np.testing.assert_array_equal(read_slices(folder, kind, len(scan.hu)), volume)
    assert folder.name == scan.series_uid and str(tmp_path) not in json.dumps(metadata)
