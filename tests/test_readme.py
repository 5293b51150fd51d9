"""The README's commands are ones that the stages take, and its make targets exist."""

import importlib
import re
import shlex

import pytest

from tests.conftest import ROOT

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
