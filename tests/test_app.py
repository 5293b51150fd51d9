"""The app: its image mapping, that it shows what the study measured, and that it never shows a traceback."""

from __future__ import annotations

import io
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from streamlit.testing.v1 import AppTest

import anatomy
import app
import checkpoints
import dataset
import display
import metrics
import models
import run_experiments
import stage
from inference import classify, denoise, load_classifier, load_denoiser
from low_dose import LowDose
from volumes import Scan

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


def write_checkpoint(folder: Path, name: str, kind: str, **facts) -> None:
    torch.manual_seed(0)
    if kind == "denoiser":
        model, kwargs = "unet", {"widths": [2, 4]}
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


def result_rows() -> list[dict]:
    rows = []
    for dose in (5.0, 10.0):
        for arm in ("1", "2"):
            for level in ("slice", "scan"):
                row = dict.fromkeys(run_experiments.COLUMNS, 0.5)
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


def page_script(page: str, root: str) -> None:
    from pathlib import Path

    import app

    root = Path(root)
    folders = app.Folders(root / "data", root / "models", root / "results", "cpu")
    app.show(getattr(app, page), folders)


def open_page(page: str, root: Path) -> AppTest:
    return AppTest.from_function(page_script, args=(page, str(root)), default_timeout=60).run()


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
        series = app.read_series(dataset.write_scan(scan, tmp_path), SIZE)
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
    assert app.finding(labels) == expected


def test_verdict_at_above_below_and_without_threshold_follows_the_metrics():
    assert [app.verdict(score, 0.5) for score in (0.4, 0.5, 0.6)] == ["negative", "positive", "positive"]
    assert metrics.rates(np.array([1]), np.array([0.5]), 0.5)["sens"] == 1  # the study calls a tie positive
    assert app.verdict(0.5, None) == "no threshold"


def test_plain_text_of_markdown_has_every_special_character_escaped():
    assert app.plain_text("a_b*[c]`$\nx") == r"a\_b\*\[c\]\`\$ x"


def test_arm_labels_where_classifiers_share_a_pipeline_name_them():
    assert app.arm_labels(["1", "2", "1"], ["a", "a", "b"]) == ["1 a", "2", "1 b"]


# ---------------------------------------------------------------- the study and the app are the same


def test_columns_of_the_table_are_those_of_the_study():
    assert set(app.TABLE) <= set(run_experiments.COLUMNS)


def test_series_and_low_dose_are_bit_for_bit_those_of_the_study(full):
    pack = dataset.load_pack(full / "data", "test", SIZE)
    heads = pack.masks(anatomy.head_mask)
    noisy = LowDose(pack, "calibrated", [5.0] * len(pack)).evaluation(range(len(pack)), [5.0] * len(pack), 7)
    for number, folder in enumerate(dataset.series_folders(full / "data", "test")):
        rows = pack.series_of == number
        series = app.read_series(folder, SIZE)
        assert np.array_equal(series.image, pack.image[rows])
        assert np.array_equal(series.reference, pack.truth[rows])
        assert np.array_equal(series.lesions, pack.mask[rows])
        assert np.array_equal(app.load_inside(app.stamp(folder / "metadata.json"), SIZE, "head"), heads[rows])
        noise = app.Noise("calibrated", 5.0, 7)
        own = np.stack([app.low_dose_slice(series, index, noise) for index in range(SLICES)])
        assert np.array_equal(own, noisy[rows])


def test_scores_of_every_arm_are_those_of_the_study(full):
    pack = dataset.load_pack(full / "data", "test", SIZE)
    rows = np.flatnonzero(pack.series_of == 1)
    noisy = LowDose(pack, "calibrated", [5.0] * len(rows)).evaluation(rows, [5.0] * len(rows), 7)
    denoiser, facts = load_denoiser(full / "models/denoiser.pt")
    denoised = denoise(denoiser, noisy, 10.0)
    assert np.abs(denoised - noisy).max() > 1  # else the arms could not be told apart
    names = ("classifier", "classifier_d", "classifier_n")
    files = [full / f"models/{name}.pt" for name in names]
    found = [app.Checkpoint(app.stamp(file), load_classifier(file)[1]) for file in files]
    arms = app.arms_of(app.Checkpoint(app.stamp(full / "models/denoiser.pt"), facts), found)
    assert [arm.name for arm in arms] == ["1", "1n", "2", "2d"]
    folder = dataset.series_folders(full / "data", "test")[1]
    place = app.Place(app.stamp(folder / "metadata.json"), SIZE, 0)
    scores = app.all_scores(place, app.Noise("calibrated", 5.0, 7), arms, "cpu")
    for arm, (values, scan) in zip(arms, scores, strict=True):
        assert scan == pytest.approx(values.max())
        classifier = load_classifier(arm.classifier.file.path)[0]
        expected = classify(classifier, noisy if arm.denoiser is None else denoised)[:, 0]
        np.testing.assert_allclose(values, expected, atol=1e-5)  # one slice at a time rounds otherwise


def test_arms_without_a_denoiser_are_the_direct_ones():
    clean, denoised = (
        app.Checkpoint(app.Stamp("c.pt", 0, 0), {"input": what}) for what in ("clean", "denoised")
    )
    assert [arm.name for arm in app.arms_of(None, [clean, denoised])] == ["1"]


# ---------------------------------------------------------------- pages


def test_app_without_anything_names_the_commands(tmp_path, monkeypatch):
    folders = ["--data", tmp_path / "d", "--models", tmp_path / "m", "--results", tmp_path / "r"]
    monkeypatch.setattr("sys.argv", ["app.py", *map(str, folders)])
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    assert not at.exception and not at.error
    assert app.NOTICE in words(at)
    assert "run_experiments.py" in words(at) and "make demo" in words(at)
    at = open_page("scan_page", tmp_path)
    assert not at.exception and not at.error
    assert app.NOTICE in words(at)
    assert "prepare_dataset.py --source phantom" in words(at) and "make demo" in words(at)


def test_app_with_an_unknown_option_says_so_in_one_line_and_with_help_shows_it(monkeypatch):
    monkeypatch.setattr("sys.argv", ["app.py", "--nonsense"])
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    assert not at.exception
    assert len(at.error) == 1 and "--nonsense" in at.error[0].value
    monkeypatch.setattr("sys.argv", ["app.py", "--help"])
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    assert not at.exception and not at.error and "--results" in at.code[0].value


def test_start_without_streamlit_names_the_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["app.py"])
    with pytest.raises(stage.InputError, match="streamlit run app.py"):
        app.start()


def test_results_page_shows_what_was_measured_and_the_numbers(full):
    at = open_page("results_page", full)
    assert not at.exception and not at.error
    shown = {metric.label: metric.value for metric in at.metric}
    assert shown["Test patients"] == "3" and shown["Test slices"] == "24"
    assert shown["Doses (lambda)"] == "5, 10"
    assert shown["AUC, pipeline 1"] == "0.812"
    assert shown["RMSE, denoised"] == "4.25 HU"
    assert shown["PSNR, denoised"] == "n/a"
    text = words(at)
    assert "python run_experiments.py --doses 5 10" in text
    assert "01234567" in text and "changed since" in text  # the checkpoint is not the one that was measured
    assert r"no\_such.pt is missing" in text
    assert list(at.dataframe[0].value.columns) == list(app.TABLE)
    assert len(at.dataframe[0].value) == 4  # two doses, two pipelines, one level
    assert at.dataframe[0].value["psnr"].isna().all()


def test_results_page_at_scan_level_shows_the_rows_of_scans(full, tmp_path):
    rows = result_rows()
    for row in rows:
        row["auc"] = 0.6 if row["level"] == "slice" else 0.9
    write_results(tmp_path / "results", rows)
    at = open_page("results_page", tmp_path)
    assert set(at.dataframe[0].value["auc"]) == {0.6}
    at.segmented_control(key="level").set_value("scan").run()
    assert not at.exception
    assert set(at.dataframe[0].value["auc"]) == {0.9}


def test_results_page_without_a_classifier_shows_image_quality(tmp_path):
    rows = [row for row in result_rows() if row["arm"] == "2" and row["level"] == "slice"]
    absent = ("task", "level", "classifier", "threshold", *metrics.CLASSIFICATION_METRICS)
    rows = [row | {"arm": "denoised"} | dict.fromkeys(absent) for row in rows]
    write_results(tmp_path / "results", rows)
    at = open_page("results_page", tmp_path)
    assert not at.exception and not at.error
    assert len(at.dataframe[0].value) == 2
    assert "RMSE, denoised" in {metric.label for metric in at.metric}


@pytest.mark.parametrize(
    "content",
    ['{"rows": [', "[]", '{"manifest": {}, "rows": []}', '{"manifest": {}, "rows": [{"dose": 1}]}', "\x00"],
)
def test_results_page_with_a_damaged_file_names_it_in_one_line(tmp_path, content):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/experiments.json").write_text(content)
    at = open_page("results_page", tmp_path)
    assert not at.exception
    assert len(at.error) == 1
    assert "experiments.json" in at.error[0].value and "\n" not in at.error[0].value


def test_scan_page_with_damaged_results_still_works_and_says_so(tmp_path):
    write_data(tmp_path / "data", make_scan())
    (tmp_path / "results").mkdir()
    (tmp_path / "results/experiments.json").write_text("{")
    at = open_page("scan_page", tmp_path)
    assert not at.exception and not at.error
    assert "experiments.json" in at.warning[0].value and str(app.NOISE_SEED) in at.warning[0].value
    assert len(at.image) == 3


def test_scan_page_with_everything_shows_four_views_and_every_pipeline(full):
    at = open_page("scan_page", full)
    assert not at.exception and not at.error and not at.info and not at.warning
    assert len(at.image) == 4
    table = at.dataframe[0].value
    assert list(table["Pipeline"]) == ["1", "1n", "2", "2d"]
    assert set(table["slice truth"]) == {"positive"}  # it opens at the lesion
    assert set(table["scan verdict"]) == {"no threshold"}
    assert at.slider[0].value == 4
    assert at.selectbox[0].options == [
        f"patient_s1 - normal - {SLICES} slices",
        f"patient_s2 - haemorrhage (subdural) - {SLICES} slices",
    ]
    text = words(at)
    assert "Outlined in this slice: subdural" in text
    assert "seed 7" in text  # of the results, not the default


def test_scan_page_states_the_error_of_the_very_images_of_the_study(full):
    at = open_page("scan_page", full)
    pack = dataset.load_pack(full / "data", "test", SIZE)
    row = SLICES + 3  # second series, fourth slice: where it opens
    dose = at.segmented_control(key="dose-calibrated-[5.0, 10.0]").value
    noisy = LowDose(pack, "calibrated", [dose]).evaluation([row], [dose], 7)[0]
    head = pack.masks(anatomy.head_mask)[row]
    assert f"RMSE **{metrics.rmse_hu(noisy, pack.truth[row], head):.2f} HU**" in words(at)


def test_scan_page_at_other_settings_never_fails(full):
    at = open_page("scan_page", full)
    at.slider[0].set_value(1).run()
    assert set(at.dataframe[0].value["slice truth"]) == {"negative"}
    assert "Outlined in this slice: no lesion" in words(at)
    at.segmented_control(key="window").set_value(app.OWN_WINDOW).run()
    at.number_input(key="width").set_value(1).run()
    at.selectbox(key="dose-model").set_value("poisson").run()
    at.selectbox(key="dose-model").set_value("projection").run()
    at.toggle(key="large").set_value(True).run()
    at.toggle(key="outline").set_value(False).run()
    at.selectbox[0].select_index(0).run()
    assert not at.exception and not at.error
    assert len(at.image) == 4


def test_scan_page_without_checkpoints_shows_images_and_names_the_commands(tmp_path):
    write_data(tmp_path / "data", make_scan())
    at = open_page("scan_page", tmp_path)
    assert not at.exception and not at.error
    assert len(at.image) == 3  # no denoised one
    assert "train_denoiser.py" in words(at) and "train_classifier.py" in words(at)
    assert f"seed {app.NOISE_SEED}" in words(at)


def test_scan_page_with_a_damaged_checkpoint_names_it_and_goes_on_without(tmp_path):
    write_data(tmp_path / "data", make_scan())
    write_models(tmp_path / "models")
    path = tmp_path / "models/denoiser.pt"
    path.write_bytes(path.read_bytes()[:-200])
    at = open_page("scan_page", tmp_path)
    assert not at.exception
    assert len(at.error) == 1 and "denoiser.pt" in at.error[0].value
    assert list(at.dataframe[0].value["Pipeline"]) == ["1", "1n"]


def test_scan_page_with_a_checkpoint_of_another_size_or_split_says_so(tmp_path):
    write_data(tmp_path / "data", make_scan())
    write_checkpoint(tmp_path / "models", "denoiser", "denoiser", split_hash="other")
    write_checkpoint(tmp_path / "models", "classifier", "classifier", input="clean", size=64)
    at = open_page("scan_page", tmp_path)
    assert not at.exception
    assert "classifier.pt" in at.error[0].value and "64" in at.error[0].value
    assert "denoiser.pt" in at.warning[0].value and "another split" in at.warning[0].value


@pytest.mark.parametrize("lost", ["thresholds", "input", "size"])
def test_scan_page_with_an_incomplete_checkpoint_names_it(tmp_path, lost):
    write_data(tmp_path / "data", make_scan())
    write_checkpoint(tmp_path / "models", "classifier", "classifier", input="clean")
    path = tmp_path / "models/classifier.pt"
    content = torch.load(path, weights_only=True)
    del content[lost]
    checkpoints.save(path, content)
    at = open_page("scan_page", tmp_path)
    assert not at.exception
    assert len(at.error) == 1
    assert "classifier.pt" in at.error[0].value and lost in at.error[0].value


def test_scan_page_with_a_damaged_series_names_the_file(tmp_path):
    write_data(tmp_path / "data", make_scan())
    path = tmp_path / "data/test/s1/00002/image.npz"
    path.write_bytes(b"damaged")
    at = open_page("scan_page", tmp_path)
    assert not at.exception
    assert len(at.error) == 1 and "00002/image.npz" in at.error[0].value


@pytest.mark.parametrize(
    "change", [{"shape": None}, {"affine": [1]}, {"slices": []}, {"intensity": "windowed"}]
)
def test_scan_page_with_odd_metadata_names_the_series(tmp_path, change):
    write_data(tmp_path / "data", make_scan())
    path = tmp_path / "data/test/s1/metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    at = open_page("scan_page", tmp_path)
    assert not at.exception
    assert len(at.error) == 1 and "s1" in at.error[0].value


# ---------------------------------------------------------------- the server


def test_config_binds_this_machine_only_and_tells_nobody():
    config = tomllib.loads((ROOT / ".streamlit/config.toml").read_text(encoding="utf-8"))
    assert config["server"]["address"] == "127.0.0.1"
    assert config["server"]["allowedHosts"] == ["localhost", "127.0.0.1"]
    assert config["browser"]["gatherUsageStats"] is False
    assert config["client"]["showErrorDetails"] == "none"
    assert config["client"]["showErrorLinks"] is False
