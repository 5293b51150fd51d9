"""The figures of a study: every one as PNG and SVG, the same bytes twice, one look for an arm."""

import math

import numpy as np
import pytest

import figures
from figures import Answers, Tile, Volumes

LOOKS = figures.arm_looks(["1", "2"])
IMAGES = figures.image_looks(["none", "denoiser.pt"])
NAN = math.nan


def about(**more):
    return {"dose_model": "projection", "dose_fraction": more.get("dose")} | more


def with_ends(name, value, reach=0.1, sd=NAN):
    ends = {f"{name}_low": value - reach, f"{name}_high": value + reach, f"{name}_seed_sd": sd}
    return {name: value} | ends


def arm_rows(doses=(1.0, 0.1), value=0.8, **more):
    """A row for each arm and dose with every number of an arm."""
    return [
        about(dose=dose, arm=arm, auc_null=0.5, prevalence=0.1, n=9, threshold_shift=0.1, **more)
        | {"ece": value, "brier": value}
        | {
            key: number
            for name in ("auc", "sens", "spec", "ppv", "npv")
            for key, number in with_ends(name, value).items()
        }
        for arm in LOOKS
        for dose in doses
    ]


def difference_rows(doses=(1.0, 0.1), **more):
    outcomes = {"auc": "non-inferior", "sens": "inferior", "spec": "inconclusive"}
    return [
        about(dose=dose, arm=arm, kind=kind, outcome=outcome, margin=0.05, level="scan", **more)
        | {"estimate": -0.02, "low": -0.04, "high": 0.0}
        for kind, outcome in outcomes.items()
        for arm in LOOKS
        for dose in doses
    ]


def image_rows(doses=(1.0, 0.1), value=1.0):
    names = [*figures.QUALITY, *figures.TISSUES]
    return [
        about(dose=dose, denoiser=denoiser, of_subset=subset, noise_seed=1)
        | {key: number for name in names for key, number in with_ends(name, value).items()}
        for dose in doses
        for denoiser, subset in (("none", False), ("denoiser.pt", False), ("none", True))
    ]


def spectrum_rows(power=(0.0, 2.0, 1.0)):
    return [
        about(dose=1.0, denoiser="none", of_subset=False, frequency_per_mm=0.1 * place, power_hu2_mm2=value)
        for place, value in enumerate(power)
    ]


def answers(scores=((0.1, 0.6, 0.9, 0.4),)):
    return [Answers("dose 10 %", arm, np.array([0.0, 0, 1, 1]), np.array(scores)) for arm in LOOKS]


def segmented_rows(value=0.7):
    numbers = ("dice", "any_recall", "false_positive_ml")
    return [
        about(dose=dose, segmenter="segmenter.pt", denoiser=denoiser)
        | {key: number for name in numbers for key, number in with_ends(name, value).items()}
        for dose in (1.0, 0.1)
        for denoiser in IMAGES
    ]


def stress_rows():
    return [row | {"artifact": "motion", "severity": row["dose"]} for row in difference_rows()]


def external_rows(auc=0.9):
    row = {"pipeline": "1", "classifier": "classifier.pt", "denoiser": None, "auc": auc}
    return [row | {"data": "a", "home": "a", "drop": 0.0}, row | {"data": "b", "home": "a", "drop": NAN}]


def seed_rows(value=0.8):
    return [
        about(dose=dose, arm=arm) | dict.fromkeys(figures.SCORES, value - 0.1 * seed)
        for arm in LOOKS
        for dose in (1.0, 0.1)
        for seed in (1, 2)
    ]


def tiles():
    picture, mask = np.full((9, 7, 3), 100, np.uint8), np.zeros((9, 7), bool)
    mask[2:5, 2:5] = True
    return [Tile("100 %", picture, mask, mask), Tile("10 %", picture)]


EVERY = {
    "dose_response": lambda: figures.dose_response(arm_rows(level="scan"), LOOKS),
    "one_dose": lambda: figures.dose_response(arm_rows((1.0,), level="slice"), LOOKS),
    "unknown": lambda: figures.dose_response(arm_rows(value=NAN, level="scan"), LOOKS),
    "non_inferiority": lambda: figures.non_inferiority(difference_rows(), LOOKS),
    "strata": lambda: figures.strata(arm_rows(stratum="under_1_ml"), LOOKS),
    "image_quality": lambda: figures.image_quality(image_rows(), IMAGES, figures.QUALITY),
    "image_tissues": lambda: figures.image_quality(image_rows(), IMAGES, figures.TISSUES),
    "noise_spectra": lambda: figures.noise_spectra(spectrum_rows(), IMAGES),
    "noise_unknown": lambda: figures.noise_spectra(spectrum_rows((NAN, NAN)), IMAGES),
    "roc": lambda: figures.roc(answers(), LOOKS),
    "reliability": lambda: figures.reliability_diagram(answers(), LOOKS),
    "calibration": lambda: figures.calibration(arm_rows(), LOOKS),
    "segmentation": lambda: figures.segmentation(segmented_rows(), IMAGES),
    "bland_altman": lambda: figures.bland_altman(
        [Volumes("10 %", "none", np.array([1.0, 2]), np.array([2.0, 1]), 0.0, -3.0, 3.0)], IMAGES
    ),
    "stress": lambda: figures.stress(stress_rows(), LOOKS),
    "external": lambda: figures.external(external_rows(), {"a": "home", "b": "away"}),
    "external_unknown": lambda: figures.external(external_rows(NAN), {"a": "home", "b": "away"}),
    "seed_bars": lambda: figures.seed_bars(arm_rows(), LOOKS),
    "seed_boxes": lambda: figures.seed_boxes(seed_rows(), LOOKS),
    "failure": lambda: figures.failure(tiles()),
}


@pytest.mark.parametrize("name", EVERY)
def test_figure_is_written_as_png_and_svg_the_same_twice(name, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "DPI", 30)  # most of the time goes into pixels
    texts = [figures.save(tmp_path / folder, name, EVERY[name]()) for folder in ("one", "two")]
    assert texts[0] == texts[1]
    for end, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        one, two = ((tmp_path / folder / f"{name}.{end}").read_bytes() for folder in ("one", "two"))
        assert one == two and one.startswith(start)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [f"{name}.png", f"{name}.svg"]


def test_looks_tell_arms_apart_and_keep_a_pipelines_colour():
    labels = ["1", "1n", "2 bm3d", "2 denoiser", "2d", "2j"]
    looks = figures.arm_looks(labels)
    assert len({look.colour for look in looks.values()}) == len({look.marker for look in looks.values()}) == 6
    assert looks["1"] == figures.arm_looks(["1"])["1"]
    assert looks["2 bm3d"].colour == figures.ARM_COLOURS["2"]
    many = figures.arm_looks([f"1 number {number}" for number in range(30)])
    assert len(many) == 30
    images = figures.image_looks(["a.pt", "none", "b.pt", "a.pt"])
    assert list(images) == ["none", "a.pt", "b.pt"] and images["none"].colour == figures.INK


def drawn_lines(axis):
    """Those of arms, without the caps of bars."""
    return [line for line in axis.lines if line.get_marker() in {look.marker for look in LOOKS.values()}]


def test_dose_response_draws_what_the_rows_say_in_the_colour_of_the_arm():
    rows = arm_rows(level="scan")
    figure = figures.dose_response(rows, LOOKS)
    assert [axis.get_title() for axis in figure.axes] == [
        f"{name}, per scan" for name in figures.NAMES.values()
    ]
    for axis in figure.axes:
        lines = drawn_lines(axis)
        assert [line.get_color() for line in lines] == [look.colour for look in LOOKS.values()]
        for line in lines:
            np.testing.assert_allclose(line.get_ydata(), 0.8)
            np.testing.assert_allclose(line.get_xdata(), [10, 100], rtol=0.02)  # arms stand side by side


def test_dose_axis_of_a_model_without_routine_shows_its_own_unit():
    rows = [row | {"dose_model": "poisson", "dose_fraction": None} for row in arm_rows(level="scan")]
    figure = figures.dose_response(rows, LOOKS)
    assert figure.axes[0].get_xlabel() == "dose, lambda"
    assert figures.place(rows[0]) == 1.0
    assert figures.dose_words("poisson", 5.0) == "lambda 5"
    assert figures.dose_words("calibrated", 5.0) == "12.5 %"
    assert figures.dose_words("projection", NAN) == figures.dose_words("projection", None) == "none"


def test_non_inferiority_fills_only_what_is_shown_and_stands_at_the_margin():
    figure = figures.non_inferiority(difference_rows(), LOOKS)
    for axis, filled in zip(figure.axes, (True, True, False), strict=True):
        marks = [line for line in axis.lines if len(line.get_xdata()) == 1]
        assert len(marks) == 4
        assert all((mark.get_markerfacecolor() != "none") == filled for mark in marks)
        assert {tuple(line.get_xdata()) for line in axis.lines} >= {(-0.05, -0.05), (0, 0), (-0.04, 0.0)}
    assert {mark.get_marker() for mark in figure.axes[1].lines if len(mark.get_xdata()) == 1} == {"X"}


def test_image_panels_that_no_row_knows_are_left_out():
    rows = [row | {"cnr_blood": NAN, "cnr_infarct": NAN} for row in image_rows()]
    titles = [axis.get_title() for axis in figures.image_quality(rows, IMAGES, figures.QUALITY).axes]
    assert len(titles) == len(figures.QUALITY) - 2
    assert not any("CNR" in title for title in titles)


def test_spectrum_leaves_out_the_frequency_without_power():
    (axis,) = figures.noise_spectra(spectrum_rows(), IMAGES).axes
    np.testing.assert_allclose(axis.lines[0].get_xdata(), [0.1, 0.2])


def test_roc_goes_through_the_corner_of_a_perfect_network_and_skips_what_has_no_classes():
    perfect = answers([[0.1, 0.2, 0.8, 0.9]])
    one_class = Answers("dose 10 %", "2", np.ones(4), np.ones((1, 4)))
    unknown = Answers("dose 10 %", "2", perfect[0].targets, np.full((1, 4), NAN))
    (axis,) = figures.roc([perfect[0], one_class, unknown], LOOKS).axes
    _, line = axis.lines  # the diagonal, and one network
    assert (0, 1) in zip(*line.get_data(), strict=True)


def test_reliability_of_probabilities_that_come_true_lies_on_the_diagonal():
    rng = np.random.default_rng(1)
    scores = np.tile(np.where(rng.uniform(size=20000) < 0.5, 0.25, 0.75), (2, 1))
    targets = (rng.uniform(size=20000) < scores[0]).astype(float)
    (axis,) = figures.reliability_diagram([Answers("dose 10 %", "1", targets, scores)], LOOKS).axes
    x, y = axis.lines[1].get_data()
    np.testing.assert_allclose(x, [0.25, 0.75])
    np.testing.assert_allclose(y, x, atol=0.02)  # four standard errors of 10000 draws


def test_failure_shows_slices_of_one_size_however_many_there_are():
    widths = [figures.failure(tiles() * count).axes[0].get_position().width for count in (1, 2)]
    assert widths[0] == pytest.approx(widths[1])
    axes = figures.failure(tiles()).axes
    assert [axis.get_title() for axis in axes] == ["100 %", "10 %"]
    colours = [tuple(one.get_edgecolor()[0][:3]) for one in axes[0].collections]
    assert colours == [(1, 0, 0), (0, 1, 0)]
    assert not axes[1].collections
