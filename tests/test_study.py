"""A study from what its networks said: its grid, its families, the rows that are compared."""

import math

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binom, norm

import cells
import comparisons
import study as module
import tables
from arms import Family
from cells import Condition
from dataset import task_targets
from study import Shown
from tests.toy_study import CUT, ToyPack, classifier, denoiser, toy_design, toy_study

ONE = [classifier()]
SPREAD = math.sqrt(0.6**2 + 0.15**2)  # of simulated scores of a class: patient, reading
SHIFT = 1.05  # of positives, AUC 0.885
AUC = norm.cdf(SHIFT / (math.sqrt(2) * SPREAD))


def shift_for(loss):
    """By how much positives must score lower to lose that much AUC."""
    return SHIFT - math.sqrt(2) * SPREAD * norm.ppf(AUC - loss)


def simulated(seed, patients, losses=None):
    """tell() for patients of one scan, half of them sick. losses: (arm's classifier, dose) -> lost AUC.

    A reading shares the patients, and has noise of its own for each network, dose and denoiser."""
    rng = np.random.default_rng(seed)
    sick = np.arange(patients) % 2
    shared = rng.normal(0, 0.6, patients) + SHIFT * sick
    said = {}

    def tell(cell):
        name, dose = cell.reader.path.stem, cell.condition.dose
        key = (name, cell.denoiser, cell.condition)
        if key not in said:
            lower = shift_for((losses or {}).get((name.split(".seed")[0], dose), 0.0))
            said[key] = expit(shared + rng.normal(0, 0.15, patients) - lower * sick - SHIFT / 2)
        return said[key]

    return tell


def targets_of(patients):
    return [int(number % 2) for number in range(patients)]


def two_arms(seed, patients, losses=None, **options):
    readers = [classifier("a"), classifier("b", input="noisy")]
    return toy_study(ToyPack(targets_of(patients)), simulated(seed, patients, losses), readers, **options)


@pytest.fixture
def scans_only(monkeypatch):
    """Tables of scans alone: slices take the bootstrap, hundreds of times."""
    monkeypatch.setattr(tables, "LEVELS", ("scan",))


# ---------------------------------------------------------------- planted effects are found, and no others

STUDIES = 300


def allowed(share):
    """How many of STUDIES may do what a share of all does, in all but one of a thousand test runs."""
    return binom.ppf(0.999, STUDIES, share)


def test_family_of_tests_without_an_effect_errs_in_five_percent_of_studies(scans_only):
    wrong = dict.fromkeys((table, kind) for table in ("reference", "arms") for kind in comparisons.KINDS)
    wrong = dict.fromkeys(wrong, 0)
    for seed in range(STUDIES):
        study = two_arms(seed, 120)
        for table, make in (("reference", tables.against_reference), ("arms", tables.between_arms)):
            rows = make(study)
            for kind in comparisons.KINDS:
                own = [row["p_holm"] for row in rows if row["kind"] == kind]
                wrong[table, kind] += min(own) <= 0.05
    assert max(wrong.values()) <= allowed(0.05), wrong
    assert sum(wrong.values()) > 0  # it is a test


def test_drop_of_one_arm_at_one_dose_is_found_and_blamed_on_nobody_else(scans_only):
    found = {}
    for seed in range(20):
        study = two_arms(seed, 400, {("b", 0.1): 0.05})
        for table, make in (("reference", tables.against_reference), ("arms", tables.between_arms)):
            for row in make(study):
                if row["kind"] == "auc" and not row.get("is_reference"):
                    key = table, row["classifier"], row["dose"]
                    found.setdefault(key, []).append((row["p_holm"] <= 0.05, row["estimate"]))
    planted = {("reference", "b", 0.1), ("arms", "b", 0.1)}
    for key, values in found.items():
        times, estimate = sum(is_found for is_found, _ in values), np.mean([value for _, value in values])
        assert times >= 18 if key in planted else times <= 4, (key, times)
        assert estimate == pytest.approx(-0.05 if key in planted else 0, abs=0.01)
    assert planted < set(found) and len(found) == 5 + 3


def test_verdict_is_the_lowest_dose_above_a_loss_and_claims_no_more(scans_only):
    """Power to claim 0.5, and no claim of 0.1, whose loss is that of the margin itself or more."""
    deepest, false, highest = [], 0, 0
    for seed in range(40):
        study = two_arms(seed, 500, {("a", 0.1): 0.02, ("b", 0.1): 0.06, ("b", 0.5): 0.06})
        rows = [row for row in tables.verdicts(study) if (row["kind"], row["stratum"]) == ("auc", "all")]
        a, b = (next(row for row in rows if row["classifier"] == name) for name in "ab")
        deepest.append(a["dose"])
        false += a["dose"] == 0.1
        assert b["dose"] not in (0.5, 0.1)  # three times the margin
        highest += b["dose"] == 1 and (b["failed_dose"], b["how"]) == (0.5, "inferior")
    assert sum(dose == 0.5 for dose in deepest) >= 30 and highest >= 25
    assert false <= binom.ppf(0.999, 40, 0.025)


def test_planted_drop_is_found_in_slices_by_the_bootstrap(monkeypatch):
    monkeypatch.setattr(module.comparisons, "read", _few(comparisons.read))
    pack = ToyPack([n % 2 for n in range(120)], slices=3)
    sick = np.repeat(np.arange(120) % 2, 3)
    rng = np.random.default_rng(3)
    shared = rng.normal(SHIFT * sick, 0.6)

    def tell(cell):
        lower = shift_for(0.08) if cell.condition.dose == 0.1 else 0
        return expit(shared - lower * sick + rng.normal(0, 0.1, len(shared)))

    study = toy_study(pack, tell, ONE)
    rows = [row for row in tables.against_reference(study) if row["kind"] == "auc"]
    slices = {row["dose"]: row for row in rows if row["level"] == "slice"}
    assert slices[0.1]["method"] == "patient bootstrap"
    assert slices[0.1]["p_holm"] < 0.01 and slices[0.1]["outcome"] == "inferior"
    assert slices[0.5]["p_holm"] > 0.05


def _few(read):
    return lambda *values: read(*values, replicates=200)


# ---------------------------------------------------------------- the grid


def quiet(cell):
    raise AssertionError("nobody is asked")


@pytest.fixture
def no_files(monkeypatch):
    """Networks are told apart by their names, as they have no files."""
    monkeypatch.setattr(cells.checkpoints, "file_sha256", str)


def kinds(cells):
    found = {}
    for cell in cells:
        found[cell.kind] = found.get(cell.kind, 0) + 1
    return found


def test_grid_has_one_cell_for_each_condition_denoiser_and_reader(no_files):
    readers = [classifier("a"), classifier("b", input="noisy")]
    study = toy_study(
        *(ToyPack([0, 1] * 5), quiet, readers, [denoiser(), denoiser("nlm")]),
        ladders={"projection": [1.0, 0.5], "calibrated": [40.0]},
        noise_seeds=[1, 2],
    )
    grid = study.grid()
    assert len({study.cells.path(cell) for cell in grid}) == len(grid)
    # 3 doses, 2 noises; images: low dose, denoiser, nlm and the low dose of its patients; a alone is behind
    assert kinds(grid) == {"quality": 6 * 4, "observer": 6 * 4, "classifier": 6 * (2 + 1 + 1)}
    assert {cell.patients for cell in grid if cell.denoiser is study.networks.denoisers[1]} == {6}
    assert kinds(study.external_grid()) == {"classifier": 4}


def test_one_more_arm_costs_its_own_cells_alone(no_files):
    pack, own = ToyPack([0, 1] * 5), classifier("a")
    few = toy_study(pack, quiet, [own])
    many = toy_study(pack, quiet, [own, classifier("b")])
    before, after = ({study.cells.path(cell) for cell in study.grid()} for study in (few, many))
    assert before < after
    assert len(after) - len(before) == 3


def test_stress_asks_classifiers_at_the_highest_dose_and_not_behind_classical_denoisers():
    study = toy_study(
        *(ToyPack([0, 1] * 5), quiet, ONE, [denoiser(), denoiser("tv")]),
        noise_seeds=[1, 2],
        stress={"rings": [0.5, 1.0]},
    )
    plain = toy_study(ToyPack([0, 1] * 5), quiet, ONE, study.networks.denoisers, noise_seeds=[1, 2])
    more = [cell for cell in study.grid() if cell.condition.artifact]
    assert len(study.grid()) - len(plain.grid()) == len(more) == 2 * 2 * 2
    assert {(cell.kind, cell.condition.dose) for cell in more} == {("classifier", 1.0)}


def test_design_is_json_and_knows_its_reference():
    design = toy_design(ladders={"calibrated": [40.0, 5.0], "poisson": [20.0]}, noise_seeds=[3, 4])
    assert (design.main_model, design.reference("poisson")) == ("calibrated", 20.0)
    assert design.facts()["ladders"] == {"calibrated": [40.0, 5.0], "poisson": [20.0]}
    assert len(design.conditions()) == 3 * 2


# ---------------------------------------------------------------- readings


def test_reading_has_a_row_for_each_network_and_noise_with_its_own_threshold():
    pack = ToyPack([0, 1, None, 1, 0, 1])
    readers = [classifier(f"c.seed{seed}", seed=seed, threshold=cut) for seed, cut in ((2, 0.3), (1, None))]

    def tell(cell):
        return np.full(6, 0.1 * cell.reader.facts["seed"] + 0.01 * cell.condition.noise_seed)

    study = toy_study(pack, tell, readers, noise_seeds=[5, 6])
    (family,) = study.families
    assert study.seeds(family) == (1, 2)
    reading = study.family_reading(family, study.at("projection", 1.0), "scan")
    np.testing.assert_allclose(reading.scores[:, 0], [0.15, 0.16, 0.25, 0.26])
    np.testing.assert_array_equal(reading.thresholds, [math.nan, math.nan, 0.3, 0.3])
    np.testing.assert_array_equal(reading.targets, [0, 1, math.nan, 1, 0, 1])
    assert reading is study.family_reading(family, study.at("projection", 1.0), "scan")


def test_pair_of_families_is_of_the_seeds_that_both_have():
    readers = [classifier(f"a.seed{seed}", seed=seed) for seed in (1, 2, 3)]
    readers += [classifier(f"b.seed{seed}", seed=seed, input="noisy") for seed in (2, 3, 4)]
    study = toy_study(ToyPack([0, 1]), lambda cell: np.full(2, cell.reader.facts["seed"] / 10), readers)
    pairs = [Shown(family, study.at("projection", 1.0)) for family in study.families]
    a, b = study.pair(*pairs, "slice")
    np.testing.assert_allclose(a.scores[:, 0], [0.2, 0.3])
    np.testing.assert_allclose(b.scores[:, 0], [0.2, 0.3])


@pytest.mark.parametrize("noises", [[1], [1, 2]])
@pytest.mark.parametrize(
    ("a", "b", "rows"),
    [
        ([1], [2], [(1, 2)]),
        ([1], [2, 3, 4], [(1, 2), (1, 3), (1, 4)]),
        ([1, 2], [3, 4], [(1, 3), (2, 4)]),
        ([1, 2], [3, 4, 5], [(1, 3), (1, 4), (1, 5), (2, 3), (2, 4), (2, 5)]),
        ([1, 7], [7, 8], [(7, 7)]),
    ],
)
def test_pair_without_common_seeds_is_in_order_or_each_with_each(a, b, rows, noises):
    readers = [classifier(f"a.seed{seed}", seed=seed) for seed in a]
    readers += [classifier(f"b.seed{seed}", seed=seed, input="noisy") for seed in b]

    def tell(cell):
        return np.full(2, cell.reader.facts["seed"] / 10)

    study = toy_study(ToyPack([0, 1]), tell, readers, noise_seeds=noises)
    shown = [Shown(family, study.at("projection", 1.0)) for family in study.families]
    pair = study.pair(*shown, "scan")
    found = np.rint(10 * np.stack([one.scores[:, 0] for one in pair], axis=1)).astype(int)
    assert [tuple(row) for row in found.tolist()] == [row for row in rows for _ in noises]
    study.compare(*shown, "scan")  # as many rows on both sides


def test_pair_with_denoisers_of_several_seeds_holds_each_classifier_against_itself():
    readers = [classifier(f"c.seed{seed}", seed=seed) for seed in (1, 2, 3)]
    denoisers = [denoiser(f"denoiser.seed{seed}") for seed in (1, 2)]
    seeds = {None: 0, denoisers[0]: 1, denoisers[1]: 2}

    def tell(cell):
        return np.full(2, cell.reader.facts["seed"] / 10 + seeds[cell.denoiser] / 100)

    study = toy_study(ToyPack([0, 1]), tell, readers, denoisers)
    direct, behind = (Shown(family, study.at("projection", 1.0)) for family in study.families)
    a, b = study.pair(direct, behind, "scan")
    np.testing.assert_allclose(a.scores[:, 0], [0.1, 0.2, 0.3, 0.3])
    np.testing.assert_allclose(b.scores[:, 0], [0.11, 0.22, 0.31, 0.32])
    lower = behind._replace(conditions=study.at("projection", 0.1))
    same = study.pair(behind, lower, "scan")
    np.testing.assert_array_equal(*(one.scores for one in same))
    assert study.compare(behind, behind, "scan").auc.p == 1


def test_subset_is_compared_on_its_own_patients_with_the_same_of_the_low_dose():
    pack = ToyPack([0, 1] * 10, slices=2)
    asked = []

    def tell(cell):
        asked.append(cell)
        return np.linspace(0, 1, 40)

    study = toy_study(pack, tell, ONE, [denoiser("bm3d")], classical_patients=6)
    low, classical = study.families
    assert (low.denoiser, classical.denoiser) == (None, "bm3d")
    assert study.reference("hemorrhage", "projection").family == low
    shown = Shown(classical, study.at("projection", 0.5))
    for level, slices in (("scan", 1), ("slice", 2)):
        a, b = study.pair(shown, study.reference("hemorrhage", "projection"), level)
        np.testing.assert_array_equal(a.targets, b.targets)
        assert len(a.known[0]) == 6 * slices
        assert len(study.family_reading(low, shown.conditions, level).known[0]) == 20 * slices
        np.testing.assert_array_equal(a.known[1], b.known[1])  # the same scores of the same rows
    assert {cell.patients for cell in asked if cell.denoiser} == {6}
    again = toy_study(pack, tell, ONE, [denoiser("bm3d")], classical_patients=6, seed=2)
    assert not np.array_equal(study.cells.rows(6), again.cells.rows(6))


def test_reference_is_an_arm_on_all_patients_even_behind_denoisers_only():
    study = toy_study(ToyPack([0, 1] * 10), quiet, ONE, [denoiser("bm3d"), denoiser("denoiser.own")])
    direct = [arm for arm in study.arms if arm.denoiser]
    assert direct[0].denoiser.path.stem == "denoiser.own"


def test_scan_null_and_targets_are_those_of_the_patients_asked():
    study = toy_study(ToyPack([0, 1] * 10), quiet, ONE, [denoiser("tv")])
    low, classical = study.families
    assert study.null_auc(low, "slice") == pytest.approx(0.55)  # of 100 pairs 55 have the sick scan higher
    rows = study.cells.rows(6)
    own = study.family_targets(classical, "scan")
    assert np.flatnonzero(~np.isnan(own)).tolist() == rows.tolist()
    assert study.null_auc(classical, "scan") != study.null_auc(low, "scan")


def test_tasks_have_their_own_reference_and_answers():
    pack = ToyPack([0, 1, 1, 0])
    readers = [classifier("a"), classifier("b", task="type", classes=["normal", "ischemic", "hemorrhagic"])]
    study = toy_study(pack, quiet, readers)
    assert [study.reference(task, "projection").family.task for task in ("hemorrhage", "type")] == [
        *("hemorrhage", "type")
    ]
    found = [study.family_targets(family, "scan") for family in study.families]
    np.testing.assert_array_equal(found[0], found[1])
    labels = [metadata["labels"] for metadata in pack.series]
    np.testing.assert_array_equal(found[0], task_targets("hemorrhage", labels)[:, 0])


def test_lesions_of_a_size_are_those_whose_mask_has_it():
    mask = np.zeros((6, 30, 30), np.uint8)
    mask[0, :10, :10] = 5  # 100 pixels of 1 mm x 1 mm x 5 mm: half a millilitre
    mask[3, :, :] = 5  # 4.5 ml
    study = toy_study(ToyPack([1, 0, 1], slices=2, kinds=("subdural", "epidural")), quiet, ONE)
    study.pack.mask = mask
    found = study.strata
    assert {name: np.flatnonzero(own).tolist() for name, own in found.items()} == {
        **{"subdural": [0, 2], "under_1_ml": [0], "1_to_5_ml": [1]},
    }


def test_subject_says_what_a_row_is_about():
    study = toy_study(ToyPack([0, 1]), quiet, ONE)
    (family,) = study.families
    assert family == Family("hemorrhage", "1", None, "classifier")
    about = study.subject(family, "scan", "calibrated", 10.0)
    assert (about["arm"], about["denoiser"], about["dose_fraction"]) == ("1", None, 0.25)
    assert study.subject(family, "scan", "poisson", 10.0)["dose_fraction"] is None
    assert Condition("projection", 0.1, 3, "rings", 0.25).title == "projection 0.1, noise seed 3, rings 0.25"
    assert module.threshold(study.arms[0].classifier, "slice") == CUT
