"""The report of a study: its sentences, and a page that is complete in itself."""

import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

import checkpoints
import figures
import gallery
import methods
import report
import run_experiments
import wording
from page import Page, inline
from segmenters import SEGMENTERS
from tests.toy_models import BrightSegmenter, write_models
from tests.toy_study import toy_design

NAN = math.nan

# ---------------------------------------------------------------- the answer

STUDY = SimpleNamespace(design=toy_design())


def verdict(kind="auc", dose=1.0, failed=0.5, how="inconclusive", **more):
    arm = {"arm": "1", "pipeline": "1", "denoiser": None, "task": "stroke", "level": "scan", "stratum": "all"}
    stopped = {"failed_dose": failed, "how": how, "power": 0.31, "patients": 40, "patients_needed": 210.0}
    numbers = {"failed_estimate": -0.2, "margin": {"auc": 0.02, "sens": 0.05}[kind]}
    return arm | {"dose_model": "projection", "kind": kind, "dose": dose} | stopped | numbers | more


def passed(kind="auc", dose=0.1, **more):
    unknown = {"failed_dose": NAN, "how": "", "power": NAN, "patients": 0, "patients_needed": NAN}
    return verdict(kind, dose, **unknown | {"failed_estimate": NAN} | more)


DENOISED = {"arm": "2", "pipeline": "2", "denoiser": "denoiser"}


def sentences(rows, between=()):
    reference = {"task": "stroke", "dose_model": "projection", "reference": "1"}
    found = {"verdicts": rows, "against_reference": [reference], "between_arms": list(between)}
    return wording.answer(STUDY, found)


def test_answer_of_doses_that_all_pass_names_the_lowest():
    (line,) = sentences([passed(), passed("sens")])
    assert "arm 1 (no denoising) was non-inferior down to 10 %, the lowest dose tried" in line
    assert line.startswith("Stroke, per scan") and "margins: AUC 0.02, sensitivity 0.05" in line


def test_answer_of_an_inferior_dose_says_so_and_stops_at_the_higher_of_both_numbers():
    (line,) = sentences([verdict(dose=0.5, failed=0.1, how="inferior"), passed("sens")])
    assert "was non-inferior down to 50 %; at 10 % its AUC is inferior (-0.20)" in line
    (line,) = sentences([verdict(dose=0.5, failed=0.1, how="inferior"), verdict("sens", 1.0, 0.5)])
    assert "no cut of the dose was shown to be non-inferior: at 50 % its sensitivity is inconclusive" in line
    assert "inferior (" not in line


def test_answer_of_an_inconclusive_dose_gives_power_and_patients():
    (line,) = sentences([verdict(), verdict("sens", power=0.6, patients_needed=90.0)])
    assert "at 50 % its AUC and sensitivity are inconclusive" in line
    assert "for the AUC 40 patients give a power of 0.31, and 80 % would take 210" in line
    (line,) = sentences([verdict(power=0.9), passed("sens")])
    assert "power of 0.90)" in line and "would take" not in line


def test_answer_of_what_cannot_be_computed_says_unknown_and_never_nan():
    rows = [verdict(kind, NAN, 1.0, "unknown", power=NAN, patients_needed=NAN) for kind in ("auc", "sens")]
    (line,) = sentences(rows)
    assert "no dose was shown to be non-inferior: at 100 % its AUC and sensitivity are unknown" in line
    (line,) = sentences([verdict(power=NAN, patients_needed=NAN), passed("sens")])
    assert "power of n/a" in line and "nan" not in line


def test_answer_of_a_single_dose_claims_nothing():
    (line,) = sentences([passed(dose=1.0), passed("sens", dose=1.0)])
    assert "read at one dose only, so no cut was tried" in line


def test_answer_takes_the_arm_with_denoising_that_comes_down_furthest():
    poor = {"arm": "2d", "pipeline": "2d", "denoiser": "denoiser"}
    rows = [
        *(verdict(kind, **poor) for kind in ("auc", "sens")),
        *(verdict(kind) for kind in ("auc", "sens")),
        *(verdict(kind, 0.5, 0.1, **DENOISED) for kind in ("auc", "sens")),
    ]
    (line,) = sentences(rows)
    assert "for arm 1 (no denoising) no cut" in line  # the reference first, wherever its rows stand
    assert "arm 2 (the best of 2 with denoising) was non-inferior down to 50 %" in line


def test_denoising_helps_only_where_holm_says_so():
    def row(kind, dose, estimate, p):
        more = {"kind": kind, "dose": dose, "estimate": estimate, "p_holm": p, "against": "1"}
        return DENOISED | {"task": "stroke", "dose_model": "projection", "level": "scan"} | more

    rows = [row("auc", 0.1, 0.2, 0.01), row("spec", 0.1, -0.3, 0.04), row("auc", 0.5, 0.4, 0.06)]
    rows += [row("sens", 0.5, 0.4, NAN), row("auc", 0.05, 0.3, 0.01)]
    _, line = sentences([passed()], rows)
    assert (
        "arm 2 against arm 1: AUC higher at 10 % (+0.20), 5 % (+0.30); specificity lower at 10 % (-0.30); "
        "no other difference was shown (Holm" in line
    )
    _, line = sentences([passed()], [row("auc", 0.1, 0.2, 0.5)])
    assert "no difference was shown at any dose" in line


def test_answer_without_classifiers_is_about_images_alone():
    rows = [
        {"dose_model": "projection", "dose": dose, "denoiser": name, "of_subset": False, "rmse_hu": error}
        for dose, name, error in ((1.0, "none", 4.0), (0.1, "none", 12.0), (0.1, "denoiser.pt", 5.0))
    ]
    found = {"verdicts": [], "against_reference": [], "between_arms": [], "image_quality": rows}
    (line,) = wording.answer(STUDY, found)
    assert "No classifier" in line and "at 10 %" in line
    assert "12.0 HU for noisy input, 5.0 HU for denoiser" in line


# ---------------------------------------------------------------- parts of a page


def test_table_escapes_names_and_shows_what_is_unknown(tmp_path):
    page = Page(tmp_path)
    columns = {"arm": lambda row: row["arm"], "AUC": lambda row: wording.with_interval(row, "auc")}
    rows = [
        {"arm": "<script>", "auc": NAN, "auc_low": NAN, "auc_high": NAN},
        {"arm": "1", "auc": 0.5, "auc_low": 0.4, "auc_high": 0.6, "auc_seed_sd": 0.01},
    ]
    text = page.table("a & b", columns, rows)
    assert "&lt;script&gt;" in text and "<script>" not in text and "a &amp; b" in text
    assert '<td class="n">n/a</td>' in text
    assert '<td class="n">0.500 (0.400 to 0.600) ± 0.010</td>' in text
    assert page.table("", columns, []) == ""


def test_small_numbers_have_no_sign_of_nothing():
    assert wording.rounded(-0.001) == "0.00" and wording.signed(-0.001) == "0.00"
    assert wording.signed(0.2) == "+0.20" and wording.signed(-0.2) == "-0.20" and wording.signed(NAN) == "n/a"
    assert [wording.p_value(p) for p in (0.0001, 0.04, NAN, None)] == ["< 0.001", "0.040", "n/a", "n/a"]


def test_inline_drawing_takes_the_colours_of_the_page_and_ids_of_its_own(tmp_path):
    looks = figures.arm_looks(["1"])
    row = {"dose_model": "projection", "dose": 1.0, "dose_fraction": 1.0, "arm": "1", "level": "scan"}
    drawn = figures.save(
        tmp_path, "seed_bars", figures.seed_bars([row | dict.fromkeys(figures.NAMES, 0.5)], looks)
    )
    svg = inline(drawn, "seed_bars", 'say "no" & go')
    assert svg.startswith('<svg role="img" aria-label="say &quot;no&quot; &amp; go"')
    assert figures.INK not in svg and "var(--ink)" in svg
    ids = re.findall(r' id="([^"]*)"', svg)
    used = re.findall(r'(?:href="|url\()#([^")]*)', svg)
    assert all(name.startswith("seed_bars-") for name in ids) and set(used) <= set(ids) and used
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"subdural": 1, "any": 1, "ischemia": 1}, "subdural, ischemia"),
        ({"any": 1}, "haemorrhage"),
        ({"any": 0, "ischemia": 0}, "no lesion"),
        ({"any": None}, "unknown finding"),
    ],
)
def test_finding_of_labels_is_in_words(labels, words):
    assert gallery.finding(labels) == words


# ---------------------------------------------------------------- a study


class Tags(HTMLParser):
    """Tags that are opened and closed, and all that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.names = [], [], []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(path):
    tags = Tags()
    tags.feed(path.read_text(encoding="utf-8"))
    assert not tags.open
    return tags


def studied(monkeypatch, out, data, models, *options):
    """What run_experiments.py hands to report.write()."""
    given = []
    monkeypatch.setattr(run_experiments.report, "write", lambda *arguments: given.append(arguments) or [])
    run_experiments.main(
        [str(one) for one in ("--data", data, "--models", models, "--out", out, "--device", "cpu", *options)]
    )
    monkeypatch.undo()
    return given[0][1:]


@pytest.fixture(scope="module")
def small_study(split_data_once, tmp_path_factory):
    """(study, manifest, found) of untrained networks at two doses, with a segmenter and a stress test."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SEGMENTERS, "bright", BrightSegmenter)
        models = write_models(folder / "models", threshold=0.5)
        content = checkpoints.load(models / "classifier.pt", "classifier") | {"assume_absent": []}
        checkpoints.save(models / "classifier.pt", content)
        options = ("--doses", 40, 5, "--stress", "rings", "--severities", 1)
        return studied(pytest.MonkeyPatch(), folder / "out", split_data_once, models, *options)


def lost(study):
    """The first scan of the study, as if each arm had lost it."""
    series = study.pack.series[0]
    about = {"row": 0, "patient": series["patient_id"], "target": 1, "change": "lost", "mcnemar_p": NAN}
    scores = {"score_reference": 0.9, "score": 0.1, "series_uid": series["series_uid"]}
    return [study.subject(family, "scan", "calibrated", 5.0) | about | scores for family in study.families]


@pytest.fixture(scope="module")
def pages(small_study, tmp_path_factory):
    """The folders of the same report written twice."""
    study, manifest, found = small_study
    manifest = manifest | {"data": "<b>data</b>", "left_out": ['<img src="x">']}
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "DPI", 30)  # most of the time goes into pixels
        for folder in folders:
            report.write(folder, study, manifest, found | {"flips": lost(study)})
    return folders


def test_report_is_complete_in_itself_and_well_formed(pages):
    tags = parsed(pages[0] / "report.html")
    assert all(re.match(r"#|data:image/png;base64,", address) for address in tags.fetched)
    assert not {"script", "link", "img", "iframe", "b>data"} & set(tags.names)
    text = (pages[0] / "report.html").read_text(encoding="utf-8")
    assert "http" not in re.sub(r"<!DOCTYPE[^>]*>", "", text)
    assert (
        "@import" not in text
        and "url(http" not in text
        and "nan" not in re.sub("<svg.*?</svg>", "", text, flags=re.S)
    )


def test_report_escapes_what_comes_from_files(pages):
    text = (pages[0] / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;data&lt;/b&gt;" in text and "<b>data" not in text
    assert "&lt;img src=&quot;x&quot;&gt;" in text


def test_report_is_the_same_bytes_when_written_twice(pages):
    one, two = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")} for folder in pages
    )
    assert one == two


def test_report_shows_every_figure_that_it_writes(pages):
    names = {path.stem for path in (pages[0] / "figures").iterdir()}
    expected = {
        "dose_response",
        "non_inferiority",
        "strata",
        "image_quality",
        "image_tissues",
        "noise_spectra",
    }
    expected |= {
        "roc_scan",
        "roc_slice",
        "reliability",
        "calibration",
        "segmentation",
        "bland_altman",
        "stress",
    }
    assert names == expected | {"failure_1", "failure_2"}
    assert all(name.startswith(report.FIGURES) for name in names)
    text = (pages[0] / "report.html").read_text(encoding="utf-8")
    for name in names:
        assert f'<figure id="{name}">' in text
        assert {path.suffix for path in (pages[0] / "figures").glob(f"{name}.*")} == {".png", ".svg"}


def test_report_says_what_it_was_made_of_and_for_whom_it_is_not(pages, small_study):
    study, manifest, _ = small_study
    text = (pages[0] / "report.html").read_text(encoding="utf-8")
    for words in (manifest["split_hash"], manifest["command"][:20], manifest["versions"]["torch"]):
        assert words in text
    assert all(digest in text for digest in manifest["checkpoints"].values())
    assert "Research use only" in text and "says nothing of patients" in text
    assert methods.BLANK in text
    for series in study.pack.series:
        series["source"] = "dicom"
    try:
        assert methods.sources(study) == ["dicom"]
        unknown = [item for item in methods.checklist(study, manifest, {"flips": []}) if not item[2]]
        assert "ethics approval and consent" in {item[0] for item in unknown}
    finally:
        for series in study.pack.series:
            series["source"] = "phantom"


def test_report_removes_its_own_old_figures_and_nothing_else(small_study, tmp_path):
    study, manifest, found = small_study
    folder = tmp_path / "figures"
    folder.mkdir()
    for name in ("failure_8.png", "failure_8.svg", "mine.png"):
        (folder / name).write_text("old")
    nothing = {name: [] for name in found} | {"image_quality": found["image_quality"]}
    paths = report.write(tmp_path, study, manifest, nothing)
    assert paths == [tmp_path / "report.html", folder]
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "mine.png",
        *(f"image_{name}.{end}" for name in ("quality", "tissues") for end in ("png", "svg")),
    }
    assert "No classifier" in paths[0].read_text(encoding="utf-8")


def test_failure_shows_the_slice_with_most_lesion_and_where_the_network_looked(small_study):
    study, _, _ = small_study
    plain, denoised = lost(study)
    for flip, count in ((plain, 4), (denoised, 5)):
        series = max(
            range(len(study.pack.series)), key=lambda n: study.pack.mask[study.pack.series_of == n].sum()
        )
        found = gallery.failure_tiles(study, flip | {"row": series})
        assert len(found) == count
        assert [tile.title for tile in found[-2:]] == ["100 %, Grad-CAM", "12.5 %, Grad-CAM"]
        areas = np.asarray(study.pack.mask[study.pack.series_of == series] > 0).sum((1, 2))
        assert all(tile.truth.sum() == areas.max() > 0 for tile in found)
        assert all(tile.found is not None for tile in found[:-2])
        assert not np.array_equal(found[0].picture, found[1].picture)


def test_failure_without_masks_shows_the_most_suspicious_slice(small_study, monkeypatch):
    study, _, _ = small_study
    monkeypatch.setattr(study.pack, "mask", None)
    monkeypatch.setattr(study, "outlines", [])
    flip = lost(study)[0]
    found = gallery.failure_tiles(study, flip)
    assert all(tile.truth is None and tile.found is None for tile in found)


def test_failure_of_a_network_without_feature_maps_has_no_heat(small_study, monkeypatch):
    study, _, _ = small_study
    network = study.arms[0].classifier.network
    monkeypatch.setattr(type(network), "cam_layers", lambda _: {})
    assert len(gallery.failure_tiles(study, lost(study)[0])) == 2


def test_head_in_the_gallery_is_turned_nose_up(small_study, monkeypatch):
    study, _, _ = small_study
    upright = gallery.failure_tiles(study, lost(study)[0])[0].picture
    affine = np.array(study.pack.series[0]["affine"])
    affine[:2, 1] *= -1  # rows now lead to the front
    monkeypatch.setitem(study.pack.series[0], "affine", affine.tolist())
    turned = gallery.failure_tiles(study, lost(study)[0])[0].picture
    np.testing.assert_array_equal(turned, upright[::-1])


def test_study_of_a_denoiser_alone_has_a_report_about_images(split_data_once, tmp_path, monkeypatch):
    monkeypatch.setitem(SEGMENTERS, "bright", BrightSegmenter)
    models = write_models(tmp_path / "models")
    for name in ("classifier.pt", "segmenter.pt"):
        (models / name).unlink()
    given = studied(monkeypatch, tmp_path, split_data_once, models, "--doses", 5)
    monkeypatch.setattr(figures, "DPI", 30)
    path, _ = report.write(tmp_path, *given)
    assert not parsed(path).fetched[0].startswith("http")
    text = path.read_text(encoding="utf-8")
    assert "No classifier was tried" in text and "for noisy input" in text
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert names == {"image_quality", "image_tissues", "noise_spectra"}
