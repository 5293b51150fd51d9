"""A segmenter alone: its numbers against masks predicted anew, its tables and pictures, what is refused."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import checkpoints
import inference
import lesions
import segmented
import stage
import train_segmenter
from anatomy import LESION_CLASSES
from dataset import load_pack, read_metadata, read_splits, series_folders
from inference import denoise, load_denoiser, load_segmenter, segment
from lesion_reading import outline_lesions
from low_dose import LowDose
from scoring import Shown
from segmenters import SEGMENTERS, Segmenter
from slice_files import read_npz, write_npz
from tests.toy_models import BRIGHT_HU, SIZE, bright, write_models  # noqa: F401 a fixture

DOSES = (20.0, 5.0)
VIEWS = [("clean", None), ("noisy", 20.0), ("denoised", 20.0), ("noisy", 5.0), ("denoised", 5.0)]


class BandSegmenter(Segmenter):
    """Calls a pixel of the class in whose band of 10 HU from BRIGHT_HU on it lies, else nothing."""

    step = 1

    def __init__(self, **kwargs):
        super().__init__(classes=LESION_CLASSES, windows=[(BRIGHT_HU, 100.0)], **kwargs)
        self.head = nn.Conv2d(1, 7, 1)
        nn.init.zeros_(self.head.weight)

    def features(self, picture):
        return picture

    def forward(self, hu):
        band = ((hu[:, 0] - BRIGHT_HU) / 10).floor().long() + 1
        band = torch.where((band >= 1) & (band <= 6), band, 0)
        return nn.functional.one_hot(band, 7).movedim(-1, 1).float() * 9


@pytest.fixture
def models(tmp_path, bright, monkeypatch):  # noqa: F811
    """segmenter.pt (what is bright), classes.pt (bands of HU) and denoiser.pt, which adds some HU."""
    monkeypatch.setitem(SEGMENTERS, "band", BandSegmenter)
    folder = tmp_path / "models"
    folder.mkdir()
    write_models(folder)
    change(folder, "denoiser", state={"head.bias": torch.tensor([0.1])}, doses=list(DOSES))
    change(folder, "segmenter", dose_model=None, doses=[])
    classes = {"model": {"name": "band", "kwargs": {}}, "classes": list(LESION_CLASSES)}
    content = checkpoints.load(folder / "segmenter.pt", "segmenter")
    state = BandSegmenter().state_dict()
    checkpoints.save(folder / "classes.pt", content | classes | {"state": state})
    return folder


def change(folder, kind, **facts):
    """Rewrite a checkpoint; state: what is added to its weights."""
    content = checkpoints.load(folder / f"{kind}.pt", kind)
    for name, value in facts.pop("state", {}).items():
        content["state"][name] += value
    checkpoints.save(folder / f"{kind}.pt", content | facts)


def call(*words):
    train_segmenter.main([str(word) for word in (*words, "--device", "cpu")])


def evaluate(folder, data, out, *words, name="segmenter"):
    """The folder of its results."""
    call("--evaluate", folder / f"{name}.pt", "--data", data, "--results", out, *words)
    return out / "segmenter" / name


@pytest.fixture
def few_draws(monkeypatch):
    """The bootstrap is tested elsewhere."""
    own = lesions.summarise
    monkeypatch.setattr(lesions, "summarise", lambda *args, **more: own(*args, **more, replicates=40))


@pytest.fixture
def no_pictures(monkeypatch):
    """They take most of the time."""
    monkeypatch.setattr(segmented, "write_figures", lambda *_: None)
    monkeypatch.setattr(segmented, "pictured_scans", lambda _: set())


def views_anew(models, pack, rows, seed, doses=DOSES):
    """{(input, dose): slices} of a scan."""
    denoiser, _ = load_denoiser(models / "denoiser.pt")
    found = {("clean", None): np.array(pack.image[rows])}
    for dose in doses:
        low, same = LowDose(pack, "calibrated", [dose]), [dose] * len(rows)
        found["noisy", dose] = low.evaluation(rows, same, seed)
        found["denoised", dose] = denoise(denoiser, found["noisy", dose], low.levels(rows, same))
    return found


def as_text(report):
    """Numbers of a report as pandas reads them."""
    return {name: math.nan if value is None else value for name, value in report.items()}


def check_row(row, report):
    for name, value in as_text(report).items():
        assert row[name] == (value if isinstance(value, str) else pytest.approx(value, nan_ok=True)), name


# ---------------------------------------------------------------- numbers


def test_cases_are_those_of_masks_predicted_anew(models, split_data_once, tmp_path, no_pictures, few_draws):
    half = SIZE // 2  # pixels twice as wide as those of the series
    change(models, "segmenter", size=half)
    data = shutil.copytree(split_data_once, tmp_path / "data")
    folder = evaluate(models, data, tmp_path, "--split", "train", "--seed", 7)
    table, pack = pd.read_csv(folder / "cases.csv"), load_pack(data, "train", half)
    network, _ = load_segmenter(models / "segmenter.pt")
    assert len(table) == len(VIEWS) * len(pack.series)
    assert not table.duplicated(["input", "dose", "series_uid"]).any()
    dices = []
    for number, series in enumerate(pack.series):
        rows = np.flatnonzero(pack.series_of == number)
        pixel_mm = 2 * series["spacing_mm"][1]
        spacing_mm = (series["spacing_mm"][0], pixel_mm, pixel_mm)
        for (kind, dose), images in views_anew(models, pack, rows, 7).items():
            mask = segment(network, images, threshold=0.5)
            own = table[(table["input"] == kind) & (table["series_uid"] == series["series_uid"])]
            own = own[own["dose"].isna() if dose is None else own["dose"] == dose]
            row = own.iloc[0].to_dict()
            assert (row["patient_id"], row["n_slices"]) == (series["patient_id"], len(rows))
            check_row(row, lesions.case_report(pack.mask[rows], mask, spacing_mm))
            dices.append(row["dice"])
    assert len(set(dices)) > len(pack.series)  # noise and denoiser change what is found


def test_metrics_are_the_summary_of_the_cases_by_view_and_class(
    models, split_data_once, tmp_path, no_pictures
):
    folder = evaluate(models, split_data_once, tmp_path, "--split", "train")
    cases, table = pd.read_csv(folder / "cases.csv"), pd.read_csv(folder / "metrics.csv")
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    assert list(table)[: len(segmented.SUBJECT)] == list(segmented.SUBJECT)
    shown = table[table["class"] == "lesion"]
    assert [
        (row["input"], None if math.isnan(row["dose"]) else row["dose"]) for _, row in shown.iterrows()
    ] == VIEWS
    kinds = sorted(set(cases["kind"].dropna()))
    assert len(kinds) > 1
    for (_, row), same in zip(table.iterrows(), rows, strict=True):
        own = cases[cases["input"] == row["input"]]
        own = own[own["dose"].isna() if math.isnan(row["dose"]) else own["dose"] == row["dose"]]
        if row["class"] == "lesion":
            assert row["scope"] == "all scans"
        else:
            assert (row["scope"], row["class"] in kinds) == ("scans of the class", True)
            own = own[own["kind"] == row["class"]]
        reports = [
            one | {"size": None if one["size"] != one["size"] else one["size"]}
            for one in own.to_dict("records")
        ]
        expected = lesions.summarise(reports, list(own["patient_id"]), seed=42)
        check_row(row, expected)
        assert {name: same[name] for name in expected} == stage.plain(expected)


def test_gain_of_the_denoiser_is_of_the_same_scans(models, split_data_once, tmp_path, no_pictures, few_draws):
    folder = evaluate(models, split_data_once, tmp_path, "--split", "train")
    cases = pd.read_csv(folder / "cases.csv").set_index(["input", "dose", "series_uid"]).sort_index()
    table = pd.read_csv(folder / "metrics.csv")
    assert table[table["input"] != "denoised"]["dice_gain"].isna().all()
    for _, row in table[(table["input"] == "denoised") & (table["class"] == "lesion")].iterrows():
        after, before = (cases.loc[kind, row["dose"]] for kind in ("denoised", "noisy"))
        gains = (after["dice"] - before["dice"])[before["truth_ml"] > 0]
        assert row["dice_gain"] == pytest.approx(gains.mean())
        assert gains.min() <= row["dice_gain_low"] <= row["dice_gain"] <= row["dice_gain_high"] <= gains.max()
        assert row["dice_gain_low"] < row["dice_gain_high"]


def test_classes_are_scored_alone_where_the_network_tells_them_apart(
    models, split_data_once, tmp_path, no_pictures, few_draws
):
    folder = evaluate(models, split_data_once, tmp_path, "--split", "train", "--doses", 20, name="classes")
    table, pack = pd.read_csv(folder / "classes.csv"), load_pack(split_data_once, "train", SIZE)
    network, _ = load_segmenter(models / "classes.pt")
    assert len(table) == 3 * 6 * len(pack.series)
    clean = table[table["input"] == "clean"].set_index(["series_uid", "class"])
    for number, series in enumerate(pack.series):
        rows = np.flatnonzero(pack.series_of == number)
        pixel_mm = float(pack.pixel_mm[rows[0]])
        mask = segment(network, pack.image[rows])
        spacing_mm = (series["spacing_mm"][0], pixel_mm, pixel_mm)
        for name, report in lesions.class_report(pack.mask[rows], mask, spacing_mm).items():
            check_row(clean.loc[series["series_uid"], name], report)
    rows = pd.read_csv(folder / "metrics.csv")
    rows = rows[(rows["input"] == "clean") & (rows["scope"] == "voxels of the class")].set_index("class")
    assert list(rows.index) == list(LESION_CLASSES)
    for name, row in rows.iterrows():
        own = clean.xs(name, level="class")
        own = own[own["truth_ml"] > 0]
        assert row["n_positive"] == len(own)
        assert row["dice"] == pytest.approx(own["dice"].mean() if len(own) else math.nan, nan_ok=True)


def test_each_scan_passes_the_network_once_per_view(
    models, split_data_once, tmp_path, no_pictures, monkeypatch
):
    seen = []

    def counted(model, rule, volume, spacing_mm):
        seen.append(len(volume))
        return outline_lesions(model, rule, volume, spacing_mm)

    monkeypatch.setattr(segmented, "outline_lesions", counted)
    evaluate(models, split_data_once, tmp_path)
    assert seen == [6] * 2 * len(VIEWS)  # never more than one scan at once


def test_main_kind_is_that_of_most_voxels():
    truth = np.zeros((2, 5, 5), np.uint8)
    assert segmented.main_kind(truth) is None
    truth[0, 0] = 3
    truth[1, 0, :4] = 1
    assert segmented.main_kind(truth) == "intraventricular"
    truth[0, 1:3] = lesions.UNKNOWN_KIND
    assert segmented.main_kind(truth) == "unknown"


# ---------------------------------------------------------------- what is shown


def doses_of(facts, denoiser=None, dose_model=None, doses=None):
    before = None if denoiser is None else inference.Network(None, None, denoiser)
    return tuple(segmented.pick_doses(facts, before, dose_model, doses))


def test_doses_are_the_given_ones_else_of_the_training_else_of_the_denoiser():
    clean = {"dose_model": None, "doses": []}
    noisy = {"dose_model": "projection", "doses": [0.1, 0.5]}
    denoiser = {"dose_model": "calibrated", "doses": [5, 20]}
    assert doses_of(clean) == (None, [])
    assert doses_of(clean, denoiser) == ("calibrated", [20, 5])
    assert doses_of(noisy, denoiser) == ("projection", [0.5, 0.1])
    assert doses_of(noisy, denoiser, doses=[0.25, 1, 0.25]) == ("projection", [1, 0.25])
    assert doses_of(clean, doses=[10]) == ("calibrated", [10])
    model, doses = doses_of(noisy, dose_model="poisson")
    assert model == "poisson" and 0.1 not in doses and doses == sorted(doses, reverse=True)
    with pytest.raises(ValueError, match="dose 5"):
        doses_of(noisy, doses=[5])


def test_denoiser_is_the_given_one_else_the_parent_else_the_one_beside(models, tmp_path):
    facts = {"parents": {}}
    beside = models / "denoiser.pt"
    shutil.copy(beside, models / "other.pt")
    assert segmented.pick_denoiser(models / "segmenter.pt", facts, None).path == beside
    assert (
        segmented.pick_denoiser(models / "segmenter.pt", facts, models / "other.pt").path.name == "other.pt"
    )
    assert segmented.pick_denoiser(tmp_path / "segmenter.pt", facts, None) is None
    behind = {"parents": {"denoiser": {"path": "other.pt", "sha256": checkpoints.file_sha256(beside)}}}
    assert segmented.pick_denoiser(models / "segmenter.pt", behind, None).path.name == "other.pt"
    change(models, "denoiser", seed=2)
    with pytest.raises(stage.InputError, match=r"behind another denoiser than .*denoiser\.pt"):
        segmented.pick_denoiser(models / "segmenter.pt", behind, beside)
    (models / "other.pt").unlink()
    with pytest.raises(stage.InputError, match=r"other\.pt: no such checkpoint"):
        segmented.pick_denoiser(models / "segmenter.pt", behind, None)


def test_segmenter_alone_in_its_folder_is_scored_on_clean_scans(
    models, split_data_once, tmp_path, capsys, few_draws
):
    (models / "denoiser.pt").unlink()
    folder = evaluate(models, split_data_once, tmp_path)
    assert set(pd.read_csv(folder / "metrics.csv")["input"]) == {"clean"}
    assert json.loads((folder / "metrics.json").read_text())["manifest"]["denoiser"] is None
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"clean"}
    assert "dose" not in capsys.readouterr().out.split("clean\n")[1]


# ---------------------------------------------------------------- pictures


def test_pictures_show_the_same_scans_in_every_view_and_none_of_an_earlier_run(
    models, split_data_once, tmp_path, few_draws
):
    folder = evaluate(models, split_data_once, tmp_path, "--split", "train")
    places = ["clean", *(f"dose_{dose:g}/{kind}" for dose in DOSES for kind in ("noisy", "denoised"))]
    names = [{path.name for path in (folder / place).glob("*.png")} for place in places]
    clean = pd.read_csv(folder / "cases.csv").query("input == 'clean'")
    ill = int((clean["truth_ml"] > 0).sum())
    assert 0 < ill < len(clean)
    expected = min(ill, segmented.PICTURES) + min(len(clean) - ill, segmented.NORMAL_PICTURES)
    assert {len(own) for own in names} == {expected + 1}
    assert all("bland_altman.png" in own for own in names)
    assert {name.split("_")[0] for name in names[0]} == {name.split("_")[0] for name in names[-1]}
    assert {path.name for path in folder.glob("*.png")} == {"dice_by_dose.png", "dice_by_size.png"}
    for path in folder.rglob("*.png"):
        with Image.open(path) as picture:
            picture.verify()
    evaluate(models, split_data_once, tmp_path, "--split", "train", "--doses", 10)
    assert {path.parent.relative_to(folder).as_posix() for path in folder.rglob("*.png")} == {
        *(".", "clean", "dose_10/noisy", "dose_10/denoised")
    }


def test_plots_show_every_view_with_its_interval():
    report = lesions.case_report(np.ones((2, 9, 9), bool), np.ones((2, 9, 9), bool), (5, 2, 2))
    row = lesions.summarise([report, report | {"dice": 0.5}], ["a", "b"], seed=0, replicates=50)
    assert (row["dice"], row["dice_low"], row["dice_high"], row["n_1_to_5_ml"]) == (0.75, 0.5, 1, 2)
    noisy = {Shown("clean"): row, Shown("noisy", "projection", 0.1): row}
    both = noisy | {Shown("denoised", "projection", 0.1): row}
    views = ({Shown("clean"): row}, noisy, both)
    for overall, lines, sizes in zip(
        views, (1, 1, 2), (["clean"], ["noisy"], ["noisy", "denoised"]), strict=True
    ):
        over_dose, by_size = segmented.dose_plot(overall), segmented.size_plot(overall)
        dice = over_dose.axes[0].containers
        assert len(dice) == lines
        for curve in dice:
            assert set(curve.lines[0].get_ydata()) == {0.75}
            assert {end for part in curve.lines[2][0].get_segments() for end in part[:, 1]} == {0.5, 1}
        assert len(by_size.axes) == len(sizes)
        for axis, kind in zip(by_size.axes, sizes, strict=True):
            assert kind in axis.get_title() or sizes == ["clean"]
            assert len(axis.containers) == min(len(overall), 2)
            heights = np.asarray(axis.containers[0].lines[0].get_ydata(), float)
            assert heights[~np.isnan(heights)].tolist() == [0.75]


def test_overlay_shows_the_slice_with_most_of_the_lesion():
    images = np.full((4, 32, 32), 40, np.int16)
    truth, mask = np.zeros((2, 4, 32, 32), np.uint8)
    truth[1, 4:8, 4:8] = truth[2, 4:12, 4:12] = 1
    mask[3, 20:28, 20:28] = 1
    case = segmented.Case({}, None, lesions.case_report(truth, mask, (5, 1, 1)), {})
    place, png = segmented.draw(images, mask, truth, np.eye(4), Shown("clean"), case)
    assert (place, png[:4]) == (2, b"\x89PNG")
    assert segmented.draw(images, mask, 0 * truth, np.eye(4), Shown("clean"), case)[0] == 3
    assert segmented.draw(images, 0 * mask, 0 * truth, np.eye(4), Shown("clean"), case)[0] == 2


# ---------------------------------------------------------------- edges


def remask(data, split, value):
    """Write value(mask) over every mask of a split."""
    for folder in series_folders(data, split):
        metadata = read_metadata(folder)
        for entry in metadata["slices"]:
            path = folder / f"{entry['index']:05d}" / "mask.npz"
            write_npz(path, value(read_npz(path)).astype(np.uint8))
            entry["sha256"]["mask"] = "changed"  # so that the cache is made anew
        stage.write_json(folder / "metadata.json", metadata)


def test_split_without_a_lesion_has_no_dice_and_its_false_positives(models, split_data, tmp_path, capsys):
    remask(split_data, "test", lambda mask: 0 * mask)
    folder = evaluate(models, split_data, tmp_path)
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    assert {row["class"] for row in rows} == {"lesion"}
    for row in rows:
        assert (row["n_positive"], row["n_negative"], row["dice"], row["dice_low"]) == (0, 2, None, None)
        assert row["false_positive_ml"] > 0
        assert (row["clean"], row["dice_gain"], row["any_recall"]) == (0, None, None)
    printed = capsys.readouterr().out
    assert "Dice n/a" in printed and "nan" not in printed
    for path in folder.rglob("*.png"):
        with Image.open(path) as picture:
            picture.verify()


@pytest.mark.parametrize("name", ["segmenter", "classes"])
def test_split_of_one_scan_is_scored_as_far_as_it_goes(models, split_data, tmp_path, capsys, name):
    for folder in series_folders(split_data, "train")[1:]:
        shutil.rmtree(folder)
    folder = evaluate(models, split_data, tmp_path, "--split", "train", name=name)
    assert len(pd.read_csv(folder / "cases.csv")) == len(VIEWS)
    assert "1 train patients, 1 scans, 6 slices of 48 x 48" in capsys.readouterr().out


def test_lesion_of_unknown_kind_is_a_lesion_and_of_no_class(models, split_data, tmp_path, no_pictures):
    somewhere = np.zeros((SIZE, SIZE), bool)
    somewhere[20:24, 20:24] = True
    remask(split_data, "test", lambda mask: np.where((mask > 0) | somewhere, lesions.UNKNOWN_KIND, 0))
    found = evaluate(models, split_data, tmp_path, name="classes")
    rows = pd.read_csv(found / "metrics.csv")
    clean = rows[rows["input"] == "clean"].set_index(["class", "scope"])
    assert set(clean.index) == {("lesion", "all scans"), ("unknown", "scans of the class")}
    assert set(clean["n_positive"]) == {2}
    assert clean["dice"].nunique() == 1  # both are of the same two scans
    assert clean["dice"].iloc[0] > 0
    assert set(pd.read_csv(found / "cases.csv")["kind"]) == {"unknown"}
    assert pd.read_csv(found / "classes.csv").empty


def test_scans_without_masks_are_refused(models, split_data, tmp_path):
    for folder in series_folders(split_data, "test"):
        metadata = read_metadata(folder)
        stage.write_json(folder / "metadata.json", metadata | {"has_mask": False})
    with pytest.raises(stage.InputError, match="test-48: not every series has a lesion mask"):
        evaluate(models, split_data, tmp_path)


# ---------------------------------------------------------------- what is told and refused


def test_evaluation_tells_whom_it_is_about_and_keeps_it(models, split_data_once, tmp_path, capsys, few_draws):
    patients = read_splits(split_data_once)["patients"]
    some = sorted(patient for patient, split in patients.items() if split == "val")
    change(models, "segmenter", trained_on=some[:1])
    change(models, "denoiser", trained_on=some[1:])
    folder = evaluate(models, split_data_once, tmp_path, "--split", "val", "--doses", 20)
    printed = capsys.readouterr().out.splitlines()
    assert (
        "lesion or not, trained on clean slices. 2 val patients, 2 scans, 12 slices of 48 x 48" in printed[0]
    )
    assert "threshold 0.5, nothing with less than 0 ml from 0.5 on" in printed[0]
    assert f"noise seed 42, denoiser {models / 'denoiser.pt'}" in printed[0]
    assert "2 of these patients were seen in training or validation: no fair test" in printed[1]
    assert [line for line in printed if not line.startswith(" ")][1:-1] == [
        *("clean", "dose 20, noisy (calibrated)", "dose 20, denoised (calibrated)")
    ]
    assert "pictures" in printed[-1] and "metrics.csv, metrics.json, cases.csv" in printed[-1]
    manifest = json.loads((folder / "metrics.json").read_text())["manifest"]
    assert manifest["checkpoint"]["sha256"] == checkpoints.file_sha256(models / "segmenter.pt")
    assert manifest["denoiser"]["sha256"] == checkpoints.file_sha256(models / "denoiser.pt")
    assert (manifest["noise_seed"], manifest["train_seed"], manifest["n_scans"]) == (42, 1, 2)
    assert manifest["thresholds"]["lesion"]["value"] == 0.5
    assert manifest["command"].startswith("train_segmenter.py --evaluate ")


@pytest.mark.parametrize("kind", ["segmenter", "denoiser"])
def test_network_that_has_seen_a_test_patient_is_refused(models, split_data_once, tmp_path, kind):
    change(models, kind, trained_on=list(read_splits(split_data_once)["patients"]))
    with pytest.raises(stage.InputError, match=rf"{kind}\.pt: was trained on .* test patients"):
        evaluate(models, split_data_once, tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "test"], "--split: only with --evaluate"),
        (["--results", "results"], "--results: only with --evaluate"),
        (["--evaluate", "x.pt", "--epochs", 3], "--epochs: not with --evaluate"),
        (["--evaluate", "x.pt", "--threshold", 0.5], "--threshold: not with --evaluate"),
        (["--evaluate", "x.pt", "--input", "clean"], "--input: not with --evaluate"),  # be it the default
        (["--evaluate", "x.pt"], r"x\.pt: no such checkpoint"),
    ],
)
def test_option_without_its_mode_is_refused(words, message):
    with pytest.raises(stage.InputError, match=message):
        call(*words)
