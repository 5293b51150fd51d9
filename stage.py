"""What every script shares at its edges: flags, one-line errors and exit codes, seeds, locks, safe writes.

Nothing here knows of images or networks, and nothing imports torch."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NoReturn

from tqdm import tqdm

EXIT_FAILED, EXIT_USAGE, EXIT_REJECTED, EXIT_LOCKED, EXIT_DISK, EXIT_INTERRUPTED = 1, 2, 3, 4, 5, 130

PR_SET_PDEATHSIG = 1  # linux/prctl.h
NO_MEMORY = "not enough memory (a smaller --batch-size or --size needs less)"

log = logging.getLogger("ldct")


class StageError(Exception):
    """An expected failure: its text is the one line that the user sees, exit_code the script's."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED):
        super().__init__(message)
        self.exit_code = exit_code


class InputError(StageError, ValueError):
    """Bad usage or bad input: the value, what is allowed, and the remedy, in one line."""

    def __init__(self, message: str):
        super().__init__(message, EXIT_USAGE)


class LockedError(StageError):
    """Another run is at work on the same files."""

    def __init__(self, message: str):
        super().__init__(message, EXIT_LOCKED)


# ---------------------------------------------------------------- command line


class StageParser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviations, and `--batch_size` accepted for `--batch-size`."""

    def __init__(self, doc: str, **kwargs: Any):
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )
        self.add_argument("--debug", action="store_true", help="show a traceback when something fails")

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else [str(arg) for arg in args]
        parsed = super().parse_args([_dashes(arg) for arg in args], namespace)
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
        return parsed

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def _dashes(arg: str) -> str:
    """`--batch_size=8` -> `--batch-size=8`; anything that is not a long option stays as it is."""
    match = re.match(r"--[A-Za-z_][\w-]*", arg)
    return match.group().replace("_", "-") + arg[match.end() :] if match else arg


def given_options(parser: StageParser, argv: Sequence | None) -> set[str]:
    """The options that a command line names, be it with their defaults."""
    names = vars(parser.parse_args([]))
    blank = argparse.Namespace(**dict.fromkeys(names))  # argparse leaves alone what is there
    return {name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not None}


def training_only(
    args: argparse.Namespace, given: set[str], modes: Mapping[str, Sequence[str]], shared: Sequence[str]
) -> argparse.Namespace:
    """The options without those of modes that do not train, which decide nothing in a training.

    given: of given_options. modes: mode -> its own options. shared: options of training that modes take too.
    Raises InputError for one whose mode is not asked for, and for one of training beside a mode."""
    own = {*modes, *(option for options in modes.values() for option in options)}
    for mode, options in modes.items():
        asked = mode in given
        wrong = given - {mode, *options, *shared} if asked else given & set(options)
        if wrong:
            words = f"--{min(wrong).replace('_', '-')}"
            reason = f"not with --{mode}, which does not train" if asked else f"only with --{mode}"
            raise InputError(f"{words}: {reason} (leave it out)")
    return argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in own})


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def natural_int(text: str) -> int:
    """argparse type: an integer of at least 0."""
    return _number(text, int, lambda value: value >= 0, "a whole number of at least 0")


def positive_float(text: str) -> float:
    """argparse type: a positive finite number."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a positive number")


def fraction(text: str) -> float:
    """argparse type: a number in [0, 1]."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number in [0, 1]")


def _number(text: str, kind: type, allowed: Callable, words: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise argparse.ArgumentTypeError(f"{text}: must be {words}")
    return value


def run(main: Callable[[], None]) -> NoReturn:
    """Run a stage's main() as a script: failures become one line on stderr and the house's exit codes.

    0 done, 1 failed, 2 bad usage or input, 3 too many rejected, 4 locked, 5 disk full, 130 interrupted."""
    code, message, error = 0, None, None
    try:
        main()
        sys.stdout.flush()
    except StageError as caught:
        code, message, error = caught.exit_code, str(caught), caught
    except KeyboardInterrupt as caught:
        code, message, error = EXIT_INTERRUPTED, "interrupted; finished work is kept", caught
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MemoryError as caught:
        code, message, error = EXIT_FAILED, NO_MEMORY, caught
    except OSError as caught:
        full = caught.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        code = EXIT_DISK if full else EXIT_FAILED
        message, error = f"{caught.filename or 'file'}: {caught.strerror or caught}", caught
    except ValueError as caught:  # a pure module refused a value
        code, message, error = EXIT_USAGE, str(caught), caught
    except Exception as caught:  # noqa: BLE001 the border: whatever is left is a fault of ours, in one line
        code, error = EXIT_FAILED, caught
        message = f"{type(caught).__name__}: {caught} (--debug shows where)"
        if "out of memory" in message or "can't allocate memory" in message:  # torch has no MemoryError
            message = NO_MEMORY
    if error is not None and "--debug" in sys.argv:
        traceback.print_exception(error)
    if message is not None:
        line = " ".join(message.split()).encode("utf-8", "backslashreplace").decode()
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {line}\n")
    sys.exit(code)


def say(text: str = "") -> None:
    """Print a result on stdout (progress and log lines go to stderr)."""
    sys.stdout.write(f"{text}\n")


def progress(items: Iterable, *, desc: str, total: int | None = None, unit: str = "it") -> tqdm:
    """A tqdm bar with rate and time left on a terminal; silent where stderr is not one."""
    return tqdm(items, desc=desc, total=total, unit=unit, disable=None, leave=False)


# ---------------------------------------------------------------- seeds


def stable_seed(*parts: str | int | float) -> int:
    """A seed in [0, 2^63) that depends on the parts alone: the same on every machine and in every run."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside path; on success it is flushed to disk and moved into place.

    A reader sees the old file or the new one, never a part; a kill leaves the old one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    encoding = None if "b" in mode else "utf-8"
    try:
        with temporary.open(mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when it is full; a kill leaves .<name>.partial at most."""
    final = Path(final)
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(final)
    sync_folder(final.parent)


EXPORT_FORMAT = 1


def claim_export(out: Path, asked: dict, split: str, facts: dict, versions: dict) -> dict:
    """export.json of the folder of an export, made or found, with the facts of a split.

    asked: what decides the values. facts: of the split, with a hash as "contents". Raises InputError if out
    is another export's, holds anything else, or if the split has other contents by now."""
    path = out / "export.json"
    asked = plain(asked)
    manifest = {"format": EXPORT_FORMAT, "options": asked, "versions": versions, "splits": {}}
    if path.exists():
        manifest = read_json(path, f"delete {out} and export again")
        known = manifest["options"]
        for name, value in asked.items():
            if known.get(name) != value:
                raise InputError(
                    f"{out}: was exported with {name} {known.get(name)}, not {value} (choose another --out)"
                )
        if manifest["splits"].get(split, facts)["contents"] != facts["contents"]:
            raise InputError(f"{out}: the series of {split} have changed since (choose another --out)")
        if manifest["versions"] != versions:
            log.warning("%s: begun with other versions: %s", out, manifest["versions"])
    elif any(entry.name != ".lock" for entry in out.iterdir()):
        raise InputError(f"{out}: is not empty and holds no export (choose another --out)")
    manifest["splits"].setdefault(split, facts | {"complete": False})
    write_json(path, manifest)
    return manifest


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; not-a-number becomes null, as JSON has none."""
    with atomic_write(path) as file:
        json.dump(plain(value), file, indent=1, allow_nan=False)
        file.write("\n")


def plain(value: Any) -> Any:
    """Turn numpy scalars, paths and tuples into JSON types, NaN and infinities into None."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return str(value) if isinstance(value, Path) else value


def read_json(path: Path, remedy: str) -> Any:
    """Read JSON. Raises InputError naming the file and the remedy if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found ({remedy})") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: damaged JSON, {error} ({remedy})") from None


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold path as a lock file; wait for another run that has it, or raise LockedError naming it.

    The kernel frees it when its holder dies, so there are no stale locks."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise LockedError(f"{path.parent}: in use by {holder} (wait, or stop it)") from None
        file.truncate(0)
        started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        file.write(f"{Path(sys.argv[0]).name}, pid {os.getpid()} on {socket.gethostname()} since {started}")
        file.flush()
        yield


def die_with_parent() -> None:
    """Ask the kernel to kill this worker process when the one that made it dies.

    A worker that outlived a killed parent would hold the parent's locks."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise StageError (exit 5) unless folder's disk has room for needed_bytes."""
    existing = next(
        parent for parent in [Path(folder).absolute(), *Path(folder).absolute().parents] if parent.exists()
    )
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise StageError(
            f"{folder}: needs about {needed_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB free "
            "(free some space or write elsewhere)",
            EXIT_DISK,
        )
