"""What a study says of itself in words: its methods, and what guidelines for papers ask of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import intervals
from figures import NAMES, dose_words
from study import PRIMARY_LEVEL, Study

BLANK = "to be filled in by the authors"
DOSE_WORDS = {  # by the beginning of a dose model's name
    "projection": "the noise that a lower tube current would add was simulated in the sinogram, "
    "quantum and electronic, reconstructed and added to the image (after Yu et al. 2012)",
    "reprojection": "the image was projected, its photons were thinned, and it was reconstructed anew",
    "calibrated": "Poisson noise, slice by slice, on a scale at which lambda 40 is a routine head scan",
    "poisson": "Poisson noise on intensities 0 to 1 of the brain window, without a routine dose",
    "measured": "real low-dose images of the same scans",
}
STATISTICS = (
    "Every arm reads the same patients with the same noise. Arms that differ by training seeds alone are "
    "one arm, whose numbers are means over its networks. 95 % intervals and p are for patients drawn anew, "
    "the networks being fixed; the SD over training seeds stands beside them. Where each scan is a patient "
    "of its own: AUC by DeLong's variance (DeLong 1988; Sun and Xu 2014), rates by Clopper and Pearson "
    "(1934), differences of rates by Tango's score interval (1998) with a design effect for clustered "
    "calls (Rao and Scott 1992). Else: bootstrap over patients with {replicates} replicates (Efron and "
    "Tibshirani 1993). Tests of a task, dose model, level and kind of number are one family, adjusted "
    "after Holm (1979). Calls that flip: exact test of McNemar (1947). Non-inferiority: the lower end of "
    "the 95 % interval of the difference to the reference (the first arm at the highest dose) lies above "
    "minus the margin, a one-sided test at 2.5 %, dose after dose from the highest down until one fails, "
    "which needs no correction for the number of doses (Maurer et al. 1995; ICH E9). It holds for one arm "
    "and one number; several are several claims, and the best of several arms is picked after the fact. "
    "Thresholds are those of the checkpoints, chosen on validation, and the same at every dose. ECE after "
    "Guo et al. 2017, Brier score after Brier 1950, d' by a channelised Hotelling observer with "
    "difference-of-Gaussian channels (Abbey and Barrett 2001; Barrett and Myers 2004), noise power spectra "
    "after Siewerdsen et al. 2002, SSIM after Wang et al. 2004, Grad-CAM after Selvaraju et al. 2017."
)
PHANTOM = (
    "These data are computer-drawn phantoms. Their lesions, anatomy and noise are simpler than those of "
    "people, and the networks have learnt the phantom as much as the lesion. What is found here about "
    "doses, denoisers and classifiers is found about phantoms; it says nothing of patients and is no "
    "ground for lowering a dose."
)
NOTICE = "Research use only. Not a medical device; not for diagnosis, and not for setting the dose of a scan."


def listed(values: Iterable[Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def sources(study: Study) -> list[str]:
    """Where the scans come from, as prepare_dataset.py calls it."""
    return sorted({series["source"] for series in study.pack.series})


def counts(manifest: dict) -> str:
    return ", ".join(f"{manifest[f'n_{what}']} {what}" for what in ("patients", "scans", "slices"))


def paragraphs(study: Study, manifest: dict) -> dict[str, str]:
    """Heading -> text, empty where there is nothing to say. manifest: of run_experiments.py."""
    design, pack = study.design, study.pack
    doses = "; ".join(
        f"{model}: " + ", ".join(dose_words(model, dose) for dose in doses)
        for model, doses in design.ladders.items()
    )
    models = "; ".join(
        f"{model}: {next(words for start, words in DOSE_WORDS.items() if model.startswith(start))}"
        for model in design.ladders
    )
    truth = "the noise-free truth" if pack.truth is not None else "the image at its own dose"
    return {
        "Data": f"Test split of {manifest['data']}: {counts(manifest)}, "
        f"{pack.size} x {pack.size} pixels; source "
        f"{listed(sources(study))}; split by patient, hash {manifest['split_hash']}. No test patient was "
        "seen in training, which is checked for every network. Lesion masks: "
        f"{'known' if pack.mask is not None else 'not known of all scans'}.",
        "Dose": f"{models}. Doses: {doses}. Noise seeds: {listed(design.noise_seeds)}.",
        "Images": f"Measured inside the {design.mask} against {truth}."
        + (
            f" Classical denoisers on {design.classical_patients} patients drawn by the seed."
            if any(study.subset(one) is not None for one in study.networks.denoisers)
            else ""
        ),
        "Stated beforehand": "Margins: "
        + ", ".join(f"{NAMES[kind]} {margin:g}" for kind, margin in design.margins.items())
        + f". Primary level: {PRIMARY_LEVEL}. Prevalence for predictive values: {design.prevalence:g}. "
        f"Seed of the bootstrap: {design.seed}.",
        "Statistics": STATISTICS.format(replicates=intervals.BOOTSTRAP_REPLICATES),
        "Software": listed(f"{name} {version}" for name, version in manifest["versions"].items()) + ".",
        "Left out": listed(manifest["left_out"]) + "." if manifest["left_out"] else "",
    }


def checklist(study: Study, manifest: dict, found: dict[str, list[dict]]) -> list[tuple[str, str, str]]:
    """(what CLAIM 2024, STARD-AI or TRIPOD+AI ask in substance, which of them, what is known here).

    What a study cannot know of itself is empty, or says BLANK."""
    phantom = "phantom" in sources(study)
    every, claim, stard, tripod = "all three", "CLAIM", "STARD-AI", "TRIPOD+AI"
    ladders = ", ".join(study.design.ladders)
    numbers = counts(manifest)
    trained = study.networks.trained
    masked = study.pack.mask is not None
    return [
        ("title names the study as one of AI and says what kind", every, ""),
        ("structured abstract", every, ""),
        ("clinical background and intended use", every, ""),
        ("aims and hypotheses", every, "how far the dose can be cut; non-inferiority, margins under Methods"),
        ("prospective or retrospective", every, "simulation" if phantom else ""),
        ("where the data come from", every, f"{listed(sources(study))}, {manifest['data']}"),
        ("dates and setting of collection", every, "drawn by computer" if phantom else ""),
        ("who was eligible and how chosen", every, "drawn from a seed" if phantom else ""),
        ("ethics approval and consent", every, "none needed: no people" if phantom else ""),
        ("de-identification", claim, "pseudonyms; nothing else of a patient leaves the reader"),
        (
            "how images were prepared",
            f"{claim}, {tripod}",
            f"HU, {study.pack.size} x {study.pack.size} pixels",
        ),
        ("image acquisition", claim, f"low dose by {ladders}, see Methods"),
        ("reference standard and why", every, "what the phantom drew" if phantom else ""),
        ("who set the reference standard, and agreement", every, "no reader" if phantom else ""),
        ("blinding of index test and reference to each other", stard, "networks see images only"),
        ("missing data", every, "unknown labels count in no number"),
        (
            "splits and the level at which they are disjoint",
            every,
            f"by patient, hash {manifest['split_hash'][:12]}",
        ),
        ("sample size and its reason", every, f"{numbers}; power in the table of verdicts"),
        (
            "networks, inputs and outputs",
            every,
            "see Methods and model cards" if trained else "classical only",
        ),
        (
            "training, initial weights, hyperparameters",
            f"{claim}, {tripod}",
            "model cards" if trained else "",
        ),
        (
            "how the final network was chosen",
            f"{claim}, {tripod}",
            "best epoch on validation" if trained else "",
        ),
        ("software and versions", f"{claim}, {tripod}", "see Methods"),
        ("measures of performance and cut-offs", every, "see Methods; cut-offs from validation"),
        ("uncertainty", every, "95 % intervals over patients, SD over training seeds apart"),
        ("robustness", claim, "stress test" if found.get("stress") else ""),
        ("explainability", claim, "Grad-CAM of scans that flip" if found["flips"] else ""),
        ("test on other data", every, "see Other test sets" if found.get("external") else "none"),
        ("flow of participants", every, f"{numbers} read; exclusions before: {BLANK}"),
        ("age, sex and other traits of patients", every, "none: no people" if phantom else ""),
        ("spectrum of disease", stard, "subtypes and sizes under Every dose in numbers" if masked else ""),
        ("performance with precision", every, "see the tables" if study.arms else "images only"),
        ("calibration", tripod, "see Probabilities and decisions" if study.arms else ""),
        ("subgroups and fairness", f"{stard}, {tripod}", "by lesion only; by group of people: " + BLANK),
        ("analysis of failures", claim, "see Scans that flip" if study.arms else ""),
        ("harms of the test", stard, ""),
        ("limitations", every, "phantoms say nothing of patients" if phantom else ""),
        ("meaning for practice", every, ""),
        ("registration and protocol", every, ""),
        ("funding and interests", every, ""),
        ("code and data for others", every, f"command and hashes under Methods; where: {BLANK}"),
        ("patients and public in the work", tripod, ""),
    ]
