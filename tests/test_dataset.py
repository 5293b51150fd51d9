import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import anatomy
import dataset
import stage
from dataset import load_pack
from scans import READERS
from slice_files import write_npz
from tests.conftest import ROOT

NAN = math.nan

# ---------------------------------------------------------------- windows


@pytest.mark.parametrize(("center", "width"), [(40.0, 80.0), (40.0, 380.0), (600.0, 2800.0)])
def test_unwindow_is_the_inverse_of_window_to_a_hundredth_hu(center, width):
    hu = np.linspace(-1500, 3500, 5001)
    linear = dataset.window_hu(hu, center, width, clip=False)
    np.testing.assert_allclose(dataset.unwindow_hu(linear, center, width), hu, atol=1e-9)
    inside = (hu >= center - width / 2) & (hu <= center + width / 2)
    back = dataset.unwindow_hu(dataset.window_hu(hu, center, width), center, width)
    np.testing.assert_allclose(back[inside], hu[inside], atol=1e-9)
    assert back.min() == pytest.approx(center - width / 2)
    assert back.max() == pytest.approx(center + width / 2)


def test_window_of_a_tensor_equals_that_of_an_array():
    hu = np.array([-1024.0, 0.0, 40.0, 80.0, 200.0])
    np.testing.assert_array_equal(dataset.window_hu(torch.from_numpy(hu), 40, 80).numpy(), [0, 0, 0.5, 1, 1])


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("any_", "ischemia", "stroke"),
    [
        (1, 0, 1),
        (0, 1, 1),
        (0, 0, 0),
        (1, None, 1),
        (None, 1, 1),
        (0, None, NAN),
        (None, None, NAN),
    ],
)
def test_stroke_is_either_lesion_and_unknown_when_it_might_be(any_, ischemia, stroke):
    found = dataset.task_targets("stroke", [{"any": any_, "ischemia": ischemia}])
    np.testing.assert_array_equal(found, [[stroke]])


def test_assume_absent_fills_unknown_values_only():
    labels = [{"any": 0, "ischemia": None}, {"any": None, "ischemia": 1}, {"any": None, "ischemia": None}]
    found = dataset.task_targets("stroke", labels, ["ischemia"])
    np.testing.assert_array_equal(found, [[0], [1], [math.nan]])
    assert labels[0]["ischemia"] is None


@pytest.mark.parametrize("task", dataset.TASKS)
def test_every_task_gives_a_column_per_class_even_for_nothing(task):
    assert dataset.task_targets(task, []).shape == (0, len(dataset.TASKS[task].classes))


# ---------------------------------------------------------------- layout


@pytest.fixture
def scan():
    jobs, _ = READERS["phantom"].discover(patients=1, size=40, slices=3, seed=5)
    return READERS["phantom"].read(jobs[0])


def test_write_scan_gives_back_pixels_masks_truth_and_labels(scan, tmp_path):
    folder = dataset.write_scan(scan, tmp_path / "unsplit")
    metadata = dataset.read_metadata(folder)
    for kind, array in (("image", scan.hu), ("mask", scan.mask), ("truth", scan.truth)):
        found = dataset.read_slices(folder, kind, 3)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    assert [entry["labels"] for entry in metadata["slices"]] == scan.slice_labels
    assert metadata["labels"] == scan.labels
    assert metadata["spacing_mm"] == list(scan.spacing_mm)
    np.testing.assert_array_equal(metadata["affine"], scan.affine)
    assert dataset.all_series(tmp_path) == {folder: "unsplit"}


def test_write_scan_that_fails_leaves_no_series(scan, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dataset.write_scan(scan, tmp_path / "unsplit")
    assert dataset.all_series(tmp_path) == {}


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"PK rubbish")])
def test_read_slices_names_the_file_that_is_damaged(scan, tmp_path, damage):
    folder = dataset.write_scan(scan, tmp_path)
    damage(folder / "00001" / "image.npz")
    with pytest.raises(stage.InputError, match="00001/image.npz"):
        dataset.read_slices(folder, "image", 3)


def test_read_slices_names_the_slice_that_is_unlike_the_others(scan, tmp_path):
    folder = dataset.write_scan(scan, tmp_path)
    np.testing.assert_array_equal(dataset.read_slices(folder, "image", 2, 1), scan.hu[1:])
    for image in (scan.hu[0, 1:], scan.hu[0].astype(np.int32)):
        write_npz(folder / "00001" / "image.npz", image)
        with pytest.raises(stage.InputError, match=r"00001/image\.npz: .* its series has \(40, 40\) int16"):
            dataset.read_slices(folder, "image", 3)


def test_read_metadata_of_another_format_is_refused(scan, tmp_path):
    folder = dataset.write_scan(scan, tmp_path)
    metadata = stage.read_json(folder / "metadata.json", "")
    stage.write_json(folder / "metadata.json", metadata | {"format": 99})
    with pytest.raises(stage.InputError, match="format 99"):
        dataset.read_metadata(folder)


# ---------------------------------------------------------------- geometry


def test_fit_to_square_of_the_right_size_changes_nothing():
    volume = np.random.default_rng(0).integers(-1024, 2000, (2, 32, 32)).astype(np.int16)
    assert dataset.fit_to_square(volume, (5, 1, 1), 32, -1024) is volume


@pytest.mark.parametrize("shape", [(2, 60, 40), (1, 33, 51)])
def test_fit_to_square_keeps_the_centre_of_a_disc_and_its_area_in_mm(shape):
    spacing = (5.0, 1.0, 1.5)
    y = (np.arange(shape[1]) - (shape[1] - 1) / 2) * spacing[1]
    x = (np.arange(shape[2]) - (shape[2] - 1) / 2) * spacing[2]
    disc = np.broadcast_to((np.hypot(*np.meshgrid(y, x, indexing="ij")) < 14) * 1000, shape).astype(np.int16)
    size = 64
    found = dataset.fit_to_square(disc, spacing, size, 0)
    pixel_mm = max(shape[1] * spacing[1], shape[2] * spacing[2]) / size
    assert found.shape == (shape[0], size, size)
    assert found[0].sum() * pixel_mm**2 / 1000 == pytest.approx(disc[0].sum() * 1.5 / 1000, rel=0.03)
    rows, columns = np.nonzero(found[0] > 500)
    assert rows.mean() == pytest.approx((size - 1) / 2, abs=0.6)
    assert columns.mean() == pytest.approx((size - 1) / 2, abs=0.6)


@pytest.mark.parametrize("shape", [(4, 4), (6, 10), (64, 48), (512, 512)])
@pytest.mark.parametrize(("low", "high"), [(-1024, 3071), (0, 3), (-4095, 4095), (-32768, 32767)])
def test_fit_to_square_to_the_half_is_exactly_the_antialiased_filter_of_torch(shape, low, high):
    """All ties of rounding occur: between 0 and 3 every second sum of 64ths is near one."""
    volume = np.random.default_rng(0).integers(low, high, (3, *shape), np.int16, endpoint=True)
    size = max(shape) // 2
    found = dataset.fit_to_square(volume, (5, 1, 1), size, -1024)
    half = (shape[0] // 2, shape[1] // 2)
    expected = F.interpolate(
        torch.from_numpy(volume).double()[:, None], half, mode="bilinear", antialias=True
    )[:, 0]
    top, left = (size - half[0]) // 2, (size - half[1]) // 2
    inside = found[:, top : top + half[0], left : left + half[1]]
    np.testing.assert_array_equal(inside[:, 1:-1, 1:-1], expected.round().numpy()[:, 1:-1, 1:-1])
    assert np.abs(inside - expected.numpy()).max() <= 0.5 + 1e-3  # float32 at the border
    outside = np.ones(found.shape, bool)
    outside[:, top : top + half[0], left : left + half[1]] = False
    assert (found[outside] == -1024).all()


def test_fit_to_square_to_the_half_equals_the_general_way_bit_by_bit_at_the_border_too():
    volume = np.random.default_rng(1).integers(-1024, 3071, (9, 32, 32)).astype(np.int16)
    beyond = volume.astype(np.int32)  # the general way: only int16 is halved
    found = [dataset.fit_to_square(array, (5, 1, 1), 16, -1024) for array in (volume, beyond)]
    np.testing.assert_array_equal(*found)


def test_fit_to_square_of_a_mask_invents_no_class():
    mask = np.zeros((1, 50, 40), np.uint8)
    mask[0, 10:30, 10:20], mask[0, 30:40, 10:20] = 1, 6
    assert set(np.unique(dataset.fit_to_square(mask, (5, 1, 1), 31, 0))) == {0, 1, 6}


SCANS = [  # shape, spacing, size
    *(((61, 47), (5.0, 0.9, 0.6), 64), ((60, 52), (5.0, 0.5, 0.75), 33), ((128, 96), (2.5, 0.5, 0.5), 64)),
    *(((33, 71), (2.0, 1.1, 0.4), 128), ((40, 41), (3.0, 1.0, 1.0), 41)),
]


def one_sided(shape, spacing_mm):
    """(rows, columns) share 0..1 of each pixel in a disc near one corner, and the place of its centre."""
    _, row_mm, column_mm = spacing_mm
    centre = 0.3 * shape[0], 0.72 * shape[1]
    radius_mm = 0.16 * min(shape[0] * row_mm, shape[1] * column_mm)
    row, column = np.indices(shape)
    away = np.hypot((row - centre[0]) * row_mm, (column - centre[1]) * column_mm)
    return np.clip((radius_mm - away) / max(row_mm, column_mm) + 0.5, 0, 1), centre


@pytest.mark.parametrize(("shape", "spacing_mm", "size"), SCANS)
def test_from_square_puts_a_one_sided_blob_back_where_it_was(shape, spacing_mm, size):
    share, centre = one_sided(shape, spacing_mm)
    percent = (100 * share).astype(np.int16)[None]  # resampled as HU are
    found = dataset.fit_to_square(percent, spacing_mm, size, 0).astype(np.float32) / 100
    back = dataset.from_square(found, shape, spacing_mm)
    assert back.shape == (1, *shape) and back.dtype == np.float32
    inside = back[0] >= 0.5
    np.testing.assert_allclose(np.argwhere(inside).mean(axis=0), centre, atol=0.5)
    pixel = dataset.square_pixel_mm(shape, spacing_mm, size) / min(spacing_mm[1:])
    assert inside.sum() == pytest.approx((share >= 0.5).sum(), rel=0.08 * max(pixel, 1))


@pytest.mark.parametrize(("shape", "spacing_mm", "size"), SCANS)
def test_from_square_undoes_fit_to_square_of_a_mask(shape, spacing_mm, size):
    """Nearest pixels on the way there and back: edges move by a pixel of the coarser grid at most."""
    mask = np.zeros((2, *shape), np.uint8)
    mask[0, 4 : shape[0] // 2, 3 : shape[1] // 3], mask[1, -12:-3, -15:-4] = 3, 255
    back = dataset.from_square(dataset.fit_to_square(mask, spacing_mm, size, 0), shape, spacing_mm)
    assert back.dtype == np.uint8 and set(np.unique(back)) == {0, 3, 255}
    pixel_mm = dataset.square_pixel_mm(shape, spacing_mm, size)
    reach = [math.ceil(max(pixel_mm / mm, 1)) for mm in spacing_mm[1:]]
    for value, slice_ in ((3, 0), (255, 1)):
        places = [np.argwhere(part == value) for part in (mask[slice_], back[slice_])]
        for ends in (np.min, np.max):
            assert (abs(ends(places[0], axis=0) - ends(places[1], axis=0)) <= reach).all()


def test_from_square_keeps_classes_of_probabilities_apart():
    found = np.random.default_rng(0).random((3, 2, 48, 48), dtype=np.float32)
    back = dataset.from_square(found, (50, 40), (5.0, 1.0, 1.0))
    assert back.shape == (3, 2, 50, 40)
    for name in range(2):
        np.testing.assert_array_equal(back[:, name], dataset.from_square(found[:, name], (50, 40), (5, 1, 1)))
    assert found.min() <= back.min() and back.max() <= found.max()


# ---------------------------------------------------------------- packed cache


def test_pack_holds_every_slice_in_order_with_its_labels(split_data):
    pack = load_pack(split_data, "train", 48)
    row = 0
    for number, folder in enumerate(dataset.series_folders(split_data, "train")):
        metadata = dataset.read_metadata(folder)
        images = dataset.read_slices(folder, "image", len(metadata["slices"]))
        for index, entry in enumerate(metadata["slices"]):
            np.testing.assert_array_equal(pack.image[row], images[index])
            assert pack.labels[row] == entry["labels"]
            assert (pack.series_of[row], pack.slice_of[row]) == (number, index)
            row += 1
    assert row == len(pack)


def test_pack_is_built_once_and_again_when_the_data_change(split_data):
    load_pack(split_data, "val", 24)
    image = split_data / "cache" / "val-24" / "image.npy"
    first = image.stat().st_mtime_ns
    load_pack(split_data, "val", 24)
    assert image.stat().st_mtime_ns == first
    shutil.rmtree(dataset.series_folders(split_data, "val")[0])
    assert len(load_pack(split_data, "val", 24).series) == 1
    assert image.stat().st_mtime_ns != first


def assert_same_pack(one, two):
    for kind in ("image", "truth", "mask"):
        np.testing.assert_array_equal(np.asarray(getattr(one, kind)), np.asarray(getattr(two, kind)))
    np.testing.assert_array_equal(one.series_of, two.series_of)
    np.testing.assert_array_equal(one.pixel_mm, two.pixel_mm)
    assert (one.labels, one.series, one.checksums) == (two.labels, two.series, two.checksums)


def test_pack_compressed_has_the_values_of_the_raw_one_in_fewer_bytes(split_data):
    raw = load_pack(split_data, "train", 48)
    values = {kind: np.array(slices) for kind, slices in raw.slices.items()}
    compressed = load_pack(split_data, "train", 48, compress=True)
    assert (raw.compressed, compressed.compressed) == (False, True)
    for kind, expected in values.items():
        np.testing.assert_array_equal(np.asarray(compressed.slices[kind]), expected)
    assert (compressed.labels, compressed.checksums) == (raw.labels, raw.checksums)
    files = list((split_data / "cache" / "train-48").iterdir())
    assert sum(file.stat().st_size for file in files) < 0.6 * sum(array.nbytes for array in values.values())
    head = anatomy.MASKS["head"]
    np.testing.assert_array_equal(
        compressed.masks(head), load_pack(split_data, "train", 48, False).masks(head)
    )


def test_pack_keeps_its_form_when_it_is_loaded_or_rebuilt(split_data):
    for compress in (True, False):
        load_pack(split_data, "val", 24, compress)
        index = split_data / "cache" / "val-24" / "index.json"
        before = index.stat().st_mtime_ns
        assert load_pack(split_data, "val", 24).compressed is compress
        assert load_pack(split_data, "val", 24, compress).compressed is compress
        assert index.stat().st_mtime_ns == before
        path = dataset.series_folders(split_data, "val")[0] / "metadata.json"
        metadata = stage.read_json(path, "")
        metadata["slices"][2]["labels"]["any"] = int(compress)
        stage.write_json(path, metadata)
        pack = load_pack(split_data, "val", 24)
        assert pack.compressed is compress and pack.labels[2]["any"] == int(compress)
        assert index.stat().st_mtime_ns != before


def test_pack_of_another_format_is_rebuilt(split_data):
    first = load_pack(split_data, "val", 24)
    index = split_data / "cache" / "val-24" / "index.json"
    content = stage.read_json(index, "")
    stage.write_json(index, {"key": "old", "size": 24, "has_truth": True, "series": content["series"]})
    assert_same_pack(load_pack(split_data, "val", 24), first)
    stage.write_json(index, content | {"format": 1})
    with pytest.raises(stage.InputError, match=r"another version \(delete the folder"):
        dataset.Pack(index.parent)


@pytest.mark.parametrize("compress", [False, True])
def test_pack_finds_the_series_whose_values_have_changed(split_data, compress):
    pack = load_pack(split_data, "train", 24, compress)
    assert pack.damaged() == []
    file = split_data / "cache" / "train-24" / ("truth.slices" if compress else "truth.npy")
    data = bytearray(file.read_bytes())
    data[-9] ^= 1  # of the last slice
    file.write_bytes(data)
    assert dataset.Pack(file.parent).damaged() == [f"truth of series {pack.series[-1]['series_uid']}"]


@pytest.mark.parametrize("compress", [False, True])
def test_pack_that_is_cut_off_says_what_to_delete(split_data, compress):
    load_pack(split_data, "train", 24, compress)
    file = split_data / "cache" / "train-24" / ("image.slices" if compress else "image.npy")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(stage.InputError, match="train-24: image is damaged, .*delete the folder"):
        load_pack(split_data, "train", 24)


def test_pack_build_that_fails_leaves_the_old_pack(split_data, monkeypatch):
    old = load_pack(split_data, "val", 24, compress=True)
    monkeypatch.setattr(dataset, "fit_to_square", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_pack(split_data, "val", 24, compress=False)
    assert_same_pack(load_pack(split_data, "val", 24), old)


def test_pack_checks_the_disk_before_it_is_built(split_data, monkeypatch):
    asked = []
    monkeypatch.setattr(stage, "require_space", lambda _, needed: asked.append(needed))
    count = len(load_pack(split_data, "val", 24))
    load_pack(split_data, "val", 24, compress=True)
    assert asked[0] == count * 24 * 24 * 5 and asked[1] < asked[0] / 2


def test_pack_follows_a_change_of_labels(split_data):
    load_pack(split_data, "val", 24)
    path = dataset.series_folders(split_data, "val")[0] / "metadata.json"
    metadata = stage.read_json(path, "")
    metadata["slices"][2]["labels"]["any"] = None
    stage.write_json(path, metadata)
    assert load_pack(split_data, "val", 24).labels[2]["any"] is None


def test_pack_can_be_loaded_by_many_processes_at_once(split_data):
    code = (
        "import sys; from pathlib import Path; import dataset; "
        "print(len(dataset.load_pack(Path(sys.argv[1]), 'train', 24)))"
    )
    command = [sys.executable, "-c", code, str(split_data)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(4)]
    counts = {process.communicate(timeout=120)[0] for process in processes}
    assert len(counts) == 1
    assert all(process.returncode == 0 for process in processes)


def test_pack_refuses_a_patient_on_the_wrong_side(split_data):
    folder = dataset.series_folders(split_data, "test")[0]
    folder.rename(split_data / "train" / folder.name)
    with pytest.raises(stage.InputError, match="belongs to test, not to train"):
        load_pack(split_data, "train", 24)


def test_pack_refuses_windowed_images(split_data):
    path = dataset.series_folders(split_data, "train")[0] / "metadata.json"
    stage.write_json(path, stage.read_json(path, "") | {"intensity": "windowed"})
    with pytest.raises(stage.InputError, match="8-bit"):
        load_pack(split_data, "train", 24)


def test_pack_without_a_split_says_what_to_run(split_data):
    (split_data / "splits.json").unlink()
    with pytest.raises(stage.InputError, match=r"split_dataset\.py"):
        load_pack(split_data, "train", 24)


def test_native_size_is_shared_or_256(split_data):
    assert dataset.native_size(split_data) == 48
    path = dataset.series_folders(split_data, "train")[0] / "metadata.json"
    stage.write_json(path, stage.read_json(path, "") | {"shape": [6, 50, 48]})
    assert dataset.native_size(split_data) == 256
