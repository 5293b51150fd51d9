import math

import numpy as np
import pytest
import torch

import anatomy
import batches
import dataset
import low_dose
import stage
from batches import Batches, mirror
from dataset import load_pack
from dose import DOSE_MODELS, SIMULATED
from low_dose import LowDose, check_doses, load_noise, simulate_scan
from phantom import generate_phantom

DOSES = [0.5, 0.25, 0.1, 0.05]


@pytest.fixture
def pack(split_data):
    """Of series whose noise is unknown: in pixels of 5 mm, 4 HU would mean that rays starve."""
    for split in dataset.SPLITS:
        for folder in dataset.series_folders(split_data, split):
            path = folder / "metadata.json"
            stage.write_json(path, stage.read_json(path, "") | {"noise_hu": None})
    return load_pack(split_data, "train", 48)


def batch_of(pack, size=8):
    batches = Batches(pack, batch_size=size, seed=1, device=torch.device("cpu"))
    return next(iter(batches.epoch(0)))


@pytest.mark.parametrize("model", SIMULATED)
def test_evaluation_noise_depends_on_the_slice_alone_and_not_on_its_batch(pack, model):
    dose = DOSE_MODELS[model].doses[1]
    rows = [6, 7]
    together = LowDose(pack, model, [dose] * len(rows)).evaluation(rows, [dose] * len(rows), 42)
    alone = LowDose(pack, model, [dose]).evaluation([7], [dose], 42)
    np.testing.assert_allclose(alone[0], together[-1], atol=2e-3)  # HU; sums in another order
    noise = together - pack.image[list(rows)]
    assert np.abs(np.corrcoef(noise[-2].ravel(), noise[-1].ravel())[0, 1]) < 0.2
    assert not np.allclose(LowDose(pack, model, [dose]).evaluation([7], [dose], 43), alone, atol=1)


@pytest.mark.parametrize(("model", "full"), [("calibrated", 40.0), ("projection", 1.0), ("measured", 1.0)])
def test_evaluation_at_the_full_dose_is_the_image(pack, model, full):
    found = LowDose(pack, model, [full, full]).evaluation([0, 3], [full, full], 42)
    np.testing.assert_array_equal(found, pack.image[[0, 3]])


def test_evaluation_takes_a_dose_for_each_row(pack):
    mixed = LowDose(pack, "projection", [1.0, 0.1]).evaluation([2, 3], [1.0, 0.1], 42)
    np.testing.assert_array_equal(mixed[0], pack.image[2])
    np.testing.assert_allclose(
        mixed[1], LowDose(pack, "projection", [0.1]).evaluation([3], [0.1], 42)[0], atol=2e-3
    )


def test_check_doses_gives_all_of_the_model_or_refuses():
    assert check_doses("calibrated", None) == [1, 5, 10, 20, 40]
    assert check_doses("projection", None) == [0.025, 0.1, 0.25, 0.5, 1.0]
    with pytest.raises(ValueError, match="dose 50"):
        check_doses("calibrated", [5, 50])
    with pytest.raises(ValueError, match=r"dose 1\.5.*\(0, 1\]"):
        check_doses("projection", [0.5, 1.5])


def test_projection_adds_the_noise_that_the_series_own_noise_asks_for():
    scan = generate_phantom(3, size=128, slices=5, noise_hu=4.0)
    some, added = scan.hu[2:3], []
    inside = anatomy.brain_mask(some, scan.spacing_mm)
    for own in (4.0, 8.0):
        low = simulate_scan(some, "projection", [0.5], [1], spacing_mm=scan.spacing_mm, noise_hu=own)
        added.append((low - some)[inside].std())
        assert added[-1] == pytest.approx(own, rel=0.1)  # 1/d - 1 = 1: as much again as the series has
    assert added[1] > 1.8 * added[0]


def test_flux_is_worked_out_once_and_again_for_other_data(pack, monkeypatch):
    first = low_dose.pack_flux(pack, "projection")
    assert len(first) == len(pack.series)
    assert set(first) == {1.0}  # nothing is known of the noise
    monkeypatch.setattr(low_dose, "scan_flux", lambda *_: 7.0)
    np.testing.assert_array_equal(low_dose.pack_flux(pack, "projection"), first)
    pack.key = "other data"
    assert set(low_dose.pack_flux(pack, "projection")) == {7.0}


def test_stored_noise_has_the_size_of_fresh_noise(pack):
    stored = LowDose(pack, "projection", DOSES, realisations=3)
    fresh = LowDose(pack, "projection", DOSES)
    rows = np.arange(12)
    hu = batches.to_tensor(pack.image[rows])
    inside = torch.from_numpy(pack.masks(anatomy.MASKS["brain"])[rows])
    sds = {}
    for name, source in (("stored", stored), ("fresh", fresh)):
        noise = [
            (source.simulate(hu, rows, [0.1] * 12, range(12 * turn, 12 * turn + 12)) - hu)[:, 0][inside]
            for turn in range(4)
        ]
        sds[name] = torch.cat(noise).std().item()
    # three realisations of 12 slices: some thousand independent values
    assert sds["stored"] == pytest.approx(sds["fresh"], rel=0.08)


def test_stored_noise_is_read_back_within_its_step_and_made_only_once(pack, monkeypatch):
    first = load_noise(pack, "projection", 2).images([3, 4])
    assert first.quantum.shape == (2, 2, 48, 48)
    assert first.bias.shape == first.electronic.shape == (2, 1, 48, 48)
    flux = low_dose.pack_flux(pack, "projection")[pack.series_of[3]]
    seeds = [
        stage.stable_seed(
            "noise images", pack.series[pack.series_of[row]]["series_uid"], int(pack.slice_of[row])
        )
        for row in (3, 4)
    ]
    scanner = DOSE_MODELS["projection"].scanner
    hu = batches.to_tensor(pack.image[[3, 4]])
    exact = low_dose.noise_images(hu, seeds, float(pack.pixel_mm[3]), scanner, float(flux), 2)
    for name, step in low_dose.STEPS_HU.items():
        error = (getattr(first, name) - getattr(exact, name)).abs().max().item()
        assert error <= 0.51 * step + 1e-3, name
    monkeypatch.setattr(low_dose, "_make_noise", lambda *_: pytest.fail("made again"))
    load_noise(pack, "projection", 2)


def test_pair_is_the_same_for_the_same_seeds_and_fresh_for_others(pack):
    source = LowDose(pack, "projection", DOSES, realisations=2)
    batch = batch_of(pack)
    full, low, doses = source.pair(batch, mirror)
    again = source.pair(batch, mirror)
    assert torch.equal(full, again[0])
    assert torch.equal(low, again[1])
    assert set(doses) <= set(DOSES)
    torch.testing.assert_close(full, mirror(batch.hu, batch.seeds))
    other = source.pair(batch._replace(seeds=[seed + 2 for seed in batch.seeds]), mirror)
    assert not torch.allclose(low, other[1], atol=1)


def test_starved_slices_are_drawn_photon_by_photon(pack, monkeypatch):
    source = LowDose(pack, "projection", [0.05], realisations=1)
    batch = batch_of(pack, 4)
    source.noise.counts = np.full_like(source.noise.counts, 1.0)  # below FEWEST_STORED_COUNTS at any dose
    called = []
    fresh = LowDose._fresh
    monkeypatch.setattr(LowDose, "_fresh", lambda self, *args: called.append(1) or fresh(self, *args))
    low = source.simulate(batch.hu, batch.rows, [1.0, 0.05, 1.0, 0.05], batch.seeds)
    assert called
    assert torch.equal(low[0], batch.hu[0])
    assert (low[1] - batch.hu[1]).std() > 1


# ---------------------------------------------------------------- real low dose


@pytest.fixture
def paired(split_data):
    """The small data set with a real low dose of 0.25 beside each slice: the image plus 7 HU."""
    for split in dataset.SPLITS:
        for folder in dataset.series_folders(split_data, split):
            metadata = dataset.read_metadata(folder)
            for entry in metadata["slices"]:
                place = folder / f"{entry['index']:05d}"
                with np.load(place / "image.npz") as archive:
                    np.savez_compressed(place / "low_0.25.npz", arr_0=archive["arr_0"] + np.int16(7))
            stage.write_json(folder / "metadata.json", metadata | {"low_doses": ["0.25"]})
    return load_pack(split_data, "train", 48)


def test_real_low_dose_is_used_as_it_is(paired):
    source = LowDose(paired, "measured", [0.25, 1.0])
    batch = batch_of(paired)
    full, low, doses = source.pair(batch, mirror)
    assert {0.25, 1.0} == set(doses)
    for image, other, dose in zip(full, low, doses, strict=True):
        torch.testing.assert_close(other - image, torch.full_like(image, 7.0 if dose == 0.25 else 0.0))
    np.testing.assert_array_equal(
        LowDose(paired, "measured", [0.25]).evaluation([4], [0.25], 0)[0], paired.image[4] + 7
    )


def test_real_low_dose_that_is_not_there_is_named(pack, paired):
    with pytest.raises(stage.InputError, match=r"--doses 0\.25: .*only none"):
        LowDose(pack, "measured", [0.25])
    with pytest.raises(stage.InputError, match=r"--doses 0\.1: .*only 0\.25"):
        LowDose(paired, "measured", [0.25, 0.1])


# ---------------------------------------------------------------- one scan


def test_scan_gets_the_noise_of_its_pack(pack):
    rows = np.flatnonzero(pack.series_of == 1)
    metadata, pixel = pack.series[1], float(pack.pixel_mm[rows[0]])
    seeds = [
        low_dose.evaluation_seed(5, metadata["series_uid"], int(pack.slice_of[row]), "projection", 0.1)
        for row in rows
    ]
    gap, row_mm, column_mm = metadata["spacing_mm"]
    alone = simulate_scan(
        pack.image[rows],
        "projection",
        [0.1] * len(rows),
        seeds,
        spacing_mm=(gap, pixel, pixel),
        noise_hu=math.nan,
        own_pixel_mm=math.sqrt(row_mm * column_mm),
    )
    study = LowDose(pack, "projection", [0.1] * len(rows)).evaluation(rows, [0.1] * len(rows), 5)
    np.testing.assert_allclose(alone, study, atol=2e-3)


def test_scan_without_a_pixel_size_is_refused():
    volume = np.zeros((1, 16, 16), np.int16)
    with pytest.raises(ValueError, match="PixelSpacing"):
        simulate_scan(volume, "projection", [0.5], [0], spacing_mm=(5.0, math.nan, math.nan))
