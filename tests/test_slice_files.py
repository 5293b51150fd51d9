"""Slices on disk: what is written comes back, others' files are read, and damage is named and never read."""

from __future__ import annotations

import io
import zipfile
import zlib

import numpy as np
import pytest

import slice_files
from phantom import generate_phantom
from slice_files import (
    PackedSlices,
    open_slices,
    pack_slice,
    read_npz,
    slices_writer,
    unpack_slice,
    write_npz,
)
from stage import InputError

LIMITS = {np.int16: (-32768, 32767), np.uint8: (0, 255), np.int32: (-(2**31), 2**31 - 1)}


def extremes(dtype, shape=(7, 5)) -> np.ndarray:
    """The lowest and the highest value in turn, and everything between: whatever could overflow does."""
    low, high = LIMITS[dtype]
    image = np.random.default_rng(0).integers(low, high, shape, dtype, endpoint=True)
    image.flat[::2], image.flat[1::4] = low, high
    return image


@pytest.fixture(scope="module")
def head() -> np.ndarray:
    return generate_phantom(3, size=(90, 70), slices=6, lesions=[]).hu.clip(-1024, 3071).astype(np.int16)


# ---------------------------------------------------------------- one slice, one npz


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_comes_back_through_us_numpy_and_zip(tmp_path, dtype, order):
    image = np.asarray(extremes(dtype), order=order)
    write_npz(tmp_path / "a.npz", image)
    with np.load(tmp_path / "a.npz") as archive:
        assert archive.files == ["arr_0"]
        found = [archive["arr_0"], read_npz(tmp_path / "a.npz")]
    for array in found:
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, image)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None


def test_npz_of_the_same_slice_has_the_same_bytes(tmp_path, head):
    for name in ("a", "b"):
        write_npz(tmp_path / name, head[2])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def zipped(method: int, **options):
    def write(path, image):
        with zipfile.ZipFile(path, "w", method, **options) as archive, archive.open("arr_0.npy", "w") as file:
            np.lib.format.write_array(file, image)

    return write


@pytest.mark.parametrize(
    "write",
    [
        np.savez,
        np.savez_compressed,
        zipped(zipfile.ZIP_DEFLATED, compresslevel=1),  # as this project wrote it before ISA-L
        zipped(zipfile.ZIP_STORED),
        zipped(zipfile.ZIP_BZIP2),
        zipped(zipfile.ZIP_LZMA),
        lambda path, image: np.savez_compressed(path, other=image[:1], arr_0=image),
    ],
)
def test_npz_that_others_wrote_is_read(tmp_path, head, write):
    write(tmp_path / "a.npz", head[2])
    np.testing.assert_array_equal(read_npz(tmp_path / "a.npz"), head[2])


def test_npz_with_a_header_of_another_version_is_read(tmp_path, head):
    file = io.BytesIO()
    np.lib.format.write_array(file, head[2], version=(2, 0))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", file.getvalue())
    np.testing.assert_array_equal(read_npz(tmp_path / "a.npz"), head[2])


def assert_unreadable(path) -> None:
    with pytest.raises(InputError, match="delete the series and prepare it again") as caught:
        read_npz(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [write_npz, np.savez, np.savez_compressed])
def test_npz_with_any_flipped_bit_or_cut_is_refused_or_read_right(tmp_path, head, write):
    """Right, because the directory at the end of our own files, and dates, matter to nobody."""
    write(tmp_path / "a.npz", head[2])
    good, file = (tmp_path / "a.npz").read_bytes(), tmp_path / "b.npz"
    refused = 0
    for place in range(0, len(good), 23 if len(good) < 8000 else 137):
        for damaged in (good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :], good[:place]):
            file.write_bytes(damaged)
            try:
                np.testing.assert_array_equal(read_npz(file), head[2])
            except InputError:
                refused += 1
    assert refused > 0.9 * len(range(0, len(good), 23 if len(good) < 8000 else 137))


def test_npz_whose_values_were_changed_but_not_its_checksum_is_refused(tmp_path, head):
    write_npz(tmp_path / "a.npz", head[2])
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[14] ^= 1  # of the checksum
    (tmp_path / "a.npz").write_bytes(data)
    assert_unreadable(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 4, 5), np.int16),
        np.zeros(5, np.int16),
        np.zeros((3, 4)),
        np.zeros((3, 4), bool),
        np.array([["a"]]),
    ],
)
def test_npz_of_anything_but_a_slice_of_whole_numbers_is_refused(tmp_path, array):
    write_npz(tmp_path / "a.npz", array)
    assert_unreadable(tmp_path / "a.npz")


def member(shape: str, payload: bytes) -> bytes:
    header = f"{{'descr': '<i2', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + payload


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])  # our way, and numpy's
@pytest.mark.parametrize(
    "content",
    [
        member("(65535, 65535)", bytes(100)),  # claims more than it has
        member("(9, 9)", bytes(100)),
        member("(9, 9", bytes(162)),
        member("(9, __import__('os'))", bytes(162)),
        b"",
        b"no array",
    ],
)
def test_npz_whose_header_lies_is_refused(tmp_path, content, method):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("arr_0.npy", content)
    assert_unreadable(tmp_path / "a.npz")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("promised", [None, 4242])
def test_npz_bomb_is_refused_before_it_unpacks(tmp_path, monkeypatch, method, promised):
    monkeypatch.setattr(slice_files, "MAX_SLICE_BYTES", 50_000)
    content = member("(4000, 4000)", bytes(32_000_000))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("arr_0.npy", content)
    if promised is not None:  # a small size in both headers of the zip
        data = (tmp_path / "a.npz").read_bytes()
        lie = data.replace(len(content).to_bytes(4, "little"), promised.to_bytes(4, "little"))
        (tmp_path / "a.npz").write_bytes(lie)
    assert_unreadable(tmp_path / "a.npz")


def test_npz_that_is_missing_empty_or_too_large_is_named(tmp_path, monkeypatch, head):
    with pytest.raises(InputError, match=r"b\.npz: not found"):
        read_npz(tmp_path / "b.npz")
    (tmp_path / "a.npz").write_bytes(b"")
    assert_unreadable(tmp_path / "a.npz")
    write_npz(tmp_path / "a.npz", head[2])
    monkeypatch.setattr(slice_files, "MAX_SLICE_BYTES", 1000)
    assert_unreadable(tmp_path / "a.npz")


# ---------------------------------------------------------------- all slices, one file


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (31, 17)])
def test_packed_slice_comes_back_whatever_it_holds(dtype, shape):
    for image in (extremes(dtype, shape), np.zeros(shape, dtype), np.full(shape, LIMITS[dtype][0], dtype)):
        found = unpack_slice(pack_slice(image), shape, np.dtype(dtype))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, image)


def test_packed_slice_of_a_head_takes_less_than_a_general_compressor(head):
    image = head[3]
    assert len(pack_slice(image)) < len(zlib.compress(image, 9)) < image.nbytes


@pytest.fixture(params=[False, True], ids=["raw", "packed"])
def opened(request, tmp_path, head):
    """The slices of a head, written in two parts and opened again."""
    with slices_writer(tmp_path / "image", head.shape, head.dtype, compress=request.param) as write:
        write(head[:1])
        write(np.asfortranarray(head[1:]))
    return open_slices(tmp_path / "image", head.shape, head.dtype, compress=request.param)


KEYS = [
    *(0, -1, np.int64(3)),
    *(slice(None), slice(1, 4), slice(None, None, -2), slice(2, 2)),
    *([4, 1, 1], np.array([5, 0], np.uint8), range(6), [], np.array([[0, 1], [2, 3]])),
    *(np.arange(6) % 2 == 0, np.zeros(6, bool), Ellipsis),
]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_slices_on_disk_are_read_like_the_array(opened, head, key):
    if isinstance(key, list) and not key:
        key = np.array(key, int)
    found = opened[key]
    assert (found.dtype, found.shape) == (head.dtype, head[key].shape)
    np.testing.assert_array_equal(found, head[key])


def test_slices_on_disk_have_the_shape_and_the_arithmetic_of_the_array(opened, head):
    assert (len(opened), opened.shape, opened.ndim, opened.dtype) == (6, head.shape, 3, head.dtype)
    np.testing.assert_array_equal(np.asarray(opened), head)
    assert np.asarray(opened, np.float32).dtype == np.float32
    np.testing.assert_array_equal(head.astype(np.float32) - opened, np.zeros(head.shape))
    assert sum(np.array_equal(one, two) for one, two in zip(opened, head, strict=True)) == 6
    for key in (6, -7, [0, 6], np.zeros(5, bool)):
        with pytest.raises(IndexError):
            opened[key]


def test_packed_slices_are_never_handed_out_without_a_copy(tmp_path, head):
    with slices_writer(tmp_path / "image", head.shape, head.dtype, compress=True) as write:
        write(head)
    slices = open_slices(tmp_path / "image", head.shape, head.dtype, compress=True)
    assert isinstance(slices, PackedSlices)
    with pytest.raises(ValueError, match="copied"):
        np.asarray(slices, copy=False)
    slices[2][:] = 0
    np.testing.assert_array_equal(slices[2], head[2])


@pytest.mark.parametrize("compress", [False, True])
def test_slices_that_are_missing_cut_off_or_others_are_refused_when_they_are_opened(tmp_path, head, compress):
    with slices_writer(tmp_path / "image", head.shape, head.dtype, compress=compress) as write:
        write(head)
    for shape, dtype in ((head[:5].shape, np.int16), (head.shape, np.uint8)):
        if not compress or shape != head.shape:
            with pytest.raises(InputError, match=r"image is damaged, .* \(delete the folder, run again\)"):
                open_slices(tmp_path / "image", shape, dtype, compress=compress)
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        for spoil in (lambda path, data: path.write_bytes(data[:-1]), lambda path, _: path.unlink()):
            spoil(file, whole)
            with pytest.raises(InputError, match="image is damaged"):
                open_slices(tmp_path / "image", head.shape, head.dtype, compress=compress)
        file.write_bytes(whole)
    open_slices(tmp_path / "image", head.shape, head.dtype, compress=compress)


def test_packed_slice_with_a_flipped_bit_is_named_and_the_others_are_read(tmp_path, head):
    with slices_writer(tmp_path / "image", head.shape, head.dtype, compress=True) as write:
        write(head)
    file = tmp_path / "image.slices"
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    slices = open_slices(tmp_path / "image", head.shape, head.dtype, compress=True)
    with pytest.raises(InputError, match="slice 5 of image is damaged, its checksum is wrong"):
        slices[5]
    np.testing.assert_array_equal(slices[:5], head[:5])
