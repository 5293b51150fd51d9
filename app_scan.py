"""Page Own scan: a scan that is not in the data set, read by the networks and kept for this session only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

import canvas
import stage
from app_data import (
    Arm,
    Checkpoint,
    Checkpoints,
    arms_of,
    denoiser_for,
    find_checkpoints,
    load_network,
    pick_device,
    study_of,
)
from app_files import Folders
from app_words import arm_colours, arm_labels, dose_text, plain_text, quoted
from dataset import TASKS
from dicom_output import highdicom_package
from dose import DOSE_MODELS, SIMULATED
from inference import LEGEND, Network
from lesion_reading import describe
from own_scan import (
    SAMPLES,
    SUFFIXES,
    Dose,
    Opened,
    Outcome,
    Request,
    derived_bytes,
    dicom_files,
    json_bytes,
    nifti_bytes,
    open_scan,
    sample_scan,
    segmentation_bytes,
    sheet_bytes,
    uploaded,
    work,
)
from volumes import Scan, ScanError

SAMPLE, UPLOAD, FOLDER = "Sample", "Upload", "This machine"
AS_IT_IS = "as it is"
SCAN, OUTCOME = "own-scan", "own-outcome"  # of the session, which alone holds them
ASKED = "own-asked"  # the scan of which the networks are to say something
MANY_ENTRIES = 500  # of the folder of scans, in the list; others can be typed
HIGHDICOM = "DICOM SEG of lesions needs highdicom (pip install highdicom)"


def own_scan_page(folders: Folders) -> None:
    """Load, ask, look, take away."""
    device = pick_device(folders.device)
    networks = find_checkpoints(folders, device)
    for line in networks.faults:
        st.error(plain_text(line))
    row = st.container(horizontal=True, vertical_alignment="bottom", gap="medium")
    source = choose_source(folders, row)
    try:
        opened = load(source, folders)
    except ScanError as error:
        raise stage.InputError(str(error)) from None
    if opened is None:
        st.caption(
            "The scan is read on this machine, and forgotten when the session ends. Names in headers are "
            "neither shown nor kept."
        )
        return
    request, reference, arm = choose_request(folders, networks, opened, device)
    outcome = ask(opened, request, reference, source, row)
    show_outcome(opened, outcome, request, arm)
    if outcome is not None:
        show_downloads(opened, outcome, request, source, folders)
    if networks.missing:
        st.info("No checkpoint for what is not shown. This trains it:")
        st.code("\n".join(networks.missing), language="bash")


# ---------------------------------------------------------------- where it comes from


def choose_source(folders: Folders, row: DeltaGenerator) -> tuple:
    """(kind, what it takes to find the scan again, which series of those that are there).

    row: of the page, where its controls begin."""
    kinds = [SAMPLE, UPLOAD, *([FOLDER] if folders.scans else [])]
    with row:
        kind = st.segmented_control("Scan from", kinds, default=SAMPLE, required=True, key="own-kind")
        if kind == SAMPLE:
            name = st.segmented_control(
                "Synthetic head", list(SAMPLES), default=next(iter(SAMPLES)), required=True, key="own-sample"
            )
            return SAMPLE, name, 0
        if kind == FOLDER:
            entries = sorted(
                entry.name for entry in folders.scans.iterdir() if not entry.name.startswith(".")
            )
            name = st.selectbox(
                f"Folder or file below {plain_text(folders.scans)}",
                entries[:MANY_ENTRIES],
                index=None,
                accept_new_options=True,
                key="own-path",
            )
            number = st.number_input("Series", 1, 999, 1, key="own-number", width=110) - 1
            return FOLDER, name, number
    left, right, narrow = st.columns((5, 5, 1), vertical_alignment="bottom")
    endings = [ending.lstrip(".") for ending in SUFFIXES if ending != ".nii.gz"] + ["gz"]
    files = left.file_uploader(
        "Files: zip, NIfTI, NPZ, PNG, DICOM", type=endings, accept_multiple_files=True, key="own-files"
    )
    folder = right.file_uploader(
        "or a folder of DICOM files", accept_multiple_files="directory", key="own-folder"
    )
    number = narrow.number_input("Series", 1, 999, 1, key="own-number") - 1
    return UPLOAD, tuple(folder or files or ()), number


@contextlib.contextmanager
def on_disk(source: tuple, folders: Folders) -> Iterator[Path]:
    """Where the files of a source are, for as long as they are needed.

    Raises InputError for a path that is not there or outside of the folder of scans."""
    kind, what, _ = source
    if kind == UPLOAD:
        with uploaded([(file.name, file.getvalue()) for file in what]) as path:
            yield path
        return
    root = folders.scans.resolve()
    path = (root / what).resolve()
    if not path.is_relative_to(root):
        raise stage.InputError(f"{what}: not below {folders.scans} (choose a folder that is)")
    if not path.exists():
        raise stage.InputError(f"{path}: no such file or folder")
    yield path


def identity(source: tuple) -> tuple:
    """What tells one source from another."""
    kind, what, number = source
    return kind, tuple(file.file_id for file in what) if kind == UPLOAD else what, number


# Synthetic, and so the one scan that sessions may share
cached_sample = st.cache_resource(sample_scan, show_spinner=False)


def load(source: tuple, folders: Folders) -> Opened | None:
    """The scan, read once and kept in the session until another one is asked for; None: none was chosen."""
    kind, what, number = source
    known = st.session_state.get(SCAN)
    if known is not None and known[0] == identity(source):
        return known[1]
    st.session_state.pop(SCAN, None)
    st.session_state.pop(OUTCOME, None)
    if not what:
        return None
    with st.spinner("Reading the scan ..."):
        if kind == SAMPLE:
            opened = cached_sample(what)
        else:
            with on_disk(source, folders) as path:
                opened = open_scan(path, number)
    st.session_state[SCAN] = (identity(source), opened)
    return opened


# ---------------------------------------------------------------- what is asked


def choose_request(
    folders: Folders, networks: Checkpoints, opened: Opened, device: str
) -> tuple[Request, Scan | None, Arm | None]:
    """The request, the reference if one is given, and the pipeline."""
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        denoiser = None
        if networks.denoisers:
            names = [one.name for one in networks.denoisers]
            name = st.selectbox("Denoiser", [*names, "none"], key="own-denoiser", width=150)
            denoiser = networks.denoisers[names.index(name)] if name in names else None
        arm = choose_pipeline(arms_of(denoiser, networks.classifiers))
        of_class = threshold = None
        if arm is not None:
            facts = arm.classifier.facts
            own = facts["thresholds"]["scan"]["value"]
            start = 0.5 if own is None else float(own)
            threshold = st.slider(
                "Threshold of the scan",
                0.0,
                1.0,
                start,
                0.005,
                format="%.3f",
                key=f"own-threshold-{arm.classifier.name}",
                width=180,
                help="at first the one of the checkpoint, chosen on validation patients",
            )
            threshold = None if threshold == start else threshold  # untouched: what the checkpoint says
            of_class = st.selectbox(
                "Grad-CAM of", ["none", *facts["classes"]], 1, key=f"own-class-{facts['classes']}", width=120
            )
        dose = choose_dose(denoiser, arm, study_of(folders).noise_seed)
        reference = choose_reference(opened, dose)
    segmenter = networks.segmenters[0] if networks.segmenters else None
    always = False
    with st.container(horizontal=True, gap="medium"):
        if segmenter is not None and arm is not None:
            wanted = st.toggle("Outline lesions", value=True, key="own-segment")
            always = wanted and st.toggle("in scans called normal too", key="own-always")
            segmenter = segmenter if wanted else None

    def network(one: Checkpoint | None) -> Network | None:
        if one is None:
            return None
        path = Path(one.file.path)
        return Network(path, *load_network(one.facts["stage"], one.file, device))

    through = arm is not None and arm.denoiser is not None
    if (
        segmenter is not None
        and segmenter.facts["input"] == "denoised"
        and not denoiser_for(segmenter, denoiser)
    ):
        st.warning(plain_text(f"{segmenter.name}: was trained behind another denoiser; left out"))
        segmenter = None
    request = Request(
        denoiser=network(denoiser),
        classifier=network(arm.classifier if arm else None),
        through=through,
        segmenter=network(segmenter if arm else None),
        always=always,
        dose=dose,
        of_class=None if of_class in (None, "none") else of_class,
        threshold=threshold,
    )
    return request, reference, arm


def choose_pipeline(arms: list[Arm]) -> Arm | None:
    """Direct, or denoise first: what the checkpoints allow."""
    if not arms:
        return None
    labels = arm_labels([arm.name for arm in arms], [arm.classifier.name for arm in arms])
    titles = {
        label: f"{label}: {LEGEND[arm.name].replace('low dose -> ', '').replace('->', '→')}"
        for label, arm in zip(labels, arms, strict=True)
    }
    label = st.selectbox("Pipeline", labels, format_func=titles.get, key="own-pipeline", width=290)
    return arms[labels.index(label)]


def choose_dose(denoiser: Checkpoint | None, arm: Arm | None, seed: int) -> Dose | None:
    """A dose to simulate first, in the dose model of the networks."""
    facts = denoiser.facts if denoiser else arm.classifier.facts if arm else {}
    model = facts.get("dose_model") if facts.get("dose_model") in SIMULATED else sorted(SIMULATED)[0]
    doses = sorted(DOSE_MODELS[model].doses, reverse=True)
    dose = st.selectbox(
        "Simulate dose",
        [AS_IT_IS, *doses],
        format_func=lambda dose: dose if dose == AS_IT_IS else dose_text(model, dose),
        key=f"own-dose-{model}",
        width=190,
    )
    return None if dose == AS_IT_IS else Dose(model, dose, seed)


def choose_reference(opened: Opened, dose: Dose | None) -> Scan | None:
    """The same slices at another dose, to measure against; a simulated dose has the scan itself."""
    if dose is not None:
        return None
    with st.popover("Reference", help="to measure PSNR and SSIM against"):
        files = st.file_uploader(
            "The same slices at full dose: zip, NIfTI, DICOM, NPZ, PNG",
            accept_multiple_files=True,
            key="own-reference",
        )
    if not files:
        return None
    try:
        with uploaded([(file.name, file.getvalue()) for file in files]) as path:
            scan = open_scan(path).scan
    except (ScanError, stage.StageError) as error:
        st.error(plain_text(f"reference: {error}"))
        return None
    if scan.hu.shape != opened.scan.hu.shape:
        st.error(
            f"reference: {scan.hu.shape} pixels, the scan has {opened.scan.hu.shape} (give the same slices)"
        )
        return None
    return scan


def ask(
    opened: Opened, request: Request, reference: Scan | None, source: tuple, row: DeltaGenerator
) -> Outcome | None:
    """What the networks say, once for every question; a click on anything else stops them.

    row: of the page, in which the button is, and the progress while it lasts."""
    denoiser = None if request.denoiser is None else request.denoiser.path
    images = (identity(source), request.dose, denoiser)  # what the denoised images depend on
    key = (
        *(request.of_class, request.threshold, request.through, request.always),
        tuple(str(one.path) for one in request.networks),
        None if reference is None else reference.series_uid,
    )
    known = st.session_state.get(OUTCOME)
    if known is not None and known[:2] == (images, key):
        return known[2]
    if not request.networks and request.dose is None and reference is None:
        return None
    asked = st.session_state.get(ASKED) == identity(source)
    button, stop, bar = row.empty(), row.empty(), row.empty()
    button.button(
        "Denoise and read",
        key="own-run",  # it stays the same button, which would else be in sight as it was until the end
        on_click=lambda: st.session_state.update({ASKED: identity(source)}),
        disabled=asked,
        type="primary",
        icon=":material/play_arrow:",
    )
    if not asked:
        return None
    stop.button("Cancel", on_click=cancel, icon=":material/close:")
    bar.progress(0.0, "Starting", width=300)
    outcome = work(
        opened.scan,
        request,
        reference,
        lambda share, what: bar.progress(share, f"{what} ...", width=300),
        known[2] if known is not None and known[0] == images else None,
    )
    for element in (button, stop, bar):
        element.empty()
    st.session_state[OUTCOME] = (images, key, outcome)
    return outcome


def cancel() -> None:
    """The networks stop at the next look at the progress bar, and are asked by the button alone."""
    st.session_state.pop(ASKED, None)


# ---------------------------------------------------------------- what is shown


def show_outcome(opened: Opened, outcome: Outcome | None, request: Request, arm: Arm | None) -> None:
    scan = opened.scan
    layers = [canvas.Layer("full", "Scan", scan.hu)]
    differences = []
    lines: list[canvas.Scores] = []
    heat = found = None
    if outcome is not None:
        if request.dose is not None:
            dose = dose_text(request.dose.model, request.dose.value)
            layers.append(canvas.Layer("low", "Low dose", outcome.given, dose, request.dose.model))
            differences.append(("low", "full"))
        if outcome.denoised is not None:
            layers.append(
                canvas.Layer("denoised", "Denoised", outcome.denoised, "", request.denoiser.path.name)
            )
            differences.insert(0, ("denoised", "full"))
        if outcome.heat is not None:
            heat = canvas.Heat(outcome.heat, request.of_class)
        if outcome.lesions is not None and outcome.lesions.mask is not None:
            found = outcome.lesions.mask
        if outcome.found is not None:
            facts = request.classifier.facts
            values = TASKS[facts["task"]].positive(outcome.found.slices)
            label = arm.name if arm else "1"
            threshold = facts["thresholds"]["slice"]["value"]
            lines.append(canvas.Scores(label, values, threshold, arm_colours([label])[0]))
    if scan.truth is not None:
        layers.append(canvas.Layer("truth", "Noise-free", scan.truth, "phantom, before noise"))
    start = len(scan.hu) // 2 if not lines else int(np.argmax(lines[0].values))
    view = canvas.View(
        key=scan.series_uid,
        title=f"scan {scan.series_uid[:8]}",
        layers=layers,
        affine=scan.affine,
        spacing_mm=scan.spacing_mm,
        truth=scan.mask,
        found=found,
        heat=heat,
        scores=lines,
        scores_title="probability of a lesion, each slice",
        notes=["; ".join(texts) for texts in scan.repairs],
        start=start,
        differences=differences,
        panes=[layer.name for layer in layers[:2]] if differences else [],
    )
    canvas.show(canvas.pack(view), "own-viewer")
    if outcome is not None:
        show_cards(outcome)
    tilt = f" · gantry tilt {scan.gantry_tilt_deg:.1f}°" if scan.gantry_tilt_deg else ""
    several = f" · series 1 of {opened.series}" if opened.series > 1 else ""
    st.caption(
        f"{len(scan.hu)} slices of {scan.hu.shape[1]} x {scan.hu.shape[2]} pixels{tilt} · noise "
        f"{scan.noise_hu:.1f} HU{several}. Kept for this session only."
    )
    for note in opened.notes:
        st.caption(plain_text(note))


def show_cards(outcome: Outcome) -> None:
    """What was found, in numbers."""
    facts, cards = outcome.facts, []
    if outcome.found is not None:
        said = facts["scan"]
        verdict = {True: "above the threshold", False: "below the threshold", None: "no threshold"}
        cards.append(
            (f"Probability: {facts['class']}", f"{said['probability']:.3f}", verdict[said["positive"]])
        )
        values = [one["probability"] for one in facts["slices"]]
        cards.append(("Highest slice", f"{int(np.argmax(values)) + 1}", f"of {len(values)}"))
    lesions = outcome.lesions
    if lesions is not None and lesions.mask is not None:
        cards.append(("Lesions found", str(lesions.facts["lesions"]), f"{lesions.facts['volume_ml']:.2f} ml"))
    quality = facts.get("quality")
    if quality is not None:
        last = quality.get("denoised", quality["given"])
        for name, unit, digits in (("rmse_hu", " HU", 2), ("psnr", " dB", 2), ("ssim", "", 3)):
            before = f"before {quality['given'][name]:.{digits}f}" if "denoised" in quality else None
            cards.append((name.removesuffix("_hu").upper(), f"{last[name]:.{digits}f}{unit}", before))
    if cards:
        for cell, (label, value, below) in zip(st.columns(len(cards)), cards, strict=True):
            cell.metric(label, value, below, delta_color="off", delta_arrow="off", border=True)
    if lesions is not None:
        if lesions.facts["contradiction"]:
            st.warning(plain_text(lesions.facts["contradiction"]))
        st.caption(plain_text(describe(lesions.facts | {"contradiction": None})))
    if outcome.heat is not None:
        st.caption("Grad-CAM shows what moves the network's score; it is not a localisation of lesions.")


def show_downloads(
    opened: Opened, outcome: Outcome, request: Request, source: tuple, folders: Folders
) -> None:
    """Made when they are asked for."""
    lesions = None if outcome.lesions is None else outcome.lesions.mask
    with st.container(horizontal=True, gap="small"):
        files: list[tuple] = []
        if outcome.denoised is not None:
            files.append(("Denoised NIfTI", lambda: nifti_bytes(outcome.denoised, opened), "denoised.nii.gz"))
        if lesions is not None:
            files.append(("Lesions NIfTI", lambda: nifti_bytes(lesions, opened), "lesions.nii.gz"))
        files.append(("All slices PNG", lambda: sheet_bytes(opened, outcome), "contact_sheet.png"))
        files.append(("JSON", lambda: json_bytes(outcome), "prediction.json"))
        for label, make, name in files:
            st.download_button(label, make, name, on_click="ignore", icon=":material/download:")
        if opened.dicom:
            files_of_dicom(outcome, request, source, folders)
    with st.expander("The same from a shell"):
        dose = "" if request.dose is None else f" --dose {request.dose.value:g}"
        segment = "" if request.segmenter is None else " --segment"
        st.code(
            f"python predict.py --input STUDY --out predictions --models {quoted(folders.models)}{dose}"
            f"{segment}",
            language="bash",
        )


def files_of_dicom(outcome: Outcome, request: Request, source: tuple, folders: Folders) -> None:
    """What goes back into the study: the denoised series, and a segmentation where the package is there."""

    def made(make: Callable[..., bytes], volume: np.ndarray, by: Network) -> Callable[[], bytes]:
        def now() -> bytes:
            with on_disk(source, folders) as path:
                return make(dicom_files(path, source[2]), volume, by)

        return now

    icon = ":material/download:"
    if outcome.denoised is not None:
        make = made(derived_bytes, outcome.denoised, request.denoiser)
        st.download_button("Denoised DICOM", make, "denoised.zip", on_click="ignore", icon=icon)
    mask = None if outcome.lesions is None else outcome.lesions.mask
    if mask is None or not mask.any():
        return
    try:
        highdicom_package()
    except stage.InputError:
        st.caption(HIGHDICOM)
        return
    make = made(segmentation_bytes, mask, request.segmenter)
    st.download_button("Lesions DICOM SEG", make, "lesions.dcm", on_click="ignore", icon=icon)
