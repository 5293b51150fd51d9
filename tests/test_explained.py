"""Grad-CAM scored on a split: which slices are asked, what is written, what the summary says."""

import csv
import math

import numpy as np
import pytest
import torch
from torch import nn

import explained
import stage
import train_classifier
from dataset import load_pack
from explained import Seen, asked_slices, heats, score, summary

TOY = ["--size", 32, "--epochs", 1, "--width", 4, "--device", "cpu", "--precision", "fp32"]


class Volumes:
    """A pack of two scans of 5 slices of 32 x 32, pixels of 4 mm and gaps of 5 mm: 0.08 ml a voxel."""

    def __init__(self):
        self.series = [
            {"series_uid": name, "spacing_mm": (5.0, 4.0, 4.0), "affine": np.diag([4, 4, 5, 1]).tolist()}
            for name in ("one", "two")
        ]
        self.series_of = np.repeat([0, 1], 5)
        self.slice_of = np.tile(np.arange(5), 2)
        self.image = np.zeros((10, 32, 32), np.int16)
        self.mask = np.zeros((10, 32, 32), np.uint8)
        self.mask[1:3, 8:16, 8:16] = 2  # 128 voxels, 10.2 ml
        self.mask[3, 8:10, 8:10] = 2  # its thin end
        self.mask[6, 20:22, 20:22] = 6  # 0.3 ml
        self.mask[8, 8:20, 8:20] = 6  # 11.5 ml
        self.image[self.mask > 0] = 70

    def spacing_mm(self, number):
        return self.series[number]["spacing_mm"]


class Bright(nn.Module):
    """Says of a slice how bright its brightest place is, and so looks there."""

    classes, slices = ("stroke",), 1

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 1, 8, 8, bias=False)
        nn.init.constant_(self.stem.weight, 1 / 64)

    def cam_layers(self):
        return {8: self.stem}

    def forward(self, hu):
        return self.stem(hu).relu().flatten(1).square().mean(1, keepdim=True) / 100


def seen(pack):
    return Seen(lambda rows: pack.image[rows], np.linspace(0, 1, 10)[:, None])


def test_asked_slices_are_the_thick_ones_of_large_lesions_of_the_class():
    pack = Volumes()
    assert [row for row, _, _ in asked_slices(pack, "stroke")] == [1, 2, 8]
    assert [row for row, _, _ in asked_slices(pack, "intraparenchymal")] == [1, 2]
    assert [row for row, _, _ in asked_slices(pack, "ischemic")] == [8]
    assert asked_slices(pack, "subdural") == []
    row, mask, volume = asked_slices(pack, "any")[0]
    assert volume == pytest.approx((128 + 4) * 0.08)
    np.testing.assert_array_equal(mask, pack.mask[row] > 0)


def test_a_network_that_looks_at_the_lesion_points_at_it_and_random_weights_do_not(tmp_path):
    torch.manual_seed(0)
    pack, model = Volumes(), Bright()
    rows = score(model, pack, {"clean": seen(pack), "dose 0.1": seen(pack)}, ["stroke"], tmp_path)
    assert len(rows) == 6
    with (tmp_path / "gradcam.csv").open() as file:
        assert [row["slice_index"] for row in csv.DictReader(file)] == ["1", "2", "3"] * 2
    first, second = summary(rows)
    assert (first["dose"], second["dose"]) == ("clean", "dose 0.1")
    assert first["pointing"] == 1
    assert first["energy"] > 3 * first["chance"]
    assert first["n_found"] == 1  # of probabilities 1/9, 2/9 and 8/9
    assert second["correlation_first"] == pytest.approx(1)
    assert second["shift_px_first"] == 0
    pictures = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    assert len(pictures) == 6
    assert str(pictures[0]) == "gradcam_stroke/clean/one_00001.png"
    assert "3 slices with a lesion of 5 ml" in explained.describe(first)


def test_heats_come_in_the_order_of_the_rows_with_the_slices_that_they_are_of():
    pack = Volumes()
    images, (heat,) = heats([Bright()], seen(pack), pack, [1, 8], "stroke", "grad-cam")
    np.testing.assert_array_equal(images, pack.image[[1, 8]])
    for place, row in enumerate((1, 8)):
        assert pack.mask[row][np.unravel_index(heat[place].argmax(), (32, 32))]


def test_data_without_masks_or_without_large_lesions_are_refused(tmp_path):
    pack = Volumes()
    pack.mask[:] = 0
    with pytest.raises(stage.InputError, match="no lesion of 5 ml"):
        score(Bright(), pack, {"clean": seen(pack)}, ["stroke"], tmp_path)
    pack.mask = None
    with pytest.raises(stage.InputError, match="no lesion masks"):
        score(Bright(), pack, {"clean": seen(pack)}, ["stroke"], tmp_path)


@pytest.mark.parametrize(
    "options", [[], ["--model", "cnn-bilstm", "--hidden", 8]], ids=["slices", "cnn-bilstm"]
)
def test_gradcam_of_the_command_line_writes_its_table_and_pictures(split_data, tmp_path, options, capsys):
    words = ["--data", split_data, "--out", tmp_path, *TOY, *options]
    train_classifier.main([str(word) for word in words])
    words = [
        "--evaluate",
        tmp_path / "classifier.pt",
        "--data",
        split_data,
        "--results",
        tmp_path,
        "--gradcam",
    ]
    train_classifier.main([str(word) for word in [*words, "--split", "val", "--device", "cpu"]])
    assert "Grad-CAM, clean, stroke" in capsys.readouterr().out
    folder = tmp_path / "classifier/classifier"
    pack = load_pack(split_data, "val", 32)
    with (folder / "gradcam.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(asked_slices(pack, "stroke"))
    assert len(list(folder.glob("gradcam_stroke/clean/*.png"))) == min(len(rows), explained.PICTURES)
    content = stage.read_json(folder / "metrics.json", "")["gradcam"]
    assert content[0]["n_slices"] == len(rows)
    assert all(math.isfinite(content[0][name]) for name in ("pointing", "chance", "pointing_random"))
