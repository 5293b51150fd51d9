"""The classifier stage: every network, task and input through its command line, at toy size."""

import json
import math

import numpy as np
import pytest
import torch

import checkpoints
import inference
import stage
import train_classifier
import train_denoiser
from dataset import TASKS, THREE_WINDOWS, load_pack, task_targets
from inference import classify, load_classifier, read
from models import build_model

TOY = ["--size", 32, "--epochs", 1, "--device", "cpu", "--precision", "fp32"]
SMALL = [*TOY, "--width", 4]
PROJECTION = ["--dose-model", "projection", "--doses", 0.5, 0.1, "--noise-realisations", 1]
SCANS = ["--hidden", 8, "--scans", 2]
TWO_STAGE = [*SCANS, "--model", "two-stage", "--folds", 2, "--components", 5, "--epochs-sequence", 2]


def run(data, out, *more):
    train_classifier.main([str(word) for word in ("--data", data, "--out", out, *more)])


@pytest.fixture
def with_denoiser(split_data, tmp_path):
    """(data, folder with a toy denoiser.pt)."""
    words = ["--data", split_data, "--out", tmp_path, "--size", 32, "--epochs", 1, "--widths", 2, 4]
    train_denoiser.main([str(word) for word in [*words, "--device", "cpu"]])
    return split_data, tmp_path


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        [*SMALL, *SCANS, "--model", "cnn-bilstm", "--scan-length", 4, "--max-skip"],
        [*SMALL, *TWO_STAGE],
        [*TOY, "--model", "statistics"],
    ],
    ids=["slices", "cnn-bilstm", "two-stage", "statistics"],
)
def test_every_task_trains_and_its_checkpoint_answers_for_slices_and_scans(
    split_data, tmp_path, task, options
):
    run(split_data, tmp_path, "--task", task, *options)
    model, facts = load_classifier(tmp_path / "classifier.pt")
    pack = load_pack(split_data, "val", 32)
    found = read(model, pack.image, pack.series_of)
    count = len(TASKS[task].classes)
    assert found.slices.shape == (len(pack), count)
    assert found.scans.shape == (len(pack.series), count)
    if TASKS[task].exclusive:
        np.testing.assert_allclose(found.slices.sum(1), 1)
        np.testing.assert_allclose(found.scans.sum(1), 1)
    assert facts["classes"] == list(TASKS[task].classes)
    for level in ("slice", "scan"):
        threshold = facts["thresholds"][level]
        assert set(threshold["values"]) == set(facts["classes"])
        assert "on val" in threshold["origin"]
        assert 0 < facts["temperatures"][level]["value"] < 100
    entry = json.loads((tmp_path / "classifier.jsonl").read_text().splitlines()[-1])
    assert {"loss", "auc", "auc_scan"} <= set(entry)


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "convnext-tiny", "--batch-size", 4],
        ["--width", 4, "--windows", "three", "--slices", 3, "--dropout", 0.3, "--label-smoothing", 0.1],
        ["--width", 4, "--window-jitter", 0.2, "--balance", "pos-weight", "--task", "type"],
    ],
    ids=lambda options: "-".join(str(word).lstrip("-") for word in options[:4]),
)
def test_options_of_the_network_stand_in_its_checkpoint(split_data, tmp_path, options):
    run(split_data, tmp_path, *TOY, *options)
    model, facts = load_classifier(tmp_path / "classifier.pt")
    if "three" in options:
        assert model.windows == THREE_WINDOWS
        assert model.slices == 3
        assert facts["model"]["kwargs"]["dropout"] == 0.3
        assert len(facts["model"]["kwargs"]["mean"]) == 3
    assert facts["model"]["name"] == (options[1] if options[0] == "--model" else "resnet18")


@pytest.mark.parametrize(
    "options",
    [
        ["--input", "noisy", *PROJECTION],
        ["--input", "denoised", *PROJECTION, "--slices", 3],
        ["--input", "joint", *PROJECTION],
        ["--input", "denoised", *SCANS, "--model", "cnn-bilstm"],
        ["--input", "noisy", *TWO_STAGE],
    ],
    ids=["noisy", "denoised 2.5-D", "joint", "denoised scans", "noisy two-stage"],
)
def test_every_input_trains_and_stands_in_the_checkpoint(with_denoiser, options):
    data, out = with_denoiser
    run(data, out, *SMALL, *options)
    model, facts = load_classifier(out / "classifier.pt")
    assert facts["input"] == options[1]
    assert facts["dose_model"] == (options[3] if "--dose-model" in options else "calibrated")
    before = load_pack(data, "val", 32)
    assert np.isfinite(classify(model, before.image, before.series_of)).all()
    if options[1] in ("denoised", "joint"):
        assert facts["parents"]["denoiser"]["path"] == "denoiser.pt"


def test_joint_training_moves_the_denoiser_and_logs_both_parts_of_the_loss(with_denoiser):
    data, out = with_denoiser
    run(data, out, *SMALL, "--input", "joint", "--joint-weight", 0.5)
    joint, alone = (checkpoints.load(out / f"{n}.pt", n)["state"] for n in ("classifier", "denoiser"))
    assert any(not torch.equal(joint[f"denoiser.{key}"], value) for key, value in alone.items())
    entry = json.loads((out / "classifier.jsonl").read_text().splitlines()[-1])
    total = entry["train_answer"] + 0.5 * entry["train_image"]
    assert entry["train_loss"] == pytest.approx(total, rel=1e-5)


def test_joint_refuses_a_denoiser_that_must_know_the_dose():
    unet = {"name": "unet", "kwargs": {"widths": [2, 4], "dose_aware": True}}
    with pytest.raises(ValueError, match="noise level"):
        build_model("joint", denoiser=unet, classifier={"name": "resnet18", "kwargs": {"width": 4}})


def test_pretrained_of_a_file_begins_with_its_weights_and_offline_says_so(split_data, tmp_path, monkeypatch):
    network = build_model("resnet18", classes=[str(n) for n in range(1000)])
    state = {key: value for key, value in network.state_dict().items() if not key.startswith("fc.")}
    state["conv1.weight"] = torch.randn(64, 3, 7, 7)
    state["fc.weight"], state["fc.bias"] = torch.zeros(1000, 512), torch.zeros(1000)
    torch.save(state, tmp_path / "imagenet.pth")
    words = [*TOY, "--pretrained", "--lr", 1e-12]
    run(split_data, tmp_path / "out", *words, "--weights", tmp_path / "imagenet.pth")
    kept = checkpoints.load(tmp_path / "out/classifier.pt", "classifier")["state"]
    torch.testing.assert_close(
        kept["conv1.weight"], state["conv1.weight"].sum(1, keepdim=True), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        kept["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"], atol=1e-4, rtol=0
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(stage.InputError, match="--weights"):
        run(split_data, tmp_path / "offline", *words)


def test_finetune_of_a_scan_network_begins_with_all_of_its_weights(split_data, tmp_path):
    words = [*SMALL, *SCANS, "--model", "cnn-bilstm"]
    run(split_data, tmp_path, *words, "--name", "clean")
    run(
        *(split_data, tmp_path, *words, "--input", "noisy", "--lr", 1e-12),
        *("--finetune", tmp_path / "clean.pt"),
    )
    first, second = (checkpoints.load(tmp_path / f"{n}.pt", "classifier") for n in ("clean", "classifier"))
    for key, value in first["state"].items():
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(second["state"][key], value, atol=1e-4, rtol=0)
    assert second["parents"]["finetune"]["path"] == "clean.pt"


# ---------------------------------------------------------------- two stages


def test_two_stage_keeps_its_cnn_and_features_and_resumes_without_working_them_out_again(
    split_data, tmp_path, monkeypatch
):
    run(split_data, tmp_path, *SMALL, *TWO_STAGE)
    whole = checkpoints.load(tmp_path / "classifier.pt", "classifier")["state"]
    cnn = checkpoints.load(tmp_path / "classifier.cnn.pt", "classifier")["state"]
    for key, value in cnn.items():  # parameters and buffers, bit for bit
        assert torch.equal(whole[f"cnn.{key}"], value), key
    with monkeypatch.context() as patch:
        patch.setattr(train_classifier.two_stage, "ask", None)
        run(split_data, tmp_path, *SMALL, *TWO_STAGE, "--resume")
        for path in tmp_path.glob("classifier.*"):  # another BiLSTM behind the same CNNs
            if path.is_file() and not path.name.startswith("classifier.cnn"):
                path.unlink()
        run(split_data, tmp_path, *SMALL, *TWO_STAGE, "--resume", "--hidden", 8, "--max-skip")
    again = checkpoints.load(tmp_path / "classifier.pt", "classifier")
    assert again["model"]["kwargs"]["hidden"] == 8 and again["model"]["kwargs"]["max_skip"]
    assert torch.equal(again["state"]["pca_components"], whole["pca_components"])
    run(
        *(split_data, tmp_path / "other", *TOY, *TWO_STAGE),
        *("--cnn", tmp_path / "classifier.cnn.pt", "--name", "again"),
    )
    assert not (tmp_path / "other/again.cnn.pt").exists()
    other = checkpoints.load(tmp_path / "other/again.pt", "classifier")
    assert other["parents"]["cnn"]["path"] == "classifier.cnn.pt"
    assert torch.equal(other["state"]["pca_components"], whole["pca_components"])


def test_two_stage_reads_from_hu_what_it_learnt_from_cached_features(split_data, tmp_path):
    run(split_data, tmp_path, *SMALL, *TWO_STAGE)
    model, _ = load_classifier(tmp_path / "classifier.pt")
    pack = load_pack(split_data, "val", 32)
    with np.load(tmp_path / "classifier.features/val.npz") as kept:
        said = train_classifier.two_stage.Said(kept["embeddings"], kept["probabilities"])
    pca = train_classifier.two_stage.Components(model.pca_mean, model.pca_components)
    cached = train_classifier.two_stage.read_features(model, pca.features(said), pack.series_of)
    straight = read(model, pack.image, pack.series_of)
    np.testing.assert_allclose(cached.slices, straight.slices, atol=1e-4)
    np.testing.assert_allclose(cached.scans, straight.scans, atol=1e-4)


def test_folds_keep_patients_together_and_every_slice_is_asked_of_a_stranger(split_data):
    pack = load_pack(split_data, "train", 32)
    folds = train_classifier.two_stage.folds_of(pack, 3, seed=1)
    patients = pack.patient_ids()
    assert all(len(set(folds[patients == patient])) == 1 for patient in set(patients))
    sizes = np.bincount([folds[patients == patient][0] for patient in sorted(set(patients))])
    assert sizes.max() - sizes.min() <= 1
    assert (train_classifier.two_stage.folds_of(pack, 3, seed=2) != folds).any()
    for count in (1, 1000):
        with pytest.raises(stage.InputError, match="--folds"):
            train_classifier.two_stage.folds_of(pack, count, seed=1)


class Says(torch.nn.Module):
    """A slice classifier whose logit is always `value`."""

    slices, classes = 1, ("stroke",)

    def __init__(self, value):
        super().__init__()
        self.head = torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.constant_(self.head.bias, value)

    def embed(self, hu):
        return hu.mean((1, 2, 3))[:, None]


def test_out_of_fold_probabilities_come_from_the_network_that_left_the_fold_out():
    folds, series_of = np.array([1, 1, 0, 0, 2]), np.array([0, 0, 1, 1, 2])
    cnns = [Says(-3.0), Says(0.0), Says(3.0)]
    found = train_classifier.two_stage.out_of_fold(cnns, folds, np.zeros((5, 32, 32)), series_of)
    expected = 1 / (1 + np.exp(-np.array([0, 0, -3, -3, 3])))
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-6)


def test_principal_components_have_no_correlation_and_are_refused_beyond_the_slices():
    values = np.random.default_rng(0).normal(size=(40, 6)) @ np.random.default_rng(1).normal(size=(6, 6))
    pca = train_classifier.two_stage.fit_pca(values, 4)
    said = train_classifier.two_stage.Said(values, np.zeros((40, 1)))
    features = pca.features(said)[:, :4]
    covariance = np.cov(features.T)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-4)
    with pytest.raises(stage.InputError, match="--components 7"):
        train_classifier.two_stage.fit_pca(values, 7)


# ---------------------------------------------------------------- options without effect, bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scans", 2], "--scans: only for --model cnn-bilstm and two-stage"),
        (["--max-skip"], "--max-skip: only for --model cnn-bilstm and two-stage"),
        (["--model", "cnn-bilstm", "--batch-size", 8], "--batch-size: cnn-bilstm learns from whole scans"),
        (["--model", "cnn-bilstm", "--folds", 3], "--folds: only for --model two-stage"),
        (["--model", "cnn-bilstm", "--input", "joint"], "--input joint: for networks of slices"),
        (["--doses", 5], "--doses: clean slices have no low dose"),
        (["--joint-weight", 0.1], "--joint-weight: only for --input joint"),
        (["--denoiser", "x.pt"], "--denoiser: clean slices pass none"),
        (["--model", "convnext-tiny", "--width", 4], "--width: only for resnet18"),
        (["--weights", "x.pth"], "--weights: give --pretrained too"),
        (["--model", "two-stage", "--cnn", "x.pt", "--width", 8], "--width: --cnn is what it is"),
    ],
)
def test_an_option_without_effect_is_refused_before_anything_is_read(tmp_path, options, words):
    with pytest.raises(stage.InputError, match=words):
        run(tmp_path / "nothing", tmp_path, *options)


def test_a_cnn_of_another_task_is_refused(split_data, tmp_path):
    run(split_data, tmp_path, *SMALL, "--name", "stroke")
    with pytest.raises(stage.InputError, match="a classifier of slices for --task subtypes is needed"):
        run(split_data, tmp_path, *TOY, *TWO_STAGE, "--task", "subtypes", "--cnn", tmp_path / "stroke.pt")


def test_scans_whose_slices_nobody_labelled_teach_a_network_of_scans_only(split_data, tmp_path):
    for path in split_data.glob("*/*/metadata.json"):
        metadata = stage.read_json(path, "")
        for entry in metadata["slices"]:
            entry["labels"] = dict.fromkeys(entry["labels"])
        stage.write_json(path, metadata)
    with pytest.raises(stage.InputError, match="no slice with a known answer"):
        run(split_data, tmp_path, *SMALL)
    run(split_data, tmp_path, *SMALL, *SCANS, "--model", "cnn-bilstm")
    entry = json.loads((tmp_path / "classifier.jsonl").read_text().splitlines()[-1])
    assert entry["train_slice"] == 0
    assert entry["auc"] is None or math.isnan(entry["auc"])
    assert entry["train_scan"] > 0


# ---------------------------------------------------------------- as a library


@pytest.fixture
def two_models(split_data, tmp_path):
    for seed in (1, 2):
        run(split_data, tmp_path, *SMALL, "--task", "subtypes", "--seed", seed, "--name", f"m{seed}")
    return [tmp_path / "m1.pt", tmp_path / "m2.pt"]


def phantom_scan():
    jobs, _ = inference.READERS["phantom"].discover(1, 40, 5, 3)
    return inference.read_scan(jobs[0])


def test_ensemble_is_the_mean_of_its_models(two_models):
    scan = phantom_scan()
    one, other = (inference.load_model(path).predict(scan) for path in two_models)
    both = inference.ICHEnsemble.load_from_checkpoint(two_models).predict(scan)
    np.testing.assert_allclose(both.slices, (one.slices + other.slices) / 2)
    assert both.scan["any"] == pytest.approx((one.scan["any"] + other.scan["any"]) / 2)
    assert list(both.scan) == list(TASKS["subtypes"].classes)
    with pytest.raises(stage.InputError, match="a checkpoint at least"):
        inference.ICHEnsemble([])


def test_mirrored_reading_is_the_mean_of_both_and_the_same_for_the_mirrored_scan(two_models):
    model, scan = inference.load_model(two_models[0]), phantom_scan()
    images = model.prepare(scan).astype(np.float32)
    plain, turned = (classify(model.network, one) for one in (images, images[..., ::-1]))
    both = classify(model.network, images, mirrored=True)
    np.testing.assert_allclose(both, (plain + turned) / 2, atol=1e-6)
    np.testing.assert_allclose(
        classify(model.network, images[..., ::-1].copy(), mirrored=True), both, atol=1e-6
    )
    np.testing.assert_allclose(model.predict(scan, mirrored=True).slices, both, atol=1e-6)


def test_gradcam_of_a_scan_and_of_one_slice_are_at_the_networks_matrix(two_models):
    model, scan = inference.load_model(two_models[0]), phantom_scan()
    assert inference.generate_gradcam(model, scan, "any").shape == (5, 32, 32)
    assert inference.generate_gradcam(model, scan.hu[2], "any").shape == (32, 32)


def test_preprocess_scan_reads_a_folder_of_dicom_files_and_refuses_what_is_no_scan(real_data, tmp_path):
    scan = inference.preprocess_scan(real_data / "head_ge_tilted")
    assert scan.hu.shape == (28, 512, 512)
    with pytest.raises(stage.InputError, match="no such file"):
        inference.preprocess_scan(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(stage.InputError, match="0 CT series"):
        inference.preprocess_scan(tmp_path / "empty")


def test_targets_of_types_follow_the_labels_by_name_whatever_their_order():
    labels = [
        {"ischemia": 0, "any": 1},
        {"any": 0, "ischemia": 1},
        {"ischemia": 1, "any": 1},
        {"any": 0, "ischemia": 0},
        {"any": 0, "ischemia": None},
        {"any": None, "ischemia": 1},
    ]
    expected = np.array([[0, 0, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0], [np.nan] * 3, [np.nan] * 3])
    np.testing.assert_array_equal(task_targets("type", labels), expected)
    np.testing.assert_array_equal(TASKS["type"].positive(expected)[:4], [1, 1, 1, 0])
    mixed = [dict(reversed(entry.items())) for entry in labels]
    np.testing.assert_array_equal(task_targets("type", mixed), expected)
    one = {"subdural": 1, "intraventricular": 0, "epidural": 1, "any": 1}
    found = dict(zip(TASKS["subtypes"].classes, task_targets("subtypes", [one])[0], strict=True))
    assert (found["subdural"], found["epidural"], found["intraventricular"], found["any"]) == (1, 1, 0, 1)
    assert math.isnan(found["subarachnoid"])


def test_scan_probabilities_of_types_sum_to_one_and_follow_the_worst_slice():
    slices = np.array([[0.9, 0.05, 0.05], [0.2, 0.7, 0.1], [0.8, 0.1, 0.1]])
    (found,) = inference.scan_probabilities(slices, np.zeros(3, int), TASKS["type"].classes)
    np.testing.assert_allclose(found, [0.2, 0.7, 0.1])


def test_cnn_bilstm_begins_with_a_trained_cnn(split_data, tmp_path):
    run(split_data, tmp_path, *SMALL, "--windows", "three", "--name", "slices")
    words = [*TOY, *SCANS, "--model", "cnn-bilstm", "--cnn", tmp_path / "slices.pt", "--lr", 1e-12]
    run(split_data, tmp_path, *words)
    first, second = (checkpoints.load(tmp_path / f"{n}.pt", "classifier") for n in ("slices", "classifier"))
    for key, value in first["state"].items():
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(second["state"][f"cnn.{key}"], value, atol=1e-4, rtol=0)
    assert second["model"]["kwargs"]["cnn"] == first["model"]
    assert second["parents"]["cnn"]["path"] == "slices.pt"
