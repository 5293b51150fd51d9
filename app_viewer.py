"""Page Viewer: one prepared case at any dose, what the networks make of it, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import streamlit as st
from scipy import ndimage

import anatomy
import app_charts
import canvas
import lesions
import metrics
from app_data import (
    SPLIT_NOTES,
    Arm,
    Case,
    Checkpoint,
    Checkpoints,
    Noise,
    Series,
    Source,
    Study,
    all_cases,
    arms_of,
    denoised,
    denoiser_for,
    errors_hu,
    families,
    find_checkpoints,
    heat,
    low_dose,
    outlined,
    pick_device,
    reading,
    study_of,
    texture,
)
from app_files import Folders, Stamp, stamp
from app_words import (
    arm_colours,
    arm_labels,
    dose_text,
    finding,
    first_look,
    plain_text,
    quoted,
    truth_text,
    verdict,
)
from dataset import TASKS, task_targets
from detectability import spectrum_distance
from dose import DOSE_MODELS, SIMULATED
from inference import LEGEND
from metrics import shown

DIFFERENCE_RANGE_HU = 20.0  # twice the noise of a routine scan and more: what stays dark is noise
NOTHING = "nothing"
OTHER = "Other denoiser"
NO_HEAT = "Off"
LESION_KEY = "lesion-rows"


def viewer_page(folders: Folders) -> None:
    """One series: full dose, low dose, denoised and difference, and what the networks say."""
    cases = all_cases(folders)
    if not cases:
        no_data(folders)
        return
    device = pick_device(folders.device)
    networks, study = find_checkpoints(folders, device), study_of(folders)
    say_faults(networks, study)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        case = choose_case(cases)
        source = Source(stamp(Path(case.folder) / "metadata.json"), networks.size)
        series = source.series
        noise = choose_dose(networks.found, study)
        denoiser, other = choose_denoisers(networks.denoisers)
        arms = arms_of(denoiser, networks.classifiers)
        explained = choose_heat(arms)
    scan = Shown(series, source, noise, denoiser, other, arms, device)
    scores = [reading(source, noise, arm.classifier.file, arm.denoiser, device) for arm in arms]
    outlines = outline(scan, networks.segmenters)
    found = outlines[0].mask if outlines else None
    parts = lesion_parts(series, outlines)
    view = make_view(case, scan, study, scores, explained, found, go_to(case, parts))
    canvas.show(canvas.pack(view), "viewer")
    st.caption(about(scan, study, case))
    if explained:
        st.caption(
            "Grad-CAM shows what moves the network's score, in nats on one scale for all slices and doses. "
            "It is not a localisation of lesions."
        )
    show_numbers(scan, study, scores, outlines, parts, folders)


class Shown(NamedTuple):
    """What is on the page."""

    series: Series
    source: Source
    noise: Noise
    denoiser: Checkpoint | None
    other: Checkpoint | None  # a second denoiser, to compare
    arms: list[Arm]
    device: str

    @property
    def images(self) -> dict[str, Stamp | None]:
        """What is made of the full dose, by its title: the low dose, and it behind each denoiser."""
        behind = {"Denoised": self.denoiser, OTHER: self.other}
        return {"Low dose": None} | {title: one.file for title, one in behind.items() if one is not None}


class Explained(NamedTuple):
    """The pipeline and the class of a Grad-CAM."""

    arm: Arm
    of_class: str


class Outlined(NamedTuple):
    """What a segmenter found, (S, n, n) uint8, and where it looked."""

    segmenter: Checkpoint
    on: str
    mask: np.ndarray


def no_data(folders: Folders) -> None:
    """What to type where nothing is prepared."""
    st.info(f"No prepared data in {plain_text(folders.data)} yet. This makes some:")
    st.code(
        f"python prepare_dataset.py --source phantom --patients 40 --out {quoted(folders.data)}\n"
        f"python split_dataset.py --data {quoted(folders.data)}\n"
        "# or everything on a synthetic phantom, results included:\nmake demo",
        language="bash",
    )
    st.caption("The page Own scan shows a synthetic head at once, without any of this.")


def say_faults(networks: Checkpoints, study: Study) -> None:
    """In a line each what is missing or unfit."""
    for line in networks.faults:
        st.error(plain_text(line))
    for line in [*networks.warnings, *([study.fault] if study.fault else [])]:
        st.warning(plain_text(line))
    if networks.missing:
        st.info("No checkpoint for what follows; shown is what goes without. This trains it:")
        st.code("\n".join(networks.missing), language="bash")


# ---------------------------------------------------------------- what is shown


def linked(name: str) -> str | None:
    """What the address of the page asks for, if it was not this page that wrote it there."""
    asked = st.query_params.get(name)
    return asked if asked != st.session_state.get(f"linked-{name}") else None


def link(name: str, value: str) -> None:
    """Keep a choice in the address, so that it can be passed on."""
    st.session_state[f"linked-{name}"] = value
    if st.query_params.get(name) != value:
        st.query_params[name] = value


def choose_case(cases: dict[str, Case]) -> Case:
    """From the address (?case=), or the list; opens at the first one with a lesion."""
    asked = linked("case")
    if asked in cases:
        st.session_state["case"] = asked
    elif asked is not None:
        st.warning(plain_text(f"case {asked}: not in the prepared data (choose one below)"))
    names = list(cases)
    if st.session_state.get("case") not in cases:
        st.session_state["case"] = next((name for name in names if cases[name].lesion), names[0])

    def title(name: str) -> str:
        case = cases[name]
        count = "" if case.slices is None else f" · {case.slices} slices"
        return f"{case.patient} · {case.finding}{count} · {case.split}"

    case = cases[st.selectbox("Case", names, format_func=title, key="case", width=330)]
    if st.session_state.get("linked-case") not in (None, case.uid):
        st.query_params.pop("slice", None)  # it was of another case
    link("case", case.uid)
    return case


def choose_dose(found: Sequence[Checkpoint], study: Study) -> Noise:
    """Dose model and dose, as the study or the checkpoints have them; from the address (?dose=) first."""
    models = sorted(SIMULATED)
    trained = [study.dose_model, *(one.facts["dose_model"] for one in found)]
    first = next((name for name in trained if name in models), models[0])
    dose_model = st.selectbox(
        "Dose model", models, models.index(first), key="dose-model", persist_state="session", width=135
    )
    own = [one.facts["doses"] for one in found if one.facts["dose_model"] == dose_model]
    doses = sorted({float(dose) for ladder in (*own, DOSE_MODELS[dose_model].doses) for dose in ladder})
    key = f"dose-{dose_model}"
    try:
        asked = float(linked("dose") or "nan")
        DOSE_MODELS[dose_model].check(asked)
        doses = sorted({*doses, asked})
        st.session_state[key] = asked
    except ValueError:
        pass  # none was asked for, or none of this dose model: the choice stands
    if st.session_state.get(key) not in doses:
        st.session_state[key] = doses[len(doses) // 3]
    dose = st.select_slider(
        f"Dose ({DOSE_MODELS[dose_model].unit})",
        doses,
        format_func=lambda dose: dose_text(dose_model, dose),
        key=key,
        persist_state="session",
        width=300,
    )
    link("dose", f"{dose:g}")
    return Noise(dose_model, dose, study.noise_seed)


def choose_denoisers(denoisers: Sequence[Checkpoint]) -> tuple[Checkpoint | None, Checkpoint | None]:
    """The one that is shown, and one to compare it with."""
    if len(denoisers) < 2:
        return (denoisers[0] if denoisers else None), None
    by_name = {one.name: one for one in denoisers}
    name = st.selectbox("Denoiser", list(by_name), key="denoiser", persist_state="session", width=150)
    others = [NOTHING, *(one for one in by_name if one != name)]
    other = st.selectbox("Compare with", others, key="other-denoiser", persist_state="session", width=150)
    return by_name[name], by_name.get(other)


def choose_heat(arms: Sequence[Arm]) -> Explained | None:
    """Whose Grad-CAM to show, and of which class."""
    if not arms:
        return None
    labels = arm_labels([arm.name for arm in arms], [arm.classifier.name for arm in arms])
    label = st.selectbox("Grad-CAM of", [NO_HEAT, *labels], key="heat", persist_state="session", width=180)
    if label == NO_HEAT:
        return None
    arm = arms[labels.index(label)]
    classes = arm.classifier.facts["classes"]
    of_class = classes[0]
    if len(classes) > 1:
        of_class = st.selectbox("Class", classes, len(classes) - 1, key=f"class-{classes}", width=150)
    return Explained(arm, of_class)


def outline(scan: Shown, segmenters: Sequence[Checkpoint]) -> list[Outlined]:
    """What each segmenter finds, on the images that it learnt on."""
    found = []
    for segmenter in segmenters:
        denoiser = denoiser_for(segmenter, scan.denoiser)
        mask = outlined(scan.source, scan.noise, segmenter.file, denoiser, scan.device)
        found.append(Outlined(segmenter, "denoised" if denoiser else "low dose", mask))
    return found


def strip_lines(arms: Sequence[Arm], slices: Sequence[np.ndarray]) -> list[canvas.Scores]:
    """The lines under the slices: one for each arm, of networks that differ by their seed alone the mean.

    slices: of each arm (S, classes). A mean has no threshold, as each of its networks has its own."""
    groups = families(arms)
    lines = []
    for (label, places), colour in zip(groups.items(), arm_colours(list(groups)), strict=True):
        facts = [arms[place].classifier.facts for place in places]
        values = [
            TASKS[one["task"]].positive(slices[place]) for one, place in zip(facts, places, strict=True)
        ]
        threshold = facts[0]["thresholds"]["slice"]["value"] if len(places) == 1 else None
        lines.append(canvas.Scores(label, np.mean(values, axis=0), threshold, colour))
    return lines


def make_view(
    case: Case,
    scan: Shown,
    study: Study,
    scores: Sequence[tuple[np.ndarray, np.ndarray]],
    explained: Explained | None,
    found: np.ndarray | None,
    go: tuple[int, str] | None,
) -> canvas.View:
    """All that the canvas is given."""
    series, noise, device = scan.series, scan.noise, scan.device
    dose = dose_text(noise.dose_model, noise.dose)
    low = low_dose(scan.source, noise)
    layers = [
        canvas.Layer("full", "Full dose", series.image, "as prepared"),
        canvas.Layer("low", "Low dose", low, dose, noise.dose_model),
    ]
    errors = {
        title.lower(): errors_hu(scan.source, noise, file, study.mask, device)[0]
        for title, file in scan.images.items()
    }
    differences, panes = [("low", "full")], ["full", "low"]
    if scan.denoiser is not None:
        images = denoised(scan.source, noise, scan.denoiser.file, device)
        layers.append(canvas.Layer("denoised", "Denoised", images, dose, scan.denoiser.name))
        differences = [("denoised", "full"), ("low", "full"), ("low", "denoised")]
        panes = ["full", "low", "denoised", "denoised-full"]
    if scan.other is not None:
        images = denoised(scan.source, noise, scan.other.file, device)
        layers.append(canvas.Layer("other", OTHER, images, dose, scan.other.name))
        differences = [("other", "denoised"), ("other", "full"), *differences]
        panes = ["low", "denoised", "other", "other-denoised"]
    if series.truth is not None:
        layers.append(canvas.Layer("truth", "Noise-free", series.truth, "phantom, before noise"))
    lines = strip_lines(scan.arms, [slices for slices, _ in scores])
    shaded = [1 in (labels.get("any"), labels.get("ischemia")) for labels in series.slice_labels]
    values = None
    if explained is not None:
        arm = explained.arm
        values = canvas.Heat(
            heat(scan.source, noise, arm.classifier.file, arm.denoiser, explained.of_class, device),
            explained.of_class,
        )
    return canvas.View(
        key=case.uid,
        title=f"{case.patient} {dose}",
        layers=layers,
        affine=series.affine,
        spacing_mm=series.spacing_mm,
        truth=series.lesions,
        found=found,
        heat=values,
        scores=lines,
        scores_title="probability of a lesion, each slice",
        truth_slices=shaded,
        notes=[
            " · ".join(
                [
                    finding(labels),
                    *(f"RMSE {name} {shown(of_slice[index], 1)} HU" for name, of_slice in errors.items()),
                ]
            )
            for index, labels in enumerate(series.slice_labels)
        ],
        start=start_of(case, series),
        go=go,
        differences=differences,
        range_hu=DIFFERENCE_RANGE_HU,
        panes=panes,
        link=True,
    )


def start_of(case: Case, series: Series) -> int:
    """The slice to open a case at, from the address (?slice=), else where a lesion is. Counts from 0.

    Kept while the case is: the viewer itself writes into the address, and is not to be told of it."""
    known = st.session_state.get("start")
    if known is None or known[0] != case.uid:
        asked = st.query_params.get("slice", "")
        inside = asked.isdecimal() and 1 <= int(asked) <= len(series.image)
        known = (case.uid, int(asked) - 1 if inside else first_look(series.slice_labels))
        st.session_state["start"] = known
    return known[1]


def about(scan: Shown, study: Study, case: Case) -> str:
    """Where the images come from, in words."""
    series, count = scan.series, len(scan.series.image[0])
    against = "full dose" if series.truth is None else "noise-free truth"
    own = f"the series has {series.matrix[0]} x {series.matrix[1]}"
    return (
        f"{SPLIT_NOTES[case.split].capitalize()}. Images of {count} x {count} pixels"
        f"{', the matrix of the networks and of the study' if scan.arms or scan.denoiser else ''} ({own}). "
        f"The noise is that of the study: seed {scan.noise.seed}, this series, slice and dose. "
        f"RMSE inside the {study.mask}, against the {against}. Green: true lesions; red: found by the "
        "segmenter. Click the image, then ? for all keys."
    )


# ---------------------------------------------------------------- numbers below the images


def show_numbers(
    scan: Shown,
    study: Study,
    scores: Sequence[tuple[np.ndarray, np.ndarray]],
    outlines: Sequence[Outlined],
    parts: pd.DataFrame,
    folders: Folders,
) -> None:
    left, right = st.columns((3, 2), gap="medium")
    with left:
        st.markdown(f"**What the classifiers say** · truth: {finding(scan.series.labels)}")
        if scan.arms:
            st.dataframe(
                score_table(scan, scores), hide_index=True, column_config=score_columns(), placeholder="n/a"
            )
            names = dict.fromkeys(arm.name for arm in scan.arms)
            st.caption(calibration_note(scan.arms))
            st.caption("Pipelines: " + " · ".join(f"**{n}** {LEGEND[n]}" for n in names).replace("->", "→"))
        else:
            st.caption("No classifier, no probabilities.")
    with right:
        st.markdown("**Image quality** of the scan")
        st.dataframe(quality_table(scan, study), hide_index=True, column_config=quality_columns())
    if len(parts):
        st.markdown(f"**Lesions** · {lesion_summary(scan.series, outlines)}")
        st.dataframe(
            parts.drop(columns="middle"),
            hide_index=True,
            key=LESION_KEY,
            on_select="rerun",
            selection_mode="single-row",
            column_config={"volume": st.column_config.NumberColumn("Volume (ml)", format="%.2f")},
            height=min(35 * (len(parts) + 1) + 3, 240),
        )
        st.caption("Select a row to go there.")
    with st.expander("Noise"):
        show_noise(scan)
    with st.expander("The same from a shell"):
        noise = scan.noise
        st.code(
            f"python run_experiments.py --data {quoted(folders.data)} --models {quoted(folders.models)} "
            f"--out {quoted(folders.results)} --dose-model {noise.dose_model} --doses {noise.dose:g}\n"
            f"streamlit run app.py -- --data {quoted(folders.data)} --models {quoted(folders.models)}"
            f"  # then /viewer?case={scan.series.uid}&dose={noise.dose:g}",
            language="bash",
        )


def score_table(scan: Shown, scores: Sequence[tuple[np.ndarray, np.ndarray]]) -> pd.DataFrame:
    """One row per pipeline: what it says of the scan, and of its most suspicious slice."""
    labels = arm_labels([arm.name for arm in scan.arms], [arm.classifier.name for arm in scan.arms])
    rows = []
    for arm, label, (slices, of_scan) in zip(scan.arms, labels, scores, strict=True):
        facts = arm.classifier.facts
        task = TASKS[facts["task"]]
        targets = task.positive(task_targets(facts["task"], scan.series.slice_labels, facts["assume_absent"]))
        values, score = task.positive(slices), float(task.positive(of_scan)[0])
        threshold = facts["thresholds"]["scan"]["value"]
        rows.append(
            {
                "Pipeline": label,
                "Task": facts["task"],
                "scan probability": score,
                "scan threshold": threshold,
                "scan verdict": verdict(score, threshold),
                "scan truth": truth_text(metrics.scan_scores(targets, np.zeros(len(targets), int))[0]),
                "highest slice": int(values.argmax()) + 1,
                "classes": ", ".join(
                    f"{name} {value:.2f}" for name, value in zip(facts["classes"], of_scan[0], strict=True)
                ),
                "Classifier": arm.classifier.name,
            }
        )
    frame = pd.DataFrame(rows)
    if not any(arm.classifier.facts["classes"][1:] for arm in scan.arms):
        frame = frame.drop(columns="classes")
    return frame.astype({"scan threshold": float})


def calibration_note(arms: Sequence[Arm]) -> str:
    """How far the probabilities can be believed, as the checkpoints have it."""
    found = {}
    for arm in arms:
        temperature = arm.classifier.facts.get("temperatures", {}).get("scan", {}).get("value")
        if temperature is not None:
            found[arm.classifier.name] = f"{plain_text(arm.classifier.name)} {temperature:.2f}"
    note = "Probabilities are as the networks give them, not calibrated"
    if found:
        note += (
            f"; best on validation with the temperature (1: right as it is) of {', '.join(found.values())}"
        )
    return note + "."


def score_columns() -> dict[str, Any]:
    return {
        "scan probability": st.column_config.ProgressColumn(
            "Probability", format="%.3f", min_value=0.0, max_value=1.0
        ),
        "scan threshold": st.column_config.NumberColumn(
            "Threshold", format="%.3f", help="chosen on validation patients"
        ),
        "scan verdict": "Verdict",
        "scan truth": "Truth",
        "highest slice": "Highest slice",
        "classes": "Classes",
    }


def quality_table(scan: Shown, study: Study) -> pd.DataFrame:
    return pd.DataFrame(
        {"Image": title, **errors_hu(scan.source, scan.noise, file, study.mask, scan.device)[1]}
        for title, file in scan.images.items()
    )


def show_noise(scan: Shown) -> None:
    """How strong the noise is, and how coarse: its power spectrum."""
    found = {
        title: texture(scan.source, scan.noise, file, scan.device) for title, file in scan.images.items()
    }
    left, right = st.columns((3, 2), gap="medium")
    with left:
        spectra = [
            pd.DataFrame({"frequency_per_mm": one.spectrum.frequencies, "power_hu2_mm2": one.spectrum.power})
            for one in found.values()
        ]
        frame = pd.concat([own.assign(line=title) for title, own in zip(found, spectra, strict=True)])
        if (frame["power_hu2_mm2"] > 0).any():
            st.altair_chart(app_charts.spectrum(frame), width="stretch")
        else:
            st.caption("No part of the brain is large enough for a spectrum.")
    with right:
        with np.errstate(invalid="ignore"):  # without noise there is no texture: NaN
            moved = [spectrum_distance(one.spectrum, found["Low dose"].spectrum) for one in found.values()]
        rows = {"Image": list(found), "sd": [one.sd_hu for one in found.values()], "moved": moved}
        columns = {
            "sd": st.column_config.NumberColumn("Noise SD (HU)", format="%.2f"),
            "moved": st.column_config.NumberColumn(
                "Texture changed", format="percent", help="share of noise power at another frequency"
            ),
        }
        st.dataframe(pd.DataFrame(rows), hide_index=True, column_config=columns, placeholder="n/a")
        against = "full dose" if scan.series.truth is None else "noise-free truth"
        st.caption(
            f"Noise power inside the brain, of all slices, less the {against}. A line through the image: "
            "click it, press l and point at a row."
        )


def quality_columns() -> dict[str, Any]:
    return {
        "Image": st.column_config.TextColumn("Image", width=115),
        "rmse_hu": st.column_config.NumberColumn("RMSE (HU)", format="%.2f"),
        "mse": st.column_config.NumberColumn("MSE (HU²)", format="%.1f"),
        "psnr": st.column_config.NumberColumn("PSNR (dB)", format="%.2f"),
        "ssim": st.column_config.NumberColumn("SSIM", format="%.3f"),
    }


def lesion_summary(series: Series, outlines: Sequence[Outlined]) -> str:
    """Volumes, and Dice where the truth is known."""
    words = []
    if series.lesions is not None:
        words.append(f"true {lesions.volume_ml(series.lesions > 0, series.spacing_mm):.2f} ml")
    for found in outlines:
        text = f"{plain_text(found.segmenter.name)} on {found.on} "
        text += f"{lesions.volume_ml(found.mask > 0, series.spacing_mm):.2f} ml"
        if series.lesions is not None:
            text += f", Dice {shown(lesions.dice(series.lesions > 0, found.mask > 0))}"
        words.append(text)
    return " · ".join(words)


def lesion_parts(series: Series, outlines: Sequence[Outlined]) -> pd.DataFrame:
    """Every lesion that touches no other, true or found, largest first."""
    masks = []
    if series.lesions is not None:
        masks.append(("true", series.lesions, anatomy.LESION_CLASSES))
    masks += [(found.segmenter.name, found.mask, found.segmenter.facts["classes"]) for found in outlines]
    rows = []
    for who, mask, classes in masks:
        names = dict(enumerate(classes, 1))
        parts, count = ndimage.label(mask > 0, lesions.TOUCHING)
        for number in range(1, count + 1):
            inside = parts == number
            slices = np.flatnonzero(inside.any(axis=(1, 2)))
            kinds = [names.get(int(value), "lesion") for value in np.unique(mask[inside])]
            rows.append(
                {
                    "by": who,
                    "kind": ", ".join(kinds),
                    "slices": f"{slices[0] + 1} to {slices[-1] + 1}",
                    "volume": lesions.volume_ml(inside, series.spacing_mm),
                    "middle": int(slices[len(slices) // 2]),
                }
            )
    return pd.DataFrame(rows).sort_values("volume", ascending=False) if rows else pd.DataFrame()


def go_to(case: Case, parts: pd.DataFrame) -> tuple[int, str] | None:
    """The slice of the lesion whose row is selected."""
    chosen = st.session_state.get(LESION_KEY)
    rows = chosen["selection"]["rows"] if chosen else []
    if not rows or rows[0] >= len(parts):
        return None
    return int(parts.iloc[rows[0]]["middle"]), f"{case.uid} {rows[0]}"
