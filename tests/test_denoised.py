"""A denoiser alone: its figures against ones computed here, its slices as files, and what is refused."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import anatomy
import checkpoints
import denoised
import metrics
import stage
import train_denoiser
from array_sets import discover_npz, read_npz
from dataset import load_pack, read_metadata, read_slices, read_splits, series_folders
from inference import ROUTINE_NOISE_HU, denoise, load_denoiser
from low_dose import LowDose, evaluation_seed, noise_level, simulate_scan
from models import build_model
from volumes import AIR_HU, MAX_HU

KWARGS = {"widths": [4, 8], "dose_aware": True}


def run(*words):
    train_denoiser.main([str(word) for word in (*words, "--device", "cpu")])


@pytest.fixture
def checkpoint(split_data, tmp_path):
    return save(tmp_path / "models" / "tiny.pt", split_data)


def save(path, data, seed=0, trained_on=None):
    """A tiny network with weights of its own, as training would leave it."""
    torch.manual_seed(seed)
    model = build_model("unet", **KWARGS)
    with torch.no_grad():  # one that does something, as a fresh one gives its input back
        for value in model.parameters():
            value += 0.02 * torch.randn_like(value)
    splits = read_splits(data)
    if trained_on is None:
        trained_on = [patient for patient, split in splits["patients"].items() if split != "test"]
    content = {
        "format": checkpoints.FORMAT,
        "stage": "denoiser",
        "model": {"name": "unet", "kwargs": KWARGS},
        "state": model.state_dict(),
        "size": 48,
        "dose_model": "calibrated",
        "doses": [5.0, 20.0],
        "split_hash": splits["hash"],
        "trained_on": trained_on,
        "parents": {},
    }
    checkpoints.save(path, content)
    return path


# ---------------------------------------------------------------- figures


def test_evaluation_gives_the_metrics_of_the_study_and_the_bias(split_data, checkpoint, tmp_path, capsys):
    run("--evaluate", checkpoint, "--data", split_data, "--results", tmp_path / "results", "--seed", 7)
    folder = tmp_path / "results" / "denoiser" / "tiny"
    with (folder / "metrics_summary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["dose"], row["image"]) for row in rows] == [
        *(("5.0", "noisy"), ("5.0", "denoised"), ("20.0", "noisy"), ("20.0", "denoised"))
    ]
    pack, (model, _) = load_pack(split_data, "test", 48), load_denoiser(checkpoint)
    low, every = LowDose(pack, "calibrated", [5.0, 20.0]), np.arange(len(pack))
    inside, patients = pack.masks(anatomy.MASKS["brain"]), pack.patient_ids()
    classes = pack.masks(anatomy.tissue_classes)
    for row in rows:
        dose = [float(row["dose"])] * len(pack)
        images = low.evaluation(every, dose, 7)
        if row["image"] == "denoised":
            images = denoise(model, images, low.levels(every, dose), pack.series_of)
        quality = metrics.image_quality(images, pack.truth, inside, patients)
        for name, value in quality.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-5)  # float32 of other batches
        for tissue in denoised.BIAS_TISSUES:
            errors = np.where(classes == anatomy.TISSUES[tissue], images.astype(float) - pack.truth, np.nan)
            own = [errors[patients == patient] for patient in np.unique(patients)]
            wanted = np.mean([np.nanmean(one) for one in own if not np.isnan(one).all()])
            assert float(row[f"bias_{tissue}_hu"]) == pytest.approx(wanted, abs=1e-3)
        assert (row["n_patients"], row["n_slices"]) == (str(len(set(patients))), str(len(pack)))
        assert (row["mask"], row["range_hu"], row["reference"]) == ("brain", "0..80", "truth")
    manifest = json.loads((folder / "metrics_summary.json").read_text())["manifest"]
    assert manifest["checkpoint"]["sha256"] == checkpoints.file_sha256(checkpoint)
    assert (manifest["split_hash"], manifest["noise_seed"]) == (pack.split_hash, 7)
    assert f"RMSE {float(rows[1]['rmse_hu']):6.2f} HU" in capsys.readouterr().out
    for dose in (5, 20):
        names = {path.name for path in (folder / f"dose_{dose}").iterdir()}
        assert names == {f"{one['series_uid']}_00002.png" for one in pack.series[: denoised.PICTURES]}


def test_evaluation_again_leaves_no_picture_of_the_last_one(split_data, checkpoint, tmp_path):
    words = ("--evaluate", checkpoint, "--data", split_data, "--results", tmp_path / "results")
    run(*words, "--doses", 1)
    run(*words, "--dose-model", "projection", "--doses", 0.25)
    folder = tmp_path / "results" / "denoiser" / "tiny"
    assert not list(folder.glob("dose_1/*.png"))
    assert list(folder.glob("dose_0.25/*.png"))


def test_evaluation_of_a_classical_method_lowers_the_error(split_data, tmp_path):
    words = ("--data", split_data, "--results", tmp_path, "--doses", 5, "--split", "val")
    run("--evaluate", "tv", *words)
    content = json.loads((tmp_path / "denoiser" / "tv" / "metrics_summary.json").read_text())
    noisy, output = content["rows"]
    assert output["rmse_hu"] < 0.8 * noisy["rmse_hu"]
    assert content["manifest"]["checkpoint"] == {"path": "tv", "sha256": None}
    assert {row["split"] for row in content["rows"]} == {"val"}


def test_evaluation_of_validation_patients_says_that_they_were_seen(split_data, checkpoint, tmp_path, capsys):
    words = ("--data", split_data, "--results", tmp_path, "--doses", 5, "--split", "val")
    run("--evaluate", checkpoint, *words)
    assert "were seen in its training or validation" in capsys.readouterr().out


def test_triplet_shows_three_slices_turned_alike_with_notes_below():
    images = [np.full((40, 40), hu, np.float32) for hu in (0, 40, 80)]
    images[0][:20] = 80  # the back of a scan whose rows run to the front
    affine = np.diag([1.0, -1.0, 1.0, 1.0])
    picture = np.asarray(Image.open(io.BytesIO(denoised.triplet(images, ["a\nb"] * 3, affine))))
    side = denoised.TILE_PX
    assert picture.shape == (side + denoised.NOTE_PX, 3 * side)
    assert (picture[side // 4, side // 2], picture[3 * side // 4, side // 2]) == (0, 255)
    assert (picture[side // 2, 3 * side // 2], picture[side // 2, 5 * side // 2]) == (128, 255)
    for place in range(3):
        assert picture[side:, place * side : (place + 1) * side].max() == 255


# ---------------------------------------------------------------- slices


def expected(folder, model, dose=None, seed=42):
    metadata = read_metadata(folder)
    hu, noise = read_slices(folder, "image", metadata["shape"][0]), metadata["noise_hu"]
    given, level = hu, ROUTINE_NOISE_HU if noise is None else noise
    if dose is not None:
        uid, count = metadata["series_uid"], len(hu)
        seeds = [evaluation_seed(seed, uid, index, "projection", dose) for index in range(count)]
        own = float("nan") if noise is None else noise
        spacing = metadata["spacing_mm"]
        given = simulate_scan(hu, "projection", [dose] * count, seeds, spacing_mm=spacing, noise_hu=own)
        level = noise_level("projection", dose, own)
    whole = denoise(model, given, level).round().clip(AIR_HU, MAX_HU).astype(np.int16)
    return np.where(hu == AIR_HU, np.int16(AIR_HU), whole)


@pytest.mark.parametrize("dose", [None, 0.1])
def test_exported_data_set_holds_what_inference_gives_and_is_prepared_data(
    split_data, checkpoint, tmp_path, dose
):
    out = tmp_path / "out"
    more = [] if dose is None else ["--doses", dose, "--dose-model", "projection"]
    words = ("--export-denoised", "--checkpoint", checkpoint, "--data", split_data, "--out", out)
    for split in ("val", "test") if dose is None else ("test",):
        run(*words, "--export-split", split, *more)
    model, _ = load_denoiser(checkpoint)
    for folder in series_folders(split_data, "test"):
        final = out / "test" / folder.name
        before, after = read_metadata(folder), read_metadata(final)
        wanted = expected(folder, model, dose)
        np.testing.assert_array_equal(read_slices(final, "image", len(wanted)), wanted)
        assert not np.array_equal(wanted, read_slices(folder, "image", len(wanted)))
        for kind in ("mask", "truth"):
            kept, source = (read_slices(place, kind, len(wanted)) for place in (final, folder))
            np.testing.assert_array_equal(kept, source)
        same = ("patient_id", "series_uid", "labels", "spacing_mm", "affine", "shape", "source")
        assert [before[name] for name in same] == [after[name] for name in same]
        assert after["denoised"] == {
            "layout": "dataset",
            "denoiser": "tiny.pt",
            "sha256": checkpoints.file_sha256(checkpoint),
            "dose_model": None if dose is None else "projection",
            "dose": dose,
            "noise_seed": None if dose is None else 42,
        }
    pack, source = load_pack(out, "test", 48), load_pack(split_data, "test", 48)
    assert pack.labels == source.labels
    assert pack.split_hash == source.split_hash


def test_exported_samples_are_read_back_by_the_reader_of_the_earlier_system(split_data, checkpoint, tmp_path):
    words = ("--export-denoised", "--export-split", "val", "--checkpoint", checkpoint, "--data", split_data)
    run(*words, "--out", tmp_path / "out", "--export-layout", "samples")
    model, _ = load_denoiser(checkpoint)
    folders = series_folders(split_data, "val")
    wanted = np.concatenate([expected(folder, model) for folder in folders])
    masks = np.concatenate([read_slices(folder, "mask", 6) for folder in folders])
    jobs, _ = discover_npz(tmp_path / "out")
    scans = [read_npz(job) for job in sorted(jobs, key=lambda job: job.case)]
    assert len(scans) == len(wanted)
    np.testing.assert_array_equal(np.concatenate([scan.hu for scan in scans]), wanted)
    np.testing.assert_array_equal(np.concatenate([scan.mask for scan in scans]) > 0, masks > 0)
    assert {scan.split for scan in scans} == {"val"}
    assert len({scan.patient_id for scan in scans}) == len({read_metadata(f)["patient_id"] for f in folders})
    assert (tmp_path / "out" / "val" / "sample_00000" / "mask.npz").exists()


@pytest.mark.parametrize("layout", sorted(denoised.LAYOUTS))
def test_export_stopped_inside_a_series_goes_on_there(split_data, checkpoint, tmp_path, monkeypatch, layout):
    words = ["--export-denoised", "--export-split", "train", "--checkpoint", checkpoint, "--data", split_data]
    words += ["--export-layout", layout]
    run(*words, "--out", tmp_path / "whole")
    module = "dataset.write_npz" if layout == "dataset" else "denoised.write_npz"
    real, written = denoised.write_npz, []

    def dies(path, array):
        written.append(path)
        if len(written) == 30:  # files of the second series are half there, as a kill leaves them
            raise KeyboardInterrupt
        real(path, array)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module, dies)
        with pytest.raises(KeyboardInterrupt):
            run(*words, "--out", out)
    assert list((out / "train").glob(".*.partial"))
    assert not json.loads((out / "export.json").read_text())["splits"]["train"]["complete"]
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("[!.]*/image.npz")}
    kept = {path: time for path, time in kept.items() if ".partial" not in str(path)}
    assert kept
    run(*words, "--out", out)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    files = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    whole = {p.relative_to(tmp_path / "whole"): p.read_bytes() for p in (tmp_path / "whole").rglob("*.*z")}
    assert {path: content for path, content in files.items() if path.suffix == ".npz"} == whole
    assert not list((out / "train").glob(".*.partial"))
    assert json.loads((out / "export.json").read_text())["splits"]["train"]["complete"]


def test_export_denoises_real_low_doses_where_they_are_asked_for(split_data, checkpoint, tmp_path):
    words = ("--export-denoised", "--export-split", "val", "--checkpoint", checkpoint, "--data", split_data)
    with pytest.raises(stage.InputError, match="has no real low dose of 0.25"):
        run(*words, "--out", tmp_path / "out", "--dose-model", "measured", "--doses", 0.25)
    for folder in series_folders(split_data, "val"):
        metadata = read_metadata(folder)
        metadata["low_doses"] = ["0.25"]
        stage.write_json(folder / "metadata.json", metadata)
        for index in range(6):
            truth = (folder / f"{index:05d}" / "truth.npz").read_bytes()
            (folder / f"{index:05d}" / "low_0.25.npz").write_bytes(truth)
    run(*words, "--out", tmp_path / "out", "--dose-model", "measured", "--doses", 0.25)
    model, _ = load_denoiser(checkpoint)
    folder = series_folders(split_data, "val")[0]
    level = noise_level("measured", 0.25, read_metadata(folder)["noise_hu"] or float("nan"))
    wanted = denoise(model, read_slices(folder, "truth", 6), level).round()
    found, hu = (read_slices(f, "image", 6) for f in (tmp_path / "out" / "val" / folder.name, folder))
    measured = hu != AIR_HU
    np.testing.assert_array_equal(found[measured], wanted.clip(AIR_HU, MAX_HU)[measured])


# ---------------------------------------------------------------- refusals


def test_export_into_another_one_is_refused(split_data, checkpoint, tmp_path):
    words = ("--export-denoised", "--export-split", "val", "--data", split_data, "--out", tmp_path / "out")
    run(*words, "--checkpoint", checkpoint)
    other = save(tmp_path / "other" / "tiny.pt", split_data, seed=1)
    with pytest.raises(stage.InputError, match="was exported with sha256"):
        run(*words, "--checkpoint", other)
    with pytest.raises(stage.InputError, match=r"was exported with dose_model None, not calibrated"):
        run(*words, "--checkpoint", checkpoint, "--doses", 5)
    with pytest.raises(stage.InputError, match="was exported with layout dataset, not samples"):
        run(*words, "--checkpoint", checkpoint, "--export-layout", "samples")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(stage.InputError, match="is not empty and holds no export"):
        run(*words[:-1], tmp_path / "full", "--checkpoint", checkpoint)


def test_export_locked_by_another_run_or_without_room_stops(split_data, checkpoint, tmp_path, monkeypatch):
    words = ("--export-denoised", "--export-split", "val", "--data", split_data, "--checkpoint", checkpoint)
    with (
        stage.lock(tmp_path / "out" / ".lock"),
        pytest.raises(stage.StageError, match="in use by") as refused,
    ):
        run(*words, "--out", tmp_path / "out")
    assert refused.value.exit_code == stage.EXIT_LOCKED

    class Full:
        free = 10

    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: Full)
    with pytest.raises(stage.StageError, match="free some space") as refused:
        run(*words, "--out", tmp_path / "out")
    assert refused.value.exit_code == stage.EXIT_DISK


def test_denoiser_that_has_seen_a_test_patient_is_refused(split_data, tmp_path):
    everybody = list(read_splits(split_data)["patients"])
    path = save(tmp_path / "leaky.pt", split_data, trained_on=everybody)
    common = ("--data", split_data)
    with pytest.raises(stage.InputError, match="was trained on .* test patients"):
        run("--evaluate", path, *common, "--results", tmp_path / "results")
    with pytest.raises(stage.InputError, match="was trained on .* test patients"):
        run(
            "--export-denoised",
            "--export-split",
            "test",
            "--checkpoint",
            path,
            *common,
            "--out",
            tmp_path / "o",
        )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "val"], "--split: only with --evaluate"),
        (["--export-layout", "samples"], "--export-layout: only with --export-denoised"),
        (["--evaluate", "x.pt", "--checkpoint", "y.pt"], "--checkpoint: only with --export-denoised"),
        (["--evaluate", "x.pt", "--export-denoised"], "one at a time"),
        (["--evaluate", "x.pt"], "x.pt: no such checkpoint"),
        (["--export-denoised"], "--export-split: missing"),
        (["--export-denoised", "--export-split", "val", "--doses", 5, 10], "an export has one dose"),
        (
            ["--export-denoised", "--export-split", "val", "--checkpoint", "tv", "--dose-model", "poisson"],
            "--dose-model: says how --doses is simulated",
        ),
    ],
)
def test_option_without_its_mode_or_sense_is_refused(split_data, words, message):
    with pytest.raises(stage.InputError, match=message):
        run("--data", split_data, *words)


def test_options_of_these_modes_are_no_part_of_a_training():
    args = train_denoiser.training_only(train_denoiser.get_parser().parse_args([]))
    assert not {"evaluate", "export_denoised", "split", "results", "checkpoint"} & set(vars(args))
