"""A classifier alone: its figures against scikit-learn's, its tables and pictures, and what is refused."""

import csv
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.special import expit, log_softmax, logit, softmax
from sklearn import metrics as oracle

import checkpoints
import classified
import metrics
import stage
import train_classifier
import train_denoiser
from dataset import SUBTYPES, TASKS, load_pack, read_metadata, read_splits, series_folders
from inference import denoise, load_classifier, load_denoiser, read
from intervals import bootstrap_auc, delong_auc
from low_dose import LowDose

NAMES = {  # of toy checkpoints: the options that train them
    "clean": ("--task", "stroke", "--batch-size", 8),
    "joint": ("--task", "hemorrhage", "--input", "joint", "--doses", 20, "--batch-size", 8),
    "denoised": ("--task", "type", "--input", "denoised", "--doses", 5, 20, "--batch-size", 8),
    "bilstm": ("--task", "subtypes", "--input", "noisy", "--doses", 5, "--model", "cnn-bilstm"),
    "twostage": ("--task", "type", "--model", "two-stage", "--folds", 2, "--components", 4),
}
MORE = {"bilstm": ("--hidden", 4), "twostage": ("--hidden", 4, "--epochs-sequence", 2, "--batch-size", 8)}


def call(*words):
    train_classifier.main([str(word) for word in (*words, "--device", "cpu")])


@pytest.fixture(scope="module")
def trained(split_data_once, tmp_path_factory):
    """(data, models): every kind of classifier after two epochs; only to be read."""
    data = shutil.copytree(split_data_once, tmp_path_factory.mktemp("classified") / "dataset")
    models = tmp_path_factory.mktemp("models")
    common = ["--data", str(data), "--out", str(models), "--epochs", "2"]
    train_denoiser.main([*common, "--widths", "4", "8", "--batch-size", "8", "--device", "cpu"])
    for name, words in NAMES.items():
        call(*common, "--name", name, "--width", 4, *words, *MORE.get(name, ()))
    return data, models


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """evaluated(name) -> its folder of results on the training patients, who are many; made once."""
    results = tmp_path_factory.mktemp("results")

    def evaluate(name):
        folder = results / "classifier" / name
        if not folder.exists():
            call("--evaluate", trained[1] / f"{name}.pt", *on(trained[0], results, "--split", "train"))
        return folder

    return evaluate


@pytest.fixture
def no_pictures(monkeypatch):
    """They take most of the time."""
    monkeypatch.setattr(classified, "write_pictures", lambda *_: 0)


def on(data, results, *words):
    return ("--data", data, "--results", results, *words)


def known(table, name):
    """(targets, probabilities) of a class in a table of answers, where the answer is known."""
    table = table[table[f"target_{name}"].notna()]
    return table[f"target_{name}"].to_numpy(int), table[f"probability_{name}"].to_numpy()


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_those_of_scikit_learn_on_the_written_predictions(trained, evaluated, name):
    folder, facts = evaluated(name), checkpoints.load(trained[1] / f"{name}.pt", "classifier")
    rows = pd.read_csv(folder / "metrics.csv")
    assert tuple(rows) == classified.COLUMNS
    task = TASKS[facts["task"]]
    names = [*task.classes, "question", *(["all"] if len(task.classes) > 1 else [])]
    doses = facts["doses"] or [None]
    assert len(rows) == len(doses) * 2 * len(names)
    tables = {"slice": pd.read_csv(folder / "predictions.csv"), "scan": pd.read_csv(folder / "scans.csv")}
    assert len(tables["slice"]) == 60 * len(doses)
    assert len(tables["scan"]) == 10 * len(doses)
    checked = 0
    for row in rows[rows["class"] != "all"].to_dict("records"):
        table = tables[row["level"]]
        table = table[table["dose"] == row["dose"]] if len(doses) > 1 else table
        targets, scores = known(table, row["class"])
        assert (row["n"], row["positives"]) == (len(targets), targets.sum())
        stored = facts["thresholds"][row["level"]]
        threshold = stored["value"] if row["class"] == "question" else stored["values"][row["class"]]
        assert row["threshold"] == pytest.approx(math.nan if threshold is None else threshold, nan_ok=True)
        assert row["brier"] == pytest.approx(oracle.brier_score_loss(targets, scores))
        if len(set(targets)) < 2:
            assert all(math.isnan(row[column]) for column in ("auc", "auc_low", "ap", "sens_at_90_spec"))
            continue
        checked += 1
        assert row["auc"] == pytest.approx(oracle.roc_auc_score(targets, scores))
        assert row["ap"] == pytest.approx(oracle.average_precision_score(targets, scores))
        alarms, hits, _ = oracle.roc_curve(targets, scores, drop_intermediate=False)
        for percent in (90, 95):
            best = hits[alarms <= 1 - percent / 100 + 1e-9].max()
            assert row[f"sens_at_{percent}_spec"] == pytest.approx(best)
        if threshold is not None:
            called = scores >= threshold
            assert row["acc"] == pytest.approx(oracle.accuracy_score(targets, called))
            assert row["sens"] == pytest.approx(oracle.recall_score(targets, called))
            assert row["spec"] == pytest.approx(oracle.recall_score(targets, called, pos_label=0))
            assert row["f1"] == pytest.approx(oracle.f1_score(targets, called, zero_division=0))
            if called.any():
                assert row["prec"] == pytest.approx(oracle.precision_score(targets, called))
        patients = table[table[f"target_{row['class']}"].notna()]["patient_id"].to_numpy()
        interval = bootstrap_auc(targets, scores, patients, seed=42)
        if row["level"] == "scan":
            interval = delong_auc(targets, scores)[2:]
        assert (row["auc_low"], row["auc_high"]) == pytest.approx(tuple(interval), nan_ok=True)
    assert checked >= 4


@pytest.mark.parametrize("name", ["clean", "joint", "twostage", "bilstm"])
def test_calibrated_figures_are_those_at_the_stored_temperature(trained, evaluated, name):
    facts, folder = checkpoints.load(trained[1] / f"{name}.pt", "classifier"), evaluated(name)
    rows = pd.read_csv(folder / "metrics.csv").set_index(["level", "class"])
    classes = facts["classes"]
    for level, file in (("slice", "predictions.csv"), ("scan", "scans.csv")):
        temperature = facts["temperatures"][level]["value"]
        table = pd.read_csv(folder / file)
        found = table[[f"probability_{one}" for one in classes]].to_numpy().clip(1e-7, 1 - 1e-7)
        targets = table[[f"target_{one}" for one in classes]].to_numpy()
        if len(classes) == 3:
            warm = softmax(np.log(found) / temperature, axis=1)
        else:
            warm = expit(logit(found) / temperature)
        for place, one in enumerate(classes):
            row = rows.loc[level, one]
            assert row["temperature"] == temperature
            assert row["brier_calibrated"] == pytest.approx(
                np.square(warm[:, place] - targets[:, place]).mean()
            )
            bins = np.minimum((warm[:, place] * 15).astype(int), 14)
            gaps = [abs((warm[bins == b, place] - targets[bins == b, place]).sum()) for b in range(15)]
            assert row["ece_calibrated"] == pytest.approx(sum(gaps) / len(table))


def test_exclusive_classes_together_have_accuracy_macro_auc_and_the_ece_of_what_is_called(evaluated):
    folder = evaluated("twostage")
    rows, table = pd.read_csv(folder / "metrics.csv"), pd.read_csv(folder / "predictions.csv")
    row = rows[(rows["class"] == "all") & (rows["level"] == "slice")].iloc[0]
    classes = TASKS["type"].classes
    targets = table[[f"target_{one}" for one in classes]].to_numpy().argmax(1)
    found = table[[f"probability_{one}" for one in classes]].to_numpy()
    assert row["acc"] == pytest.approx(oracle.accuracy_score(targets, found.argmax(1)))
    macro = oracle.roc_auc_score(targets, found, multi_class="ovr")
    assert row["auc"] == pytest.approx(macro)
    assert row["auc_low"] < macro < row["auc_high"]
    sure, right = found.max(1), found.argmax(1) == targets
    bins = (sure * 15).astype(int)
    gaps = [abs((sure[bins == b] - right[bins == b]).sum()) for b in range(15)]
    assert row["ece"] == pytest.approx(sum(gaps) / len(table))


def test_submission_covers_every_slice_once_and_scores_as_the_table_says(trained, evaluated):
    folder = evaluated("bilstm")
    submission, table = pd.read_csv(folder / "submission.csv"), pd.read_csv(folder / "predictions.csv")
    assert list(submission) == ["ID", "Label"]
    ids = submission["ID"].str.rsplit("_", n=1, expand=True)
    assert submission["ID"].is_unique
    assert ids[1].tolist() == list(SUBTYPES) * len(table)
    pack = load_pack(trained[0], "train", 48)
    wanted = [
        f"{pack.series[number]['series_uid']}_{index:05d}"
        for number, index in zip(pack.series_of, pack.slice_of, strict=True)
    ]
    assert ids[0].tolist() == np.repeat(wanted, 6).tolist()
    assert all((trained[0] / "train" / one[:-6] / one[-5:]).is_dir() for one in wanted)
    found = submission["Label"].to_numpy().reshape(-1, 6)
    np.testing.assert_array_equal(found, table[[f"probability_{one}" for one in SUBTYPES]])
    targets = table[[f"target_{one}" for one in SUBTYPES]].to_numpy()
    losses = [oracle.log_loss(t, p, labels=[0, 1]) for t, p in zip(targets.T, found.T, strict=True)]
    rows = pd.read_csv(folder / "metrics.csv").set_index(["level", "class"])
    assert rows.loc[("slice", "all"), "rsna_log_loss"] == pytest.approx((sum(losses) + losses[-1]) / 7)
    facts = checkpoints.load(trained[1] / "bilstm.pt", "classifier")
    warm = expit(logit(found) / facts["temperatures"]["slice"]["value"])
    losses = [oracle.log_loss(t, p, labels=[0, 1]) for t, p in zip(targets.T, warm.T, strict=True)]
    calibrated = rows.loc[("slice", "all"), "rsna_log_loss_calibrated"]
    assert calibrated == pytest.approx((sum(losses) + losses[-1]) / 7)


def test_calls_are_those_at_the_stored_thresholds_and_empty_without_one(trained, evaluated):
    folder = evaluated("bilstm")
    facts = checkpoints.load(trained[1] / "bilstm.pt", "classifier")
    values = facts["thresholds"]["slice"]["values"]
    table, calls = (pd.read_csv(folder / name) for name in ("predictions.csv", "predictions_binary.csv"))
    assert {value is None for value in values.values()} == {True, False}
    for name, value in values.items():
        if value is None:
            assert calls[f"call_{name}"].isna().all()
        else:
            np.testing.assert_array_equal(calls[f"call_{name}"], table[f"probability_{name}"] >= value)
    assert calls["call_question"].tolist() == calls["call_any"].tolist()


# ---------------------------------------------------------------- what the classifier is shown


def test_answers_are_those_behind_the_parent_denoiser_with_the_noise_of_the_study(trained, tmp_path):
    data, models = trained
    results = tmp_path / "results"
    call("--evaluate", models / "denoised.pt", *on(data, results, "--seed", 7))
    folder = results / "classifier" / "denoised"
    pack, (denoiser, _) = load_pack(data, "test", 48), load_denoiser(models / "denoiser.pt")
    network, _ = load_classifier(models / "denoised.pt")
    every, table = np.arange(len(pack)), pd.read_csv(folder / "predictions.csv")
    scans = pd.read_csv(folder / "scans.csv")
    columns = [f"probability_{name}" for name in TASKS["type"].classes]
    for dose in (5.0, 20.0):
        low, same = LowDose(pack, "calibrated", [dose]), [dose] * len(pack)
        noisy = low.evaluation(every, same, 7)
        images = denoise(denoiser, noisy, low.levels(every, same), pack.series_of)
        found = read(network, images, pack.series_of)
        for part, level in ((table, found.slices), (scans, found.scans)):
            np.testing.assert_allclose(part[part["dose"] == dose][columns], level, atol=1e-5)
        assert not np.allclose(found.slices, read(network, noisy, pack.series_of).slices, atol=1e-5)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"dose_5", "dose_20"}


def test_network_sees_every_slice_once_at_each_dose(trained, tmp_path, monkeypatch, no_pictures):
    data, models = trained
    seen = []
    monkeypatch.setattr(
        classified,
        "read",
        lambda model, images, **more: seen.append(len(images)) or read(model, images, **more),
    )
    call("--evaluate", models / "clean.pt", *on(data, tmp_path, "--doses", 5))
    assert seen == [6, 6] * 2  # clean, then dose 5: the two scans of the split


def test_classifier_of_clean_slices_is_scored_at_doses_as_well(trained, tmp_path, capsys):
    data, models = trained
    words = ("--evaluate", models / "clean.pt", *on(data, tmp_path))
    folder = tmp_path / "classifier" / "clean"
    call(*words, "--dose-model", "projection", "--doses", 0.1)
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    shown = [(row["input"], row["dose_model"], row["dose"], row["dose_fraction"]) for row in rows[::4]]
    assert shown == [
        ("clean", None, None, None),
        ("noisy", "projection", 0.1, 0.1),
    ]
    assert "dose 0.1 (projection, noisy)" in capsys.readouterr().out
    table = pd.read_csv(folder / "predictions.csv")
    clean, low = (table[table["dose"].isna()], table[table["dose"] == 0.1])
    assert np.abs(clean["probability_stroke"].to_numpy() - low["probability_stroke"].to_numpy()).max() > 1e-6
    pictures = {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    kinds = ("roc", "reliability", "confusion", "classes")
    places = ("clean", "dose_0.1")
    assert pictures == {"learning_curves.png", *(f"{place}/{kind}.png" for place in places for kind in kinds)}
    call(*words)
    again = json.loads((folder / "metrics.json").read_text())["rows"]
    assert again == rows[:4]
    alone = pd.read_csv(folder / "predictions.csv")
    assert "dose" not in alone
    np.testing.assert_array_equal(alone["probability_stroke"], clean["probability_stroke"])
    pictures = {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    assert pictures == {"learning_curves.png", *(f"{kind}.png" for kind in kinds)}  # none of the last run


def test_doses_without_a_dose_model_are_of_the_one_it_was_trained_with():
    facts = {"input": "noisy", "dose_model": "projection", "doses": [0.1, 0.25]}
    shown = classified.conditions(facts, None, None)
    assert [tuple(one) for one in shown] == [("noisy", "projection", 0.1), ("noisy", "projection", 0.25)]
    assert [one.dose for one in classified.conditions(facts, None, [0.5, 0.5])] == [0.5]
    other = classified.conditions(facts, "poisson", None)
    assert {one.dose_model for one in other} == {"poisson"}
    assert 0.1 not in {one.dose for one in other}
    with pytest.raises(ValueError, match="dose 5"):
        classified.conditions(facts, None, [5])


def test_mirrored_answers_are_means_with_those_of_mirrored_slices(trained, tmp_path, no_pictures):
    data, models = trained
    call("--evaluate", models / "clean.pt", *on(data, tmp_path, "--mirrored"))
    folder = tmp_path / "classifier" / "clean"
    pack, (network, _) = load_pack(data, "test", 48), load_classifier(models / "clean.pt")
    both = [read(network, np.array(images), pack.series_of) for images in (pack.image, pack.image[..., ::-1])]
    found = pd.read_csv(folder / "predictions.csv")["probability_stroke"]
    np.testing.assert_allclose(found, (both[0].slices + both[1].slices)[:, 0] / 2, atol=1e-6)
    assert json.loads((folder / "metrics.json").read_text())["manifest"]["mirrored"] is True


# ---------------------------------------------------------------- position alone


def relabel(data, label):
    """Write label(index, metadata) -> dict over the labels of every slice, and of its scan their largest."""
    for split in ("train", "val", "test"):
        for folder in series_folders(data, split):
            metadata = read_metadata(folder)
            for entry in metadata["slices"]:
                entry["labels"] |= label(entry["index"], metadata)
            metadata["labels"] |= {
                name: max(entry["labels"][name] for entry in metadata["slices"])
                for name in label(0, metadata)
            }
            stage.write_json(folder / "metadata.json", metadata)


def test_null_knows_the_height_of_a_slice_and_nothing_of_the_scan(trained, split_data, tmp_path, no_pictures):
    relabel(split_data, lambda index, _: {"any": int(index >= 3)})
    call("--evaluate", trained[1] / "joint.pt", *on(split_data, tmp_path, "--split", "train"))
    rows = json.loads((tmp_path / "classifier" / "joint" / "metrics.json").read_text())["rows"]
    assert [(row["level"], row["auc_null"]) for row in rows[::2]] == [("slice", 1.0), ("scan", None)]


def test_null_is_learnt_from_the_training_split_alone(trained, split_data, tmp_path, no_pictures):
    test = {folder.name for folder in series_folders(split_data, "test")}
    relabel(split_data, lambda index, scan: {"any": int((index >= 3) != (scan["series_uid"] in test))})
    words = ("--evaluate", trained[1] / "joint.pt", *on(split_data, tmp_path))
    call(*words)
    path = tmp_path / "classifier" / "joint" / "metrics.json"
    assert json.loads(path.read_text())["rows"][0]["auc_null"] == 0.0
    shutil.rmtree(split_data / "train")
    call(*words)
    assert json.loads(path.read_text())["rows"][0]["auc_null"] is None


# ---------------------------------------------------------------- what cannot be computed


def level(name, targets, found, patients):
    targets, found = (np.array(values, float)[:, None] for values in (targets, found))
    return classified.Level(name, targets, found, found, np.full_like(found, 0.5), np.array(patients))


FACTS = {"task": "stroke", "thresholds": {"slice": {"value": 0.5}, "scan": {"value": None}}}


def test_level_of_one_class_has_its_share_right_and_no_curve():
    row, question = classified.score(FACTS, level("slice", [0, 0, 0], [0.1, 0.2, 0.7], [*"abc"]), 0)
    assert (question["class"], question["acc"], question["spec"]) == ("question", 2 / 3, 2 / 3)
    assert (row["class"], row["positives"], row["auc_interval"]) == ("stroke", 0, None)
    assert math.isnan(row["spec"])  # no threshold of its own is stored
    for name in ("auc", "auc_low", "auc_null", "ap", "sens", "sens_at_90_spec"):
        assert math.isnan(question[name])


def test_level_without_known_answers_has_nothing_but_its_counts():
    rows = classified.score(FACTS, level("scan", [math.nan] * 2, [0.1, 0.9], [*"ab"]), 0)
    for row in rows:
        assert (row["n"], row["positives"], row["n_patients"]) == (0, 0, 0)
        assert all(math.isnan(row[name]) for name in ("auc", "acc", "ece", "brier", "threshold"))


def test_scans_of_one_patient_take_the_bootstrap_of_patients_instead_of_delong():
    targets, scores = [0, 1] * 6, np.linspace(0, 1, 12) ** 2
    alone = classified.score(FACTS, level("scan", targets, scores, range(12)), 3)[1]
    assert (alone["auc_interval"], alone["auc_low"]) == ("DeLong", delong_auc(np.array(targets), scores).low)
    pairs = np.repeat(range(6), 2)
    shared = classified.score(FACTS, level("scan", targets, scores, pairs), 3)[1]
    wanted = bootstrap_auc(np.array(targets), scores, pairs, seed=3)
    assert (shared["auc_interval"], shared["auc_low"]) == ("patient bootstrap", wanted.low)


def test_temperature_of_exclusive_classes_divides_their_logits():
    found = softmax(np.random.default_rng(0).normal(size=(7, 3)), axis=1)
    warm = classified.at_temperature(TASKS["type"], found, 2.0)
    np.testing.assert_allclose(np.log(warm), log_softmax(np.log(found) / 2, axis=1))
    np.testing.assert_allclose(classified.at_temperature(TASKS["type"], found, 1.0), found)
    assert np.isnan(classified.at_temperature(TASKS["subtypes"], found, math.nan)).all()


@pytest.mark.parametrize("name", ["clean", "bilstm", "twostage"])
def test_split_of_a_single_scan_is_scored_as_far_as_it_goes(trained, split_data, tmp_path, capsys, name):
    for folder in series_folders(split_data, "test")[1:]:
        shutil.rmtree(folder)
    call("--evaluate", trained[1] / f"{name}.pt", *on(split_data, tmp_path))
    folder = tmp_path / "classifier" / name
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    scans = [row for row in rows if row["level"] == "scan"]
    assert {row["n"] for row in scans} == {1}
    assert {row["auc"] for row in scans} == {None}
    printed = capsys.readouterr().out
    assert "1 test patients, 1 scans, 6 slices" in printed
    assert "AUC n/a" in printed
    assert len(pd.read_csv(folder / "scans.csv")) == 1
    for path in folder.rglob("*.png"):
        with Image.open(path) as picture:
            picture.verify()


def test_split_without_labels_is_answered_all_the_same(trained, split_data, tmp_path):
    for folder in series_folders(split_data, "test"):
        metadata = read_metadata(folder)
        for entry in (metadata, *metadata["slices"]):
            entry["labels"] = dict.fromkeys(entry["labels"])
        stage.write_json(folder / "metadata.json", metadata)
    call("--evaluate", trained[1] / "bilstm.pt", *on(split_data, tmp_path))
    folder = tmp_path / "classifier" / "bilstm"
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    assert {(row["n"], row["auc"], row["rsna_log_loss"]) for row in rows} == {(0, None, None)}
    assert len(pd.read_csv(folder / "submission.csv")) == 12 * 6


def test_checkpoint_of_an_earlier_version_lacks_only_what_it_did_not_store(trained, tmp_path):
    data, models = trained
    content = checkpoints.load(models / "clean.pt", "classifier")
    del content["temperatures"]
    for stored in content["thresholds"].values():
        del stored["values"]
    checkpoints.save(tmp_path / "old.pt", content)
    call("--evaluate", tmp_path / "old.pt", *on(data, tmp_path))
    folder = tmp_path / "classifier" / "old"
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        stroke, question, *_ = csv.DictReader(file)
    assert (stroke["threshold"], question["ece_calibrated"], question["temperature"]) == ("", "", "")
    assert float(question["threshold"]) == content["thresholds"]["slice"]["value"]
    assert stroke["auc"] == question["auc"] != ""
    assert not (folder / "learning_curves.png").exists()  # no .jsonl beside it


# ---------------------------------------------------------------- what is told


def test_evaluation_tells_whom_it_is_about_and_keeps_it(trained, tmp_path, capsys):
    data, models = trained
    call("--evaluate", models / "bilstm.pt", *on(data, tmp_path, "--split", "val", "--doses", 10))
    printed = capsys.readouterr().out.splitlines()
    assert (
        "task subtypes, trained on noisy slices. 2 val patients, 2 scans, 12 slices of 48 x 48" in printed[0]
    )
    assert "2 of these patients were seen in its training or validation: no fair test" in printed[1]
    assert "Null: AUC of the height in the scan alone, learnt from the training slices" in printed[2]
    assert printed[3] == "dose 10 (calibrated, noisy)"
    assert "RSNA log loss" in printed[11]
    assert printed[-1].startswith(f"Wrote {tmp_path / 'classifier' / 'bilstm'}/: metrics.csv, metrics.json, ")
    assert "submission.csv and 5 figures" in printed[-1]
    manifest = json.loads((tmp_path / "classifier" / "bilstm" / "metrics.json").read_text())["manifest"]
    assert manifest["checkpoint"]["sha256"] == checkpoints.file_sha256(models / "bilstm.pt")
    assert manifest["split_hash"] == load_pack(data, "val", 48).split_hash
    assert (manifest["noise_seed"], manifest["train_seed"]) == (42, 42)
    assert manifest["patients_seen_in_training_or_validation"] == 2
    assert manifest["thresholds"]["slice"]["origin"].startswith("largest Youden index on val")
    assert manifest["command"].startswith("train_classifier.py --evaluate ")


def test_shown_numbers_are_those_of_the_table(trained, evaluated):
    rows = json.loads((evaluated("clean") / "metrics.json").read_text())["rows"]
    row = {name: math.nan if value is None else value for name, value in rows[1].items()}
    line = classified.describe(TASKS["stroke"], row)
    assert f"{row['positives']} of {row['n']} | AUC {metrics.shown(row['auc'])} [" in line
    assert f"(null {metrics.shown(row['auc_null'])})" in line
    assert f"ECE {metrics.shown(row['ece'])} -> {metrics.shown(row['ece_calibrated'])}" in line


# ---------------------------------------------------------------- refusals


def test_classifier_that_has_seen_a_test_patient_is_refused(trained, tmp_path):
    data, models = trained
    content = checkpoints.load(models / "clean.pt", "classifier")
    content["trained_on"] = list(read_splits(data)["patients"])
    checkpoints.save(tmp_path / "leaky.pt", content)
    with pytest.raises(stage.InputError, match="was trained on .* test patients"):
        call("--evaluate", tmp_path / "leaky.pt", *on(data, tmp_path / "results"))
    assert not (tmp_path / "results").exists()


def test_classifier_behind_another_denoiser_than_its_own_is_refused(trained, tmp_path):
    data, models = trained
    shutil.copy(models / "denoised.pt", tmp_path)
    words = ("--evaluate", tmp_path / "denoised.pt", *on(data, tmp_path / "results"))
    with pytest.raises(stage.InputError, match=r"denoiser\.pt: no such checkpoint"):
        call(*words)
    content = checkpoints.load(models / "denoiser.pt", "denoiser")
    content["state"]["head.bias"] += 1
    checkpoints.save(tmp_path / "denoiser.pt", content)
    with pytest.raises(stage.InputError, match="trained behind another denoiser"):
        call(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "test"], "--split: only with --evaluate"),
        (["--mirrored"], "--mirrored: only with --evaluate"),
        (["--results", "results"], "--results: only with --evaluate"),
        (["--evaluate", "x.pt", "--epochs", 3], "--epochs: not with --evaluate"),
        (["--evaluate", "x.pt", "--task", "stroke"], "--task: not with --evaluate"),  # be it the default
        (["--evaluate", "x.pt", "--batch_size", 8], "--batch-size: not with --evaluate"),
        (["--evaluate", "x.pt", "--size", 48], "--size: not with --evaluate"),
        (["--evaluate", "x.pt", "--resume"], "--resume: not with --evaluate"),
        (["--evaluate", "x.pt"], r"x\.pt: no such checkpoint"),
    ],
)
def test_option_without_its_mode_is_refused(words, message):
    with pytest.raises(stage.InputError, match=message):
        call(*words)


def test_options_of_evaluation_are_no_part_of_a_training():
    parsed = train_classifier.get_parser().parse_args([])
    args = stage.training_only(parsed, set(), train_classifier.MODES, train_classifier.SHARED)
    assert not {"evaluate", "split", "results", "mirrored"} & set(vars(args))
    assert {"task", "epochs", "seed"} <= set(vars(args))
