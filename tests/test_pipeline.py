"""The whole pipeline through its command lines at toy size, and what it says when something is wrong."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import nibabel as nib
import numpy as np
import pytest

import checkpoints
import predict
import prepare_dataset
import run_experiments
import split_dataset
import stage
import train_classifier
import train_denoiser
from dataset import all_series, fit_to_square, load_pack, read_metadata, read_slices
from inference import classify, denoise, load_classifier, load_denoiser
from phantom import generate_phantom
from tables import COLUMNS
from tests.conftest import ROOT
from tests.test_dicom_series import write_slice

DENOISER = ["--widths", 4, 8, "--epochs", 2, "--batch-size", 8, "--device", "cpu"]
CLASSIFIER = ["--width", 4, "--epochs", 2, "--batch-size", 8, "--device", "cpu"]


def call(module, *args):
    module.main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def trained(split_data_once, tmp_path_factory):
    """(data, models) after the training stages; only to be read."""
    data = shutil.copytree(split_data_once, tmp_path_factory.mktemp("pipeline") / "dataset")
    models = tmp_path_factory.mktemp("models")
    common = ["--data", data, "--out", models]
    call(train_denoiser, *common, *DENOISER, "--lr", "1e-2")
    call(train_classifier, *common, *CLASSIFIER)
    call(train_classifier, *common, *CLASSIFIER, "--input", "noisy", "--name", "classifier_noisy")
    call(train_classifier, *common, *CLASSIFIER, "--input", "denoised", "--name", "classifier_denoised")
    return data, models


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_study_writes_every_arm_dose_and_level_twice_the_same(trained, tmp_path, capsys):
    data, models = trained
    arguments = ["--data", data, "--models", models, "--device", "cpu"]
    call(run_experiments, *arguments, "--out", tmp_path / "one")
    table = capsys.readouterr().out
    call(run_experiments, *arguments, "--out", tmp_path / "two")
    assert table.replace("one", "two") == capsys.readouterr().out
    csvs = [(tmp_path / name / "experiments.csv").read_bytes() for name in ("one", "two")]
    assert csvs[0] == csvs[1]
    rows = read_csv(tmp_path / "one" / "experiments.csv")
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 5 * 4 * 2
    assert {row["arm"] for row in rows} == {"1", "1n", "2", "2d"}
    for row in rows:
        assert (row["rmse_hu"] == row["rmse_hu_noisy"]) == (row["arm"] in ("1", "1n"))
    for arm in ("1 ", "1n", "2 ", "2d"):
        for dose in (1, 5, 10, 20, 40):
            assert f"Pipeline {arm} - Dose {dose} | Acc: " in table
    loaded = json.loads((tmp_path / "one" / "experiments.json").read_text())
    assert len(loaded["rows"]) == len(rows)
    assert set(loaded["manifest"]["checkpoints"]) == {
        "denoiser.pt",
        "classifier.pt",
        "classifier_noisy.pt",
        "classifier_denoised.pt",
    }
    pictures = list((tmp_path / "one" / "figures").glob("*.png"))
    assert pictures
    for path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert "<svg" in path.with_suffix(".svg").read_text(encoding="utf-8")
    assert "<html" in (tmp_path / "one" / "report.html").read_text(encoding="utf-8")


def test_study_at_the_routine_dose_measures_the_noise_of_the_scan_itself(trained, tmp_path, no_report):
    data, models = trained
    call(run_experiments, "--data", data, "--models", models, "--out", tmp_path, "--doses", 5, 40)
    routine = next(row for row in read_csv(tmp_path / "experiments.csv") if row["dose"] == "40.0")
    assert float(routine["rmse_hu_noisy"]) == pytest.approx(4.0, rel=0.06)
    low = next(row for row in read_csv(tmp_path / "experiments.csv") if row["dose"] == "5.0")
    # 4.0 HU of its own and what lambda 5 adds at the 30 HU of a brain
    assert float(low["rmse_hu_noisy"]) == pytest.approx(11.5, rel=0.05)
    assert float(low["dose_fraction"]) == 0.125
    assert low["mask"] == "brain"
    assert low["range_hu"] == "0..80"


@pytest.mark.parametrize(
    ("kept", "arms", "words"),
    [
        (["denoiser.pt"], {"denoised"}, "no classifier trained on clean slices"),
        (["classifier.pt"], {"1"}, "pipeline 2 of classifier.pt: no denoiser"),
        (["classifier.pt", "classifier_noisy.pt", "denoiser.pt"], {"1", "1n", "2"}, "pipeline 2d: no"),
    ],
)
def test_study_with_a_checkpoint_missing_runs_the_rest_and_says_so(
    trained,
    tmp_path,
    capsys,
    no_report,
    kept,
    arms,
    words,
):
    data, models = trained
    some = tmp_path / "some"
    some.mkdir()
    for name in kept:
        shutil.copy(models / name, some)
    call(run_experiments, "--data", data, "--models", some, "--out", tmp_path / "results", "--doses", 5)
    assert {row["arm"] for row in read_csv(tmp_path / "results" / "experiments.csv")} == arms
    printed = capsys.readouterr().out
    assert f"Left out: {words}" in printed or f": {words}" in printed


def test_study_takes_networks_of_scans_and_joint_ones_and_none_of_their_parts(trained, tmp_path, no_report):
    data, models = trained
    other = tmp_path / "models"
    other.mkdir()
    shutil.copy(models / "denoiser.pt", other)
    common = [
        "--data",
        data,
        "--out",
        other,
        "--width",
        4,
        "--epochs",
        1,
        "--device",
        "cpu",
        "--task",
        "type",
    ]
    call(train_classifier, *common, "--model", "cnn-bilstm", "--hidden", 8)
    call(train_classifier, *common, "--input", "joint", "--name", "classifier_joint")
    steps = ["--folds", 2, "--components", 4, "--epochs-sequence", 1]
    call(train_classifier, *common, "--model", "two-stage", *steps, "--name", "classifier_two")
    call(run_experiments, "--data", data, "--models", other, "--out", tmp_path / "results", "--doses", 5)
    rows = read_csv(tmp_path / "results" / "experiments.csv")
    assert {(row["arm"], row["classifier"]) for row in rows} == {
        ("1", "classifier.pt"),
        ("2", "classifier.pt"),
        ("1", "classifier_two.pt"),
        ("2", "classifier_two.pt"),
        ("2j", "classifier_joint.pt"),
    }
    assert {row["level"] for row in rows} == {"slice", "scan"}
    assert {row["task"] for row in rows} == {"type"}


def test_study_leaves_out_a_classifier_of_another_denoiser(trained, tmp_path, capsys, no_report):
    data, models = trained
    other = shutil.copytree(models, tmp_path / "models")
    call(train_denoiser, "--data", data, "--out", other, *DENOISER, "--seed", 5, "--overwrite")
    call(run_experiments, "--data", data, "--models", other, "--out", tmp_path / "results", "--doses", 5)
    assert "2d of classifier_denoised.pt: trained on the output of another" in capsys.readouterr().out
    assert {row["arm"] for row in read_csv(tmp_path / "results" / "experiments.csv")} == {"1", "1n", "2"}
    with pytest.raises(stage.InputError, match="another denoiser"):
        call(
            predict,
            *("--input", tmp_path, "--out", tmp_path / "out", "--models", other),
            *("--classifier", other / "classifier_denoised.pt"),
        )


def test_study_tells_classifiers_of_one_pipeline_apart(trained, tmp_path, capsys, no_report):
    data, models = trained
    both = tmp_path / "both"
    both.mkdir()
    shutil.copy(models / "classifier.pt", both / "classifier.pt")
    shutil.copy(models / "classifier.pt", both / "classifier.again.pt")
    call(run_experiments, "--data", data, "--models", both, "--out", tmp_path / "results", "--doses", 5)
    table = capsys.readouterr().out
    assert "Pipeline 1 classifier.pt - Dose 5" in table
    assert "Pipeline 1 classifier.again.pt - Dose 5" in table


def test_study_with_nothing_that_can_run_says_so(trained, tmp_path):
    data, models = trained
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(models / "classifier_denoised.pt", alone)
    with pytest.raises(stage.InputError, match="nothing to run"):
        call(run_experiments, "--data", data, "--models", alone, "--out", tmp_path / "results")


def test_checkpoints_hold_the_window_and_whom_they_were_trained_on(trained):
    data, models = trained
    people = {who for who, split in places(data).items() if split != "test"}
    for name, kind in (("denoiser", "denoiser"), ("classifier_denoised", "classifier")):
        facts = checkpoints.load(models / f"{name}.pt", kind)
        kwargs = facts["model"]["kwargs"]
        assert [len(window) for window in kwargs.get("windows", [kwargs.get("window")])] == [2]
        assert set(facts["trained_on"]) == people


def test_study_refuses_checkpoints_of_another_split(trained, split_data, tmp_path):
    _, models = trained
    call(split_dataset, "--data", split_data, "--seed", 1)
    with pytest.raises(stage.InputError, match="another split"):
        call(run_experiments, "--data", split_data, "--models", models, "--out", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_classifier_says_where_its_threshold_and_parent_come_from(trained):
    _, models = trained
    facts = checkpoints.load(models / "classifier_denoised.pt", "classifier")
    assert facts["parents"]["denoiser"]["sha256"] == checkpoints.file_sha256(models / "denoiser.pt")
    for level in ("slice", "scan"):
        threshold = facts["thresholds"][level]
        assert threshold["value"] is None or 0 <= threshold["value"] <= 1
        assert "val, denoised slices, calibrated 1 5 10 20 40" in threshold["origin"]
    assert checkpoints.load(models / "classifier.pt", "classifier")["doses"] == []


def test_trained_networks_differ_from_where_they_began(trained):
    data, models = trained
    pack = load_pack(data, "test", 48)
    network, _ = load_denoiser(models / "denoiser.pt")
    changed = np.abs(denoise(network, pack.image, 10.0) - pack.image)
    assert changed.mean() > 0.01


def test_classifier_on_denoised_slices_learns_from_other_images_than_on_noisy_ones(trained):
    _, models = trained
    first = [
        json.loads((models / f"{name}.jsonl").read_text().splitlines()[0])
        for name in ("classifier", "classifier_noisy", "classifier_denoised")
    ]
    # the same weights, rows and noise to begin with: only what is shown differs
    assert len({line["train_loss"] for line in first}) == 3


def test_classifier_finetuned_begins_with_the_weights_of_its_parent(trained, tmp_path):
    data, models = trained
    parent = models / "classifier.pt"
    common = ["--data", data, "--out", tmp_path, *CLASSIFIER[:2], "--epochs", 1, "--batch-size", 8]
    call(train_classifier, *common, "--finetune", parent, "--lr", "1e-9", "--weight-decay", 0)
    child = checkpoints.load(tmp_path / "classifier.pt", "classifier")
    before = checkpoints.load(parent, "classifier")["state"]
    for key in ("conv1.weight", "fc.weight", "layer4.1.conv2.weight"):
        np.testing.assert_allclose(child["state"][key], before[key], atol=1e-6)
    assert child["parents"]["finetune"]["sha256"] == checkpoints.file_sha256(parent)
    with pytest.raises(stage.InputError, match="--finetune"):
        call(train_classifier, *common, "--finetune", parent, "--width", 8, "--overwrite")


# ---------------------------------------------------------------- a new scan


@pytest.fixture(scope="module")
def phantom_dicom(tmp_path_factory):
    """(folder, phantom): a phantom of 4 slices of 60 x 52 pixels written as a DICOM series."""
    made = generate_phantom(3, size=(60, 52), slices=4)
    folder = tmp_path_factory.mktemp("dicom")
    gap_mm, row_mm, column_mm = made.spacing_mm
    for index, image in enumerate(made.hu):
        tags = {"PixelSpacing": [round(row_mm, 6), round(column_mm, 6)]}
        write_slice(folder / f"{index}.dcm", image, (-100.0, -90.0, gap_mm * index), **tags)
    return folder, made


def test_predict_denoises_every_slice_where_it_lies_and_reads_it(trained, phantom_dicom, tmp_path):
    models = shutil.copytree(trained[1], tmp_path / "models")
    folder, made = phantom_dicom
    content = checkpoints.load(models / "denoiser.pt", "denoiser")
    content["state"]["head.bias"] += 0.1  # 5 HU: two toy epochs change less than the rounding to whole HU
    checkpoints.save(models / "denoiser.pt", content)
    call(
        predict,
        "--input",
        folder,
        "--models",
        models,
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
        "--tile",
        64,
    )
    (out,) = (entry for entry in (tmp_path / "out").iterdir() if entry.is_dir())
    network, _ = load_denoiser(models / "denoiser.pt")
    assert np.abs(denoise(network, made.hu, 10.0) - made.hu).mean() > 1
    image = nib.load(out / "denoised.nii.gz")
    written = np.asarray(image.dataobj).transpose(2, 1, 0)
    np.testing.assert_array_equal(written, denoise(network, made.hu, 10.0).round())
    assert image.affine @ [0, 0, 3, 1] == pytest.approx([100, 90, 3 * made.spacing_mm[0], 1], abs=0.01)
    result = json.loads((out / "prediction.json").read_text())
    classifier, facts = load_classifier(models / "classifier.pt")
    small = fit_to_square(made.hu, made.spacing_mm, facts["size"], -1024)
    found = [entry["probability"] for entry in result["slices"]]
    assert found == pytest.approx(classify(classifier, small)[:, 0].tolist(), abs=1e-5)
    assert result["scan"]["probability"] == max(found)
    assert (out / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_predict_of_a_simulated_dose_measures_what_comes_back(trained, real_data, tmp_path, capsys):
    _, models = trained
    arguments = ["--input", real_data / "head_picker_slice", "--models", models, "--device", "cpu"]
    call(predict, *arguments, "--out", tmp_path / "low", "--dose", 5)
    assert "calibrated 5: RMSE to the scan inside the brain" in capsys.readouterr().out
    (path,) = (tmp_path / "low").glob("*/prediction.json")
    quality = json.loads(path.read_text())["quality"]
    # lambda 5 adds the variance of 1/5 - 1/40 on the scale of 1562 (1 + HU / 1000), here at about 30 HU
    added = 1000 / 1562 * np.sqrt(1562 * 1.03 * (1 / 5 - 1 / 40))
    assert quality["given"]["rmse_hu"] == pytest.approx(added, rel=0.03)
    assert quality["denoised"]["rmse_hu"] != quality["given"]["rmse_hu"]
    with pytest.raises(ValueError, match="dose 50"):
        call(predict, *arguments, "--out", tmp_path / "high", "--dose", 50)
    with pytest.raises(stage.InputError, match="--dose-model"):
        call(predict, *arguments, "--out", tmp_path / "high", "--dose-model", "poisson")
    assert not (tmp_path / "high").exists()


@pytest.mark.slow
def test_predict_of_the_real_head_writes_its_files_in_its_geometry(trained, real_data, tmp_path):
    _, models = trained
    folder = real_data / "head_ge_tilted"
    call(predict, "--input", folder, "--models", models, "--out", tmp_path, "--device", "cpu")
    (out,) = (entry for entry in tmp_path.iterdir() if entry.is_dir())
    result = json.loads((out / "prediction.json").read_text())
    assert len(result["slices"]) == 28
    assert 0 <= result["scan"]["probability"] <= 1
    assert result["scan"]["probability"] == max(entry["probability"] for entry in result["slices"])
    assert abs(result["gantry_tilt_deg"]) == pytest.approx(18.5, abs=0.1)
    assert result["nifti_resampled_to_even_gaps"]
    image = nib.load(out / "denoised.nii.gz")
    assert image.shape[:2] == (512, 512)
    assert image.header.get_zooms()[:2] == pytest.approx((0.488, 0.488), abs=1e-3)
    assert (out / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- bad input, as a user meets it

TEXT_FILE = b"this is no scan\n" * 20


def run_fails(script, code, *words, stage_name, args, cwd):
    done = script(stage_name, *args, cwd=cwd)
    assert done.returncode == code, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"{stage_name}: error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage_name", "args", "words"),
    [
        ("prepare_dataset.py", ["--source", "dicom", "--input", "empty"], ["empty", "no usable series"]),
        ("prepare_dataset.py", ["--source", "dicom", "--input", "text"], ["scan.dcm", "not a DICOM"]),
        ("prepare_dataset.py", ["--source", "dicom", "--input", "nowhere"], ["nowhere", "no such folder"]),
        ("split_dataset.py", [], ["dataset", "prepare_dataset.py"]),
        ("train_denoiser.py", [], ["dataset", "prepare_dataset.py"]),
        ("train_denoiser.py", ["--data", "data"], ["splits.json", "split_dataset.py"]),
        ("train_denoiser.py", ["--device", "cuda:7"], ["--device cuda:7", "CUDA GPUs"]),
        ("train_denoiser.py", ["--doses", "0"], ["dose 0", "lambda"]),
        ("train_denoiser.py", ["--epochs", "none"], ["--epochs", "whole number"]),
        ("train_classifier.py", ["--input", "denoised"], ["denoiser.pt", "train_denoiser.py"]),
        ("run_experiments.py", [], ["saved_models", "train_denoiser.py"]),
        ("predict.py", ["--input", "text", "--out", "out"], ["denoiser.pt", "train_denoiser.py"]),
    ],
)
def test_bad_input_gives_one_line_with_the_remedy_and_leaves_nothing(
    script, split_data, tmp_path, stage_name, args, words
):
    work = tmp_path / "work"
    (work / "empty").mkdir(parents=True)
    (work / "text").mkdir()
    (work / "text" / "scan.dcm").write_bytes(TEXT_FILE)
    shutil.copytree(split_data / "train", work / "data" / "unsplit")
    before = sorted(path for path in work.rglob("*") if "data" not in path.parts)
    run_fails(script, 2, *words, stage_name=stage_name, args=args, cwd=work)
    after = sorted(path for path in work.rglob("*") if "data" not in path.parts)
    # a folder that was about to be filled may exist, but nothing half-written
    assert not [path for path in set(after) - set(before) if path.is_file() and path.name != ".lock"]


def test_wrong_checkpoint_is_refused_by_name(trained, tmp_path):
    data, models = trained
    arguments = ["--data", data, "--models", models, "--out", tmp_path / "results"]
    with pytest.raises(stage.InputError, match=r"classifier\.pt: is a classifier; a denoiser is needed"):
        call(run_experiments, *arguments, "--denoisers", models / "classifier.pt")
    with pytest.raises(stage.InputError, match=r"nothing\.pt: no such checkpoint"):
        call(run_experiments, *arguments, "--denoisers", models / "nothing.pt")
    with pytest.raises(stage.InputError, match="unfinished training"):
        call(run_experiments, *arguments, "--denoisers", models / "denoiser.last.pt")
    assert not (tmp_path / "results").exists()


def test_classifier_of_one_class_only_is_refused(split_data, tmp_path):
    for folder in all_series(split_data):
        metadata = stage.read_json(folder / "metadata.json", "")
        for entry in metadata["slices"]:
            entry["labels"] = dict.fromkeys(entry["labels"], 0)
        stage.write_json(folder / "metadata.json", metadata)
    with pytest.raises(stage.InputError, match="only slices with answer 0"):
        call(train_classifier, "--data", split_data, "--out", tmp_path, *CLASSIFIER)


def test_classifier_of_unknown_labels_needs_them_assumed(split_data, tmp_path):
    for folder in all_series(split_data):
        metadata = stage.read_json(folder / "metadata.json", "")
        for entry in metadata["slices"]:
            entry["labels"]["ischemia"] = None
        stage.write_json(folder / "metadata.json", metadata)
    common = ["--data", split_data, "--out", tmp_path, *CLASSIFIER]
    with pytest.raises(stage.InputError, match="assume-absent"):
        call(train_classifier, *common)
    call(train_classifier, *common, "--assume-absent", "ischemia")
    assert checkpoints.load(tmp_path / "classifier.pt", "classifier")["assume_absent"] == ["ischemia"]


# ---------------------------------------------------------------- preparing and splitting


def snapshot(folder):
    files = [path for path in folder.rglob("*.*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_prepare_again_makes_nothing_new_and_mends_what_was_killed(tmp_path, capsys):
    arguments = ["--source", "phantom", "--patients", 3, "--size", 32, "--slices", 2, "--out", tmp_path]
    call(prepare_dataset, *arguments, "--workers", 2)
    before = snapshot(tmp_path)
    assert "3 series new" in capsys.readouterr().out
    call(prepare_dataset, *arguments)
    assert "0 series new" in capsys.readouterr().out
    assert snapshot(tmp_path) == before
    series = sorted(all_series(tmp_path))[0]
    series.rename(series.with_name(f".{series.name}.partial"))  # what a kill leaves behind
    call(prepare_dataset, *arguments)
    assert snapshot(tmp_path) == before


def test_prepare_of_more_patients_keeps_the_first_ones(tmp_path):
    arguments = ["--source", "phantom", "--size", 32, "--slices", 2]
    call(prepare_dataset, *arguments, "--patients", 2, "--out", tmp_path / "a")
    call(prepare_dataset, *arguments, "--patients", 4, "--out", tmp_path / "b")
    few, many = ({folder.name for folder in all_series(tmp_path / name)} for name in "ab")
    assert few < many


def test_prepare_checks_the_disk_before_it_begins(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 10**6)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: usage)
    arguments = ["--source", "phantom", "--patients", 100, "--size", 128, "--slices", 24, "--out", tmp_path]
    with pytest.raises(stage.StageError, match="GB free") as full:
        call(prepare_dataset, *arguments)
    assert full.value.exit_code == stage.EXIT_DISK
    assert all_series(tmp_path) == {}


def test_prepare_with_a_limit_makes_that_many_and_goes_on_later(tmp_path):
    arguments = ["--source", "phantom", "--patients", 4, "--size", 32, "--slices", 2, "--out", tmp_path]
    call(prepare_dataset, *arguments, "--limit", 2)
    first = set(all_series(tmp_path))
    assert len(first) == 2
    call(prepare_dataset, *arguments)
    assert len(all_series(tmp_path)) == 4
    assert first < set(all_series(tmp_path))


@pytest.mark.slow
def test_prepare_killed_at_any_moment_leaves_whole_series_and_goes_on(tmp_path):
    options = ["--source", "phantom", "--patients", "8", "--size", "48", "--slices", "4", "--workers", "2"]
    call(prepare_dataset, *options, "--out", tmp_path / "whole")
    expected = snapshot(tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "prepare_dataset.py"), *options, "--out", str(out)]
    for _ in range(3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        before = len(all_series(out))
        while len(all_series(out)) == before and process.poll() is None:
            time.sleep(0.005)
        process.kill()  # the parent alone: its workers must not live on and keep the lock
        process.wait()
        with stage.lock(out / ".lock", wait=True):
            pass
        for folder in all_series(out):
            read_slices(folder, "truth", len(read_metadata(folder)["slices"]))
    assert process.returncode == -signal.SIGKILL
    call(prepare_dataset, *options, "--out", out)
    assert snapshot(out) == expected


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--source", "phantom", "--input", "x"], "makes its own data"),
        (["--source", "dicom", "--input", ".", "--patients", "3"], "only for --source phantom"),
        (["--source", "dicom"], "--input"),
    ],
)
def test_prepare_refuses_options_without_effect(args, words):
    with pytest.raises(stage.InputError, match=words):
        call(prepare_dataset, *args)


def places(data):
    return stage.read_json(data / "splits.json", "")["patients"]


def test_split_is_by_patient_idempotent_and_mends_a_kill(split_data):
    before, homes = places(split_data), all_series(split_data)
    folder = next(folder for folder, home in homes.items() if home == "test")
    (split_data / "unsplit").mkdir(exist_ok=True)
    folder.rename(split_data / "unsplit" / folder.name)
    call(split_dataset, "--data", split_data)
    assert places(split_data) == before
    assert all_series(split_data) == homes


def test_split_with_another_seed_moves_patients_and_back_again_restores_it(split_data):
    first = places(split_data)
    call(split_dataset, "--data", split_data, "--seed", 7)
    assert places(split_data) != first
    call(split_dataset, "--data", split_data, "--seed", 42)
    assert places(split_data) == first
    load_pack(split_data, "test", 24)


def test_split_of_more_data_keeps_everybody_where_they_are(split_data):
    before = places(split_data)
    more = ["--source", "phantom", "--size", 48, "--slices", 6, "--patients", 20, "--out", split_data]
    call(prepare_dataset, *more)
    call(split_dataset, "--data", split_data)
    after = places(split_data)
    assert len(after) == 20
    assert before.items() <= after.items()


def test_split_keeps_patients_with_an_identical_image_together(split_data):
    series = sorted(all_series(split_data).items())
    one = next(folder for folder, home in series if home == "train")
    two = next(folder for folder, home in series if home == "test")
    copied, metadata = (stage.read_json(folder / "metadata.json", "") for folder in (one, two))
    metadata["slices"][0]["sha256"] = copied["slices"][2]["sha256"]
    stage.write_json(two / "metadata.json", metadata)
    with pytest.raises(stage.StageError, match="is in train and in test"):
        split_dataset.check({"train": [copied], "test": [metadata]})
    call(split_dataset, "--data", split_data)
    after = places(split_data)
    assert after[copied["patient_id"]] == after[metadata["patient_id"]]


def test_split_shares_are_those_asked_for_in_every_stratum():
    strata = {(1, 0): [[f"a{n}"] for n in range(40)], (0, 0): [[f"b{n}"] for n in range(60)]}
    found = split_dataset.assign(strata, (0.7, 0.15, 0.15), 1, {})
    for letter, count in (("a", 40), ("b", 60)):
        own = [split for patient, split in found.items() if patient[0] == letter]
        assert own.count("train") == pytest.approx(0.7 * count, abs=1)
        assert own.count("val") == pytest.approx(0.15 * count, abs=1)


def test_split_of_too_few_patients_and_of_bad_fractions_is_refused(tmp_path):
    arguments = ["--source", "phantom", "--size", 32, "--slices", 2, "--patients", 2, "--out", tmp_path]
    call(prepare_dataset, *arguments)
    with pytest.raises(stage.InputError, match="2 patients are too few"):
        call(split_dataset, "--data", tmp_path)
    assert set(all_series(tmp_path).values()) == {"unsplit"}
    with pytest.raises(stage.InputError, match="must sum to 1"):
        call(split_dataset, "--data", tmp_path, "--fractions", 0.5, 0.2, 0.2)
