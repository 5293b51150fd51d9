"""The tables of a study against scikit-learn and closed forms, and where numbers do not exist."""

import itertools
import json
import math
import warnings

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import brier_score_loss, roc_auc_score

import comparisons
import intervals
import lesions
import metrics
import stage
import tables
from cells import Cell, Condition
from scoring import write_table
from tests.toy_study import MEANS, SPLIT, ToyPack, classifier, denoiser, toy_study

ONE = [classifier()]
LEVELS = ("slice", "scan")


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """50 draws of every bootstrap: what is tested is which numbers stand where."""
    whole = intervals.patient_draws
    monkeypatch.setattr(intervals, "patient_draws", lambda count, seed, _: whole(count, seed, 50))


def noisy_truth(pack, strength=1.0):
    """tell(): the truth of a slice's scan, and noise of its own for each network and condition."""
    truth = np.array([metadata["labels"]["any"] or 0 for metadata in pack.series])[pack.series_of]

    def tell(cell):
        seed = stage.stable_seed(
            cell.reader.path.name, str(cell.denoiser and cell.denoiser.path), *cell.condition
        )
        noise = np.random.default_rng(seed).normal(0, 1, len(pack))
        return 1 / (1 + np.exp(-strength * (truth - 0.5) - noise)).round(3)

    return tell


def toy_targets(number=30):
    """Of every third scan nothing is known."""
    return [None if place % 3 == 2 else place % 2 for place in range(number)]


# ---------------------------------------------------------------- other contents of cells

NAMES = ("noise_sd_hu", "contrast_kept_blood", "bias_brain_hu")


def others(pack, masks=None):
    """What cells hold that are not of classifiers: figures that are the dose, doubled behind a denoiser."""

    def content(cell):
        count = len(np.unique(pack.patient_ids())) if cell.patients is None else cell.patients
        size = cell.condition.dose * (1 if cell.denoiser is None else 2)
        if cell.kind == "observer":
            one = {"d_prime": size, "d_low": None, "d_high": size + 1}
            return {"bleed": one, "infarct": one}
        if cell.kind == "segmenter":
            return {"reports": masks(cell)}
        spread = np.linspace(0.5, 1.5, count)
        return {
            "means": MEANS | {"rmse_hu": size},
            "patients": {name: (size * spread).tolist() for name in NAMES},
            "spectrum": {
                "frequencies": [0.0, 0.1, 0.2, 0.3],
                "power": [0.0, size, size if cell.denoiser is None else 0.0, 0.0],
                "cells": [1, 8, 8, 8],
                "blocks": 5,
            },
        }

    return content


def check_whole(found):
    """Every row of a table has the same columns, and all of it is JSON."""
    for name, rows in found.items():
        assert len({tuple(row) for row in rows}) <= 1, name
        json.dumps(stage.plain(rows), allow_nan=False)


# ---------------------------------------------------------------- network by network


@pytest.mark.parametrize("level", LEVELS)
def test_rows_of_networks_are_those_of_scikit_learn_and_metrics(level):
    pack = ToyPack(toy_targets(), slices=3)
    readers = [classifier(f"c.seed{seed}", seed=seed, threshold=0.3 + seed / 10) for seed in (1, 2)]
    study = toy_study(pack, noisy_truth(pack), readers, [denoiser("tv")], noise_seeds=[1, 2])
    rows = [row for row in tables.network_rows(study) if row["level"] == level]
    assert len(rows) == 3 * 2 * 2 * 2
    for row in rows:
        assert tuple(row) == tables.COLUMNS
        arm = next(
            arm
            for arm in study.arms
            if (arm.classifier.path.name, arm.name) == (row["classifier"], row["arm"])
        )
        cells = study.cells
        condition = Condition(row["dose_model"], row["dose"], row["noise_seed"])
        few = 6 if arm.denoiser else None
        said = cells.load(Cell(condition, arm.denoiser, "classifier", arm.classifier, few))
        scores = np.array(said[f"{level}s"])[:, 0]
        series = pack.series_of[cells.rows(few)]
        series = series if level == "slice" else np.unique(series)
        truth = np.array([toy_targets()[number] for number in series], float)
        known = ~np.isnan(truth)
        assert row["auc"] == pytest.approx(roc_auc_score(truth[known], scores[known]))
        expected = metrics.rates(truth, scores, row["threshold"])
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        assert row["threshold"] == 0.3 + row["train_seed"] / 10
        assert row["n_patients"] == len(set(series[known]))
        assert row["n_slices"] == 3 * row["n_patients"]
        low, high = intervals.bootstrap_auc(truth[known], scores[known], series[known], seed=1)
        assert (row["auc_low"], row["auc_high"]) == pytest.approx((low, high))


def test_rows_without_classifiers_are_those_of_the_denoisers():
    pack = ToyPack([0, 1] * 5, slices=2)
    study = toy_study(pack, None, [], [denoiser(), denoiser("bm3d")], others=others(pack))
    rows = tables.network_rows(study)
    assert [(row["denoiser"], row["n_patients"], row["n_slices"]) for row in rows] == [
        *(("denoiser.pt", 10, 20), ("bm3d", 6, 12)) * 3,
    ]
    assert [row["rmse_hu"] / row["rmse_hu_noisy"] for row in rows] == [2] * 6
    assert {row["arm"] for row in rows} == {"denoised"}
    check_whole(tables.all_tables({"a": study}))


def test_seeds_are_what_the_earlier_systems_wrote():
    pack = ToyPack([0, 1] * 10)
    readers = [classifier(f"c.seed{seed}", seed=seed) for seed in (7, 3)]
    study = toy_study(pack, noisy_truth(pack), readers, others=others(pack))
    found = tables.all_tables({"a": study})
    assert tuple(found["seeds"][0])[:8] == ("dose", "seed", "acc", "auc", "sens", "spec", "prec", "f1")
    assert {row["seed"] for row in found["seeds"]} == {3, 7}
    assert len(found["seeds"]) == len(found["experiments"]) == 3 * 2 * 2
    pairs = zip(found["seeds"], found["experiments"], strict=True)
    assert all(own["auc"] == row["auc"] and own["seed"] == row["train_seed"] for own, row in pairs)


# ---------------------------------------------------------------- families across doses


def test_dose_response_of_one_network_is_its_row():
    pack = ToyPack(toy_targets(), slices=2)
    study = toy_study(pack, noisy_truth(pack), ONE)
    single = {(row["dose"], row["level"]): row for row in tables.network_rows(study)}
    rows = tables.dose_response(study)
    assert len(rows) == len(single) == 6
    for row in rows:
        own = single[row["dose"], row["level"]]
        for kind in comparisons.KINDS:
            assert row[kind] == pytest.approx(own[kind])
        assert row["n_patients"] == own["n_patients"] == 20
        assert (row["n_networks"], row["n"]) == (1, 20 if row["level"] == "scan" else 40)
        assert math.isnan(row["auc_seed_sd"])
        if row["level"] == "slice":
            assert (row["auc_low"], row["auc_high"]) == pytest.approx((own["auc_low"], own["auc_high"]))


def test_dose_response_of_several_seeds_is_their_mean_and_sd():
    pack = ToyPack([0, 1] * 20)
    readers = [classifier(f"c.seed{seed}", seed=seed) for seed in (1, 2, 3)]
    study = toy_study(pack, noisy_truth(pack), readers, noise_seeds=[1, 2])
    single = [row for row in tables.network_rows(study) if row["level"] == "scan" and row["dose"] == 0.5]
    row = next(row for row in tables.dose_response(study) if row["level"] == "scan" and row["dose"] == 0.5)
    for kind in comparisons.KINDS:
        values = [own[kind] for own in single]
        assert len(values) == 6
        assert row[kind] == pytest.approx(np.mean(values))
        assert row[f"{kind}_seed_sd"] == pytest.approx(np.std(values, ddof=1))
    assert row["n_networks"] == 3


def test_dose_response_counts_the_calls_of_the_stored_threshold():
    pack = ToyPack(toy_targets())
    readers = [classifier(f"c.seed{seed}", seed=seed, threshold=0.3 + seed / 10) for seed in (1, 2)]
    study = toy_study(pack, noisy_truth(pack), readers)
    truth = np.array([math.nan if target is None else target for target in toy_targets()])
    for row in tables.dose_response(study):
        condition = study.at("projection", row["dose"])[0]
        called = np.mean(
            [
                study.answer(arm, condition)["scan"] >= 0.3 + place / 10
                for place, arm in enumerate(study.arms, 1)
            ],
            axis=0,
        )
        expected = [called[truth == 1].sum(), (1 - called)[truth == 1].sum()]
        expected += [(1 - called)[truth == 0].sum(), called[truth == 0].sum()]
        assert [row[name] for name in ("tp", "fn", "tn", "fp")] == pytest.approx(expected)


def test_curves_are_the_best_of_all_thresholds_and_the_mean_of_the_networks():
    pack = ToyPack([0, 1, 1] * 9)
    readers = [classifier(f"c.seed{seed}", seed=seed) for seed in (1, 2)]
    study = toy_study(pack, noisy_truth(pack), readers)
    sick = np.array([0, 1, 1] * 9) == 1
    rows = [row for row in tables.curves(study) if (row["dose"], row["level"]) == (0.5, "scan")]
    assert [row["rate"] for row in rows] == pytest.approx(np.linspace(0, 1, 101))
    all_scores = [study.answer(arm, study.at("projection", 0.5)[0])["scan"] for arm in study.arms]
    for row in rows:
        sensitivity, precision = [], []
        for scores in all_scores:
            cuts = [(scores >= cut) for cut in [*scores, 2.0]]
            few = [called for called in cuts if called[~sick].mean() <= row["rate"] + 1e-9]
            sensitivity.append(max(called[sick].mean() for called in few))
            most = max(row["rate"] - 1e-9, 1e-9)
            # the highest threshold that finds so many
            first = min((c for c in cuts if c[sick].mean() >= most), key=lambda called: called.sum())
            precision.append(sick[first].mean())
        assert row["sensitivity"] == pytest.approx(np.mean(sensitivity), abs=1e-4)
        assert row["precision"] == pytest.approx(np.mean(precision), abs=1e-4)


def test_curves_enclose_the_area_of_the_table_beside_them():
    pack = ToyPack([0, 1] * 100)  # a rate for each negative
    study = toy_study(pack, noisy_truth(pack), ONE)
    areas = {(row["dose"], row["level"]): row["auc"] for row in tables.dose_response(study)}
    for (dose, level), area in areas.items():
        own = [row for row in tables.curves(study) if (row["dose"], row["level"]) == (dose, level)]
        assert np.mean([row["sensitivity"] for row in own[:-1]]) == pytest.approx(
            area, abs=0.01
        )  # ties: half


def test_reference_is_no_test_of_its_family_and_holm_counts_the_others():
    pack = ToyPack([0, 1] * 30)
    study = toy_study(pack, noisy_truth(pack), ONE, ladders={"projection": [1.0, 0.1], "calibrated": [40.0]})
    rows = tables.against_reference(study)
    assert len(rows) == 3 * 2 * 3
    for row in rows:
        if row["is_reference"]:
            assert row["dose"] == row["reference_dose"]
            assert (row["estimate"], row["p"], row["outcome"]) == (0, 1, "non-inferior")
        else:
            assert row["dose"] == 0.1
            assert row["p_holm"] == row["p"] < 1  # the only one of its question
        assert row["estimate"] == pytest.approx(row["a"] - row["b"])
    assert sum(row["is_reference"] for row in rows) == 12


def test_arms_are_held_against_the_first_at_the_same_dose():
    pack = ToyPack([0, 1] * 30)
    readers = [classifier("a"), classifier("b", input="noisy")]
    study = toy_study(pack, noisy_truth(pack), readers, [denoiser("tv")])
    single = {
        (row["classifier"], row["denoiser"], row["dose"], row["level"]): row
        for row in tables.network_rows(study)
    }
    rows = tables.between_arms(study)
    assert {(row["arm"], row["against"]) for row in rows} == {("1n", "1"), ("2", "1")}
    for row in rows:
        if row["denoiser"] is None:
            own, first = (single[f"{name}.pt", None, row["dose"], row["level"]] for name in "ba")
            assert row["estimate"] == pytest.approx(own[row["kind"]] - first[row["kind"]])
            assert row["patients"] == 60
        else:
            assert row["patients"] == 6
    families = {}
    for row in rows:
        families.setdefault((row["level"], row["kind"]), []).append(row)
    for own in families.values():
        assert len(own) == 2 * 3
        np.testing.assert_allclose([row["p_holm"] for row in own], intervals.holm([row["p"] for row in own]))


def test_verdict_of_the_only_dose_is_that_dose_and_of_a_stratum_its_own():
    pack = ToyPack([0, 1, 0, 1] * 160, kinds=("subdural", "subdural", "epidural", "epidural"))
    sick = np.array([metadata["labels"]["any"] for metadata in pack.series])
    epidural = np.array([metadata["labels"].get("epidural") == 1 for metadata in pack.series])

    def tell(cell):
        """Epidural bleeds are missed at a tenth of the dose."""
        noise = np.random.default_rng(4).uniform(0, 0.3, len(pack))
        return noise + 0.6 * (sick == 1) * ~(epidural & (cell.condition.dose == 0.1))

    study = toy_study(pack, tell, ONE, ladders={"projection": [1.0, 0.1], "poisson": [20.0]})
    rows = {
        (row["dose_model"], row["stratum"], row["kind"]): row
        for row in tables.verdicts(study)
        if row["level"] == "scan"
    }
    assert {key[1] for key in rows} == {"all", "subdural", "epidural"}
    assert rows["projection", "subdural", "sens"]["dose"] == 0.1
    lost = rows["projection", "epidural", "sens"]
    assert (lost["dose"], lost["failed_dose"], lost["how"]) == (1.0, 0.1, "inferior")
    assert lost["failed_estimate"] == -1
    assert rows["poisson", "all", "auc"]["dose"] == 20
    assert math.isnan(rows["poisson", "all", "auc"]["failed_dose"])


def test_strata_are_their_positives_against_all_normals():
    pack = ToyPack([0, 1, 1] * 20, kinds=("subdural", "epidural", "subdural", "subarachnoid"))
    study = toy_study(pack, noisy_truth(pack), ONE)
    rows = tables.strata(study)
    assert {row["stratum"] for row in rows} == {"subdural", "epidural", "subarachnoid"}
    truth = np.array([metadata["labels"]["any"] for metadata in pack.series])
    for row in rows:
        own = np.array([one["labels"].get(row["stratum"]) == 1 for one in pack.series])
        condition = study.at("projection", row["dose"])[0]
        scores = study.answer(study.arms[0], condition)["scan"]
        chosen = own | (truth == 0)
        assert row["auc"] == pytest.approx(roc_auc_score(truth[chosen], scores[chosen]))
        assert row["sens"] == pytest.approx((scores[own] >= 0.5).mean())
        assert row["n"] == own.sum()


def test_flips_are_the_calls_that_changed_and_no_others():
    pack = ToyPack([0, 1, None, 1, 0, 1], slices=2)
    high = np.array([0.1, 0.9, 0.9, 0.9, 0.9, 0.2])
    low = np.array([0.8, 0.1, 0.1, 0.6, 0.3, 0.9])  # gone, lost, unknown, kept, mended, found
    study = toy_study(
        *(pack, lambda cell: np.repeat(high if cell.condition.dose == 1 else low, 2), ONE),
        ladders={"projection": [1.0, 0.5]},
    )
    rows = tables.flips(study)
    found = {(row["change"], row["series_uid"], row["target"]) for row in rows}
    assert found == {
        ("lost", "s0000", 0),
        ("lost", "s0001", 1),
        ("gained", "s0004", 0),
        ("gained", "s0005", 1),
    }
    assert {row["mcnemar_p"] for row in rows} == {1.0}
    by_scan = {row["series_uid"]: row for row in rows}
    assert (by_scan["s0001"]["score_reference"], by_scan["s0001"]["score"]) == (0.9, 0.1)
    assert by_scan["s0001"]["patient"] == "p0001"


def test_scan_scores_hold_every_known_scan_and_mark_the_flips():
    pack = ToyPack(toy_targets())
    readers = [classifier(f"c.seed{seed}", seed=seed) for seed in (1, 2)]
    study = toy_study(pack, noisy_truth(pack), readers)
    rows = tables.scan_scores(study)
    known = [number for number, target in enumerate(toy_targets()) if target is not None]
    assert len(rows) == 2 * len(known)
    for row in rows:
        number = int(row["series_uid"][1:])
        assert row["target"] == toy_targets()[number]
        for name, dose in (("score_reference", 1.0), ("score", row["dose"])):
            condition = study.at("projection", dose)[0]
            said = [study.answer(arm, condition)["scan"][number] for arm in study.arms]
            assert row[name] == pytest.approx(np.mean(said), abs=1e-4)
    flipped = {
        (row["dose"], row["series_uid"], row["change"]) for row in rows if row["change"] in ("lost", "gained")
    }
    assert flipped == {(row["dose"], row["series_uid"], row["change"]) for row in tables.flips(study)}
    assert flipped and {row["change"] for row in rows} == {"lost", "gained", "kept"}


def test_scan_scores_without_a_threshold_know_no_change():
    pack = ToyPack([0, 1] * 5)
    study = toy_study(pack, noisy_truth(pack), [classifier(threshold=None)])
    assert {row["change"] for row in tables.scan_scores(study)} == {"unknown"}


def test_flips_of_a_subset_are_of_its_patients():
    pack = ToyPack([0, 1] * 20)
    study = toy_study(pack, noisy_truth(pack, 0.1), ONE, [denoiser("nlm")])
    rows = [row for row in tables.flips(study) if row["denoiser"]]
    asked = {pack.series[number]["series_uid"] for number in study.places(6, "scan")}
    assert {row["series_uid"] for row in rows} <= asked and rows


def test_calibration_is_that_of_the_scores_and_of_the_stated_prevalence():
    pack = ToyPack([0, 1] * 40)
    study = toy_study(pack, noisy_truth(pack), ONE, prevalence=0.02)
    for row in tables.calibration(study):
        scores = study.answer(study.arms[0], study.at("projection", row["dose"])[0])[row["level"]]
        truth = np.arange(80) % 2
        assert row["brier"] == pytest.approx(brier_score_loss(truth, scores))
        rates = metrics.rates(truth, scores, 0.5)
        hits, alarms = rates["sens"] * 0.02, (1 - rates["spec"]) * 0.98
        assert row["ppv"] == pytest.approx(hits / (hits + alarms))
        assert row["ppv_low"] <= row["ppv"] <= row["ppv_high"]
        assert (row["threshold_stored"], row["prevalence"]) == (0.5, 0.02)
        assert row["sens_tuned"] + row["spec_tuned"] >= rates["sens"] + rates["spec"]
        assert row["threshold_shift"] == pytest.approx(row["threshold_tuned"] - 0.5)


def test_stress_is_the_loss_to_the_same_images_without():
    pack = ToyPack([0, 1] * 60)
    truth = np.arange(120) % 2
    noise = np.random.default_rng(2).normal(0, 0.2, 120)

    def tell(cell):
        artifact, severity = cell.condition.artifact, cell.condition.severity or 0
        lost = severity if artifact == "rings" else 0
        return (0.5 + noise + 0.3 * (truth - 0.5) * (1 - lost)).clip(0, 1)

    stress = {"rings": [0.5, 1.0], "motion": [0.5, 1.0]}
    study = toy_study(pack, tell, ONE, [denoiser("tv")], stress=stress)
    rows = [row for row in tables.stress(study) if (row["level"], row["kind"]) == ("scan", "auc")]
    assert {row["denoiser"] for row in rows} == {None}
    found = {(row["artifact"], row["severity"]): row for row in rows}
    assert set(found) == set(itertools.product(stress, (0.5, 1.0)))
    plain = roc_auc_score(truth, 0.5 + noise + 0.3 * truth)
    rings = found["rings", 1.0]
    assert rings["b"] == pytest.approx(plain)
    assert rings["a"] == pytest.approx(roc_auc_score(truth, noise))
    assert rings["estimate"] < found["rings", 0.5]["estimate"] < 0
    assert rings["high"] < 0
    assert (found["motion", 1.0]["estimate"], found["motion", 1.0]["p"]) == (0, 1)


# ---------------------------------------------------------------- images and outlines


def test_image_quality_is_a_row_for_the_low_dose_and_each_denoiser():
    pack = ToyPack([0, 1] * 5)
    study = toy_study(pack, None, [], [denoiser(), denoiser("tv")], others=others(pack))
    rows = {(row["dose"], row["denoiser"], row["of_subset"]): row for row in tables.image_quality(study)}
    assert len(rows) == 3 * 4
    for (dose, name, subset), row in rows.items():
        size = dose * (1 if name == "none" else 2)
        assert (row["rmse_hu"], row["noise_sd_ratio"]) == pytest.approx((size, size))
        assert row["n_patients"] == (6 if subset else 10)
        assert row["contrast_kept_blood"] == pytest.approx(size)
        assert row["contrast_kept_blood_low"] < size < row["contrast_kept_blood_high"]
        # a half of the power is at another frequency
        assert row["spectrum_distance"] == pytest.approx(0 if name == "none" else 0.5)
        assert (row["d_prime_bleed"], row["d_prime_bleed_high"]) == (size, size + 1)
        assert math.isnan(row["d_prime_bleed_low"])
    assert {subset for _, name, subset in rows if name == "tv"} == {True}
    spectra = tables.noise_spectra(study)
    assert len(spectra) == 12 * 4
    assert spectra[1]["frequency_per_mm"] == 0.1 and spectra[1]["power_hu2_mm2"] == 1.0


def test_image_quality_without_truth_has_no_ratio_to_the_reference_dose_and_no_warning():
    pack = ToyPack([0, 1] * 5)
    full = others(pack)

    def content(cell):
        found = full(cell)
        if cell.kind == "quality" and cell.condition.dose == 1 and cell.denoiser is None:
            found["patients"] = {name: [0.0] * 10 for name in NAMES} | {"contrast_kept_blood": [None] * 10}
            found["spectrum"]["power"] = [0.0] * 4
        return found

    study = toy_study(pack, None, [], [denoiser()], others=content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = tables.image_quality(study)
    first = rows[0]
    for name in ("noise_sd_ratio", "noise_sd_ratio_low", "contrast_kept_blood", "spectrum_distance"):
        assert math.isnan(first[name]), name
    assert first["noise_sd_hu"] == 0
    assert math.isnan(rows[2]["noise_sd_ratio"]) and rows[2]["noise_sd_hu"] == 0.5


def test_segmentation_gains_what_the_denoiser_adds_on_the_same_scans():
    truth = np.zeros((10, 1, 4, 4), np.uint8)
    truth[1::2, :, :2] = 5
    pack = ToyPack([0, 1] * 5, mask=truth[:, 0])

    def outlined(cell):
        few = range(10) if cell.patients is None else study.places(cell.patients, "scan")
        found = []
        for number in few:
            mask = truth[number].copy()
            if cell.denoiser is None:
                mask[:, 0] = 0  # half of it is missed: Dice 2/3
            found.append(stage.plain(lesions.case_report(truth[number], mask, (5, 1, 1))))
        return found

    reader = [classifier("segmenter")]
    study = toy_study(
        pack,
        None,
        [],
        [denoiser(), denoiser("tv")],
        reader,
        others=others(pack, masks=outlined),
        noise_seeds=[1, 2],
    )
    rows = {(row["dose"], row["denoiser"]): row for row in tables.segmentation(study)}
    assert set(rows) == set(itertools.product((1.0, 0.5, 0.1), ("none", "denoiser.pt", "tv")))
    for (_, name), row in rows.items():
        assert row["n_cases"] == (6 if name == "tv" else 10)
        assert row["dice"] == pytest.approx(2 / 3 if name == "none" else 1)
        assert row["dice_gain"] == pytest.approx(math.nan if name == "none" else 1 / 3, nan_ok=True)
    volumes = tables.volumes(study)
    check_whole({"segmentation": list(rows.values()), "volumes": volumes})
    assert {row["patient"] for row in volumes} <= {f"p{number:04d}" for number in range(1, 10, 2)}
    for (dose, name), row in rows.items():
        own = [one for one in volumes if (one["dose"], one["denoiser"]) == (dose, name)]
        assert len(own) == row["n_positive"]
        assert np.mean([one["error_ml"] for one in own]) == pytest.approx(row["volume_error_ml"])
        assert all(one["mean_ml"] == one["truth_ml"] + one["error_ml"] / 2 for one in own)


# ---------------------------------------------------------------- other test sets


def sets_of(strengths, classifiers, denoisers=(), **options):
    """name -> a study of other patients, whose scans are that easy."""
    found = {}
    for place, (name, strength) in enumerate(strengths.items()):
        pack = ToyPack([0, 1] * 30, patients=[f"{name}{number}" for number in range(60)])
        pack.key, pack.split_hash = name, SPLIT if place == 0 else name
        found[name] = toy_study(
            pack, noisy_truth(pack, strength), classifiers, denoisers, others=others(pack), **options
        )
    return found


def test_external_is_a_whole_matrix_with_the_drop_from_home_and_its_error():
    readers = [classifier("a"), classifier("b", split_hash="B"), classifier("c", split_hash="nowhere")]
    sets = sets_of({"A": 4.0, "B": 1.0, "C": 2.0}, readers)
    rows = {(row["classifier"], row["data"]): row for row in tables.external(sets)}
    assert set(rows) == set(itertools.product(("a.pt", "b.pt", "c.pt"), "ABC"))
    for (name, data), row in rows.items():
        study = sets[data]
        arm = next(arm for arm in study.arms if arm.classifier.path.name == name)
        scores = study.answer(arm, study.at("projection", 1.0)[0])["scan"]
        oracle = intervals.delong_auc(np.arange(60) % 2, scores)
        assert row["auc"] == pytest.approx(roc_auc_score(np.arange(60) % 2, scores))
        assert (row["auc_low"], row["auc_high"], row["n_scans"]) == (oracle.low, oracle.high, 60)
        home = {"a.pt": "A", "b.pt": "B", "c.pt": None}[name]
        assert row["home"] == home
        if home is None:
            assert math.isnan(row["drop"])
        elif home == data:
            assert (row["drop"], row["drop_low"], row["drop_high"]) == (0, 0, 0)
        else:
            assert row["drop"] == pytest.approx(rows[name, home]["auc"] - row["auc"])
            variances = [
                intervals.delong_auc(
                    np.arange(60) % 2,
                    sets[place].answer(
                        sets[place].arms[study.arms.index(arm)], sets[place].at("projection", 1.0)[0]
                    )["scan"],
                ).variance
                for place in (home, data)
            ]
            reach = norm.ppf(0.975) * math.sqrt(sum(variances))
            assert row["drop_high"] - row["drop"] == pytest.approx(reach)
    assert rows["a.pt", "B"]["drop_low"] > 0  # four times as hard


def test_external_of_classical_denoisers_is_of_their_patients():
    sets = sets_of({"A": 2.0, "B": 2.0}, ONE, [denoiser("nlm")])
    behind = [row for row in tables.external(sets) if row["denoiser"] == "nlm"]
    assert [row["n_scans"] for row in behind] == [6, 6]
    assert not any(math.isnan(row["drop"]) for row in behind)


# ---------------------------------------------------------------- where numbers do not exist


def usual(targets, slices=2, **pack):
    return ToyPack(targets, slices, **pack)


TYPES = ["normal", "ischemic", "hemorrhagic"]
CASES = {
    "one class only": (usual([0] * 8), ONE, {}),
    "nothing known": (usual([None] * 8), ONE, {}),
    "one scan": (usual([1]), ONE, {}),
    "one sick": (usual([1, 0, 0, 0]), ONE, {}),
    "no threshold": (usual([0, 1] * 5), [classifier(threshold=None)], {}),
    "one dose": (usual([0, 1] * 5), ONE, {"ladders": {"poisson": [20.0]}}),
    "two dose models": (
        usual([0, 1] * 5),
        ONE,
        {"ladders": {"poisson": [20.0, 1.0], "projection": [1.0, 0.1]}},
    ),
    "two scans each": (usual([0, 1] * 5, patients=[f"p{n // 2}" for n in range(10)]), ONE, {}),
    "two tasks": (usual([0, 1] * 5), [*ONE, classifier("s", task="stroke", assume_absent=["ischemia"])], {}),
    "two noises": (usual([0, 1] * 5), ONE, {"noise_seeds": [1, 2]}),
    "stress": (usual([0, 1] * 5), ONE, {"stress": {"rings": [0.5]}}),
}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("case", CASES)
def test_tables_are_whole_and_json_whatever_is_missing(case, tmp_path):
    pack, readers, options = CASES[case]
    study = toy_study(
        *(pack, noisy_truth(pack), readers, [denoiser(), denoiser("tv")]), others=others(pack), **options
    )
    found = tables.all_tables({"A": study, "B": study})
    assert set(found) == set(tables.NAMES)
    check_whole(found)
    assert bool(found["stress"]) == (case == "stress")
    for name, rows in found.items():
        if rows:
            write_table(tmp_path / f"{name}.csv", list(rows[0]), rows)
    assert len(found["experiments"]) == len(study.design.conditions()) * len(study.arms) * 2


def test_one_class_only_is_not_a_number_and_not_a_verdict():
    pack = ToyPack([0] * 8)
    study = toy_study(pack, noisy_truth(pack), ONE)
    for row in tables.dose_response(study):
        assert math.isnan(row["auc"]) and math.isnan(row["sens"]) and 0 <= row["spec"] <= 1
    for row in tables.verdicts(study):
        assert (row["how"], math.isnan(row["dose"])) == ("unknown", True)
    rows = [
        row for row in tables.against_reference(study) if row["kind"] == "auc" and not row["is_reference"]
    ]
    assert all(math.isnan(row["p_holm"]) and row["outcome"] == "unknown" for row in rows)


def test_task_of_several_classes_answers_its_question():
    pack = ToyPack([0, 1] * 10)
    reader = classifier(task="type", classes=TYPES)
    study = toy_study(pack, noisy_truth(pack), [reader])
    whole = study.cells.load

    def load(cell):
        """The same answers as three exclusive classes."""
        found = whole(cell)
        return (
            {
                name: [[1 - value, value / 4, value * 3 / 4] for (value,) in values]
                for name, values in found.items()
            }
            if cell.kind == "classifier"
            else found
        )

    plain = toy_study(pack, noisy_truth(pack), ONE)
    study.cells.load = load
    for own, other in zip(tables.dose_response(study), tables.dose_response(plain), strict=True):
        assert (own["auc"], own["sens"]) == pytest.approx((other["auc"], other["sens"]))
        assert own["task"] == "type"


def test_two_stages_outline_only_what_the_classifier_calls_ill():
    truth = np.zeros((10, 1, 4, 4), np.uint8)
    truth[1::2, :, :2] = 5
    pack = ToyPack([0, 1] * 5, mask=truth[:, 0])
    said = np.where(np.arange(10) % 2 == 1, 0.9, 0.1)
    said[1], said[2] = 0.1, 0.9  # a lesion missed, and one made up

    def outlined(_):
        masks = [
            np.where(mask.any(), mask, np.eye(4, dtype=np.uint8)) for mask in truth
        ]  # a voxel in normals
        return [
            stage.plain(lesions.case_report(one, mask, (5, 1, 1)))
            for one, mask in zip(truth, masks, strict=True)
        ]

    study = toy_study(
        pack,
        lambda _: said,
        [classifier()],
        [],
        [classifier("segmenter")],
        others=others(pack, masks=outlined),
    )
    rows = tables.two_stage(study)
    assert [row["dose"] for row in rows] == [1.0, 0.5, 0.1]
    for row in rows:
        assert (row["arm"], row["segmenter"], row["called"]) == ("1", "segmenter.pt", 0.5)
        assert (row["dice"], row["clean"], row["n_cases"]) == (0.8, 0.8, 10)
        alone = next(one for one in tables.segmentation(study) if one["dose"] == row["dose"])
        assert (alone["dice"], alone["clean"]) == (1, 0)
    check_whole({"two_stage": rows})
