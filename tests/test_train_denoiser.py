"""The denoiser stage: every network and objective through its command line, at toy size."""

import json

import numpy as np
import pytest
import torch

import checkpoints
import stage
import train_denoiser
from batches import Batches
from dataset import load_pack
from inference import denoise, load_denoiser

CPU = torch.device("cpu")
COMMON = ["--size", 32, "--epochs", 1, "--batch-size", 8, "--device", "cpu", "--precision", "fp32"]
PROJECTION = ["--dose-model", "projection", "--doses", 0.5, 0.1, "--noise-realisations", 1]
STUDENT = ["--model", "student", "--width", 4, "--epochs_teacher", 1, "--epochs_student", 1, "--lam_perc", 0]


def run(data, out, *more):
    train_denoiser.main([str(word) for word in ("--data", data, "--out", out, *COMMON, *more)])


def parsed(*words):
    return train_denoiser.get_parser().parse_args([str(word) for word in words])


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "nafnet", "--width", 4, "--dose-aware"],
        ["--model", "redcnn", "--width", 4, "--loss", "l1"],
        ["--model", "autoencoder", "--encoder", "baseline", "--width", 2, "--loss", "l1-ssim"],
        ["--widths", 4, 8, "--slices", 3, "--dose-aware", "--loss", "tissue-weighted", "--crop", 24],
        ["--widths", 4, 8, "--loss", "lesion-mse", "--target", "noisy", *PROJECTION],
        ["--widths", 4, 8, "--loss", "tissue-weighted", "--bias-weight", 0.2],
    ],
    ids=lambda options: "-".join(str(word).lstrip("-") for word in options[:4]),
)
def test_every_network_trains_and_its_checkpoint_denoises(split_data, tmp_path, options):
    run(split_data, tmp_path, *options)
    model, facts = load_denoiser(tmp_path / "denoiser.pt")
    pack = load_pack(split_data, "val", 32)
    denoised = denoise(model, pack.image, 10.0, pack.series_of)
    assert denoised.shape == pack.image.shape
    assert np.isfinite(denoised).all()
    assert facts["model"]["name"] == (options[1] if options[0] == "--model" else "unet")
    if "--dose-aware" in options:
        assert model.dose_aware


def test_bias_weight_adds_the_mean_errors_of_tissues_to_the_loss(split_data, tmp_path):
    losses = []
    for name, more in (("plain", []), ("once", ["--bias-weight", 1]), ("twice", ["--bias-weight", 2])):
        run(split_data, tmp_path, "--widths", 4, 8, "--lr", 1e-12, "--name", name, *more)
        losses.append(json.loads((tmp_path / f"{name}.jsonl").read_text())["train_loss"])
    plain, once, twice = losses
    assert once > plain
    assert twice - plain == pytest.approx(2 * (once - plain), rel=1e-4)


def test_student_learns_before_its_teachers_decoder_which_does_not_change(split_data, tmp_path):
    run(split_data, tmp_path, *STUDENT, "--encoder", "resnet")
    teacher = checkpoints.load(tmp_path / "denoiser.teacher.pt", "denoiser")
    student = checkpoints.load(tmp_path / "denoiser.pt", "denoiser")
    decoder = [key for key in teacher["state"] if key.startswith("decoder.")]
    assert decoder
    for key in decoder:
        assert torch.equal(teacher["state"][key], student["state"][key]), key
    assert student["parents"]["teacher"]["path"] == "denoiser.teacher.pt"
    assert student["model"]["kwargs"]["dose_aware"]
    assert "dose_aware" not in teacher["model"]["kwargs"]
    encoder = [key for key in teacher["state"] if key.startswith("encoder.") and key in student["state"]]
    assert not all(torch.equal(teacher["state"][key], student["state"][key]) for key in encoder)


def first_losses(data, out, name, *more):
    """train_loss of the first epoch, of teacher and student, with weights that hardly move."""
    run(data, out, *STUDENT, "--encoder", "resnet", "--lr", 1e-12, "--name", name, *more)
    paths = out / f"{name}.teacher.jsonl", out / f"{name}.jsonl"
    return [json.loads(path.read_text()) for path in paths]


def test_window_of_teacher_and_student_is_that_of_their_losses_and_checkpoints(split_data, tmp_path):
    more = ["--width", 16, "--alpha-ssim", 0]
    wide = first_losses(split_data, tmp_path, "wide", *more)
    narrow = first_losses(split_data, tmp_path, "narrow", *more, "--window", 40, 200)
    for name, window in (("wide", (0, 2000)), ("narrow", (40, 200))):
        for end in (".teacher", ""):
            model, _ = load_denoiser(tmp_path / f"{name}{end}.pt")
            assert model.window == window
    # untrained networks of this width give their input back: the same error, in other units
    assert narrow[1]["train_reconstruction"] == pytest.approx(10 * wide[1]["train_reconstruction"], rel=1e-3)


def test_loss_of_a_student_stands_for_l1_in_both_stages(split_data, tmp_path):
    default, absolute, weighted = (
        [one["train_loss"] for one in first_losses(split_data, tmp_path, name, *more)]
        for name, more in (
            ("default", []),
            ("absolute", ["--loss", "l1"]),
            ("weighted", ["--loss", "tissue-weighted"]),
        )
    )
    assert absolute == default
    for one, other in zip(weighted, default, strict=True):
        assert one != pytest.approx(other, rel=0.02)


def test_window_of_a_plain_network_reaches_it(split_data, tmp_path):
    run(split_data, tmp_path, "--widths", 4, 8, "--window", 35, 300)
    assert load_denoiser(tmp_path / "denoiser.pt")[0].window == (35, 300)


def test_student_of_a_given_teacher_trains_no_other(split_data, tmp_path):
    run(split_data, tmp_path / "one", *STUDENT, "--encoder", "baseline", "--no-dose-aware")
    teacher = tmp_path / "one" / "denoiser.teacher.pt"
    words = [word for word in STUDENT if word not in ("--epochs_teacher",)]
    words.pop(words.index(1))  # its value
    more = ["--encoder", "baseline", "--no-dose-aware", "--teacher", teacher]
    run(split_data, tmp_path / "two", *words, *more)
    assert not (tmp_path / "two" / "denoiser.teacher.pt").exists()
    alone = checkpoints.load(tmp_path / "two" / "denoiser.pt", "denoiser")
    together = checkpoints.load(tmp_path / "one" / "denoiser.pt", "denoiser")
    assert alone["parents"] == together["parents"]
    for key, value in together["state"].items():
        assert torch.equal(alone["state"][key], value), key


def test_student_refuses_a_teacher_that_is_none_or_does_not_fit(split_data, tmp_path):
    run(split_data, tmp_path, "--widths", 4, 8, "--name", "unet")
    run(split_data, tmp_path, *STUDENT, "--encoder", "baseline", "--name", "baseline")
    words = ["--model", "student", "--width", 4, "--lam-perc", 0, "--encoder", "resnet"]
    with pytest.raises(stage.InputError, match=r"unet\.pt: is a unet; --teacher needs an autoencoder"):
        run(split_data, tmp_path, *words, "--teacher", tmp_path / "unet.pt")
    with pytest.raises(stage.InputError, match=r"baseline\.teacher\.pt.*same encoder"):
        run(split_data, tmp_path, *words, "--teacher", tmp_path / "baseline.teacher.pt")


@pytest.mark.parametrize("more", [["--dose-aware"], ["--slices", 3]], ids=["dose-aware", "2.5d"])
def test_student_refuses_a_teacher_that_sees_more_than_a_slice(split_data, tmp_path, more):
    run(
        split_data,
        tmp_path,
        "--model",
        "autoencoder",
        "--encoder",
        "resnet",
        "--width",
        4,
        "--name",
        "t",
        *more,
    )
    words = ["--model", "student", "--width", 4, "--lam-perc", 0, "--encoder", "resnet"]
    with pytest.raises(stage.InputError, match=r"t\.pt: a teacher sees one slice and no dose"):
        run(split_data, tmp_path, *words, "--teacher", tmp_path / "t.pt")


def test_resume_names_a_network_that_a_preset_now_shapes_otherwise(split_data, tmp_path, monkeypatch):
    words = ["--model", "unet-cpu", "--resume"]
    monkeypatch.setitem(train_denoiser.PRESETS, "unet-cpu", ("unet", {"widths": [4, 8]}))
    run(split_data, tmp_path, *words)
    run(split_data, tmp_path, *words)
    monkeypatch.setitem(train_denoiser.PRESETS, "unet-cpu", ("unet", {"widths": [4, 12]}))
    with pytest.raises(stage.InputError, match=r"was trained otherwise: network .*\[4, 8\].*\[4, 12\]"):
        run(split_data, tmp_path, *words)


def test_per_dose_trains_a_network_for_each_dose(split_data, tmp_path):
    run(split_data, tmp_path, "--widths", 4, 8, "--per-dose", "--doses", 5, 20, "--seeds", 1, 2)
    names = {path.name for path in tmp_path.glob("*.pt") if not path.name.endswith("last.pt")}
    assert names == {f"denoiser.seed{seed}.dose{dose}.pt" for seed in (1, 2) for dose in (5, 20)}
    five = checkpoints.load(tmp_path / "denoiser.seed1.dose5.pt", "denoiser")
    assert five["doses"] == [5.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nafnet", "--widths", 4, 8], "--widths: only for --model unet"),
        (["--width", 4], "--width: only for --model nafnet, redcnn, autoencoder, student"),
        (["--model", "redcnn", "--encoder", "resnet"], "--encoder: only for --model autoencoder, student"),
        (["--lam-lat", 2], "--lam-lat: only for --model student"),
        (["--teacher", "x.pt"], "--teacher: only for --model student"),
        (["--model", "student", "--loss", "mse"], "--loss mse: a student has other terms too"),
        (["--model", "student", "--bias-weight", 1], "--bias-weight: the student has no such term"),
        (["--window", 40, 0], "--window 40 0: must be finite, and its width above 0 HU"),
        (["--window", 40, "nan"], "--window 40 nan: must be finite"),
        (["--window", "inf", 80], "--window inf 80: must be finite"),
        (["--model", "student", "--lam-perc", 0, "--window", 40, -80], "--window 40 -80: must be"),
        (["--bias-weight", 0], "--bias-weight"),
        (["--model", "student", "--teacher", "x.pt", "--epochs-teacher", 3], "--epochs-teacher"),
        (["--model", "student", "--lam-perc", 0, "--perceptual", "vgg19"], "--lam-perc 0"),
        (["--crop", 64], "--crop 64: slices have 32 x 32"),
        (["--slices", 2], "slices 2: must be odd"),
    ],
)
def test_option_without_effect_or_sense_is_refused(split_data, tmp_path, words, message):
    with pytest.raises((stage.InputError, ValueError), match=message.replace(".", r"\.")):
        run(split_data, tmp_path, *words)


@pytest.fixture
def batch_and_data(split_data):
    def made(*words):
        args = parsed("--data", split_data, "--size", 32, *words)
        doses = train_denoiser.check_doses(args.dose_model or "calibrated", args.doses)
        data = train_denoiser.Data(args, CPU, doses)
        batches = Batches(data.train, batch_size=8, seed=0, device=CPU)
        return next(iter(batches.epoch(0))), data

    return made


def test_views_crop_low_and_target_alike(batch_and_data):
    batch, data = batch_and_data("--crop", 16, "--doses", 40)  # the full dose adds nothing
    low, sigma, target, full = data.views(batch, 1)
    assert low.shape == (8, 1, 16, 16)
    assert torch.equal(low, target)
    assert torch.equal(full, data.full(batch))
    assert sigma.tolist() == pytest.approx([4.08] * 8, abs=0.01)


def test_views_with_neighbours_hold_the_slice_in_the_middle(batch_and_data):
    batch, data = batch_and_data("--doses", 40)
    low, *_ = data.views(batch, 3)
    assert low.shape == (8, 3, 32, 32)
    one, *_ = data.views(batch, 1)
    assert torch.equal(low[:, 1:2], one)
    pack = data.train
    for place, row in enumerate(batch.rows):
        after = row + 1 if row + 1 < len(pack) and pack.series_of[row + 1] == pack.series_of[row] else row
        wanted = torch.from_numpy(pack.image[after].astype(np.float32))
        wanted = wanted.flip(-1) if batch.seeds[place] % 2 == 1 else wanted
        assert torch.equal(low[place, 2], wanted)


def test_noisy_target_is_another_realisation_of_the_same_dose(batch_and_data):
    batch, data = batch_and_data("--target", "noisy", "--doses", 5)
    low, _, target, full = data.views(batch, 1)
    one, other = (low - full).flatten(), (target - full).flatten()
    assert one.std() == pytest.approx(other.std().item(), rel=0.1)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


def test_true_target_is_the_slice_without_noise_moved_like_its_low_dose(batch_and_data):
    batch, data = batch_and_data("--target", "truth", "--doses", 40)
    low, _, target, full = data.views(batch, 1)
    assert torch.equal(full, target)  # what a student's teacher sees
    assert torch.equal(data.full(batch), target)  # and learns
    for place, row in enumerate(batch.rows):
        wanted = torch.from_numpy(data.train.truth[row].astype(np.float32))
        assert torch.equal(target[place, 0], wanted.flip(-1) if batch.moves[place] % 2 == 1 else wanted)
    assert 1 < (low - target)[target > 0].std() < 6  # the noise of the scan is in the input alone


def test_true_target_without_noise_free_slices_is_refused(batch_and_data, split_data):
    for truth in split_data.glob("*/*/*/truth.npz"):
        truth.unlink()
    for path in split_data.glob("*/*/metadata.json"):
        path.write_text(path.read_text().replace('"has_truth": true', '"has_truth": false'))
    with pytest.raises(stage.InputError, match="--target truth: .* has no noise-free slices"):
        batch_and_data("--target", "truth")


def test_teacher_is_scored_and_shown_on_what_it_is_to_give_back(split_data, tmp_path):
    for target in ("clean", "truth"):
        more = ["--encoder", "resnet", "--width", 16, "--target", target, "--name", target, "--samples"]
        run(split_data, tmp_path, *STUDENT, *more, "--lr", 1e-12)
        scores = json.loads((tmp_path / f"{target}.teacher.jsonl").read_text())
        assert scores["rmse_hu"] < 0.1  # an untrained one returns its input
        assert scores["rmse_hu_noisy"] == 0
        student = json.loads((tmp_path / f"{target}.jsonl").read_text())
        assert student["rmse_hu"] == pytest.approx(student["rmse_hu_noisy"], rel=1e-3)
        assert student["rmse_hu"] > 5
        pictures = [path.name for path in (tmp_path / f"{target}.teacher.samples").rglob("*.png")]
        assert pictures
        assert all("dose_1" in name for name in pictures)
