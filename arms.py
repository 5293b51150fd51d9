"""The arms of a study: which classifier reads which images, and which of them differ by their seed alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import checkpoints
import stage
from denoised import load as load_any_denoiser
from inference import LEGEND, PIPELINES, Network, fits_denoiser, load_classifier, load_segmenter
from models import CLASSICAL

NONE = "none"  # among denoisers: the low dose as it is
SEED = re.compile(r"\.seed(\d+)(?=\.|$)")  # what --seeds appends to a name


def family_name(path: Path) -> str:
    """What checkpoints are called that differ by their seed alone, e.g. classifier of classifier.seed1.pt."""
    return SEED.sub("", path.name.removesuffix(".pt"))


def is_classical(denoiser: Network) -> bool:
    return str(denoiser.path) in CLASSICAL


class Arm(NamedTuple):
    """A pipeline: its name in LEGEND, the classifier, and the denoiser before it or None."""

    name: str
    classifier: Network
    denoiser: Network | None

    @property
    def task(self) -> str:
        return self.classifier.facts["task"]

    @property
    def family(self) -> Family:
        before = None if self.denoiser is None else family_name(self.denoiser.path)
        return Family(self.task, self.name, before, family_name(self.classifier.path))


class Family(NamedTuple):
    """Arms that differ by their training seeds alone."""

    task: str
    name: str
    denoiser: str | None
    classifier: str


def labels(families: Sequence[Family]) -> dict[Family, str]:
    """A label for each that tells it apart: the pipeline, and what else is needed."""
    found = {}
    for family in families:
        alike = [other for other in families if other.name == family.name]
        parts = [family.name]
        for key in ("task", "denoiser", "classifier"):
            if len({getattr(other, key) for other in alike}) > 1:
                parts.append(str(getattr(family, key)))
        found[family] = " ".join(parts)
    return found


# ---------------------------------------------------------------- what there is


class Networks(NamedTuple):
    """What a study has to work with. direct: whether low dose is read as it is, too."""

    direct: bool
    denoisers: list[Network]
    classifiers: list[Network]
    segmenters: list[Network]

    @property
    def trained(self) -> list[Network]:
        """Those that come from a checkpoint."""
        own = [denoiser for denoiser in self.denoisers if not is_classical(denoiser)]
        return [*own, *self.classifiers, *self.segmenters]


def load_networks(
    models: Path,
    device,
    denoisers: Sequence[str] | None = None,
    classifiers: Sequence[Path] | None = None,
    segmenters: Sequence[Path] | None = None,
) -> Networks:
    """The named ones; None: whatever lies in models. denoisers: checkpoints, NONE, or names of CLASSICAL.

    Raises InputError if one that was named is missing, if two have one name, by which tables and families
    know them, or if there is nothing at all."""
    if denoisers is None:
        denoisers = [NONE, *map(str, checkpoints.finished(models, "denoiser"))]
    if classifiers is None:
        classifiers = checkpoints.finished(models, "classifier")
    if segmenters is None:
        segmenters = checkpoints.finished(models, "segmenter")
    found = Networks(
        NONE in denoisers,
        [load_any_denoiser(which, device) for which in dict.fromkeys(denoisers) if which != NONE],
        [Network(path, *load_classifier(path, device)) for path in dict.fromkeys(map(Path, classifiers))],
        [Network(path, *load_segmenter(path, device)) for path in dict.fromkeys(map(Path, segmenters))],
    )
    if not (found.denoisers or found.classifiers or found.segmenters):
        raise stage.InputError(f"{models}: no denoiser.pt and no classifier.pt (run train_denoiser.py first)")
    known: dict[str, Path] = {}
    for network in found.trained:
        other = known.setdefault(network.path.name, network.path)
        if other != network.path:
            raise stage.InputError(f"{network.path}: has the name of {other} (rename one of them)")
    return found


def plan_arms(networks: Networks) -> tuple[list[Arm], list[str]]:
    """(what can be run, in the order of LEGEND; what is left out and why).

    Arms behind classical denoisers, which see a part of the patients, are last: the first one, to which the
    others are compared, sees all."""
    arms, left_out = [], []
    for classifier in networks.classifiers:
        direct, through = PIPELINES[classifier.facts["input"]]
        if direct and networks.direct:
            arms.append(Arm(direct, classifier, None))
        if not through:
            continue
        what = f"pipeline {through} of {classifier.path.name}"
        fitting = [denoiser for denoiser in networks.denoisers if _may_follow(classifier, denoiser)]
        if not networks.denoisers:
            left_out.append(f"{what}: no denoiser (run train_denoiser.py)")
        elif not fitting:
            known = ", ".join(str(denoiser.path) for denoiser in networks.denoisers)
            left_out.append(
                f"{what}: trained on the output of another denoiser than {known} "
                "(run train_classifier.py --input denoised again)"
            )
        arms += [Arm(through, classifier, denoiser) for denoiser in _of_its_seed(classifier, fitting)]
    for kind, names in PIPELINES.items():
        if not any(classifier.facts["input"] == kind for classifier in networks.classifiers):
            missing = " and ".join(name for name in names if name)
            left_out.append(
                f"pipeline {missing}: no classifier trained on {kind} slices "
                f"(run train_classifier.py --input {kind})"
            )
    classical = [denoiser for denoiser in networks.denoisers if is_classical(denoiser)]
    arms.sort(key=lambda arm: (arm.denoiser in classical, list(LEGEND).index(arm.name)))
    return arms, left_out


class Outline(NamedTuple):
    """A segmenter, and the denoiser before it or None."""

    segmenter: Network
    denoiser: Network | None


def plan_outlines(networks: Networks) -> list[Outline]:
    """Every segmenter on the low dose as it is, unless it was trained behind a denoiser, and behind each."""
    found = []
    for segmenter in networks.segmenters:
        if networks.direct and segmenter.facts["input"] != "denoised":
            found.append(Outline(segmenter, None))
        fitting = [denoiser for denoiser in networks.denoisers if _may_follow(segmenter, denoiser)]
        found += [Outline(segmenter, denoiser) for denoiser in _of_its_seed(segmenter, fitting)]
    return found


def _may_follow(reader: Network, denoiser: Network) -> bool:
    if is_classical(denoiser):
        return "denoiser" not in reader.facts["parents"]
    return fits_denoiser(reader.facts, denoiser.path)


def _of_its_seed(reader: Network, denoisers: list[Network]) -> list[Network]:
    """Of denoisers trained with several seeds that of the reader's seed, if there is one."""
    own = SEED.search(reader.path.name)
    if own is None:
        return denoisers
    partners = {
        family_name(denoiser.path)
        for denoiser in denoisers
        if (found := SEED.search(denoiser.path.name)) and found[1] == own[1]
    }

    def chosen(denoiser: Network) -> bool:
        found = SEED.search(denoiser.path.name)
        return family_name(denoiser.path) not in partners or (found is not None and found[1] == own[1])

    return [denoiser for denoiser in denoisers if chosen(denoiser)]


def agree(networks: Sequence[Network], key: str):
    """The value of key that all checkpoints share. Raises InputError naming two that differ."""
    first = networks[0]
    for other in networks[1:]:
        if other.facts[key] != first.facts[key]:
            raise stage.InputError(
                f"{other.path}: {key} {other.facts[key]}, but {first.path} has {first.facts[key]} "
                "(name those that belong together with --denoisers, --classifiers and --segmenters)"
            )
    return first.facts[key]
