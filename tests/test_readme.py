"""The README's commands are ones that the stages take, and its make targets exist."""

import importlib
import re
import shlex

import numpy as np
import pytest

import train_classifier
from phantom import generate_phantom
from tests.conftest import ROOT
from volumes import write_nifti

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
STAGES = [path for path in ROOT.glob("*.py") if "stage.run(main)" in path.read_text(encoding="utf-8")]
STAGE_COMMANDS = [line for line in LINES if re.match(r"(python|torchrun) ", line)]


def test_readme_shows_every_stage():
    shown = {re.search(r"(\w+)\.py", line)[1] for line in LINES if ".py" in line}
    assert {path.stem for path in STAGES} <= shown


@pytest.mark.parametrize("line", STAGE_COMMANDS)
def test_readme_command_is_taken_by_its_stage(line):
    words = shlex.split(line)
    place = next(number for number, word in enumerate(words) if word.endswith(".py"))
    stage_module = importlib.import_module(words[place].removesuffix(".py"))
    stage_module.get_parser().parse_args(words[place + 1 :])


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_readme_make_target_exists(line):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{re.escape(line.split()[1])}:", makefile, re.MULTILINE)


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test" in LINES
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_docstring_examples_of_every_stage_are_taken_by_it():
    for path in STAGES:
        module = importlib.import_module(path.stem)
        examples = [shlex.split(line) for line in re.findall(r"(?:python|torchrun) [^\n\"]+", module.__doc__)]
        assert examples
        for words in examples:
            place = next(number for number, word in enumerate(words) if word.endswith(".py"))
            module.get_parser().parse_args(words[place + 1 :])


def test_readme_python_example_runs_as_it_stands(split_data, tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    common = ["--data", split_data, "--out", tmp_path / "saved_models", "--epochs", 1, "--width", 4]
    for name in ("classifier", "classifier_noisy"):
        words = [*common, "--size", 32, "--device", "cpu", "--name", name]
        train_classifier.main([str(word) for word in words])
    made = generate_phantom(3, size=48, slices=5)
    hu, affine = made.hu.round().astype(np.int16), np.asarray(made.affine)
    positions = affine[2, 3] + made.spacing_mm[0] * np.arange(5)
    write_nifti(tmp_path / "one_patient.nii.gz", hu, affine, positions)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    found: dict = {}
    exec(example.replace("/data/one_patient", "one_patient.nii.gz"), found)  # noqa: S102
    assert found["heat"].shape == (5, 32, 32)
    assert "(5, 1)" in capsys.readouterr().out
