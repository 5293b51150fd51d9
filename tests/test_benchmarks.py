"""The benchmarks at toy size: they measure what they say, and still run."""

import importlib
import importlib.util
import math

import pytest
import torch

from tests.conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch):
    """script(name): one of benchmarks/ as a module, found as it finds itself when it is run."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def loaded(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return loaded


@pytest.mark.parametrize("way", ["PLAIN", "OURS"])
def test_classifier_benchmark_gives_a_speed_and_a_share_of_waiting(script, split_data, way):
    module = script("classifiers")
    found = module.measure(getattr(module, way), split_data, 32, 2, 4, CPU)
    assert found["images_per_s"] > 0 and 0 <= found["waiting"] < 1


@pytest.mark.parametrize("way", ["MONAI", "OURS"])
def test_segmenter_benchmark_gives_the_time_of_an_epoch_and_of_a_scan(script, split_data, way):
    if way == "MONAI":
        pytest.importorskip("monai", reason="MONAI is not installed")
    module = script("segmenters")
    widths = [8, 8, 8, 8, 8]
    found = module.measure(getattr(module, way), split_data, 32, widths, 4, CPU)
    assert found["epoch_s"] > 0 and found["scan_s"] > 0 and found["parameters"] > 0


def test_training_benchmark_measures_the_same_loss_both_ways(script):
    module = script("training")
    plain = module.measure(module.PLAIN, 4, 8, 4, CPU)
    own = module.measure("engine: fp32", 4, 8, 4, CPU)
    assert own["loss"] == pytest.approx(plain["loss"], rel=0.02)
    assert math.isfinite(own["images_per_s"])


def test_denoiser_benchmark_calls_no_two_trainings_alike(script, tmp_path):
    module = script("denoisers")
    names, targets = ["unet-cpu", "redcnn-cpu"], ["truth", "clean"]
    for name in names:
        (tmp_path / f"{name}.truth.jsonl").write_text('{"images_per_s": 20.0}\n')
    runs = list(module.runs_of(names, targets, 400, 60.0, tmp_path))
    assert [run.name for run in runs[:4]] == [*(f"{name}.truth" for name in names), *names]
    assert [(run.name, run.images) for run in runs[4:]] == [(f"{name}.truth.time", 1200) for name in names]
    one = runs[0]._replace(end="five", bias_weight=0.2)
    assert one.name == "unet-cpu.truth.five"


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_every_benchmark_can_be_loaded(script, name):
    assert script(name).__doc__
