"""How slices lie on disk: each in an npz of the prepared layout, or all of a split in one file of a pack.

Everything is deflated by ISA-L, which writes what zlib writes in a quarter of the time and reads what zlib
wrote in half of it: numpy and any zip program open the npz files."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from stage import InputError
from volumes import MAX_SIDE_PX

# Levels 0 to 3 of ISA-L: all give about the same size on CT. 3 writes a fifth slower than 2 and is read a
# fifth faster; on the differences between pixels, which packs hold, it only writes slower
NPZ_LEVEL, PACK_LEVEL = 3, 2
RAW_DEFLATE = -15  # no header of zlib around the data

# ---------------------------------------------------------------- one slice, one npz

MEMBER = b"arr_0.npy"
# PKWARE's APPNOTE, 4.3.7, 4.3.12 and 4.3.16
LOCAL, CENTRAL, END = struct.Struct("<4s5H3L2H"), struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s4H2LH")
ZIP_2_0, DEFLATED, YEAR_1980 = 20, 8, 0x21  # the format's version, a method, and its first day
MAX_SLICE_BYTES = MAX_SIDE_PX**2 * 8 + 4096  # the largest CT slice in int64, and its header: no bomb
NPY_1_0 = b"\x93NUMPY\1\0"
NPY_HEADER = struct.Struct("<8sH")  # the magic, and how many bytes of header follow


def write_npz(path: Path, array: np.ndarray) -> None:
    """Write one array as np.savez_compressed does, under arr_0; the same array gives the same bytes."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    plain = file.getbuffer()
    packed = isal_zlib.compress(plain, NPZ_LEVEL, RAW_DEFLATE)
    facts = (ZIP_2_0, 0, DEFLATED, 0, YEAR_1980, isal_zlib.crc32(plain), len(packed), len(plain), len(MEMBER))
    local = LOCAL.pack(b"PK\3\4", *facts, 0) + MEMBER
    central = CENTRAL.pack(b"PK\1\2", ZIP_2_0, *facts, 0, 0, 0, 0, 0, 0) + MEMBER
    end = END.pack(b"PK\5\6", 0, 0, 1, 1, len(central), len(local) + len(packed), 0)
    path.write_bytes(b"".join((local, packed, central, end)))


def read_npz(path: Path) -> np.ndarray:
    """arr_0 of an npz: (H, W) whole numbers, read-only.

    Raises InputError if the file is missing or damaged, if its checksum is wrong, or if it holds, or would
    unpack to, anything else than one slice."""
    remedy = "delete the series and prepare it again"
    try:
        if path.stat().st_size > MAX_SLICE_BYTES:
            raise ValueError("larger than any slice")
        array = _read_own(path.read_bytes())
        if array is None:
            array = _read_any(path)
    except FileNotFoundError:
        raise InputError(f"{path}: not found ({remedy})") from None
    except Exception as error:  # noqa: BLE001 a damaged zip raises half a dozen types
        raise InputError(f"{path}: unreadable, {type(error).__name__} ({remedy})") from None
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise InputError(f"{path}: holds {array.shape} {array.dtype}, not one slice ({remedy})")
    return array


def _read_own(data: bytes) -> np.ndarray | None:
    """The array of a zip that begins as write_npz, or zipfile, writes it; None for any other.

    Takes a third of the time of np.load. Raises ValueError, or isal_zlib.error, if it is damaged."""
    if len(data) < LOCAL.size + len(MEMBER):
        return None
    magic, _, flags, method, _, _, crc, packed, size, name_length, extra = LOCAL.unpack_from(data)
    start = LOCAL.size + name_length
    own = (magic, flags, method, extra, data[LOCAL.size : start]) == (b"PK\3\4", 0, DEFLATED, 0, MEMBER)
    if not own or size > MAX_SLICE_BYTES:
        return None
    # No more than was promised, whatever the data would unpack to
    plain = isal_zlib.decompressobj(RAW_DEFLATE).decompress(memoryview(data)[start : start + packed], size)
    if len(plain) != size or isal_zlib.crc32(plain) != crc:
        raise ValueError("its checksum is wrong")
    magic, length = NPY_HEADER.unpack_from(plain)
    if magic != NPY_1_0:
        return None
    shape, fortran, dtype = _npy_header(plain[: NPY_HEADER.size + length])
    values = np.frombuffer(plain, dtype, offset=NPY_HEADER.size + length)
    return values.reshape(shape, order="F" if fortran else "C")


@functools.lru_cache(maxsize=64)  # all slices of a series have the same, and parsing takes as long as a crc
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    stream = io.BytesIO(header)
    np.lib.format.read_magic(stream)
    return np.lib.format.read_array_header_1_0(stream)


def _read_any(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        if archive.zip.getinfo(MEMBER.decode()).file_size > MAX_SLICE_BYTES:
            raise ValueError("unpacks to more than any slice")
        array = archive["arr_0"]
    if not isinstance(array, np.ndarray):
        raise ValueError("not an array")
    return array


# ---------------------------------------------------------------- all slices, one file

TABLE = np.dtype([("start", "<u8"), ("bytes", "<u4"), ("crc32", "<u4")])  # of each slice as it is packed
RAW, PACKED, PLACES = ".npy", ".slices", ".table.npy"  # endings


@contextlib.contextmanager
def slices_writer(
    stem: Path, shape: tuple[int, int, int], dtype: np.dtype, *, compress: bool
) -> Iterator[Callable[[np.ndarray], None]]:
    """write(slices) appends (S, H, W) to a new file for shape[0] slices, on the disk when the block ends.

    Raw they are <stem>.npy, compressed <stem>.slices and <stem>.table.npy."""
    table = np.zeros(shape[0] if compress else 0, TABLE)
    done = 0
    with stem.with_name(stem.name + (PACKED if compress else RAW)).open("xb") as file:

        def write_packed(slices: np.ndarray) -> None:
            nonlocal done
            for image in slices:
                packed = pack_slice(image)
                table[done] = file.tell(), len(packed), isal_zlib.crc32(packed)
                file.write(packed)
                done += 1

        if compress:
            yield write_packed
        else:
            facts = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, facts | {"shape": shape})
            yield lambda slices: file.write(np.ascontiguousarray(slices))
        file.flush()
        os.fsync(file.fileno())
    if compress:
        with stem.with_name(stem.name + PLACES).open("xb") as file:
            np.save(file, table)
            file.flush()
            os.fsync(file.fileno())


def open_slices(
    stem: Path, shape: tuple[int, int, int], dtype: np.dtype, *, compress: bool
) -> np.ndarray | PackedSlices:
    """The slices that slices_writer wrote, memory-mapped, nothing of them read yet.

    Raises InputError if a file is missing, cut off, or holds something else."""
    dtype = np.dtype(dtype)
    with _damage(stem.parent, stem.name):
        if compress:
            return PackedSlices(stem, shape, dtype)
        slices = np.load(stem.with_name(stem.name + RAW), mmap_mode="r", allow_pickle=False)
        if (slices.shape, slices.dtype) != (shape, dtype):
            raise ValueError("another shape or type")
        return slices


@contextlib.contextmanager
def _damage(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, isal_zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{folder}: {what} is damaged, {reason} (delete the folder, run again)") from None


class PackedSlices:
    """(N, H, W) whole numbers, compressed slice by slice, read like a memory-mapped array.

    slices[3] is one slice; slices[2:9], slices[[5, 1]] and slices[wanted], N bools, are new arrays; and
    numpy.asarray reads all. Reading raises InputError for a slice whose checksum is wrong."""

    ndim = 3

    def __init__(self, stem: Path, shape: tuple[int, int, int], dtype: np.dtype):
        self.shape, self.dtype = tuple(shape), dtype
        self._stem = stem
        self._table = np.load(stem.with_name(stem.name + PLACES), allow_pickle=False)
        self._packed = np.memmap(stem.with_name(stem.name + PACKED), np.uint8, "r")
        last = self._table[-1]
        if (self._table.shape, self._table.dtype) != (self.shape[:1], TABLE):
            raise ValueError("another table")
        if last["start"] + last["bytes"] != len(self._packed):
            raise ValueError("cut off")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        rows = np.arange(len(self))[key]
        if rows.ndim == 0:
            return self._read(rows)
        slices = np.empty((rows.size, *self.shape[1:]), self.dtype)
        for place, row in enumerate(rows.flat):
            slices[place] = self._read(row)
        return slices.reshape(*rows.shape, *self.shape[1:])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("compressed slices have to be copied")
        return self[:].astype(dtype or self.dtype, copy=False)

    def _read(self, row: int) -> np.ndarray:
        start, size, crc = self._table[row].tolist()
        packed = self._packed[start : start + size]
        with _damage(self._stem.parent, f"slice {row} of {self._stem.name}"):
            if isal_zlib.crc32(packed) != crc:
                raise ValueError("its checksum is wrong")
            return unpack_slice(packed, self.shape[1:], self.dtype)


def pack_slice(image: np.ndarray) -> bytes:
    """Compress (H, W) whole numbers without loss.

    Kept is by how much a pixel differs from the one before it, folded so that small is small whatever its
    sign, all low bytes before all high ones: the second are nearly all 0. It wraps around: nothing overflows.
    """
    bits = 8 * image.itemsize
    change = np.diff(image.ravel(), prepend=image.dtype.type(0)).view(f"i{image.itemsize}")
    folded = (change << 1 ^ change >> bits - 1).view(f"u{image.itemsize}")
    planes = b"".join((folded >> shift).astype(np.uint8) for shift in range(0, bits, 8))
    return isal_zlib.compress(planes, PACK_LEVEL, RAW_DEFLATE)


def unpack_slice(packed: bytes | np.ndarray, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """The inverse of pack_slice: (H, W) of shape and dtype. Raises ValueError for anything else."""
    size = math.prod(shape) * dtype.itemsize
    plain = isal_zlib.decompressobj(RAW_DEFLATE).decompress(packed, size)
    if len(plain) != size:
        raise ValueError("incomplete")
    *low, high = np.frombuffer(plain, np.uint8).reshape(dtype.itemsize, -1)
    folded = high.astype(f"u{dtype.itemsize}")
    for plane in reversed(low):
        folded <<= 8
        folded |= plane
    change = (folded >> 1 ^ -(folded & 1)).view(dtype)
    return change.cumsum(dtype=dtype).reshape(shape)
