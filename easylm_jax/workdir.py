"""What a run writes beside checkpoints and metrics: lock, configuration, commands, tokenizer.

What it is not: it judges no configuration and knows no key of one; the entry point that calls it
says which keys may change. Only the first host calls it.

    <workdir>/config.json    the resolved configuration of the last start
    <workdir>/command.txt    one line per start: the command, quoted for a shell
    <workdir>/starts.jsonl   one line per start: command, commit, versions, host, configuration
    <workdir>/tokenizer/     the tokenizer's files
    <workdir>/lock           who is running in here
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
ABSENT = "(absent)"


@contextlib.contextmanager
def lock(workdir: str) -> Iterator[None]:
    """Hold `workdir` for this process; ValueError naming the holder if another run is in it.

    The kernel drops the lock with the process, so a killed run leaves none behind. Object stores
    (gs://) have no such lock: there nothing stops a second run, and both would write checkpoints.
    """
    if "://" in workdir:
        yield
        return
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        opened = open(Path(workdir) / "lock", "a+")
    except OSError as error:
        raise ValueError(
            f"workdir {workdir} cannot be written ({error}): pass another --workdir"
        ) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"workdir {workdir} is in use by {file.read().strip() or 'another run'}: stop that "
                "run or pass another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on host {socket.gethostname()}\n")
        file.flush()
        yield


def record_start(
    workdir: str,
    config: Mapping[str, Any],
    *,
    argv: Sequence[str],
    save_tokenizer: Callable[[str], None],
) -> None:
    """Write all files above; a run that is continued adds its lines to those of earlier starts.

    `config` is the resolved configuration as plain JSON types; `argv` is the whole command, from
    `sys.orig_argv`; `save_tokenizer(folder)` writes the tokenizer's files.
    """
    directory = epath.Path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    start = {
        "time": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "argv": list(argv),
        **code_version(),
        "versions": library_versions(),
        "config": config,
    }
    _replace(directory / "config.json", json.dumps(config, indent=2) + "\n")
    _append(directory / "command.txt", shlex.join(argv))
    _append(directory / "starts.jsonl", json.dumps(start))
    save_tokenizer(str(directory / "tokenizer"))


def read_config(workdir: str) -> dict[str, Any] | None:
    """The configuration of the last start; None in a directory where no run has been."""
    path = epath.Path(workdir) / "config.json"
    return json.loads(path.read_text()) if path.exists() else None


def code_version() -> dict[str, Any]:
    """`commit` and whether the checkout was `dirty`; outside a checkout the package's `version`."""
    here = Path(__file__)

    def git(*args: str) -> str:
        command = ["git", "-C", str(here.parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # not some checkout around a venv
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (FileNotFoundError, subprocess.CalledProcessError):
        pass
    try:
        return {"version": importlib.metadata.version("easylm_jax")}
    except importlib.metadata.PackageNotFoundError:  # a bare copy of the files
        return {"version": "unknown"}


def library_versions() -> dict[str, str]:
    """Of Python and of the libraries that can change numbers or files."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions}


class Difference(NamedTuple):
    """One key, dotted, whose value changed; `ABSENT` on the side that lacks it."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def compare_config(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """What differs, sorted by key. Both are compared as JSON, so a tuple equals a list."""
    before, after = _flat(old), _flat(new)
    return [
        Difference(key, before.get(key, ABSENT), after.get(key, ABSENT))
        for key in sorted(before.keys() | after.keys())
        if key not in before or key not in after or before[key] != after[key]
    ]


def without(differences: Sequence[Difference], free: Sequence[str]) -> list[Difference]:
    """Those under none of the prefixes `free`: "eval" frees `eval` and `eval.batch_size`.

    What is left changes the meaning of the run. A list of what is free, not of what is fixed: a
    new setting is fixed until someone has thought about it.
    """
    return [d for d in differences if not any(f"{d.key}.".startswith(f"{p}.") for p in free)]


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    stack = [("", json.loads(json.dumps(config)))]
    while stack:
        name, value = stack.pop()
        if isinstance(value, dict) and value:
            stack += [(f"{name}.{key}".lstrip("."), inner) for key, inner in value.items()]
        else:
            flat[name] = value
    return flat


def _replace(path: epath.Path, text: str) -> None:
    """Killed at any moment, the old text or the new one is there."""
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_text(text)
    temporary.replace(path)


def _append(path: epath.Path, line: str) -> None:
    # Object stores cannot append; these files stay small.
    _replace(path, (path.read_text() if path.exists() else "") + line + "\n")
