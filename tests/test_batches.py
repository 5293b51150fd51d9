"""Batches of a training run: what they repeat, share and move."""

import numpy as np
import pytest
import torch

import batches
import dataset
import stage
from batches import Batches
from dataset import load_pack
from phantom import generate_phantom

# ---------------------------------------------------------------- batches


def rows_of(batches, epoch, start=0):
    return [batch.rows.tolist() for batch in batches.epoch(epoch, start)]


@pytest.fixture
def pack(split_data):
    return load_pack(split_data, "train", 48)


def test_batches_repeat_with_seed_and_epoch_and_go_on_from_any_step(pack):
    make = {"batch_size": 8, "device": torch.device("cpu")}
    one, two = (Batches(pack, seed=3, **make) for _ in range(2))
    assert rows_of(one, 5) == rows_of(two, 5)
    assert rows_of(one, 5) != rows_of(one, 6)
    assert rows_of(one, 5)[2:] == rows_of(one, 5, start=2)
    assert rows_of(one, 5) != rows_of(Batches(pack, seed=4, **make), 5)
    flat = sum(rows_of(one, 5), [])
    assert len(set(flat)) == len(flat) == len(one) * 8


def test_batches_of_two_processes_are_the_shares_of_one(pack):
    make = {"batch_size": 8, "seed": 3, "device": torch.device("cpu")}
    whole = list(Batches(pack, **make).epoch(1))
    halves = [list(Batches(pack, rank=rank, world_size=2, **make).epoch(1)) for rank in (0, 1)]
    for batch, left, right in zip(whole, *halves, strict=True):
        assert batch.rows.tolist() == [*left.rows, *right.rows]
        assert batch.seeds == [*left.seeds, *right.seeds]


def test_batches_refuse_a_size_that_the_processes_cannot_share(pack):
    with pytest.raises(stage.InputError, match="multiple of the 3 processes"):
        Batches(pack, batch_size=8, seed=0, device=torch.device("cpu"), world_size=3)


def test_batches_with_weights_draw_the_rare_class_as_often(pack):
    weights = np.where(np.arange(len(pack)) < 3, 1 / 3, 1 / (len(pack) - 3))
    batches = Batches(pack, batch_size=4, seed=0, device=torch.device("cpu"), weights=weights)
    drawn = [row for epoch in range(40) for batch in batches.epoch(epoch) for row in batch.rows]
    assert np.mean(np.array(drawn) < 3) == pytest.approx(0.5, abs=0.06)
    seeds = [seed for batch in batches.epoch(0) for seed in batch.seeds]
    assert len(set(seeds)) == len(seeds)  # a row drawn twice gets two noises


def test_batches_give_each_row_its_own_image_mask_and_target(pack):
    targets = np.arange(len(pack), dtype=np.float32)[:, None]
    batch = next(Batches(pack, batch_size=5, seed=0, device=torch.device("cpu"), targets=targets).epoch(0))
    np.testing.assert_array_equal(batch.hu[:, 0].numpy(), pack.image[batch.rows])
    np.testing.assert_array_equal(batch.mask[:, 0].numpy(), pack.mask[batch.rows])
    np.testing.assert_array_equal(batch.targets[:, 0].numpy(), batch.rows)


@pytest.mark.parametrize("compress", [False, True])
def test_batches_drawn_from_the_device_are_those_drawn_from_the_disk(split_data, compress):
    pack = load_pack(split_data, "train", 48, compress=compress)
    make = {"batch_size": 5, "seed": 0, "device": torch.device("cpu"), "rows": np.arange(3, 40)}
    disk, resident = Batches(pack, **make), Batches(pack, resident=True, **make)
    assert isinstance(resident.image, torch.Tensor)
    assert resident.image.dtype == torch.int16
    for one, two in zip(disk.epoch(2), resident.epoch(2), strict=True):
        np.testing.assert_array_equal(one.rows, two.rows)
        assert torch.equal(one.hu, two.hu)
        assert torch.equal(one.mask, two.mask)
        assert two.hu.dtype == torch.float32


def test_batches_move_to_a_gpu_what_fits_into_half_of_its_free_memory(pack, monkeypatch):
    needed = pack.image.nbytes + pack.mask.nbytes
    for free, fits in ((2 * needed, True), (2 * needed - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10 * free))
        assert batches._fits(torch.device("cuda"), pack.image, pack.mask, None) is fits
    assert not batches._fits(torch.device("cpu"), pack.image)


# ---------------------------------------------------------------- augmentation


def test_mirror_flips_where_the_seed_is_odd_and_keeps_the_type():
    images = torch.arange(12, dtype=torch.uint8).reshape(2, 1, 2, 3)
    found = batches.mirror(images, [4, 7])
    assert torch.equal(found[0], images[0])
    assert torch.equal(found[1], images[1].flip(-1))


def test_augment_moves_but_neither_invents_nor_loses_hu():
    hu = torch.from_numpy(generate_phantom(1, size=64, slices=4).hu).float()[2:3, None].repeat(20, 1, 1, 1)
    found = batches.augment(hu, list(range(20)))
    assert found.shape == hu.shape
    assert found.min() >= dataset.AIR_HU
    assert found.max() <= hu.max() + 1e-2
    assert torch.equal(found, batches.augment(hu, list(range(20))))
    assert len({image.sum().item() for image in found}) > 10
    corners = found[..., [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners < -900).all()  # what comes in from outside is air, not 0 HU


def test_augment_under_mixed_precision_is_the_same(pack):
    hu = batches.to_tensor(pack.image[:20])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = batches.augment(hu, list(range(20)))
    assert torch.equal(mixed, batches.augment(hu, list(range(20))))


def test_augment_leaves_the_noise_of_half_the_slices_as_it_is():
    noise = torch.randn(200, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 4 + 30
    found = batches.augment(noise, list(range(200)))[..., 16:-16, 16:-16]
    sd = found.std(dim=(1, 2, 3))
    untouched = (sd > 3.7).float().mean().item()
    assert untouched == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("side", [33, 48])
def test_augment_mask_moves_a_mask_as_augment_moves_its_slice(side):
    rows, columns = np.mgrid[:side, :side]
    disc = (rows - 0.4 * side) ** 2 + (columns - 0.6 * side) ** 2 < (side / 6) ** 2
    mask = torch.from_numpy(disc.astype(np.uint8) * 6).repeat(40, 1, 1, 1)
    hu = torch.where(mask > 0, 60.0, 30.0)
    seeds = list(range(40))
    moved, found = batches.augment(hu, seeds), batches.augment_mask(mask, seeds)
    assert found.dtype == torch.uint8
    assert set(found.unique().tolist()) == {0, 6}
    bright = moved > 45  # halfway: within half a pixel of the edge that the nearest pixel gives
    differs = bright != (found > 0)
    assert differs.float().sum((1, 2, 3)).max() <= 0.1 * disc.sum()
    assert len({tuple(image.flatten().tolist()) for image in found}) > 20
    turned = (moved != 60).logical_and(moved != 30).logical_and(moved > 0).any(3).any(2)[:, 0]
    exact = ~turned  # those that only moved by whole pixels
    assert exact.sum() > 10
    assert torch.equal(bright[exact], found[exact] > 0)


def test_augment_mask_makes_up_no_class_where_two_meet():
    mask = torch.zeros(20, 1, 32, 32, dtype=torch.uint8)
    mask[..., :16, :], mask[..., 16:, :] = 1, 255
    assert set(batches.augment_mask(mask, list(range(20))).unique().tolist()) == {0, 1, 255}
