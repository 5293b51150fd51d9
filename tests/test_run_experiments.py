"""The study's command line: plans, resumes, shares its cells, and refuses before anything slow starts."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

import cells
import prepare_dataset
import run_experiments
import split_dataset
import stage
from arms import load_networks
from dataset import all_series
from segmenters import SEGMENTERS
from tables import COLUMNS, NAMES
from tests.conftest import ROOT
from tests.toy_models import BrightSegmenter, bright  # noqa: F401 a fixture
from tests.toy_study import change, prepare_toy, train_toys

FAST = ("--dose-model", "calibrated", "--doses", 40, 10, "--device", "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Only to be read."""
    return prepare_toy(tmp_path_factory.mktemp("study"))


@pytest.fixture
def own_data(data, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))


@pytest.fixture
def models(tmp_path, bright):  # noqa: F811
    return train_toys(tmp_path / "models")


@pytest.fixture
def worked_out(monkeypatch):
    """The cells that were worked out."""
    found = []

    def counted(reading):
        return lambda *given: found.append(given[1]) or reading(*given)

    for kind, reading in list(cells.READINGS.items()):
        monkeypatch.setitem(cells.READINGS, kind, counted(reading))
    return found


def run(*words):
    run_experiments.main([str(word) for word in words])


def usual(data, models, tmp_path):
    """A command line of two doses, which are soon made."""
    return ["--data", data, "--models", models, "--out", tmp_path / "out", *FAST]


def read_table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def written(out):
    """Every file but those that name the command and the time."""
    kept = [path for path in out.rglob("*") if path.is_file() and path.suffix in (".csv", ".json")]
    return {path.relative_to(out): path.read_bytes() for path in kept if path.name != "experiments.json"}


# ---------------------------------------------------------------- a whole study


def test_study_writes_its_tables_and_a_second_run_works_nothing_out(
    data, models, tmp_path, capsys, no_report, worked_out
):
    words = (*usual(data, models, tmp_path), "--stress", "rings", "--severities", 0.5, 1)
    run(*words)
    said, before = capsys.readouterr().out, written(tmp_path / "out")
    count = len(worked_out)
    # 2 doses, 2 kinds of image: 2 cells of quality, 3 and 2 classifiers, a segmenter; 2 severities of 5 arms
    assert count == 2 * (2 * 2 + 3 + 2 + 2) + 2 * 5
    assert len(set(map(str, worked_out))) == count
    run(*words)
    assert len(worked_out) == count
    assert capsys.readouterr().out == said
    assert written(tmp_path / "out") == before
    rows = read_table(tmp_path / "out" / "experiments.csv")
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 2 * 5 * 2
    for name in set(NAMES) - {"experiments", "external", "flips"}:  # no call changes
        own = read_table(tmp_path / "out" / "tables" / f"{name}.csv")
        content = json.loads((tmp_path / "out" / "tables" / f"{name}.json").read_text())
        assert len(own) == len(content) > 0
        assert list(own[0]) == list(content[0])
    manifest = json.loads((tmp_path / "out" / "experiments.json").read_text())["manifest"]
    assert set(manifest["checkpoints"]) == {path.name for path in models.iterdir()}
    assert manifest["design"]["ladders"] == {"calibrated": [40, 10]}
    assert manifest["design"]["stress"] == {"rings": [0.5, 1]}
    for line in (
        "Pipeline 1 classifier.seed1.pt - Dose 10 | Acc: ",
        "Pipeline 2 classifier.seed2.pt - Dose 40 | Acc: ",
        "Denoising by denoiser.pt -> MSE: ",
        "Left out: pipeline 2d: no classifier trained on denoised slices",
        "the answer",
    ):
        assert line in said


def test_plan_says_what_is_done_and_left_and_works_nothing_out(
    data, models, tmp_path, capsys, no_report, worked_out
):
    words = usual(data, models, tmp_path)
    run(*words, "--plan")
    assert f"{data}: 0 of 22 cells done, 22 left" in capsys.readouterr().out
    assert not (tmp_path / "out").exists() and not worked_out
    run(*words)
    capsys.readouterr()
    run(*words, "--doses", 40, 10, 5, "--plan")
    said = capsys.readouterr().out
    assert f"{data}: 22 of 33 cells done, 11 left" in said
    lines = [line.split() for line in said.splitlines() if "calibrated 5," in line]
    assert [line[-3:] for line in lines] == [["0", "of", "6"], ["0", "of", "5"]]
    assert len(worked_out) == 22


def test_changes_make_new_cells_of_their_own_alone(data, models, tmp_path, no_report, worked_out):
    words = usual(data, models, tmp_path)

    def new(*more):
        before = len(worked_out)
        run(*words, *more)
        return [(cell.kind, cell.reader and cell.reader.path.name) for cell in worked_out[before:]]

    assert len(new()) == 22
    assert new("--margin-auc", 0.1, "--prevalence", 0.3) == []
    assert new("--mask", "head") == [("quality", None)] * 4
    assert len(new("--noise-seeds", 7)) == len(new("--seed", 1)) == 22
    change(models / "classifier_noisy.pt", models / "classifier_noisy.pt", "fc.bias", 0.3)
    assert new() == [("classifier", "classifier_noisy.pt")] * 2
    change(models / "classifier_noisy.pt", models / "classifier_noisy.seed2.pt", "fc.bias", 0.3, seed=2)
    assert new() == [("classifier", "classifier_noisy.seed2.pt")] * 2
    change(models / "denoiser.pt", models / "denoiser.pt", "head.bias", 0.1)
    assert {kind for kind, _ in new()} == set(cells.READINGS)
    some = ("--denoisers", "none", "tv", "--classical-patients", 2)
    assert sorted(new(*some, "--classifiers", models / "classifier.seed1.pt"), key=str) == [
        *[("classifier", "classifier.seed1.pt")] * 2,
        *[("observer", None)] * 4,  # behind tv, and of the low dose of its patients
        *[("quality", None)] * 4,
        *[("segmenter", "segmenter.pt")] * 2,
    ]


def test_damaged_cell_is_one_line_with_the_remedy(data, models, tmp_path, no_report):
    words = usual(data, models, tmp_path)
    run(*words)
    cell = next((tmp_path / "out" / "cells" / "classifier").iterdir())
    whole = cell.read_bytes()
    cell.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(stage.InputError, match=rf"{cell.name}: damaged JSON.*delete it"):
        run(*words)
    cell.unlink()
    run(*words)
    assert cell.read_bytes() == whole


def test_table_of_an_earlier_run_does_not_pass_for_this_one_s(data, models, tmp_path, no_report):
    words = usual(data, models, tmp_path)
    run(*words, "--stress", "rings", "--severities", 1)
    tables = tmp_path / "out" / "tables"
    assert (tables / "stress.csv").exists() and (tables / "stress.json").exists()
    run(*words)
    assert (tables / "dose_response.csv").exists()
    assert not list(tables.glob("stress.*"))


# ---------------------------------------------------------------- faults of machines


def command(*words, launch=()):
    return [str(word) for word in (sys.executable, *launch, ROOT / "run_experiments.py", *words)]


def finish(command, out):
    """What a command says, whatever the folder."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(str(out), "OUT")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """(command line without --out, what it says, what it writes) of a study that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SEGMENTERS, "bright", BrightSegmenter)
        models = train_toys(folder / "models")
    (models / "segmenter.pt").unlink()  # another process does not know it
    words = ("--data", data, "--models", models, *FAST)
    said = finish(command(*words, "--out", folder / "out"), folder / "out")
    return words, said, written(folder / "out")


@pytest.mark.slow
def test_killed_study_goes_on_and_ends_as_one_that_was_not(whole, tmp_path):
    words, said, files = whole
    own = command(*words, "--out", tmp_path)
    for wanted in (3, 10):
        process = subprocess.Popen(own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(tmp_path.glob("cells/*/*.json"))) < wanted and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finished = {path: path.stat().st_ino for path in tmp_path.glob("cells/*/*.json")}
    assert 10 <= len(finished) < sum(path.parts[0] == "cells" for path in files)
    assert finish(own, tmp_path) == said
    assert {path: path.stat().st_ino for path in finished} == finished  # another file would be another inode
    assert written(tmp_path) == files


@pytest.mark.slow
def test_two_processes_share_the_cells_and_write_what_one_writes(whole, tmp_path):
    words, said, files = whole
    launch = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    assert finish(command(*words, "--out", tmp_path, launch=launch), tmp_path) == said
    assert written(tmp_path) == files


def test_study_whose_results_are_in_use_is_refused_with_exit_4(data, models, tmp_path):
    with stage.lock(tmp_path / "out" / ".lock"), pytest.raises(stage.StageError, match="in use by") as caught:
        run("--data", data, "--models", models, "--out", tmp_path / "out", *FAST)
    assert caught.value.exit_code == stage.EXIT_LOCKED
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


# ---------------------------------------------------------------- what may be missing


def test_classical_denoisers_alone_need_no_checkpoint(data, tmp_path, no_report, capsys):
    run(
        "--data",
        data,
        "--models",
        tmp_path / "none",
        "--out",
        tmp_path / "out",
        *FAST,
        "--denoisers",
        "tv",
        "nlm",
        "--classical-patients",
        2,
    )
    rows = read_table(tmp_path / "out" / "experiments.csv")
    assert [(row["denoiser"], row["n_patients"], row["n_slices"]) for row in rows] == [
        ("tv", "2", "8"),
        ("nlm", "2", "8"),
    ] * 2
    quality = read_table(tmp_path / "out" / "tables" / "image_quality.csv")
    assert {(row["denoiser"], row["of_subset"]) for row in quality} == {
        ("none", "False"),
        ("none", "True"),
        ("tv", "True"),
        ("nlm", "True"),
    }
    assert "Denoising by tv" in capsys.readouterr().out


def test_segmenters_alone_are_a_study(data, models, tmp_path, no_report):
    for path in models.glob("[!s]*.pt"):
        path.unlink()
    run("--data", data, "--models", models, "--out", tmp_path / "out", *FAST)
    assert read_table(tmp_path / "out" / "experiments.csv") == []
    rows = read_table(tmp_path / "out" / "tables" / "segmentation.csv")
    assert [(row["dose"], row["denoiser"]) for row in rows] == [("40.0", "none"), ("10.0", "none")]


def without(data, *flags):
    for folder in all_series(data):
        metadata = stage.read_json(folder / "metadata.json", "")
        stage.write_json(folder / "metadata.json", metadata | dict.fromkeys(flags, False))


def test_segmenters_without_masks_are_left_out_or_nothing_to_run(
    own_data, models, tmp_path, no_report, capsys
):
    without(own_data, "has_mask")
    words = ("--data", own_data, "--models", models, "--out", tmp_path / "out", *FAST)
    run(*words)
    assert "Left out: segmenters: not every test series has a lesion mask" in capsys.readouterr().out
    assert not (tmp_path / "out" / "tables" / "segmentation.csv").exists()
    for path in models.glob("[!s]*.pt"):
        path.unlink()
    with pytest.raises(stage.InputError, match="nothing to run; segmenters: not every test series"):
        run(*words)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_study_of_real_data_is_held_against_the_scan_itself(own_data, models, tmp_path, no_report, capsys):
    without(own_data, "has_truth")
    run("--data", own_data, "--models", models, "--out", tmp_path / "out", *FAST)
    assert "Image quality inside the brain against the image" in capsys.readouterr().out
    rows = read_table(tmp_path / "out" / "tables" / "image_quality.csv")
    highest = next(row for row in rows if (row["dose"], row["denoiser"]) == ("40.0", "none"))
    assert (float(highest["rmse_hu"]), highest["noise_sd_ratio"]) == (0, "")


def test_several_dose_models_are_several_ladders(data, models, tmp_path, no_report):
    words = ("--data", data, "--models", models, "--out", tmp_path / "out", "--device", "cpu")
    run(
        *words,
        "--dose-model",
        "calibrated",
        "poisson",
        "--doses",
        10,
        40,
        10,
        "--classifiers",
        models / "classifier.seed1.pt",
    )
    rows = read_table(tmp_path / "out" / "tables" / "against_reference.csv")
    assert {(row["dose_model"], row["reference_dose"]) for row in rows} == {
        ("calibrated", "40.0"),
        ("poisson", "40.0"),
    }
    assert len(rows) == 2 * 2 * 2 * 2 * 3
    with pytest.raises(ValueError, match="dose 50: lambda must be in"):
        run(*words, "--dose-model", "poisson", "calibrated", "--doses", 50)


# ---------------------------------------------------------------- other test sets


@pytest.fixture
def elsewhere(tmp_path):
    """Other patients."""
    folder = tmp_path / "elsewhere"
    size = ["--size", 48, "--slices", 3, "--patients", 8, "--seed", 9, "--workers", 1]
    prepare_dataset.main(["--source", "phantom", *size, "--out", folder])
    split_dataset.main(["--data", folder, "--fractions", 0.2, 0.2, 0.6])
    return folder


def test_other_sets_are_read_at_the_highest_dose_and_make_a_matrix(
    data, elsewhere, models, tmp_path, no_report, worked_out, capsys
):
    home = stage.read_json(data / "splits.json", "")["hash"]
    for path in models.glob("classifier*.pt"):
        change(path, path, "fc.bias", 0, split_hash=home)
    words = ("--data", data, elsewhere, "--models", models, "--out", tmp_path / "out", *FAST)
    run(*words, "--plan")
    assert f"{elsewhere}: 0 of 5 cells done, 5 left" in capsys.readouterr().out
    run(*words)
    assert len(worked_out) == 22 + 5
    assert {cell.condition.dose for cell in worked_out[22:]} == {40}
    rows = read_table(tmp_path / "out" / "tables" / "external.csv")
    assert len(rows) == 5 * 2
    assert {row["home"] for row in rows} == {str(data)}
    assert {row["data"] for row in rows} == {str(data), str(elsewhere)}
    assert all(float(row["drop"]) == 0 for row in rows if row["data"] == str(data))
    manifest = json.loads((tmp_path / "out" / "experiments.json").read_text())["manifest"]
    assert (manifest["data"], manifest["other_data"]) == (str(data), [str(elsewhere)])


def test_network_that_knows_a_patient_of_another_set_is_refused(data, elsewhere, models, tmp_path):
    patients = stage.read_json(elsewhere / "splits.json", "")["patients"]
    one = next(name for name, split in patients.items() if split == "test")
    change(models / "classifier_noisy.pt", models / "classifier_noisy.pt", "fc.bias", 0, trained_on=[one])
    words = ("--models", models, "--out", tmp_path / "out", *FAST)
    with pytest.raises(stage.InputError, match=rf"classifier_noisy\.pt: was trained on 1 of .*{one}"):
        run("--data", data, elsewhere, *words)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--denoisers", "nothing.pt"], "nothing.pt: no such checkpoint"),
        (["--denoisers", "{models}/classifier.seed1.pt"], "is a classifier; a denoiser is needed"),
        (["--classifiers", "nothing.pt"], "nothing.pt: no such checkpoint"),
        (["--segmenters", "{models}/denoiser.pt"], "is a denoiser; a segmenter is needed"),
        (["--stress", "sparkles"], "argument --stress: invalid choice"),
        (["--stress", "rings", "--severities", "1.5"], "severity 1.5: must be in"),
        (["--stress", "rings", "--severities", "0"], "severity 0: must be in"),
        (["--stress", "rings", "--severities", "nan"], "severity nan: must be in"),
        (["--severities", "0.5"], "--severities: says how strong --stress is"),
        (["--prevalence", "0"], "--prevalence 0: must be in"),
        (["--prevalence", "1"], "--prevalence 1: must be in"),
        (["--margin-auc", "0"], "--margin-auc 0: must be in"),
        (["--margin-sens", "1"], "--margin-sens 1: must be in"),
        (["--doses", "0"], "0: must be a positive number"),
        (["--doses", "41"], "dose 41: lambda must be in"),
        (["--dose-model", "projection", "--doses", "2"], "dose 2: a fraction"),
        (["--dose-model", "measured"], "no real low dose of 0.25"),
        (["--noise-seeds", "-1"], "--noise-seeds"),
        (["--mask", "foot"], "argument --mask: invalid choice"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--models", "nowhere"], "nowhere: no denoiser.pt and no classifier.pt"),
        (["--classical-patients", "0"], "--classical-patients"),
        (["--classical-patients", "3"], "--classical-patients: no denoiser is classical"),
        (["--denoiser", "denoiser.pt"], "unrecognized arguments: --denoiser"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(data, models, tmp_path, words, said):
    words = [word.format(models=models) for word in words]
    usual = [] if "--dose-model" in words else ["--dose-model", "calibrated"]
    usual += [] if "--data" in words else ["--data", data]
    usual += [] if "--models" in words else ["--models", models]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 stage.InputError is one, those of pure modules too
        run(*usual, "--out", tmp_path / "out", *words)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_networks_that_do_not_belong_together_are_refused(data, models, tmp_path):
    words = usual(data, models, tmp_path)
    change(models / "classifier_noisy.pt", models / "classifier_noisy.pt", "fc.bias", 0, size=64)
    with pytest.raises(stage.InputError, match=r"classifier_noisy\.pt: size 64, but .*denoiser\.pt has 48"):
        run(*words)
    patients = stage.read_json(data / "splits.json", "")["patients"]
    known = [name for name, split in patients.items() if split == "test"]
    change(
        models / "classifier_noisy.pt",
        models / "classifier_noisy.pt",
        "fc.bias",
        0,
        size=48,
        trained_on=known,
    )
    with pytest.raises(stage.InputError, match="it belongs to another split"):
        run(*words)
    assert not (tmp_path / "out").exists()


def test_nothing_to_run_and_stress_without_classifiers_are_refused(data, models, tmp_path):
    words = usual(data, models, tmp_path)
    (models / "segmenter.pt").unlink()
    for path in models.glob("classifier.*.pt"):
        path.unlink()
    with pytest.raises(stage.InputError, match="nothing to run; pipeline 2d of classifier_noisy"):
        change(models / "classifier_noisy.pt", models / "classifier_noisy.pt", "fc.bias", 0, input="denoised")
        run(*words, "--denoisers", "none")
    (models / "classifier_noisy.pt").unlink()
    with pytest.raises(stage.InputError, match="--stress: is for classifiers"):
        run(*words, "--stress", "rings")
    assert not (tmp_path / "out").exists()


def test_default_dose_model_is_that_of_the_networks(models):
    networks = load_networks(models, "cpu")
    args = run_experiments.get_parser().parse_args([])
    design = run_experiments.make_design(args, networks)
    assert list(design.ladders) == ["calibrated"]
    assert design.ladders["calibrated"] == [40, 20, 10, 5, 1]
    assert (design.noise_seeds, design.stress) == ([42], {})
    args = run_experiments.get_parser().parse_args(["--noise_seeds", "2", "1", "2", "--stress", "rings"])
    design = run_experiments.make_design(args, networks)
    assert design.noise_seeds == [2, 1]
    assert len(design.stress["rings"]) == 12
