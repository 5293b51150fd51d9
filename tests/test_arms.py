"""Which networks make which arms, and which of them differ by their seed alone."""

import shutil

import pytest
import torch

import arms
import checkpoints
import stage
from arms import Family, Networks, agree, family_name, labels, load_networks, plan_arms, plan_outlines
from inference import LEGEND, Network
from tests.toy_models import bright, write_models  # noqa: F401 a fixture
from tests.toy_study import classifier, denoiser

CPU = torch.device("cpu")


def networks(denoisers=(), classifiers=(), segmenters=(), direct=True):
    return Networks(direct, list(denoisers), list(classifiers), list(segmenters))


def named(found):
    return [(arm.name, arm.classifier.path.stem, arm.denoiser and arm.denoiser.path.stem) for arm in found]


@pytest.fixture
def models(tmp_path, bright):  # noqa: F811
    return write_models(tmp_path)


def behind(parent, name="classifier", **facts):
    """A classifier that was trained on the output of a denoiser's file."""
    return classifier(
        name, input="denoised", parents={"denoiser": {"sha256": checkpoints.file_sha256(parent)}}, **facts
    )


@pytest.fixture
def files(tmp_path):
    """files(name, ...) -> denoisers whose files differ."""

    def make(*names):
        made = []
        for name in names:
            path = tmp_path / f"{name}.pt"
            path.write_text(name)
            made.append(Network(path, None, denoiser().facts))
        return made

    return make


# ---------------------------------------------------------------- families


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("classifier.seed1.pt", "classifier"),
        ("classifier.dose5.seed12.pt", "classifier.dose5"),
        ("classifier.seed1.noisy.pt", "classifier.noisy"),
        ("classifier.seedling.pt", "classifier.seedling"),
        ("classifier_seed1.pt", "classifier_seed1"),
        ("bm3d", "bm3d"),
    ],
)
def test_family_is_the_name_without_the_seed(tmp_path, name, family):
    assert family_name(tmp_path / name) == family


def test_networks_of_other_seeds_are_one_family_and_others_are_their_own():
    many = [classifier(f"classifier.seed{n}", seed=n) for n in (1, 2, 3)]
    found, _ = plan_arms(networks([denoiser()], [*many, classifier("classifier.noisy", input="noisy")]))
    assert [arm.family for arm in found] == [
        *[Family("hemorrhage", "1", None, "classifier")] * 3,
        Family("hemorrhage", "1n", None, "classifier.noisy"),
        *[Family("hemorrhage", "2", "denoiser", "classifier")] * 3,
    ]


def test_labels_tell_apart_with_no_more_than_is_needed():
    one, two = Family("stroke", "1", None, "a"), Family("type", "1", None, "a")
    three = Family("type", "2", "d", "b")
    assert labels([one, two, three]) == {one: "1 stroke", two: "1 type", three: "2"}
    four = Family("type", "2", "bm3d", "b")
    assert labels([three, four]) == {three: "2 d", four: "2 bm3d"}


# ---------------------------------------------------------------- arms


def test_arms_are_in_the_order_of_the_legend_and_classical_ones_last(files):
    (own,) = files("denoiser")
    readers = [
        classifier("c.joint", input="joint"),
        behind(own.path, "c.denoised"),
        classifier("c.noisy", input="noisy"),
        classifier("c"),
    ]
    found, left_out = plan_arms(networks([denoiser("tv"), own], readers))
    assert named(found) == [
        ("1", "c", None),
        ("1n", "c.noisy", None),
        ("2", "c", "denoiser"),
        ("2d", "c.denoised", "denoiser"),
        ("2j", "c.joint", None),
        ("2", "c", "tv"),
    ]
    assert left_out == []
    assert [arm.name for arm in found[:5]] == list(LEGEND)


def test_arms_without_the_low_dose_itself_are_those_behind_denoisers():
    readers = [classifier("c"), classifier("c.noisy", input="noisy"), classifier("c.joint", input="joint")]
    found, _ = plan_arms(networks([denoiser()], readers, direct=False))
    assert named(found) == [("2", "c", "denoiser")]


def test_what_is_missing_is_left_out_and_said_with_the_command(files):
    own, other = files("denoiser", "other")
    found, left_out = plan_arms(networks([other], [behind(own.path)]))
    assert found == []
    assert "pipeline 2d of classifier.pt: trained on the output of another denoiser" in left_out[0]
    assert all("(run train_classifier.py --input " in reason for reason in left_out)
    _, left_out = plan_arms(networks([], [classifier()]))
    assert left_out[0] == "pipeline 2 of classifier.pt: no denoiser (run train_denoiser.py)"


def test_denoiser_of_several_seeds_is_paired_with_the_classifier_of_its_seed(files):
    denoisers = files("denoiser.seed1", "denoiser.seed2", "other")
    readers = [classifier(f"c.seed{n}", seed=n) for n in (1, 2)]
    found, _ = plan_arms(networks(denoisers, readers))
    assert named(found)[2:] == [
        ("2", "c.seed1", "denoiser.seed1"),
        ("2", "c.seed1", "other"),
        ("2", "c.seed2", "denoiser.seed2"),
        ("2", "c.seed2", "other"),
    ]
    # without a seed of its own, or without a partner, a reader is tried behind all
    for reader in (classifier("c"), classifier("c.seed3", seed=3)):
        found, _ = plan_arms(networks(denoisers, [reader]))
        assert len(found) == 4


def test_classifier_behind_a_denoiser_follows_its_own_whatever_the_seed(files):
    denoisers = files("denoiser.seed1", "denoiser.seed2")
    found, _ = plan_arms(networks(denoisers, [behind(denoisers[1].path, "c.seed1"), classifier("d.seed1")]))
    assert named(found) == [
        ("1", "d.seed1", None),
        ("2", "d.seed1", "denoiser.seed1"),
        ("2d", "c.seed1", "denoiser.seed2"),
    ]
    found, left_out = plan_arms(networks([denoiser("nlm")], [behind(denoisers[0].path)]))
    assert found == [] and "another denoiser than nlm" in left_out[0]


def test_outlines_are_on_the_low_dose_and_behind_denoisers_that_fit(files):
    own, other = files("denoiser", "other")
    plain, after = classifier("segmenter"), behind(own.path, "segmenter.denoised")
    found = plan_outlines(networks([own, other], segmenters=[plain, after]))
    assert [(one.segmenter.path.stem, one.denoiser and one.denoiser.path.stem) for one in found] == [
        ("segmenter", None),
        ("segmenter", "denoiser"),
        ("segmenter", "other"),
        ("segmenter.denoised", "denoiser"),
    ]
    assert all(one.denoiser for one in plan_outlines(networks([own], segmenters=[plain], direct=False)))


# ---------------------------------------------------------------- what there is


def test_networks_are_all_that_lie_there_unless_named(models):
    for name in ("classifier.last", "classifier.epoch3", "classifier.cnn"):
        shutil.copy(models / "classifier.pt", models / f"{name}.pt")  # of a run, not its result
    shutil.copy(models / "classifier.pt", models / "classifier.noisy.pt")
    found = load_networks(models, CPU)
    assert found.direct
    assert [network.path.name for network in found.trained] == [
        *("denoiser.pt", "classifier.noisy.pt", "classifier.pt", "segmenter.pt"),
    ]
    some = load_networks(models, CPU, ["bm3d", "tv"], [models / "classifier.pt"], [])
    assert not some.direct
    assert [str(one.path) for one in some.denoisers] == ["bm3d", "tv"]
    assert [network.path.name for network in some.trained] == ["classifier.pt"]


def test_network_named_twice_is_loaded_once(models):
    path = models / "classifier.pt"
    found = load_networks(models, CPU, ["none", "none", "nlm", "nlm"], [path, path], [])
    assert (len(found.denoisers), len(found.classifiers)) == (1, 1)


def test_networks_of_one_name_in_two_folders_are_refused(models):
    (models / "b").mkdir()
    other = shutil.copy(models / "classifier.pt", models / "b")
    with pytest.raises(stage.InputError, match=r"b/classifier\.pt: has the name of .*rename"):
        load_networks(models, CPU, None, [models / "classifier.pt", other])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"denoisers": ["bm4d"]}, "bm4d: no such checkpoint"),
        ({"denoisers": ["{}/classifier.pt"]}, "is a classifier; a denoiser is needed"),
        ({"classifiers": ["{}/nothing.pt"]}, "nothing.pt: no such checkpoint"),
        ({"segmenters": ["{}/denoiser.pt"]}, "is a denoiser; a segmenter is needed"),
        ({"denoisers": ["none"], "classifiers": [], "segmenters": []}, "no denoiser.pt and no classifier.pt"),
    ],
)
def test_network_that_is_named_and_not_there_is_refused(models, options, words):
    options = {kind: [name.format(models) for name in names] for kind, names in options.items()}
    with pytest.raises(stage.InputError, match=words):
        load_networks(models, CPU, **options)


def test_agree_is_the_shared_value_or_names_two_that_differ():
    one, two = classifier("one", size=4), classifier("two", size=8)
    assert agree([one, one], "size") == 4
    with pytest.raises(stage.InputError, match=r"two\.pt: size 8, but one\.pt has 4"):
        agree([one, two], "size")


def test_classical_is_known_by_its_name_alone():
    assert arms.is_classical(denoiser("bm3d")) and not arms.is_classical(denoiser())
