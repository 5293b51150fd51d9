"""The segmenter stage: every network, objective and input through its command line, at toy size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import lesions
import prepare_dataset
import split_dataset
import stage
import train_classifier
import train_denoiser
import train_segmenter
from anatomy import LESION_CLASSES
from batches import Batches
from dataset import load_pack, read_metadata, read_slices, series_folders, window_hu
from inference import load_classifier, load_denoiser, load_segmenter, segment
from losses import SEGMENTATION_LOSSES
from phantom import generate_phantom
from reading_inputs import ReadingInputs
from slice_files import write_npz
from tests import test_nifti_series, test_picture_sets
from train_segmenter import Validation, dice_of_classes, mean_known, sampling_weights
from weights import freeze

CPU = torch.device("cpu")
TOY = ["--size", 32, "--epochs", 1, "--batch-size", 8, "--device", "cpu", "--precision", "fp32"]
SMALL = [*TOY, "--widths", 4, 8]


def run(data, out, *more):
    train_segmenter.main([str(word) for word in ("--data", data, "--out", out, *more)])


def rewrite_masks(data, split, change):
    """Write every mask of a split anew, as change(mask) makes it."""
    for folder in series_folders(data, split):
        metadata = read_metadata(folder)
        masks = change(read_slices(folder, "mask", len(metadata["slices"])))
        for place, mask in enumerate(masks):
            write_npz(folder / f"{place:05d}" / "mask.npz", mask)
            metadata["slices"][place]["mask_classes"] = np.unique(mask).tolist()  # the pack follows these
        stage.write_json(folder / "metadata.json", metadata)


# ---------------------------------------------------------------- through the command line


@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        [*SMALL, "--classes", "lesions", "--slices", 3, "--windows", "three", "--loss", "focal"],
        [*SMALL, "--input", "noisy", "--doses", 5, "--window-jitter", 0.1, "--loss", "tversky"],
        [*TOY, "--model", "timm-unet", "--encoder", "efficientnet-b0", "--threshold", 0.3],
    ],
    ids=["plain", "classes", "noisy", "timm"],
)
def test_every_network_trains_and_its_checkpoint_outlines(split_data, tmp_path, options, capsys):
    run(split_data, tmp_path, *options)
    assert "segmenter.pt: epoch 1, validation Dice " in capsys.readouterr().out
    model, facts = load_segmenter(tmp_path / "segmenter.pt")
    pack = load_pack(split_data, "val", 32)
    found = segment(model, pack.image, pack.series_of, facts["thresholds"]["lesion"]["value"])
    assert found.shape == pack.image.shape
    assert found.max() <= len(facts["classes"])
    assert (facts["stage"], facts["task"]) == ("segmenter", "lesion")
    assert facts["classes"] == (list(LESION_CLASSES) if "lesions" in options else ["lesion"])
    assert facts["model"]["kwargs"]["classes"] == facts["classes"]
    assert facts["input"] == ("noisy" if "noisy" in options else "clean")
    assert (facts["dose_model"], facts["doses"]) == (
        ("calibrated", [5.0]) if "noisy" in options else (None, [])
    )
    assert facts["parents"] == {}
    patients = {
        m["patient_id"] for split in ("train", "val") for m in load_pack(split_data, split, 32).series
    }
    assert set(facts["trained_on"]) == patients
    card = json.loads((tmp_path / "segmenter.card.json").read_text())
    assert card["thresholds"] == facts["thresholds"]


def test_segmenter_behind_a_denoiser_names_its_parent_and_has_seen_its_patients(split_data, tmp_path):
    words = ["--data", split_data, "--out", tmp_path, *TOY, "--widths", 2, 4]
    train_denoiser.main([str(word) for word in words])
    run(split_data, tmp_path, *SMALL, "--input", "denoised", "--doses", 5)
    facts = checkpoints.load(tmp_path / "segmenter.pt", "segmenter")
    parent = facts["parents"]["denoiser"]
    assert parent == {"path": "denoiser.pt", "sha256": checkpoints.file_sha256(tmp_path / "denoiser.pt")}
    assert facts["doses"] == [5.0]
    assert (
        "val with 95% of normal scans clean, denoised slices, calibrated 5 in turn"
        in (facts["thresholds"]["lesion"]["origin"])
    )


def test_wrong_checkpoints_are_refused_by_name(split_data, tmp_path):
    common = ["--data", split_data, "--out", tmp_path]
    train_classifier.main([str(word) for word in [*common, *TOY, "--width", 4]])
    run(split_data, tmp_path, *SMALL)
    with pytest.raises(stage.InputError, match=r"segmenter\.pt: is a segmenter; a denoiser is needed"):
        load_denoiser(tmp_path / "segmenter.pt")
    with pytest.raises(stage.InputError, match=r"segmenter\.pt: is a segmenter; a classifier is needed"):
        load_classifier(tmp_path / "segmenter.pt")
    with pytest.raises(stage.InputError, match=r"classifier\.pt: is a classifier; a segmenter is needed"):
        run(split_data, tmp_path, *SMALL, "--name", "two", "--finetune", tmp_path / "classifier.pt")
    with pytest.raises(stage.InputError, match=r"classifier\.pt: is a classifier; a denoiser is needed"):
        more = ["--input", "denoised", "--denoiser", tmp_path / "classifier.pt"]
        run(split_data, tmp_path, *SMALL, "--name", "two", *more)
    with pytest.raises(stage.InputError, match=r"none\.pt: no such checkpoint \(run train_segmenter\.py"):
        load_segmenter(tmp_path / "none.pt")
    assert not (tmp_path / "two.pt").exists()


def test_finetune_begins_with_the_parents_weights_and_names_it(split_data, tmp_path):
    run(split_data, tmp_path, *SMALL)
    parent = tmp_path / "segmenter.pt"
    still = ["--lr", 1e-12, "--weight-decay", 0]
    run(split_data, tmp_path, *SMALL, *still, "--name", "two", "--finetune", parent)
    one, two = (checkpoints.load(tmp_path / f"{name}.pt", "segmenter") for name in ("segmenter", "two"))
    for name, value in one["state"].items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(two["state"][name], value)
    assert two["parents"]["finetune"]["sha256"] == checkpoints.file_sha256(parent)
    with pytest.raises(stage.InputError, match=r"--finetune .*segmenter\.pt: is .*'widths': \[4, 8\]"):
        run(split_data, tmp_path, *TOY, "--widths", 4, "--name", "three", "--finetune", parent)


@pytest.mark.parametrize("after", [2, 4])
def test_resumed_training_ends_with_the_same_weights(split_data, tmp_path, monkeypatch, after):
    words = [*SMALL[:2], "--epochs", 2, *SMALL[4:], "--classes", "lesions", "--slices", 3]
    run(split_data, tmp_path / "whole", *words)
    calls, loss = [], SEGMENTATION_LOSSES["bce-dice"]

    def stops(logits, mask):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return loss(logits, mask)

    monkeypatch.setitem(SEGMENTATION_LOSSES, "bce-dice", stops)
    with pytest.raises(KeyboardInterrupt):
        run(split_data, tmp_path / "parts", *words)
    monkeypatch.undo()
    run(split_data, tmp_path / "parts", *words, "--resume")
    one, two = (
        checkpoints.load(tmp_path / part / "segmenter.pt", "segmenter") for part in ("whole", "parts")
    )
    assert one["thresholds"] == two["thresholds"]
    for name, value in one["state"].items():
        assert torch.equal(two["state"][name], value), name


def test_samples_show_the_slice_what_was_found_and_what_is_true(split_data, tmp_path):
    run(split_data, tmp_path, *SMALL, "--samples")
    pack = load_pack(split_data, "val", 32)
    pictures = sorted((tmp_path / "segmenter.samples").glob("epoch_001_*.png"))
    assert len(pictures) == min(train_segmenter.SAMPLES, len(pack.series))
    for path in pictures:
        picture = np.asarray(Image.open(path)).astype(int)
        assert picture.shape == (32, 96, 3)
        uid = path.stem.removeprefix("epoch_001_")
        number = next(n for n, metadata in enumerate(pack.series) if metadata["series_uid"] == uid)
        masks = pack.mask[np.flatnonzero(pack.series_of == number)] > 0
        green = picture[:, 64:, 1] > picture[:, 64:, 0]
        np.testing.assert_array_equal(green, masks[masks.sum((1, 2)).argmax()])
        assert (picture[:, :32, 0] == picture[:, :32, 1]).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--encoder", "resnet50"], "--encoder: only for --model timm-unet"),
        (["--pretrained"], "--pretrained: only for --model timm-unet"),
        (["--model", "timm-unet", "--widths", 4], "--widths: only for --model unet"),
        (["--model", "timm-unet", "--weights", "w.pth"], "--weights: give --pretrained too"),
        (
            ["--model", "timm-unet", "--pretrained", "--finetune", "s.pt"],
            "--pretrained: --finetune begins with other weights",
        ),
        (["--doses", 5], "--doses: clean slices have no low dose"),
        (["--dose-model", "poisson"], "--dose-model: clean slices have no low dose"),
        (["--input", "noisy", "--denoiser", "d.pt"], "--denoiser: noisy slices pass none"),
        (["--slices", 2, "--widths", 4, 8], "slices 2: must be odd"),
    ],
)
def test_option_without_effect_or_sense_is_refused(split_data, tmp_path, words, message):
    with pytest.raises((stage.InputError, ValueError), match=message):
        run(split_data, tmp_path, *TOY, *words)
    assert not list(tmp_path.glob("*.pt"))


# ---------------------------------------------------------------- data that lack something


def test_data_without_lesions_are_refused_before_training(split_data, tmp_path):
    rewrite_masks(split_data, "train", lambda masks: masks * 0)
    with pytest.raises(stage.InputError, match=r"train: no lesion in any mask at this size \(other data"):
        run(split_data, tmp_path, *SMALL)


def test_data_without_masks_are_refused(split_data, tmp_path):
    folder = series_folders(split_data, "train")[0]
    stage.write_json(folder / "metadata.json", read_metadata(folder) | {"has_mask": False})
    with pytest.raises(stage.InputError, match="train: not every series has a lesion mask"):
        run(split_data, tmp_path, *SMALL)


def test_one_class_or_unknown_kinds_are_no_classes_to_learn_but_lesions(split_data, tmp_path):
    words = [*SMALL, "--classes", "lesions"]
    rewrite_masks(split_data, "train", lambda masks: ((masks > 0) * 5).astype(np.uint8))
    with pytest.raises(stage.InputError, match=r"one class only, subdural \(take --classes binary\)"):
        run(split_data, tmp_path, *words)
    for split in ("train", "val"):
        rewrite_masks(split_data, split, lambda masks: ((masks > 0) * 255).astype(np.uint8))
    with pytest.raises(stage.InputError, match="train: no lesion of a known class in any mask"):
        run(split_data, tmp_path, *words)
    run(split_data, tmp_path, *SMALL)
    assert checkpoints.load(tmp_path / "segmenter.pt", "segmenter")["validation"]["dice"] >= 0


def test_val_without_lesion_keeps_the_last_epoch_and_says_so(split_data, tmp_path, capsys):
    rewrite_masks(split_data, "val", lambda masks: masks * 0)
    run(split_data, tmp_path, *SMALL[:2], "--epochs", 2, *SMALL[4:])
    assert "val holds no lesion: no Dice to choose by, the last epoch is kept" in capsys.readouterr().err
    facts = checkpoints.load(tmp_path / "segmenter.pt", "segmenter")
    assert facts["validation"]["epoch"] == 2
    origin = "val has no lesion to choose it by"
    assert facts["thresholds"]["lesion"] == {"value": 0.5, "sure": 0.5, "least_ml": 0.0, "origin": origin}
    assert facts["validation"]["false_positive_ml"] >= 0


# ---------------------------------------------------------------- what it learns from


class Blank(torch.nn.Module):
    """A denoiser that gives the slice back."""

    slices, dose_aware = 1, False

    def forward(self, hu, _sigma_hu):
        return hu


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("kind", ["clean", "noisy", "denoised"])
def test_image_and_mask_of_a_batch_stay_aligned_under_augmentation(split_data, kind, slices):
    pack = load_pack(split_data, "train", 48)
    pack.image = np.where(pack.mask > 0, 1000, np.asarray(pack.image).clip(max=100)).astype(np.int16)
    options = {} if kind == "clean" else {"dose_model": "calibrated", "doses": [40]}
    options |= {"denoiser": freeze(Blank())} if kind == "denoised" else {}
    inputs = ReadingInputs(pack, **options)
    weights = (np.asarray(pack.mask) > 0).any((1, 2)).astype(float)
    batches = Batches(pack, batch_size=16, seed=0, device=CPU, weights=weights)
    shared, either, moved = 0, 0, 0
    for batch in batches.epoch(0):
        hu, _ = inputs.draw(batch, slices)
        bright, mask = hu[:, slices // 2 : slices // 2 + 1] > 550, inputs.mask(batch) > 0
        shared, either = shared + (bright & mask).sum().item(), either + (bright | mask).sum().item()
        moved += (mask != (batch.mask > 0)).any(3).any(2).sum().item()
    assert shared / either > 0.93  # what an edge turned by interpolation and by the nearest pixel leaves
    assert moved > 0.8 * len(batches) * 16


def test_sampling_weights_draw_the_share_asked_for():
    foreground = np.arange(100) < 10
    for share in (0.25, 0.5, 1.0):
        weights = sampling_weights(foreground, share)
        assert weights[foreground].sum() / weights.sum() == pytest.approx(share)
        assert len(set(weights[foreground])) == len(set(weights[~foreground])) == 1
    assert sampling_weights(foreground, 0) is None
    assert sampling_weights(np.ones(5, bool), 0.5) is None


# ---------------------------------------------------------------- validation


class Known(torch.nn.Module):
    """Gives logits that were laid down for the slices in order, whatever it sees."""

    slices = 1

    def __init__(self, logits, classes=("lesion",)):
        super().__init__()
        self.logits, self.classes, self.anchor = logits, classes, torch.nn.Parameter(torch.zeros(1))

    def forward(self, hu):
        return self.logits[hu[:, 0, 0, 0].long()]


@pytest.fixture
def val(split_data):
    """The val pack, and images that say which row they are."""
    pack = load_pack(split_data, "val", 32)
    pack.mask = np.array(pack.mask)
    images = np.broadcast_to(np.arange(len(pack))[:, None, None], pack.image.shape)
    return pack, images


def planted(pack, positive, value=1):
    """A square of 8 x 8 lesion pixels in the slices of one series, and nothing elsewhere."""
    pack.mask[:] = 0
    rows = np.flatnonzero(pack.series_of == positive)
    pack.mask[rows, 4:12, 4:12] = value
    return rows


def test_validation_of_the_truth_is_dice_1_and_clean(val):
    pack, images = val
    planted(pack, 0)
    truth = torch.from_numpy(np.where(pack.mask > 0, 9.0, -9.0))[:, None]
    found = Validation(pack, images, None, "x")(Known(truth))
    assert (found["dice"], found["false_positive_ml"], found["clean"]) == (1, 0, 1)
    origin = "largest mean Dice on val with 95% of normal scans clean, x"
    assert found["thresholds"]["lesion"] == {"value": 0.5, "sure": 0.5, "least_ml": 0.0, "origin": origin}


def test_validation_chooses_the_threshold_with_the_largest_dice_of_scans(val):
    pack, images = val
    rows = planted(pack, 0)
    p = np.full(pack.mask.shape, 0.01)
    p[rows, 4:12, 4:20] = 0.22  # twice too large up to here
    p[rows, 4:12, 4:12] = 0.33
    model = Known(torch.logit(torch.from_numpy(p))[:, None])
    chosen = Validation(pack, images, None, "x")(model)
    assert chosen["dice"] == 1
    assert chosen["thresholds"]["lesion"]["value"] == 0.3
    given = Validation(pack, images, 0.2, "x")(model)
    assert given["dice"] == pytest.approx(2 / 3)
    assert given["thresholds"]["lesion"]["value"] == 0.2
    assert given["thresholds"]["lesion"]["origin"].startswith(
        "value: --threshold; sure and least_ml: largest mean"
    )


def test_validation_prefers_a_threshold_that_leaves_normal_scans_clean_to_a_larger_dice(val):
    pack, images = val
    rows = planted(pack, 0)
    p = np.full(pack.mask.shape, 0.01)
    pack.mask[rows, 20:28, 20:28] = 1  # another, apart from the first
    p[rows, 20:28, 20:28] = 0.5
    p[rows, 4:12, 4:12] = 0.97
    p[np.setdiff1d(np.arange(len(pack)), rows), 20:30, 20:30] = 0.6  # in every normal scan
    found = Validation(pack, images, None, "x")(Known(torch.logit(torch.from_numpy(p))[:, None]))
    rule = found["thresholds"]["lesion"]
    assert 0.6 < max(rule["value"], rule["sure"]) < 0.97
    assert (found["dice"], found["clean"]) == (pytest.approx(2 / 3), 1)


def test_validation_outlines_a_lesion_of_which_some_is_sure_to_its_edge(val):
    pack, images = val
    rows = planted(pack, 0)
    p = np.full(pack.mask.shape, 0.01)
    p[rows, 4:12, 4:12] = 0.55
    p[rows, 4:12, 4:8] = 0.97
    p[np.setdiff1d(np.arange(len(pack)), rows), 20:30, 20:30] = 0.6  # more than the lesion, but never sure
    found = Validation(pack, images, None, "x")(Known(torch.logit(torch.from_numpy(p))[:, None]))
    assert (found["dice"], found["clean"]) == (1, 1)
    rule = found["thresholds"]["lesion"]
    assert rule["value"] <= 0.55 and 0.6 < rule["sure"] <= 0.97


def test_validation_rather_drops_specks_than_half_of_the_lesion(val):
    """As above, but what normal scans show is small: the lesion stays whole."""
    pack, images = val
    pack.spacing_mm = lambda _: (5.0, 2.0, 2.0)  # voxels of 0.02 ml
    rows = planted(pack, 0)
    p = np.full(pack.mask.shape, 0.01)
    p[rows, 4:12, 4:12] = 0.5
    p[rows, 4:12, 4:8] = 0.97
    normal = np.setdiff1d(np.arange(len(pack)), rows)[0]
    p[normal, 20, 20] = 0.99
    found = Validation(pack, images, None, "x")(Known(torch.logit(torch.from_numpy(p))[:, None]))
    assert (found["dice"], found["clean"]) == (1, 1)
    rule = found["thresholds"]["lesion"]
    assert (rule["value"], rule["sure"], rule["least_ml"]) == (0.5, 0.5, 0.1)


def test_validation_where_no_threshold_is_clean_takes_the_cleanest(val):
    pack, images = val
    rows = planted(pack, 0)
    p = np.full(pack.mask.shape, 0.01)
    p[rows, 4:12, 4:12] = 0.9995
    p[np.setdiff1d(np.arange(len(pack)), rows), 20:30, 20:30] = 0.9999
    found = Validation(pack, images, None, "x")(Known(torch.logit(torch.from_numpy(p))[:, None]))
    assert (found["dice"], found["clean"]) == (1, 0)
    assert found["thresholds"]["lesion"]["value"] == 0.5


def test_validation_measures_false_volume_on_scans_without_lesion_only(val):
    pack, images = val
    rows = planted(pack, 0)
    logits = np.where(pack.mask > 0, 9.0, -9.0)
    logits[rows, 20:24, 20:24] = 9  # false as well, but its scan has a lesion
    normal = np.flatnonzero(pack.series_of == 1)
    logits[normal[0], :5, :2] = 9
    found = Validation(pack, images, 0.5, "x")(Known(torch.from_numpy(logits)[:, None]))
    voxel_ml = pack.series[1]["spacing_mm"][0] * pack.pixel_mm[normal[0]] ** 2 / 1000
    normals = len(pack.series) - 1
    assert found["false_positive_ml"] == pytest.approx(10 * voxel_ml / normals)
    assert found["clean"] == pytest.approx((normals - 1) / normals)
    assert found["dice"] == pytest.approx(2 * 64 / (64 + 80))


def test_validation_of_classes_scores_each_over_the_scans_that_show_it(val):
    pack, images = val
    rows = planted(pack, 0, value=2)
    other = np.flatnonzero(pack.series_of == 1)
    pack.mask[other, 4:12, 4:12] = 6
    called = pack.mask.copy()
    called[other] = np.where(called[other] > 0, 3, 0)  # found, but of another class
    called[rows[0]] = 0
    logits = 30 * torch.nn.functional.one_hot(torch.from_numpy(called).long(), 7).movedim(-1, 1).float()
    found = Validation(pack, images, None, "x")(Known(logits, LESION_CLASSES))
    share = (len(rows) - 1) / len(rows)
    of_second = 2 * share / (1 + share)
    assert found[f"dice_{LESION_CLASSES[1]}"] == pytest.approx(of_second)
    assert found[f"dice_{LESION_CLASSES[5]}"] == 0
    assert np.isnan(found[f"dice_{LESION_CLASSES[2]}"])
    assert found["dice_mean"] == pytest.approx(of_second / 2)
    assert found["dice"] == pytest.approx((of_second + 1) / 2)  # any lesion


def test_dice_of_classes_leaves_unknown_kinds_out():
    truth = np.array([[[1, 1, lesions.UNKNOWN_KIND, 0]]], np.uint8)
    assert dice_of_classes(truth, np.array([[[1, 1, 1, 0]]], np.uint8), 2)[0] == 1
    assert dice_of_classes(truth, np.array([[[1, 1, 0, 1]]], np.uint8), 2)[0] == pytest.approx(4 / 5)
    assert np.isnan(dice_of_classes(truth, truth, 2)[1])


def test_mean_known_of_nothing_is_unknown():
    values = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]])
    np.testing.assert_array_equal(mean_known(values), [2, 5, np.nan])


# ---------------------------------------------------------------- sets of the field


def write_brain_stroke(root: Path) -> None:
    for seed, (name, kinds) in enumerate(
        {"Bleeding": ["intraparenchymal"], "Ischemia": ["ischemia"], "Normal": []}.items()
    ):
        made = generate_phantom(seed + 20, size=48, slices=24, lesions=kinds)
        keep = np.flatnonzero(made.mask.any(axis=(1, 2))) if kinds else np.arange(9, 15)
        grey = np.rint(window_hu(made.hu[keep].astype(float), 40, 80) * 255).astype(np.uint8)
        test_picture_sets.write_class(root, name, grey, made.mask[keep] > 0)


@pytest.mark.parametrize(
    ("source", "write", "options"),
    [
        ("bhsd", test_nifti_series.write_bhsd, []),
        ("ct-ich", test_nifti_series.write_ct_ich, []),
        ("brain-stroke", write_brain_stroke, ["--assume-window", 40, 80]),
    ],
)
def test_sets_of_the_field_train_through_the_same_commands(tmp_path, source, write, options):
    raw, data = tmp_path / "raw", tmp_path / "data"
    write(raw)
    prepare_dataset.main(["--source", source, "--input", raw, "--out", data, "--max-reject", 1, *options])
    split_dataset.main(["--data", data, "--fractions", 0.5, 0.5, 0])
    run(data, tmp_path / "out", *SMALL)
    facts = checkpoints.load(tmp_path / "out" / "segmenter.pt", "segmenter")
    assert 0 <= facts["validation"]["dice"] <= 1
