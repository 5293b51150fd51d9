"""Splits that a data set brings, through the stages."""

import numpy as np
import pytest

import prepare_dataset
import split_dataset
from dataset import SPLITS, all_series, load_pack, read_metadata, read_splits, series_folders
from phantom import generate_phantom
from stage import InputError, StageError, write_json


@pytest.fixture
def prepared(tmp_path):
    """prepared({split or None: how many patients}) -> the data folder, as prepare_dataset leaves it."""

    def make(counts, same=()):
        seed = 0
        for split, count in counts.items():
            for _ in range(count):
                seed += 1
                hu = generate_phantom(0 if split in same else seed, size=32, slices=3, lesions=[]).hu
                for index, image in enumerate(hu):
                    place = tmp_path / "raw" / (split or "") / f"p{seed}" / f"{index:05d}"
                    place.mkdir(parents=True)
                    np.savez(place / "image.npz", image)
        out = tmp_path / "dataset"
        prepare_dataset.main(["--source", "npz", "--input", tmp_path / "raw", "--out", out, "--workers", 1])
        return out

    return make


def test_split_keeps_what_a_data_set_gives_and_deals_the_rest_as_if_it_were_alone(prepared):
    out = prepared({None: 6, "test": 4})
    split_dataset.main(["--data", out, "--fractions", 0.5, 0.25, 0.25])
    counts = {split: len(series_folders(out, split)) for split in SPLITS}
    assert counts["test"] >= 5 and counts["train"] == 3 and sum(counts.values()) == 10
    for split in SPLITS:
        for folder in series_folders(out, split):
            assert read_metadata(folder)["split"] in (None, split)
    before = read_splits(out)
    split_dataset.main(["--data", out, "--fractions", 0.5, 0.25, 0.25])
    assert read_splits(out) == before


def test_split_of_a_set_that_arrives_whole_in_one_split_leaves_it_there(prepared):
    out = prepared({"test": 2})
    split_dataset.main(["--data", out])
    assert len(series_folders(out, "test")) == 2


def test_split_with_an_identical_image_in_two_given_splits_is_refused(prepared):
    out = prepared({"train": 1, "test": 1}, same=("train", "test"))
    with pytest.raises(InputError, match=r"in test \(series \w+\) and in train \(series"):
        split_dataset.main(["--data", out])


def test_split_puts_an_identical_image_where_its_twin_is_given(prepared):
    out = prepared({None: 1, "test": 1, "train": 1, "val": 1}, same=(None, "test"))
    split_dataset.main(["--data", out])
    assert len(series_folders(out, "test")) == 2


# ---------------------------------------------------------------- cache


@pytest.mark.parametrize("compress", [False, True])
def test_split_with_cache_builds_that_of_every_split_and_says_its_size(split_data, capsys, compress):
    split_dataset.main(["--data", split_data, "--cache", 24, *(["--compress-cache"] if compress else [])])
    lines = capsys.readouterr().out.splitlines()[-3:]
    for split, line in zip(SPLITS, lines, strict=True):
        folder = split_data / "cache" / f"{split}-24"
        built = (folder / "index.json").stat().st_mtime_ns
        pack = load_pack(split_data, split, 24)
        assert pack.compressed is compress and (folder / "index.json").stat().st_mtime_ns == built
        assert line.startswith(
            f"{folder}: {len(pack)} slices of 24 x 24, {'compressed' if compress else 'raw'}"
        )


def test_split_without_cache_builds_none_and_an_empty_split_has_none(prepared):
    out = prepared({"test": 2})
    split_dataset.main(["--data", out])
    assert not (out / "cache").exists()
    split_dataset.main(["--data", out, "--cache", 16])
    assert [path.name for path in (out / "cache").glob("[!.]*")] == ["test-16"]


def test_split_refuses_to_compress_a_cache_that_it_does_not_build(split_data):
    with pytest.raises(InputError, match="--compress-cache: .* --cache SIZE"):
        split_dataset.main(["--data", split_data, "--compress-cache"])


def test_split_with_cache_of_windowed_pictures_splits_and_then_says_why_there_is_none(split_data):
    for folder in all_series(split_data):
        write_json(folder / "metadata.json", read_metadata(folder) | {"intensity": "windowed"})
    with pytest.raises(StageError, match="windowed 8-bit images have no HU"):
        split_dataset.main(["--data", split_data, "--cache", 24])
