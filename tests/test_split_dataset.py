"""Splits that a data set brings, through the stages."""

import numpy as np
import pytest

import prepare_dataset
import split_dataset
from dataset import SPLITS, read_metadata, read_splits, series_folders
from phantom import generate_phantom
from stage import InputError


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
