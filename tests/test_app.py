"""The app: its image mapping, that it shows what the study measured, and that it never shows a traceback."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from streamlit.testing.v1 import AppTest

import anatomy
import app
import app_cases
import app_charts
import app_data
import app_files
import app_results
import app_scan
import app_viewer
import app_words
import canvas
import checkpoints
import dataset
import detectability
import display
import figures
import lesions
import metrics
import models
import stage
import tables
from inference import classify, denoise, load_classifier, load_denoiser
from low_dose import LowDose
from scoring import write_table
from tests.test_tables import noisy_truth, others
from tests.toy_study import ToyPack, change, classifier, denoiser, toy_study
from volumes import Scan, write_nifti

ROOT = Path(app.__file__).parent
SIZE, SLICES = 45, 5  # odd on purpose
LPS = np.diag([4.0, 4.0, 5.0, 1.0])


# ---------------------------------------------------------------- fixtures


def make_scan(name: str = "s1", *, lesion: bool = True, affine=LPS, rows: int = SIZE) -> Scan:
    """A skull of 900 HU around brain of 35 HU, with a clot of 70 HU at the left of the patient."""
    y, x = np.mgrid[:rows, :SIZE]
    radius = np.hypot((y - rows // 2) / (0.42 * rows), (x - SIZE // 2) / (0.36 * SIZE))
    truth = np.full((SLICES, rows, SIZE), -1000, np.int16)
    truth[:, radius < 1] = 900
    truth[:, radius < 0.85] = 35
    mask = np.zeros(truth.shape, np.uint8)
    if lesion:
        mask[3, rows // 2 - 2 : rows // 2 + 3, SIZE // 2 + 6 : SIZE // 2 + 12] = 5
    truth[mask == 5] = 70
    noise = np.random.default_rng(0).normal(0, 4, truth.shape)
    labels = [dict.fromkeys(dataset.LABELS, 0) for _ in range(SLICES)]
    for index in np.flatnonzero(mask.any(axis=(1, 2))):
        labels[index] |= {"subdural": 1, "any": 1}
    return Scan(
        hu=(truth + noise).round().astype(np.int16),
        truth=truth,
        mask=mask,
        affine=affine,
        positions_mm=tuple(5.0 * np.arange(SLICES)),
        spacing_mm=(5.0, 4.0, 4.0),
        gantry_tilt_deg=0.0,
        source="phantom",
        patient_id=f"patient_{name}",
        study_uid=name,
        series_uid=name,
        labels=dict.fromkeys(dataset.LABELS, 0) | ({"subdural": 1, "any": 1} if lesion else {}),
        slice_labels=labels,
        repairs=[[] for _ in range(SLICES)],
    )


def write_data(data: Path, *scans: Scan) -> None:
    (data / "test").mkdir(parents=True)
    for scan in scans:
        dataset.write_scan(scan, data / "test")
    patients = {scan.patient_id: "test" for scan in scans}
    stage.write_json(data / "splits.json", {"patients": patients, "hash": "abc"})


def write_checkpoint(folder: Path, name: str, kind: str, widths: tuple[int, ...] = (2, 4), **facts) -> None:
    torch.manual_seed(0)
    if kind == "denoiser":
        model, kwargs = "unet", {"widths": list(widths)}
    else:
        model, kwargs = "resnet18", {"classes": ["stroke"], "width": 2}
        thresholds = {"slice": {"value": 0.5, "origin": "val"}, "scan": {"value": None, "origin": "val"}}
        facts = {
            "task": "stroke",
            "classes": ["stroke"],
            "assume_absent": [],
            "thresholds": thresholds,
            "parents": {},
        } | facts
    network = models.build_model(model, **kwargs)
    if kind == "denoiser":
        torch.nn.init.normal_(network.head.weight, std=0.02)  # untrained it would return its input
    content = {
        "format": checkpoints.FORMAT,
        "stage": kind,
        "model": {"name": model, "kwargs": kwargs},
        "state": network.state_dict(),
        "size": SIZE,
        "dose_model": "calibrated",
        "doses": [5.0, 10.0] if kind == "denoiser" else [],
        "split_hash": "abc",
        "seed": 1,
    }
    checkpoints.save(folder / f"{name}.pt", content | facts)


def write_models(folder: Path) -> None:
    write_checkpoint(folder, "denoiser", "denoiser")
    for name, what in (("classifier", "clean"), ("classifier_n", "noisy"), ("classifier_d", "denoised")):
        write_checkpoint(folder, name, "classifier", input=what)


CARD = {"model": {"name": "resnet18"}, "validation": {"auc": 0.75, "epoch": 3}, "config": {"lr": 0.001}}
ALWAYS_POSITIVE = {level: {"value": 0.0, "origin": "val"} for level in ("slice", "scan")}


def write_segmenter(folder: Path) -> None:
    """One that outlines anything: it is untrained."""
    torch.manual_seed(0)
    kwargs = {"widths": [2, 4], "classes": ["lesion"]}
    network = models.build_model("unet", kind="segmenter", **kwargs)
    content = {
        "format": checkpoints.FORMAT,
        "stage": "segmenter",
        "model": {"name": "unet", "kwargs": kwargs},
        "state": network.state_dict(),
        "size": SIZE,
        "dose_model": "calibrated",
        "doses": [],
        "split_hash": "abc",
        "input": "clean",
        "classes": ["lesion"],
        "parents": {},
        "thresholds": {"lesion": {"value": 0.0, "origin": "val"}},
        "volume_rule": None,
    }
    checkpoints.save(folder / "segmenter.pt", content)


def result_rows() -> list[dict]:
    rows = []
    for dose in (5.0, 10.0):
        for arm in ("1", "2"):
            for level in ("slice", "scan"):
                row = dict.fromkeys(tables.COLUMNS, 0.5)
                row |= {"dose_model": "calibrated", "dose": dose, "dose_fraction": dose / 40, "arm": arm}
                row |= {"level": level, "task": "stroke", "classifier": "classifier.pt", "noise_seed": 7}
                row |= {
                    "denoiser": "denoiser.pt" if arm == "2" else None,
                    "range_hu": "0..80",
                    "mask": "head",
                }
                row |= {"n_patients": 3, "n_slices": 24, "auc": 0.812, "auc_low": 0.7, "auc_high": 0.9}
                row |= {"psnr": None, "rmse_hu": 4.25, "rmse_hu_noisy": 12.5}
                rows.append(row)
    return rows


def write_results(folder: Path, rows: list[dict] | None = None) -> Path:
    manifest = {
        "data": "some_data",
        "split_hash": "0123456789abcdef",
        "seed": 7,
        "checkpoints": {"denoiser.pt": "ff" * 32},
        "versions": {},
        "command": "run_experiments.py --doses 5 10",
        "left_out": ["no_such.pt is missing"],
    }
    content = {"manifest": manifest, "rows": result_rows() if rows is None else rows}
    stage.write_json(folder / "experiments.json", content)
    return folder / "experiments.json"


def page_script(title: str, root: str, address: dict) -> None:
    from pathlib import Path

    import streamlit as st

    import app

    for name, value in address.items():
        if name not in st.query_params:
            st.query_params[name] = value
    root = Path(root)
    scans = root / "scans" if (root / "scans").exists() else None
    folders = app.Folders(root / "data", root / "models", root / "results", "cpu", scans)
    app.show(app.page_of(title), folders, *(["the viewer"] if title == "Cases" else []))


def open_page(title: str, root: Path, **address: str) -> AppTest:
    return AppTest.from_function(page_script, args=(title, str(root), address), default_timeout=60).run()


def viewed(at: AppTest, spy: list) -> canvas.View:
    """What the canvas was given last: AppTest cannot look into a component."""
    assert not at.exception
    return spy[-1]


@pytest.fixture
def spy(monkeypatch) -> list:
    """The canvas.View of every drawing."""
    seen = []
    pack = canvas.pack
    monkeypatch.setattr(canvas, "pack", lambda view: seen.append(view) or pack(view))
    return seen


def words(at: AppTest) -> str:
    """Everything in words on the page."""
    kinds = (at.markdown, at.caption, at.info, at.warning, at.error, at.code, at.header)
    return "\n".join(element.value for kind in kinds for element in kind)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A folder with data, checkpoints and results. Tests only read it."""
    root = tmp_path_factory.mktemp("full")
    write_data(root / "data", make_scan("s1", lesion=False), make_scan("s2", rows=39))
    write_models(root / "models")
    write_results(root / "results")
    stage.write_json(root / "models/classifier.card.json", CARD)
    (root / "models/classifier.jsonl").write_text(json.dumps({"epoch": 1, "loss": 0.5}) + "\n")
    return root


# ---------------------------------------------------------------- image mapping


def test_to_grey_at_window_edges_and_centre_is_black_white_and_middle():
    hu = np.array([[-1000.0, 0.0, 40.0, 80.0, 3000.0]])
    assert display.to_grey(hu, 40, 80).tolist() == [[0, 0, 128, 255, 255]]  # 127.5 rounds to even
    assert display.to_grey(hu, 40, 80).dtype == np.uint8


def test_difference_rgb_at_zero_and_range_is_white_blue_and_red():
    rgb = display.difference_rgb(np.array([[-20.0, 0.0, 20.0, -500.0, 500.0]]), 20)
    assert rgb.dtype == np.uint8
    assert rgb[0].tolist() == [
        list(display.LOW_RGB),
        [255, 255, 255],
        list(display.HIGH_RGB),
        list(display.LOW_RGB),
        list(display.HIGH_RGB),
    ]
    assert rgb[0, 0, 2] > rgb[0, 0, 0] and rgb[0, 2, 0] > rgb[0, 2, 2]  # blue below zero, red above


def test_difference_rgb_away_from_zero_grows_darker():
    values = np.linspace(0, 30, 31)[None]
    for sign in (-1, 1):
        brightness = display.difference_rgb(sign * values, 30).astype(int).sum(axis=-1)[0]
        assert (np.diff(brightness) < 0).all()


@pytest.mark.parametrize("flip_columns", [False, True])
@pytest.mark.parametrize("flip_rows", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_radiological_from_any_orientation_gives_the_same_view(flip_columns, flip_rows, transposed):
    view = np.arange(5 * 7).reshape(5, 7)  # what is to be seen: columns run to the left, rows to the back
    stored, columns_to, rows_to = view, np.array([1.0, 0, 0]), np.array([0, 1.0, 0])
    if flip_columns:
        stored, columns_to = stored[:, ::-1], -columns_to
    if flip_rows:
        stored, rows_to = stored[::-1], -rows_to
    if transposed:
        stored, columns_to, rows_to = stored.T, rows_to, columns_to
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = 0.5 * columns_to, 0.5 * rows_to
    assert np.array_equal(display.radiological(stored, affine), view)
    colours = np.stack([stored] * 3, axis=-1)
    assert np.array_equal(display.radiological(colours, affine)[..., 1], view)


def test_draw_outlines_of_a_square_is_around_it_and_not_on_it():
    lesions = np.zeros((64, 64), np.uint8)
    lesions[20:30, 40:50] = 5
    rgb = np.zeros((512, 512, 3), np.uint8)
    drawn = display.draw_outlines(rgb, lesions).any(axis=-1)
    assert not rgb.any()
    assert not drawn[160:240, 320:400].any()
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    width = display.OUTLINE_PX
    assert (rows[0], rows[-1]) == (160 - width, 239 + width)
    assert (columns[0], columns[-1]) == (320 - width, 399 + width)


def test_enlarge_of_a_mask_stays_sharp_and_of_a_large_image_changes_nothing():
    mask = np.zeros((45, 45), bool)
    mask[10:20, 10:20] = True
    large = display.enlarge(mask, 512)
    assert large.dtype == bool and large.shape == (512, 512)
    assert large.mean() == pytest.approx(mask.mean(), rel=0.05)  # an edge moves by half a pixel of 11
    image = np.zeros((600, 600, 3), np.uint8)
    assert display.enlarge(image, 512) is image


@pytest.mark.parametrize("range_hu", [None, 20.0])
def test_annotate_keeps_the_middle_of_the_image_and_is_png(range_hu):
    rgb = np.full((512, 512, 3), 90, np.uint8)
    with Image.open(io.BytesIO(display.annotate(rgb, display.Note("1/2", "C 40 W 80", range_hu)))) as image:
        assert image.format == "PNG"
        drawn = np.asarray(image)
    assert (drawn[100:220, 100:400] == 90).all()
    assert (drawn[:, :60] != 90).any() and (drawn[:, -60:] != 90).any()


def test_views_of_a_one_sided_lesion_show_it_at_the_same_side_in_las_and_lps(tmp_path):
    sides = []
    for name, flipped in (("plain", False), ("flipped", True)):
        affine = LPS.copy()
        scan = make_scan(name, affine=affine)
        if flipped:
            affine[0, 0] = -4.0
            mirrored = {kind: getattr(scan, kind)[:, :, ::-1] for kind in ("hu", "truth", "mask")}
            scan = Scan(**{**{key: getattr(scan, key) for key in scan.__dataclass_fields__}, **mirrored})
        series = app_data.read_series(dataset.write_scan(scan, tmp_path), SIZE)
        seen = display.radiological(series.lesions[3], series.affine)
        sides.append(np.flatnonzero(seen.any(axis=0)).mean())
    assert sides[0] == sides[1] > SIZE / 2  # the patient's left is at the right edge


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"any": 1, "subdural": 1, "ischemia": 0}, "haemorrhage (subdural)"),
        ({"any": 1, "ischemia": 1}, "haemorrhage, ischemia"),
        ({"any": 0, "ischemia": 0}, "normal"),
        ({"any": 0, "ischemia": None}, "ischemia unknown"),
        ({}, "labels unknown"),
    ],
)
def test_finding_of_labels_says_what_is_known(labels, expected):
    assert app_words.finding(labels) == expected


def test_verdict_at_above_below_and_without_threshold_follows_the_metrics():
    assert [app_words.verdict(score, 0.5) for score in (0.4, 0.5, 0.6)] == [
        "negative",
        "positive",
        "positive",
    ]
    assert metrics.rates(np.array([1]), np.array([0.5]), 0.5)["sens"] == 1  # the study calls a tie positive
    assert app_words.verdict(0.5, None) == "no threshold"


def test_plain_text_of_markdown_has_every_special_character_escaped():
    assert app_words.plain_text("a_b*[c]`$\nx") == r"a\_b\*\[c\]\`\$ x"


def test_arm_labels_where_classifiers_share_a_pipeline_name_them():
    assert app_words.arm_labels(["1", "2", "1"], ["a", "a", "b"]) == ["1 a", "2", "1 b"]


# ---------------------------------------------------------------- the study and the app are the same


def test_columns_of_the_table_are_those_of_the_study():
    assert set(app_results.TABLE) <= set(tables.COLUMNS)


def test_series_and_low_dose_are_bit_for_bit_those_of_the_study(full):
    pack = dataset.load_pack(full / "data", "test", SIZE)
    heads = pack.masks(anatomy.head_mask)
    noisy = LowDose(pack, "calibrated", [5.0] * len(pack)).evaluation(range(len(pack)), [5.0] * len(pack), 7)
    for number, folder in enumerate(dataset.series_folders(full / "data", "test")):
        rows = pack.series_of == number
        series = app_data.read_series(folder, SIZE)
        assert np.array_equal(series.image, pack.image[rows])
        assert np.array_equal(series.reference, pack.truth[rows])
        assert np.array_equal(series.lesions, pack.mask[rows])
        assert np.array_equal(
            app_data.load_inside(app_files.stamp(folder / "metadata.json"), SIZE, "head"), heads[rows]
        )
        noise = app_data.Noise("calibrated", 5.0, 7)
        source = app_data.Source(app_files.stamp(folder / "metadata.json"), SIZE)
        assert np.array_equal(app_data.low_dose(source, noise), noisy[rows])


def test_scores_of_every_arm_are_those_of_the_study(full):
    pack = dataset.load_pack(full / "data", "test", SIZE)
    rows = np.flatnonzero(pack.series_of == 1)
    noisy = LowDose(pack, "calibrated", [5.0] * len(rows)).evaluation(rows, [5.0] * len(rows), 7)
    denoiser, facts = load_denoiser(full / "models/denoiser.pt")
    denoised = denoise(denoiser, noisy, 10.0)
    assert np.abs(denoised - noisy).max() > 1  # else the arms could not be told apart
    names = ("classifier", "classifier_d", "classifier_n")
    files = [full / f"models/{name}.pt" for name in names]
    found = [app_data.Checkpoint(app_files.stamp(file), load_classifier(file)[1]) for file in files]
    arms = app_data.arms_of(app_data.Checkpoint(app_files.stamp(full / "models/denoiser.pt"), facts), found)
    assert [arm.name for arm in arms] == ["1", "1n", "2", "2d"]
    folder = dataset.series_folders(full / "data", "test")[1]
    source = app_data.Source(app_files.stamp(folder / "metadata.json"), SIZE)
    noise = app_data.Noise("calibrated", 5.0, 7)
    for arm in arms:
        values, scan = app_data.reading(source, noise, arm.classifier.file, arm.denoiser, "cpu")
        assert scan[0, 0] == pytest.approx(values.max())
        classifier = load_classifier(arm.classifier.file.path)[0]
        expected = classify(classifier, noisy if arm.denoiser is None else denoised)
        np.testing.assert_allclose(values, expected, atol=1e-5)  # other batches round otherwise


def test_arms_without_a_denoiser_are_the_direct_ones():
    clean, denoised = (
        app_data.Checkpoint(app_files.Stamp("c.pt", 0, 0), {"input": what}) for what in ("clean", "denoised")
    )
    assert [arm.name for arm in app_data.arms_of(None, [clean, denoised])] == ["1"]


# ---------------------------------------------------------------- pages


def run_app(monkeypatch, *options) -> AppTest:
    monkeypatch.setattr("sys.argv", ["app.py", *map(str, options)])
    return AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()


def test_app_without_anything_names_the_commands(tmp_path, monkeypatch):
    folders = ("--data", tmp_path / "d", "--models", tmp_path / "m", "--results", tmp_path / "r")
    at = run_app(monkeypatch, *folders)
    assert not at.exception and not at.error
    assert display.NOTICE in words(at)
    assert "run_experiments.py" in words(at) and "make demo" in words(at)


@pytest.mark.parametrize(
    ("title", "command"),
    [
        ("Overview", "run_experiments.py"),
        ("Cases", "prepare_dataset.py --source phantom"),
        ("Viewer", "prepare_dataset.py --source phantom"),
        ("Experiments", "run_experiments.py"),
        ("Training", "train_denoiser.py"),
        ("Models", "train_denoiser.py"),
        ("Own scan", "train_classifier.py"),
    ],
)
def test_every_page_without_anything_names_the_command_that_brings_it(tmp_path, title, command):
    at = open_page(title, tmp_path)
    assert not at.exception and not at.error
    assert command in words(at) and display.NOTICE in words(at)


def test_every_page_with_everything_shows_no_error(full):
    for title in app.ICONS:
        at = open_page(title, full)
        assert not at.exception and not at.error and not at.warning, title
        assert not at.info or title == "Overview", title  # which says what the study left out


def test_first_page_without_results_needs_neither_torch_nor_scipy():
    code = "import sys, app, app_results, app_words; "
    code += "print({'torch', 'scipy.stats', 'scipy.ndimage'} & {*sys.modules} or app_words.NOTICE)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.strip() == display.NOTICE, done.stderr


def test_app_with_an_unknown_option_says_so_in_one_line_and_with_help_shows_it(monkeypatch, tmp_path):
    at = run_app(monkeypatch, "--nonsense")
    assert not at.exception
    assert len(at.error) == 1 and "--nonsense" in at.error[0].value
    at = run_app(monkeypatch, "--scans", tmp_path / "none")
    assert len(at.error) == 1 and "no such folder" in at.error[0].value
    at = run_app(monkeypatch, "--help")
    assert not at.exception and not at.error and "--results" in at.code[0].value


def test_start_without_streamlit_names_the_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["app.py"])
    with pytest.raises(stage.InputError, match="streamlit run app.py"):
        app.start()


# ---------------------------------------------------------------- Overview and Experiments


def test_overview_shows_what_was_measured_and_with_what(full):
    at = open_page("Overview", full)
    shown = {metric.label: metric.value for metric in at.metric}
    assert shown["Test patients"] == "3" and shown["Test slices"] == "24"
    assert shown["Doses (lambda)"] == "5, 10"
    text = words(at)
    assert "At lambda 5 (12.5 %) the AUC per scan is 0.81 (0.70 to 0.90) with pipeline 1" in text
    assert "python run_experiments.py --doses 5 10" in text
    assert "01234567" in text and "changed since" in text  # the checkpoint is not the one that was measured
    assert r"no\_such.pt is missing" in text


def test_overview_where_the_study_answers_says_what_it_says(tmp_path):
    path = write_results(tmp_path / "results")
    content = json.loads(path.read_text())
    content["manifest"]["answer"] = ["Inconclusive: 3 patients."]
    path.write_text(json.dumps(content))
    at = open_page("Overview", tmp_path)
    assert "Inconclusive: 3 patients." in words(at) and "AUC per scan is" not in words(at)


def test_experiments_shows_the_numbers_of_one_dose_and_the_table(full):
    at = open_page("Experiments", full)
    assert not at.exception and not at.error
    shown = {metric.label: metric.value for metric in at.metric}
    assert shown["AUC, pipeline 1"] == "0.812"
    assert shown["RMSE, denoised"] == "4.25 HU"
    assert shown["PSNR, denoised"] == "n/a"
    table = at.dataframe[0].value
    assert list(table.columns) == list(app_results.TABLE)
    assert len(table) == 4  # two doses, two pipelines, one level
    assert table["psnr"].isna().all()


def test_experiments_at_slice_level_shows_the_rows_of_slices(tmp_path):
    rows = result_rows()
    for row in rows:
        row["auc"] = 0.6 if row["level"] == "scan" else 0.9
    write_results(tmp_path / "results", rows)
    at = open_page("Experiments", tmp_path)
    assert set(at.dataframe[0].value["auc"]) == {0.6}
    at.segmented_control(key="level").set_value("slice").run()
    assert not at.exception
    assert set(at.dataframe[0].value["auc"]) == {0.9}


@pytest.fixture(scope="module")
def study_results(tmp_path_factory) -> Path:
    """What run_experiments.py writes of a study of two networks an arm and a segmenter."""
    truth = np.zeros((10, 1, 4, 4), np.uint8)
    truth[1::2, :, :2] = 5
    pack = ToyPack([0, 1] * 5, mask=truth[:, 0])

    def outlined(cell):
        found = truth.copy()
        found[:, :, 0] = 0  # half of every lesion is missed
        return [stage.plain(lesions.case_report(*pair, (5, 1, 1))) for pair in zip(truth, found, strict=True)]

    study = toy_study(
        *(pack, noisy_truth(pack), [classifier(f"classifier.seed{seed}", seed=seed) for seed in (1, 2)]),
        *([denoiser()], [classifier("segmenter")]),
        others=others(pack, outlined),
    )
    root = tmp_path_factory.mktemp("study")
    write_results(root / "results", stage.plain(tables.network_rows(study)))
    for name in ("dose_response", "curves", "scan_scores", "image_quality", "segmentation", "volumes"):
        rows = tables.TABLES[name](study)
        write_table(root / "results/tables" / f"{name}.csv", list(rows[0]), rows)
    return root


def test_overview_has_one_line_for_each_arm_and_a_row_for_each_dose(study_results):
    at = open_page("Overview", study_results)
    assert not at.exception and not at.error
    table = at.dataframe[0].value
    assert [name for name in table.columns if name.startswith("AUC")] == [
        "AUC per scan, 1",
        "AUC per scan, 2",
    ]
    assert len(table) == 3
    study = pd.read_csv(study_results / "results/tables/dose_response.csv", dtype={"arm": str})
    row = study[(study["arm"] == "1") & (study["level"] == "scan") & (study["dose"] == 0.1)].iloc[0]
    assert table["AUC per scan, 1"][0] == f"{row['auc']:.2f} ({row['auc_low']:.2f} to {row['auc_high']:.2f})"
    assert table["Dice"][0] == "0.67 → 0.67"


def test_experiments_shows_curves_calls_scans_and_volumes_of_the_chosen_dose(study_results, monkeypatch):
    drawn = {}

    def spy(name):
        draw = getattr(app_charts, name)
        monkeypatch.setattr(
            app_charts, name, lambda *given: drawn.setdefault(name, []).append(given) or draw(*given)
        )

    for name in ("dose_curve", "roc", "precision_recall", "confusion", "score_scatter", "bland_altman"):
        spy(name)
    at = open_page("Experiments", study_results)
    assert not at.exception and not at.error
    assert {metric.label for metric in at.metric} >= {"AUC, pipeline 1", "AUC, pipeline 2"}
    assert set(drawn["dose_curve"][0][0]["line"]) == {"1", "2"}  # and not a line for each network
    (curve,) = drawn["roc"][0]
    assert set(curve["dose"]) == {0.1} and set(curve["level"]) == {"scan"} and len(curve) == 2 * 101
    for (row,) in drawn["confusion"]:
        assert row["tp"] + row["fn"] == row["tn"] + row["fp"] == 5 and row["dose"] == 0.1
    assert [len(own) for (own,) in drawn["score_scatter"]] == [10, 10]
    assert drawn["score_scatter"][0][0]["link"].iloc[0] == "viewer?case=s0000&dose=0.1"
    assert [len(own) for own, _ in drawn["bland_altman"]] == [5, 5]
    drawn.clear()
    at.segmented_control(key="glance").set_value(1.0).run()
    assert not at.exception and not at.error
    assert "score_scatter" not in drawn  # the highest dose beside itself
    assert set(drawn["roc"][0][0]["dose"]) == {1.0} and len(drawn["confusion"]) == 2


def test_experiments_with_a_table_of_another_version_says_so_in_one_line(study_results, tmp_path):
    shutil.copytree(study_results, tmp_path / "all")
    (tmp_path / "all/results/tables/curves.csv").write_text("arm,task\n1,stroke\n")
    at = open_page("Experiments", tmp_path / "all")
    assert not at.exception and len(at.error) == 1
    assert "curves.csv" in at.error[0].value and "sensitivity" in at.error[0].value


def test_confusion_of_calls_shows_counts_and_shares_of_their_truth():
    row = pd.Series({"tp": 3, "fn": 1, "fp": 2, "tn": 6, "sens": 0.75, "spec": 0.75})
    (data,) = app_charts.confusion(row).to_dict()["datasets"].values()
    found = {(one["truth"], one["call"]): (one["count"], one["share"]) for one in data}
    assert found == {
        ("lesion", "positive"): (3, 0.75),
        ("lesion", "negative"): (1, 0.25),
        ("normal", "positive"): (2, 0.25),
        ("normal", "negative"): (6, 0.75),
    }


def test_colours_of_arms_are_those_of_the_report():
    assert (app_words.ARM_COLOURS, app_words.OTHER_COLOURS) == (figures.ARM_COLOURS, figures.OTHER_COLOURS)


def test_experiments_of_several_dose_models_shows_one_at_a_time(tmp_path):
    rows = result_rows() + [row | {"dose_model": "poisson", "auc": 0.55} for row in result_rows()]
    write_results(tmp_path / "results", rows)
    at = open_page("Experiments", tmp_path)
    assert not at.exception and set(at.dataframe[0].value["auc"]) == {0.812}
    at.segmented_control(key="dose_model").set_value("poisson").run()
    assert not at.exception and set(at.dataframe[0].value["auc"]) == {0.55}


@pytest.mark.parametrize("title", ["Overview", "Experiments"])
def test_results_without_a_classifier_show_image_quality(tmp_path, title):
    rows = [row for row in result_rows() if row["arm"] == "2" and row["level"] == "slice"]
    absent = ("task", "level", "classifier", "threshold", *metrics.CLASSIFICATION_METRICS)
    rows = [row | {"arm": "denoised"} | dict.fromkeys(absent) for row in rows]
    write_results(tmp_path / "results", rows)
    at = open_page(title, tmp_path)
    assert not at.exception and not at.error
    if title == "Overview":
        assert "4.2 HU after denoising" in words(at)  # of 4.25
    else:
        assert len(at.dataframe[0].value) == 2
        assert "RMSE, denoised" in {metric.label for metric in at.metric}


def test_experiments_shows_every_other_table_and_figure_and_the_report(tmp_path):
    results = tmp_path / "results"
    write_results(results)
    for folder in ("tables", "figures"):
        (results / folder).mkdir()
    (results / "tables/strata.csv").write_text("size,auc\nsmall,0.7\n")
    (results / "tables/verdicts.csv").write_text("dose,verdict\n5,inconclusive\n")
    (results / "tables/broken.csv").write_bytes(b"\xff\xfe\x00\x01")
    Image.new("RGB", (8, 8)).save(results / "figures/roc.png")
    (results / "report.html").write_text("<p>report")
    at = open_page("Experiments", tmp_path)
    assert not at.exception and not at.error
    assert at.selectbox(key="table").options == ["verdicts", "broken", "strata"]
    assert at.dataframe[1].value["verdict"].tolist() == ["inconclusive"]
    assert len(at.image) == 1
    labels = [button.label for button in at.get("download_button")]
    assert "Download report.html" in labels and "Download verdicts.csv" in labels
    at.selectbox(key="table").set_value("broken").run()
    assert not at.exception and len(at.error) == 1 and "broken.csv" in at.error[0].value


@pytest.mark.parametrize("title", ["Overview", "Experiments"])
@pytest.mark.parametrize(
    "content",
    ['{"rows": [', "[]", '{"manifest": {}, "rows": []}', '{"manifest": {}, "rows": [{"dose": 1}]}', "\x00"],
)
def test_results_in_a_damaged_file_are_named_in_one_line(tmp_path, title, content):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/experiments.json").write_text(content)
    at = open_page(title, tmp_path)
    assert not at.exception
    assert len(at.error) == 1
    assert "experiments.json" in at.error[0].value and "\n" not in at.error[0].value


# ---------------------------------------------------------------- Viewer


def test_viewer_with_everything_gives_the_canvas_every_layer_and_pipeline(full, spy):
    at = open_page("Viewer", full)
    assert not at.exception and not at.error and not at.info and not at.warning
    view = viewed(at, spy)
    assert [layer.name for layer in view.layers] == ["full", "low", "denoised", "truth"]
    assert [line.label for line in view.scores] == ["1", "1n", "2", "2d"]
    assert [line.threshold for line in view.scores] == [0.5] * 4
    assert (view.key, view.start) == ("s2", 3)  # it opens at the lesion
    assert view.truth.any(axis=(1, 2)).tolist() == list(view.truth_slices) == [False] * 3 + [True, False]
    assert "subdural" in view.notes[3] and "normal" in view.notes[0]
    table = at.dataframe[0].value
    assert list(table["Pipeline"]) == ["1", "1n", "2", "2d"]
    assert set(table["scan truth"]) == {"positive"} and set(table["scan verdict"]) == {"no threshold"}
    assert at.selectbox(key="case").options == [
        f"patient_s1 · normal · {SLICES} slices · test",
        f"patient_s2 · haemorrhage (subdural) · {SLICES} slices · test",
    ]
    assert "seed 7" in words(at)  # of the results, not the default


def test_viewer_with_two_denoisers_compares_them(full, spy, tmp_path):
    shutil.copytree(full, tmp_path / "all")
    models = tmp_path / "all/models"
    change(models / "denoiser.pt", models / "denoiser_b.pt", "head.bias", 0.1)
    at = open_page("Viewer", tmp_path / "all")
    assert "other" not in [layer.name for layer in viewed(at, spy).layers]
    assert at.selectbox(key="other-denoiser").options == ["nothing", "denoiser_b.pt"]
    at.selectbox(key="other-denoiser").set_value("denoiser_b.pt").run()
    assert not at.error
    view = viewed(at, spy)
    layers = {layer.name: layer for layer in view.layers}
    assert (layers["denoised"].model, layers["other"].model) == ("denoiser.pt", "denoiser_b.pt")
    assert list(view.panes) == ["low", "denoised", "other", "other-denoised"]
    assert view.differences[0] == ("other", "denoised")
    assert np.abs(layers["other"].hu - layers["denoised"].hu).max() > 1
    quality = next(frame.value for frame in at.dataframe if "rmse_hu" in frame.value)
    assert quality["Image"].tolist() == ["Low dose", "Denoised", "Other denoiser"]
    assert len(set(quality["rmse_hu"])) == 3


def test_viewer_measures_the_noise_of_each_image(full, spy):
    at = open_page("Viewer", full, case="s2", dose="5")
    assert not at.exception and not at.error
    table = next(frame.value for frame in at.dataframe if "sd" in frame.value).set_index("Image")
    low = {layer.name: layer.hu for layer in viewed(at, spy).layers}["low"]
    series = app_data.read_series(full / "data/test/s2", SIZE)
    brain = anatomy.brain_mask(series.reference, series.spacing_mm)
    flat = detectability.flat_tissue(series.reference, brain, series.spacing_mm[1])
    expected = detectability.noise_sd(low, series.reference, flat, series.spacing_mm[1])
    assert table.loc["Low dose", "sd"] == pytest.approx(expected) and expected > 5
    assert table.loc["Low dose", "moved"] == 0 < table.loc["Denoised", "moved"] < 1


def test_viewer_shows_the_very_images_of_the_study_and_their_error(full, spy):
    at = open_page("Viewer", full, case="s2", dose="5")
    view = viewed(at, spy)
    pack = dataset.load_pack(full / "data", "test", SIZE)
    rows = np.flatnonzero(pack.series_of == 1)
    noisy = LowDose(pack, "calibrated", [5.0] * SLICES).evaluation(rows, [5.0] * SLICES, 7)
    assert np.array_equal(view.layers[1].hu, noisy)
    heads = pack.masks(anatomy.head_mask)[rows]
    error = metrics.rmse_hu(noisy[3], pack.truth[rows[3]], heads[3])
    assert f"RMSE low dose {error:.1f} HU" in view.notes[3]
    quality = metrics.image_quality(noisy, pack.truth[rows], heads, np.zeros(SLICES))
    assert at.dataframe[1].value["rmse_hu"][0] == pytest.approx(quality["rmse_hu"])


def test_viewer_from_a_link_opens_its_case_dose_and_slice(full, spy):
    at = open_page("Viewer", full, case="s1", dose="20", slice="2")
    view = viewed(at, spy)
    assert (view.key, view.start, view.layers[1].dose) == ("s1", 1, "lambda 20 (50 %)")
    at.selectbox(key="case").set_value("s2").run()
    view = viewed(at, spy)
    assert (view.key, view.start) == ("s2", 3)  # the slice of the link was of another case
    assert view.layers[1].dose == "lambda 20 (50 %)"


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ({"case": "no-such"}, True),
        ({"case": "../../etc"}, True),
        ({"case": "s1", "slice": "999"}, False),
        ({"case": "s1", "slice": "x"}, False),
        ({"case": "s1", "dose": "-3"}, False),
        ({"case": "s1", "dose": "nan"}, False),
    ],
)
def test_viewer_from_a_bad_link_opens_all_the_same(full, spy, address, warned):
    at = open_page("Viewer", full, **address)
    assert not at.exception and not at.error
    assert len(at.warning) == warned
    assert viewed(at, spy).start < SLICES


def test_viewer_at_other_settings_never_fails(full, spy):
    at = open_page("Viewer", full)
    at.selectbox(key="dose-model").set_value("poisson").run()
    at.selectbox(key="dose-model").set_value("projection").run()
    at.selectbox(key="heat").set_value("2").run()
    view = viewed(at, spy)
    assert not at.error and view.heat.values.shape == view.layers[0].hu.shape
    assert "not a localisation" in words(at)
    at.selectbox(key="case").select_index(0).run()
    assert viewed(at, spy).key == "s1" and not at.error


def test_viewer_with_a_segmenter_gives_its_mask_and_its_lesions(full, tmp_path, spy):
    shutil.copytree(full, tmp_path / "all")
    write_segmenter(tmp_path / "all/models")
    at = open_page("Viewer", tmp_path / "all")
    view = viewed(at, spy)
    assert view.found.any() and view.found.shape == view.truth.shape
    table = at.dataframe[2].value
    assert {"true", "segmenter.pt"} == set(table["by"])
    assert table["volume"].is_monotonic_decreasing
    assert "Dice" in words(at)


def test_go_to_a_selected_lesion_is_its_middle_slice(monkeypatch):
    parts = pd.DataFrame({"middle": [4, 9]})
    case = app_data.Case("s1", "", "test", "p", "normal", False)
    for rows, expected in (([], None), ([1], (9, "s1 1")), ([7], None)):
        monkeypatch.setattr(
            app_viewer.st, "session_state", {app_viewer.LESION_KEY: {"selection": {"rows": rows}}}
        )
        assert app_viewer.go_to(case, parts) == expected


def test_viewer_without_checkpoints_shows_images_and_names_the_commands(tmp_path, spy):
    write_data(tmp_path / "data", make_scan())
    at = open_page("Viewer", tmp_path)
    assert not at.exception and not at.error
    assert [layer.name for layer in viewed(at, spy).layers] == ["full", "low", "truth"]
    assert "train_denoiser.py" in words(at) and "train_classifier.py" in words(at)
    assert f"seed {app_data.NOISE_SEED}" in words(at)


def test_viewer_with_damaged_results_still_works_and_says_so(tmp_path, spy):
    write_data(tmp_path / "data", make_scan())
    (tmp_path / "results").mkdir()
    (tmp_path / "results/experiments.json").write_text("{")
    at = open_page("Viewer", tmp_path)
    assert not at.exception and not at.error
    assert "experiments.json" in at.warning[0].value and str(app_data.NOISE_SEED) in at.warning[0].value
    assert viewed(at, spy)


def test_viewer_with_a_damaged_checkpoint_names_it_and_goes_on_without(tmp_path, spy):
    write_data(tmp_path / "data", make_scan())
    write_models(tmp_path / "models")
    path = tmp_path / "models/denoiser.pt"
    path.write_bytes(path.read_bytes()[:-200])
    at = open_page("Viewer", tmp_path)
    assert len(at.error) == 1 and "denoiser.pt" in at.error[0].value
    assert [line.label for line in viewed(at, spy).scores] == ["1", "1n"]


def test_viewer_with_a_checkpoint_of_another_size_or_split_says_so(tmp_path):
    write_data(tmp_path / "data", make_scan())
    write_checkpoint(tmp_path / "models", "denoiser", "denoiser", split_hash="other")
    write_checkpoint(tmp_path / "models", "classifier", "classifier", input="clean", size=64)
    at = open_page("Viewer", tmp_path)
    assert not at.exception
    assert "classifier.pt" in at.error[0].value and "64" in at.error[0].value
    assert "denoiser.pt" in at.warning[0].value and "another split" in at.warning[0].value


@pytest.mark.parametrize("lost", ["thresholds", "input", "size"])
def test_viewer_with_an_incomplete_checkpoint_names_it(tmp_path, lost):
    write_data(tmp_path / "data", make_scan())
    write_checkpoint(tmp_path / "models", "classifier", "classifier", input="clean")
    path = tmp_path / "models/classifier.pt"
    content = torch.load(path, weights_only=True)
    del content[lost]
    checkpoints.save(path, content)
    at = open_page("Viewer", tmp_path)
    assert not at.exception
    assert len(at.error) == 1
    assert "classifier.pt" in at.error[0].value and lost in at.error[0].value


def test_viewer_with_a_damaged_series_names_the_file(tmp_path):
    write_data(tmp_path / "data", make_scan())
    path = tmp_path / "data/test/s1/00002/image.npz"
    path.write_bytes(b"damaged")
    at = open_page("Viewer", tmp_path)
    assert not at.exception
    assert len(at.error) == 1 and "00002/image.npz" in at.error[0].value


@pytest.mark.parametrize(
    "change", [{"shape": None}, {"affine": [1]}, {"slices": []}, {"intensity": "windowed"}]
)
def test_viewer_with_odd_metadata_names_the_series(tmp_path, change):
    write_data(tmp_path / "data", make_scan())
    path = tmp_path / "data/test/s1/metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    at = open_page("Viewer", tmp_path)
    assert not at.exception
    assert len(at.error) == 1 and "s1" in at.error[0].value


# ---------------------------------------------------------------- Cases


def test_cases_lists_filters_and_finds(full):
    at = open_page("Cases", full)
    assert at.dataframe[0].value["Patient"].tolist() == ["patient_s1", "patient_s2"]
    assert at.dataframe[0].value["Matrix"].tolist() == [f"{SIZE} x {SIZE}", f"39 x {SIZE}"]
    at.segmented_control(key="with-lesion").set_value("yes").run()
    assert at.dataframe[0].value["Series"].tolist() == ["s2"]
    at.segmented_control(key="with-lesion").set_value("all").run()
    at.text_input(key="search").set_value("S1").run()
    assert at.dataframe[0].value["Series"].tolist() == ["s1"]
    at.text_input(key="search").set_value("nothing of the kind").run()
    assert not at.exception and not at.error and at.dataframe[0].value.empty


def test_cases_read_by_the_networks_say_what_the_study_would(full, tmp_path):
    shutil.copytree(full, tmp_path / "all")
    folder = tmp_path / "all/models"
    write_checkpoint(folder, "classifier", "classifier", input="clean", thresholds=ALWAYS_POSITIVE)
    for name in ("classifier_n", "classifier_d"):
        (folder / f"{name}.pt").unlink()
    at = open_page("Cases", tmp_path / "all")
    next(button for button in at.button if button.label.startswith("Read 2 cases")).click().run()
    assert not at.exception and not at.error
    table = at.dataframe[0].value.set_index("Series")
    assert table["call 1"].tolist() == ["positive"] * 2
    assert table["Result"].to_dict() == {"s1": "false alarm", "s2": "right"}
    assert (table["RMSE low dose"] > 1).all() and table["p 1"].between(0, 1).all()
    at.segmented_control(key="result").set_value("missed").run()
    assert not at.exception and at.dataframe[0].value.empty


def test_cases_read_by_networks_of_several_seeds_have_one_column_of_them(full, tmp_path):
    shutil.copytree(full / "data", tmp_path / "data")
    for seed, cut in ((1, 0.0), (2, 1.0), (3, 0.0)):
        thresholds = {level: {"value": cut, "origin": "val"} for level in ("slice", "scan")}
        write_checkpoint(
            tmp_path / "models", f"classifier.seed{seed}", "classifier", input="clean", thresholds=thresholds
        )
    at = open_page("Cases", tmp_path)
    next(button for button in at.button if button.label.startswith("Read 2 cases")).click().run()
    assert not at.exception and not at.error
    table = at.dataframe[0].value
    assert [name for name in table.columns if name.startswith(("p ", "call "))] == ["p 1", "call 1"]
    assert table["call 1"].tolist() == ["positive"] * 2  # two of three


def test_cases_with_an_unreadable_series_lists_it_as_such(tmp_path):
    write_data(tmp_path / "data", make_scan("s1"), make_scan("s2"))
    (tmp_path / "data/test/s1/metadata.json").write_text("{")
    at = open_page("Cases", tmp_path)
    assert not at.exception and not at.error
    assert at.dataframe[0].value["Finding"].tolist() == ["unreadable", "haemorrhage (subdural)"]


def test_cases_click_opens_the_viewer_at_the_case_and_dose(full, monkeypatch):
    opened = []
    monkeypatch.setattr(app_cases.st, "switch_page", lambda _page, query_params: opened.append(query_params))
    monkeypatch.setattr(app_cases.st, "dataframe", lambda *_, **__: {"selection": {"rows": [1]}})
    at = open_page("Cases", full)
    assert not at.exception and not at.error
    assert opened == [{"case": "s2", "dose": "5"}]


# ---------------------------------------------------------------- Training and Models


def test_training_of_a_run_under_way_draws_whole_lines_only(tmp_path):
    (tmp_path / "models").mkdir()
    entry = {"epoch": 1, "train_loss": 0.5, "auc": None, "seconds": 2.0, "seconds_left": 40.0}
    lines = [json.dumps(entry), json.dumps(entry | {"epoch": 2, "train_loss": 0.4})]
    path = tmp_path / "models/denoiser.jsonl"
    path.write_text("\n".join(lines) + '\n{"epoch": 3, "train_l')
    at = open_page("Training", tmp_path)
    assert not at.exception and not at.error
    row = at.dataframe[0].value.iloc[0]
    assert (row["Run"], row["State"], row["Epochs"], row["Left"]) == ("denoiser", "running", 2, "0:00:40")
    path.write_text("\n".join([*lines, json.dumps(entry | {"epoch": 3, "seconds_left": 0.0}), ""]))
    at.run()
    assert at.dataframe[0].value.iloc[0]["Epochs"] == 3
    assert at.dataframe[0].value.iloc[0]["State"] == "ended"


@pytest.mark.parametrize("content", ["not json\n", "[1]\n[2]\n", "\x00\n"])
def test_training_with_a_damaged_log_names_it(tmp_path, content):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/denoiser.jsonl").write_text(content)
    at = open_page("Training", tmp_path)
    assert not at.exception
    assert len(at.error) == 1 and "denoiser.jsonl" in at.error[0].value


def test_models_shows_a_card_and_names_a_damaged_one(tmp_path):
    write_checkpoint(tmp_path / "models", "classifier", "classifier", input="clean")
    content = torch.load(tmp_path / "models/classifier.pt", weights_only=True)
    card = content | CARD | {"trained_on": ["a", "b"]}
    checkpoints.write_card(tmp_path / "models/classifier.card.json", card)
    (tmp_path / "models/denoiser.card.json").write_text('{"model": 1}')
    at = open_page("Models", tmp_path)
    assert not at.exception
    assert len(at.error) == 1 and "denoiser.card.json" in at.error[0].value
    assert at.dataframe[0].value["Validation"].tolist() == ["auc 0.75"]
    facts = dict(at.dataframe[1].value.itertuples(index=False))
    assert facts["trained on"] == "2 patients" and facts["task"] == "stroke"
    assert "Threshold per slice: 0.500" in words(at)


# ---------------------------------------------------------------- Own scan


def nifti_of(scan: Scan, path: Path) -> bytes:
    write_nifti(path, scan.hu, scan.affine)
    return path.read_bytes()


def read_own(at: AppTest) -> AppTest:
    next(button for button in at.button if button.label == "Denoise and read").click().run()
    assert not at.exception and not at.error
    return at


def test_own_scan_sample_without_networks_is_shown(tmp_path, spy):
    at = open_page("Own scan", tmp_path)
    view = viewed(at, spy)
    assert [layer.name for layer in view.layers] == ["full", "truth"] and view.truth.any()
    assert not [button for button in at.button if button.label == "Denoise and read"]


def test_own_scan_sample_with_networks_is_denoised_read_and_explained(full, spy):
    at = read_own(open_page("Own scan", full))
    view = viewed(at, spy)
    assert [layer.name for layer in view.layers] == ["full", "denoised", "truth"]
    assert view.heat.values.shape == view.layers[0].hu.shape
    assert len(view.scores[0].values) == len(view.layers[0].hu)
    shown = {metric.label: metric.value for metric in at.metric}
    assert float(shown["Probability: stroke"]) == pytest.approx(max(view.scores[0].values), abs=6e-4)
    labels = [button.label for button in at.get("download_button")]
    assert labels == ["Denoised NIfTI", "All slices PNG", "JSON"]


def test_own_scan_at_a_simulated_dose_measures_what_denoising_does(full, spy):
    at = open_page("Own scan", full)
    at.selectbox(key="own-dose-calibrated").set_value(5.0).run()
    at = read_own(at)
    assert [layer.name for layer in viewed(at, spy).layers] == ["full", "low", "denoised", "truth"]
    assert {"RMSE", "PSNR", "SSIM"} <= {metric.label for metric in at.metric}


def test_own_scan_threshold_of_the_checkpoint_can_be_moved(full, spy, tmp_path):
    shutil.copytree(full, tmp_path / "all")
    half = {"slice": {"value": 0.5, "origin": "val"}, "scan": {"value": 0.25, "origin": "val"}}
    write_checkpoint(tmp_path / "all/models", "classifier", "classifier", input="clean", thresholds=half)
    at = read_own(open_page("Own scan", tmp_path / "all"))
    slider = at.slider(key="own-threshold-classifier.pt")
    assert slider.value == 0.25
    slider.set_value(1.0).run()
    assert {metric.delta for metric in at.metric if "Probability" in metric.label} == {"below the threshold"}
    at.slider(key="own-threshold-classifier.pt").set_value(0.0).run()
    assert {metric.delta for metric in at.metric if "Probability" in metric.label} == {"above the threshold"}


def test_own_scan_cancelled_is_asked_for_anew_and_not_half_done(full, spy, monkeypatch):
    whole = app_scan.work

    def cancelled(_scan, _request, _reference, progress, _known):
        progress(0.4, "Denoising")
        app_scan.cancel()  # what the button does; Streamlit then stops the script at its next word
        app_scan.st.stop()

    monkeypatch.setattr(app_scan, "work", cancelled)
    at = open_page("Own scan", full)
    next(button for button in at.button if button.label == "Denoise and read").click().run()
    assert not at.exception and not at.error
    monkeypatch.setattr(app_scan, "work", whole)
    at.run()
    assert [layer.name for layer in viewed(at, spy).layers] == ["full", "truth"]
    assert "denoised" in [layer.name for layer in viewed(read_own(at), spy).layers]


def test_own_scan_uploaded_is_read_and_leaves_nothing_behind(full, spy, tmp_path, monkeypatch):
    content = nifti_of(make_scan(), tmp_path / "made.nii.gz")
    kept = tmp_path / "temporary"
    kept.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(kept))
    at = open_page("Own scan", full)
    at.segmented_control(key="own-kind").set_value("Upload").run()
    assert "forgotten when the session ends" in words(at)
    at.file_uploader(key="own-files").set_value([("a b.nii.gz", content, "application/gzip")]).run()
    at = read_own(at)
    assert viewed(at, spy).layers[0].hu.shape == (SLICES, SIZE, SIZE)
    assert not list(kept.iterdir())


def test_own_scan_uploaded_of_another_user_is_not_seen(full, spy, tmp_path):
    content = nifti_of(make_scan(), tmp_path / "made.nii.gz")
    first, second = open_page("Own scan", full), open_page("Own scan", full)
    for at in (first, second):
        at.segmented_control(key="own-kind").set_value("Upload").run()
    first.file_uploader(key="own-files").set_value([("a.nii.gz", content, "application/gzip")]).run()
    assert viewed(first, spy).layers[0].hu.shape == (SLICES, SIZE, SIZE)
    drawn = len(spy)
    second.run()
    assert len(spy) == drawn and "forgotten when the session ends" in words(second)


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.zip", "scan.dcm", "scan.png", "scan.npz"])
def test_own_scan_uploaded_rubbish_is_named_in_one_line(tmp_path, name):
    at = open_page("Own scan", tmp_path)
    at.segmented_control(key="own-kind").set_value("Upload").run()
    at.file_uploader(key="own-files").set_value([(name, b"rubbish", "application/octet-stream")]).run()
    assert not at.exception
    assert len(at.error) == 1
    assert "own-scan-" not in at.error[0].value and "\n" not in at.error[0].value


def test_own_scan_from_this_machine_stays_below_its_folder(full, tmp_path, spy):
    (tmp_path / "scans").mkdir()
    nifti_of(make_scan(), tmp_path / "scans/one.nii.gz")
    nifti_of(make_scan(), tmp_path / "outside.nii.gz")
    at = open_page("Own scan", tmp_path)
    at.segmented_control(key="own-kind").set_value("This machine").run()
    assert at.selectbox(key="own-path").options == ["one.nii.gz"]
    at.selectbox(key="own-path").set_value("one.nii.gz").run()
    assert viewed(at, spy).layers[0].hu.shape == (SLICES, SIZE, SIZE)
    for path in ("../outside.nii.gz", str(tmp_path / "outside.nii.gz")):
        state = app.Folders(*[tmp_path] * 3, "cpu", tmp_path / "scans")
        with pytest.raises(stage.InputError, match="not below"):  # noqa: SIM117 of the context itself
            with app_scan.on_disk(("This machine", path, 0), state):
                pass


# ---------------------------------------------------------------- the server


def test_config_binds_this_machine_only_and_tells_nobody():
    config = tomllib.loads((ROOT / ".streamlit/config.toml").read_text(encoding="utf-8"))
    assert config["server"]["address"] == "127.0.0.1"
    assert config["server"]["allowedHosts"] == ["localhost", "127.0.0.1"]
    assert config["browser"]["gatherUsageStats"] is False
    assert config["client"]["showErrorDetails"] == "none"
    assert config["client"]["showErrorLinks"] is False


def test_strip_has_one_line_for_networks_that_differ_by_their_seed_alone():
    from types import SimpleNamespace

    def arm(name, file):
        facts = {"task": "stroke", "thresholds": {"slice": {"value": 0.4}}}
        return SimpleNamespace(name=name, classifier=SimpleNamespace(name=file, facts=facts))

    arms = [arm("1", "classifier.seed1.pt"), arm("1", "classifier.seed2.pt"), arm("1n", "classifier_n.pt")]
    slices = [np.array([[value], [0.0]]) for value in (0.2, 0.6, 0.9)]
    seeded, alone = app_viewer.strip_lines(arms, slices)
    assert (seeded.label, seeded.threshold) == ("1", None)
    np.testing.assert_allclose(seeded.values, [0.4, 0.0])
    assert (alone.label, alone.threshold) == ("1n", 0.4)
    assert app_viewer.strip_lines([], []) == []


def test_overview_names_arms_of_fewer_patients():
    arms = pd.DataFrame({"line": ["1", "1", "2 bm3d", "2 bm3d"], "n_patients": [30, 30, 4, 5]})
    assert app_results.of_fewer_patients(arms) == "Measured on fewer than the 30 patients: 2 bm3d on 4."
    assert app_results.of_fewer_patients(arms[:2]) == ""
    assert app_results.of_fewer_patients(arms[["line"]]) == ""
