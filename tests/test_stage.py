import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest

import stage


def exit_of(main, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.run(main)
    return stopped.value.code, capsys.readouterr().err


def failing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (stage.InputError("x.pt: not found (train first)"), 2, "x.pt: not found (train first)"),
        (stage.StageError("locked", stage.EXIT_LOCKED), 4, "locked"),
        (ValueError("dose 0: must be positive"), 2, "dose 0"),
        (OSError(errno.ENOSPC, "No space left on device", "big.npy"), 5, "big.npy: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "out: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("two\nlines"), 1, "RuntimeError: two lines"),
        (MemoryError(), 1, "not enough memory"),
    ],
)
def test_run_of_a_failure_gives_one_line_and_the_exit_code_of_the_house(error, code, text, capsys):
    found, printed = exit_of(failing(error), capsys)
    assert found == code
    assert text in printed
    assert printed.count("\n") == 1
    assert "Traceback" not in printed


def test_run_of_success_exits_with_zero(capsys):
    assert exit_of(lambda: None, capsys) == (0, "")


def test_parser_takes_underscores_but_no_abbreviations():
    parser = stage.StageParser("doc")
    parser.add_argument("--batch-size", type=stage.positive_int)
    parser.add_argument("--name")
    assert parser.parse_args(["--batch_size", "8"]).batch_size == 8
    assert parser.parse_args(["--batch_size=9", "--name", "a_b"]).name == "a_b"
    with pytest.raises(stage.InputError, match="--batch 8"):
        parser.parse_args(["--batch", "8"])


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (stage.positive_int, ("1", 1), ["0", "-3", "1.5", "x"]),
        (stage.natural_int, ("0", 0), ["-1", "x"]),
        (stage.positive_float, ("1e-4", 1e-4), ["0", "nan", "inf", "x"]),
        (stage.fraction, ("0.15", 0.15), ["-0.1", "1.5", "nan"]),
    ],
)
def test_number_types_refuse_what_is_out_of_range(kind, good, bad):
    assert kind(good[0]) == good[1]
    for text in bad:
        with pytest.raises(Exception, match="must be"):
            kind(text)


def test_stable_seed_depends_on_every_part_and_on_nothing_else():
    seed = stage.stable_seed("evaluation", 42, "series", 3, 5.0)
    code = "import stage; print(stage.stable_seed('evaluation', 42, 'series', 3, 5.0))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == seed
    changed = [("evaluation", 43, "series", 3, 5.0), ("evaluation", 42, "series", 4, 5.0), ("training", 42)]
    assert len({seed, *(stage.stable_seed(*parts) for parts in changed)}) == 4
    assert 0 <= seed < 2**63


def test_atomic_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), stage.atomic_write(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_json_turns_nan_and_numpy_into_json(tmp_path):
    np = pytest.importorskip("numpy")
    stage.write_json(
        tmp_path / "x.json", {"a": np.float32(1.5), "b": (float("nan"), np.int64(2)), 3: tmp_path}
    )
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1.5, "b": [None, 2], "3": str(tmp_path)}


@pytest.mark.parametrize("content", [None, b"{half", b"\xff\xfe"])
def test_read_json_of_a_bad_file_names_it_and_the_remedy(tmp_path, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(stage.InputError, match=r"x\.json.*\(run it again\)"):
        stage.read_json(path, "run it again")


def hold(path, ready):
    with stage.lock(path):
        ready.set()
        time.sleep(60)


def test_lock_is_refused_while_held_and_free_after_a_kill(tmp_path):
    path = tmp_path / "run.lock"
    ready = multiprocessing.get_context("fork").Event()
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(path, ready))
    holder.start()
    assert ready.wait(10)
    with pytest.raises(stage.StageError, match=f"pid {holder.pid}") as refused, stage.lock(path):
        pass
    assert refused.value.exit_code == stage.EXIT_LOCKED
    holder.kill()
    holder.join()
    with stage.lock(path):
        pass


def test_require_space_of_more_than_the_disk_is_exit_five(tmp_path):
    stage.require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(stage.StageError, match="GB free") as refused:
        stage.require_space(tmp_path, 10**18)
    assert refused.value.exit_code == stage.EXIT_DISK


def test_run_into_a_closed_pipe_is_quiet():
    code = "import stage; stage.run(lambda: [stage.say('x' * 1000) for _ in range(1000)])"
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    os.read(reader, 10)
    os.close(reader)
    assert "Traceback" not in process.communicate(timeout=30)[1]
