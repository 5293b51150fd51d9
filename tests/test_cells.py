"""The grid on disk: which cells are one, what is worked out again, and what the images are."""

import dataclasses
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch

import anatomy
import cells as module
import checkpoints
import detectability
import lesions
import prepare_dataset
import split_dataset
import stage
from arms import load_networks
from artifacts import ARTIFACTS, scan_seed
from batches import to_tensor
from cells import Cell, Cells, Condition
from dataset import load_pack
from denoised import load
from inference import denoise, read, segment
from low_dose import LowDose
from metrics import IMAGE_METRICS
from tests.toy_models import SIZE, bright, write_models  # noqa: F401 a fixture
from tests.toy_study import change, prepare_toy

FULL, LOW = Condition("calibrated", 40.0, 1), Condition("calibrated", 10.0, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Only to be read."""
    return prepare_toy(tmp_path_factory.mktemp("cells"))


@pytest.fixture(scope="module")
def pack(data):
    return load_pack(data, "test", SIZE)


@pytest.fixture
def networks(tmp_path, bright):  # noqa: F811
    models = write_models(tmp_path / "models")
    change(models / "denoiser.pt", models / "denoiser.pt", "head.bias", 0.1)  # else images stay as they are
    return load_networks(models, torch.device("cpu"))


@pytest.fixture
def cells(tmp_path, pack):
    return Cells(tmp_path / "cells", pack, "brain", 3)


@pytest.fixture
def asked(monkeypatch):
    """What was worked out, cell by cell."""
    found = []

    def counted(kind, reading):
        def counting(cells, cell, seen):
            found.append(cell)
            return reading(cells, cell, seen)

        monkeypatch.setitem(module.READINGS, kind, counting)

    for kind, reading in list(module.READINGS.items()):
        counted(kind, reading)
    return found


def some(networks):
    """A small grid of every kind."""
    (reader,), (segmenter,), (own,) = networks.classifiers, networks.segmenters, networks.denoisers
    return [
        cell
        for condition, denoiser in itertools.product((FULL, LOW), (None, own))
        for cell in (
            Cell(condition, denoiser, "quality"),
            Cell(condition, denoiser, "classifier", reader),
            Cell(condition, denoiser, "segmenter", segmenter),
        )
    ]


# ---------------------------------------------------------------- which cells are one


def test_cell_is_another_with_whatever_decides_its_values(cells, networks, pack, tmp_path, monkeypatch):
    (reader,), (own,) = networks.classifiers, networks.denoisers
    cell = Cell(LOW, own, "classifier", reader)
    content = checkpoints.load(reader.path, "classifier")
    content["state"]["fc.bias"] += 1
    checkpoints.save(tmp_path / "classifier.pt", content)
    (other,) = load_networks(tmp_path, "cpu", ["none"], [tmp_path / "classifier.pt"], []).classifiers
    changed = [
        *(
            cell,
            cell._replace(denoiser=None),
            cell._replace(denoiser=load("nlm")),
            cell._replace(reader=other),
        ),
        *(cell._replace(kind="segmenter"), cell._replace(patients=3)),
        *(
            cell._replace(condition=LOW._replace(**{name: value}))
            for name, value in (
                *(("dose_model", "poisson"), ("dose", 5.0), ("noise_seed", 2)),
                *(("artifact", "rings"), ("artifact", "motion"), ("severity", 0.5)),
            )
        ),
    ]
    paths = [cells.path(one) for one in changed]
    paths.append(Cells(cells.folder, pack, "brain", 4).path(cell))
    stranger = dataclasses.make_dataclass("Pack", ["key", "image", "truth"])("other", None, None)
    paths.append(Cells(cells.folder, stranger, "brain", 3).path(cell))
    monkeypatch.setattr(module, "CELL_FORMAT", 0)
    paths.append(cells.path(cell))
    assert len(set(paths)) == len(paths)


def test_checkpoint_trained_again_makes_new_cells_and_a_copy_does_not(networks, pack, tmp_path):
    path = networks.classifiers[0].path

    def place(path):
        (reader,) = load_networks(tmp_path, "cpu", ["none"], [path], []).classifiers
        return Cells(tmp_path, pack, "brain", 3).path(Cell(LOW, None, "classifier", reader))

    before = place(path)
    assert place(shutil.copy(path, tmp_path / "copy.pt")) == before
    content = checkpoints.load(path, "classifier")
    checkpoints.save(path, content | {"seed": 5})
    assert place(path) != before


def test_mask_decides_image_quality_and_nothing_else(pack, networks, tmp_path):
    one, two = (Cells(tmp_path, pack, mask, 3) for mask in anatomy.MASKS)
    for kind in module.READINGS:
        cell = Cell(LOW, None, kind, networks.classifiers[0])
        assert (one.path(cell) == two.path(cell)) == (kind != "quality")
    np.testing.assert_array_equal(one.places(np.arange(len(pack)))[1], two.places(np.arange(len(pack)))[1])
    for cells in (one, two):
        cells.fill([Cell(LOW, None, "quality")])
    first, second = (cells.load(Cell(LOW, None, "quality")) for cells in (one, two))
    assert all(first["means"][name] != second["means"][name] for name in IMAGE_METRICS)
    assert (first["patients"], first["spectrum"]) == (second["patients"], second["spectrum"])


# ---------------------------------------------------------------- what is worked out


def test_finished_cells_are_never_worked_out_again(cells, networks, asked):
    grid = some(networks)
    cells.fill(grid[:5])
    assert asked == grid[:5]
    cells.fill(grid)
    assert sorted(asked, key=grid.index) == grid
    cells.fill(grid)
    assert len(asked) == len(grid)
    assert all(map(cells.done, grid))


def test_cell_that_fails_leaves_the_finished_ones_and_no_half(cells, networks, asked, monkeypatch):
    def broken(*_):
        raise OSError("no more")

    whole = module.READINGS["segmenter"]
    monkeypatch.setitem(module.READINGS, "segmenter", broken)
    grid = some(networks)
    with pytest.raises(OSError, match="no more"):
        cells.fill(grid)
    done = [cell for cell in grid if cells.done(cell)]
    low = [cell for cell in grid if cell.condition == LOW]
    assert done == asked == low[:2]
    assert len(list(cells.folder.glob("*/*.json*"))) == len(done)
    monkeypatch.setitem(module.READINGS, "segmenter", whole)
    cells.fill(grid)
    assert sorted(asked, key=grid.index) == grid


def test_one_more_noise_is_made_once_for_all_images_of_a_condition(cells, networks, monkeypatch):
    made = []
    whole = cells.images
    monkeypatch.setattr(cells, "images", lambda *wanted: made.append(wanted[0]) or whole(*wanted))
    cells.fill(some(networks))
    assert made == [LOW, FULL]  # what takes longest first


def test_damaged_cell_is_named_with_the_remedy(cells, networks):
    cell = some(networks)[1]
    cells.fill([cell])
    path = cells.path(cell)
    path.write_text(path.read_text()[:50])
    with pytest.raises(stage.InputError, match=rf"{path.name}: damaged JSON.*delete it and run"):
        cells.load(cell)
    path.unlink()
    with pytest.raises(stage.InputError, match="not found"):
        cells.load(cell)


def test_cells_come_out_the_same_twice(pack, networks, tmp_path):
    grid = some(networks)
    for name, order in (("one", grid), ("two", grid[::-1])):
        Cells(tmp_path / name, pack, "brain", 3).fill(order)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.json")}
        for name in ("one", "two")
    ]
    assert files[0] == files[1] and len(files[0]) == len(grid)
    for content in files[0].values():
        json.loads(content, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_processes_share_the_cells_and_none_is_worked_out_twice(cells, networks, asked, monkeypatch):
    """A second process fills while the first is at work on the images that it took: it takes the others."""
    grid = some(networks)
    images, nested = cells.images, []

    def meanwhile(condition, rows):
        if not nested:
            nested.append(condition)
            cells.fill(grid)
            assert asked and all(cell.condition != condition for cell in asked)
        return images(condition, rows)

    monkeypatch.setattr(cells, "images", meanwhile)
    cells.fill(grid)
    assert nested and sorted(asked, key=grid.index) == grid


def test_what_a_killed_run_left_half_written_goes(cells, networks):
    cell = some(networks)[0]
    stale = cells.path(cell).with_name(f".{cells.path(cell).name}.tmp.99999")
    stale.parent.mkdir(parents=True)
    stale.write_text("{")
    cells.fill([cell])
    assert cells.done(cell) and not stale.exists()


def test_network_that_says_nan_is_named(cells, networks):
    (reader,) = networks.classifiers
    reader.network.fc.bias.data.fill_(math.nan)
    with pytest.raises(stage.InputError, match=r"classifier\.pt: says NaN of calibrated 10"):
        cells.fill([Cell(LOW, None, "classifier", reader)])
    assert not list(cells.folder.rglob("*.json"))


# ---------------------------------------------------------------- what is seen and said


@pytest.mark.parametrize(
    ("dose_model", "dose"), [("projection", 0.1), ("calibrated", 5.0), ("poisson", 10.0)]
)
def test_images_are_those_that_every_arm_and_stage_sees(cells, pack, dose_model, dose):
    rows = np.arange(len(pack))[6:10]
    images, levels = cells.images(Condition(dose_model, dose, 7), rows)
    source = LowDose(pack, dose_model, [dose, dose / 2])
    np.testing.assert_array_equal(images, source.evaluation(rows, [dose] * 4, 7))
    np.testing.assert_array_equal(levels, source.levels(rows, [dose] * 4))
    assert images.dtype == np.float32


@pytest.mark.parametrize("artifact", ["rings", "motion", "starvation"])
def test_artifact_is_added_to_the_same_noise_and_alike_at_every_dose(cells, pack, artifact):
    rows = np.flatnonzero(pack.series_of == 1)
    changes = {}
    for plain, severity in itertools.product((FULL, LOW), (0.5, 1.0)):
        stressed = plain._replace(artifact=artifact, severity=severity)
        changes[plain, severity] = cells.images(stressed, rows)[0] - cells.images(plain, rows)[0]
        hu = to_tensor(pack.image[rows])
        seeds = [scan_seed(1, pack.series[1]["series_uid"])] * len(rows)
        moved = ARTIFACTS[artifact](hu, severity, seeds, float(pack.pixel_mm[rows[0]]))
        np.testing.assert_allclose(changes[plain, severity], (moved - hu)[:, 0], atol=2e-3)
    for severity in (0.5, 1.0):
        np.testing.assert_allclose(changes[FULL, severity], changes[LOW, severity], atol=2e-3)
    assert np.abs(changes[FULL, 0.5]).max() > 2  # HU
    assert np.abs(changes[FULL, 1.0] - changes[FULL, 0.5]).max() > 2
    again = cells.images(FULL._replace(artifact=artifact, severity=1.0, noise_seed=2), rows)[0]
    other = again - cells.images(FULL._replace(noise_seed=2), rows)[0]
    assert np.abs(other - changes[FULL, 1.0]).max() > 2


def test_readers_are_shown_the_denoised_images_and_told_the_series(cells, pack, networks):
    (reader,), (segmenter,), (own,) = networks.classifiers, networks.segmenters, networks.denoisers
    grid = [Cell(LOW, own, kind, one) for kind, one in (("classifier", reader), ("segmenter", segmenter))]
    cells.fill(grid)
    rows = np.arange(len(pack))
    source = LowDose(pack, "calibrated", [10.0])
    low, levels = (
        make(rows, [10.0] * len(rows), *more)
        for make, more in ((source.evaluation, [1]), (source.levels, []))
    )
    images = denoise(own.network, low, levels, pack.series_of)
    assert np.abs(images - low).max() > 1e-3
    said, outlined = map(cells.load, grid)
    expected = read(reader.network, images, pack.series_of)
    np.testing.assert_array_equal(said["slices"], expected.slices)
    np.testing.assert_array_equal(said["scans"], expected.scans)
    masks = segment(segmenter.network, images, pack.series_of, 0.5)
    assert len(outlined["reports"]) == len(pack.series)
    own_rows = pack.series_of == 2
    pixel = float(pack.pixel_mm[own_rows][0])
    spacing = (pack.series[2]["spacing_mm"][0], pixel, pixel)
    report = lesions.case_report(np.asarray(pack.mask)[own_rows], masks[own_rows], spacing)
    assert outlined["reports"][2] == stage.plain(report)


def test_subset_is_whole_patients_drawn_by_the_seed_with_the_noise_of_all(cells, pack):
    rows = cells.rows(3)
    ids = pack.patient_ids()
    assert len(set(ids[rows])) == 3
    assert len(rows) == np.isin(ids, ids[rows]).sum()
    np.testing.assert_array_equal(cells.rows(3), rows)
    np.testing.assert_array_equal(np.isin(cells.rows(3), cells.rows(5)), True)
    np.testing.assert_array_equal(cells.rows(99), np.arange(len(pack)))
    np.testing.assert_array_equal(cells.images(LOW, rows)[0], cells.images(LOW, cells.rows(None))[0][rows])
    others = {tuple(Cells(cells.folder, pack, "brain", seed).rows(3)) for seed in range(5)}
    assert len(others) > 1


# ---------------------------------------------------------------- image quality


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Test patients whose pixels are small enough to see edges and texture: 6 of 4 slices of 160 x 160."""
    folder = tmp_path_factory.mktemp("large")
    size = ["--size", 160, "--slices", 4, "--patients", 10, "--out", folder, "--workers", 1]
    prepare_dataset.main(["--source", "phantom", *size])
    split_dataset.main(["--data", folder, "--fractions", 0.2, 0.2, 0.6])
    return Cells(folder / "cells", load_pack(folder, "test", 160), "brain", 3)


def test_quality_of_the_reference_dose_keeps_contrast_and_edges(large):
    grid = [Cell(condition, None, kind) for condition in (FULL, LOW) for kind in ("quality", "observer")]
    large.fill(grid)
    full, seen, low, seen_low = map(large.load, grid)
    figures = {name: np.array(values, float) for name, values in full["patients"].items()}
    assert len(figures["noise_sd_hu"]) == len(set(large.pack.patient_ids()))
    for name, within in (
        ("contrast_kept_blood", 0.05),
        ("edge_sharpness_skull", 0.01),
        ("edge_sharpness_brain", 0.05),
    ):
        assert np.nanmean(figures[name]) == pytest.approx(1, abs=within)
    assert np.nanmean(figures["noise_sd_hu"]) == pytest.approx(full["means"]["rmse_hu"], rel=0.05)
    assert abs(np.nanmean(figures["bias_brain_hu"])) < 0.1
    ratio = np.array(low["patients"]["noise_sd_hu"]) / figures["noise_sd_hu"]
    assert ratio == pytest.approx(2, rel=0.2)  # a quarter of the photons
    assert low["spectrum"]["blocks"] == full["spectrum"]["blocks"] > 0
    assert set(seen) == set(seen_low) == set(detectability.SIGNALS)


def test_quality_without_noise_is_perfect_and_says_so_in_json(large):
    pack = large.pack
    seen = module.Seen(
        np.arange(len(pack)), *[np.asarray(large.reference, np.float32)] * 2, np.ones(len(pack))
    )
    found = stage.plain(module.READINGS["quality"](large, Cell(FULL, None, "quality"), seen))
    assert found["means"] == {"mse": 0, "psnr": None, "ssim": 1, "rmse_hu": 0}
    assert set(found["patients"]["noise_sd_hu"]) == {0}
    assert sum(found["spectrum"]["power"]) == 0


def test_places_of_signals_are_in_clean_brain_of_two_slices_of_each_scan(large):
    pack = large.pack
    chosen, places = large.places(np.arange(len(pack)))
    counts = np.bincount(pack.series_of[chosen])
    assert set(counts) == {module.OBSERVED_SLICES}
    assert len(places) > len(chosen) / 2
    assert (np.asarray(pack.mask)[chosen][tuple(places.T)] == 0).all()
    assert large.brain[chosen][tuple(places.T)].all()
