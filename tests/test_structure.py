"""The shape of the house, held with ast: which module may import which, and what no file may hold."""

import ast
import sys

import pytest

from tests.conftest import ROOT

STAGES = (
    "prepare_dataset",
    "split_dataset",
    "check_dataset",
    "export_low_dose",
    "train_denoiser",
    "train_classifier",
    "train_segmenter",
    "run_experiments",
    "predict",
    "app",
)
ORDER = (  # each imports only from its left
    *("stage", "tomography", "dose", "anatomy", "artifacts"),
    *("calibration", "intervals", "metrics", "comparisons", "detectability", "lesions", "phantom"),
    *("volumes", "slice_files", "dicom_headers", "dicom_series", "dicom_output", "dicom_sets"),
    *("nifti_series", "array_sets", "picture_sets", "scans"),
    *("dataset", "batches", "low_dose", "weights", "unet"),
    *("denoisers", "autoencoders", "classical", "tiling"),
    *("classifiers", "segmenters", "joint", "sequences", "models", "losses", "checkpoints"),
    *("display", "explain", "sheets", "runs", "training", "inference", "lesion_reading"),
    *("reading_inputs", "answers", "two_stage", "denoised"),
    *("scoring", "explained", "classified", "segmented"),
    *("arms", "cells", "study", "tables", "figures", "gallery", "methods", "wording", "page", "report"),
    # the app: its arithmetic, then what needs Streamlit
    *(
        "own_scan",
        "app_words",
        "app_files",
        "canvas",
        "app_data",
        "app_charts",
        "app_results",
        "app_viewer",
        "app_cases",
    ),
    *("app_runs", "app_scan"),
)
MODULES = {path.stem: path for path in ROOT.glob("*.py")}


def imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_every_module_has_its_place():
    assert set(MODULES) == {*STAGES, *ORDER}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down_only(name):
    ours = set(imports(MODULES[name])) & set(MODULES)
    if name in STAGES:
        assert not ours & set(STAGES), "a stage never imports a stage"
    else:
        assert ours <= set(ORDER[: ORDER.index(name)])


def test_stage_knows_nothing_of_torch():
    allowed = sys.stdlib_module_names | {"tqdm"}
    assert set(imports(MODULES["stage"])) <= allowed


@pytest.mark.parametrize("name", [name for name in STAGES if name != "app"])
def test_every_stage_says_what_it_reads_and_writes_and_gives_an_example(name):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    doc = ast.get_docstring(tree)
    assert all(word in doc for word in ("Reads:", "Writes:", "Example: python " + name))
    assert {"get_parser", "main"} <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", MODULES)
def test_no_module_loads_unsafely_or_laxly(name):
    calls = [node for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.Call)]
    given = {(word.arg, getattr(word.value, "value", None)) for call in calls for word in call.keywords}
    assert not given & {("weights_only", False), ("allow_pickle", True), ("shell", True)}
    loads = [call for call in calls if getattr(call.func, "attr", "") == "load_state_dict"]
    assert not any(word.arg == "strict" for call in loads for word in call.keywords)
