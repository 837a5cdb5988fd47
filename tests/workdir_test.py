"""The lock lets one run in and dies with it; each start leaves its own line."""

import json
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from easylm_jax import workdir
from easylm_jax.workdir import Difference, compare_config, without

HOLD = """
import sys
from easylm_jax import workdir
with workdir.lock(sys.argv[1]):
    print(1, flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_told_who_holds_the_workdir_until_that_one_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=root, text=True, **pipes) as holder:
        assert holder.stdout.readline() == "1\n"
        with pytest.raises(ValueError) as caught, workdir.lock(str(tmp_path / "run")):
            pass
        assert f"process {holder.pid} on host {socket.gethostname()}" in str(caught.value)
        assert "\n" not in str(caught.value)
        with workdir.lock(str(tmp_path / "other")):
            pass
        second = subprocess.run(command, cwd=root, text=True, capture_output=True, input="")
        assert second.returncode != 0 and f"process {holder.pid} " in second.stderr
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with workdir.lock(str(tmp_path / "run")):
        pass
    with workdir.lock(str(tmp_path / "run")):  # the first of these two let go
        pass


def save_tokenizer(folder: str) -> None:
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / "tokenizer.model").write_bytes(b"pieces")


def test_each_start_adds_its_command_and_configuration(tmp_path):
    run = tmp_path / "new" / "run"
    commands = [["python", "-m", "x", f"--config.note=it's start {i}"] for i in range(3)]
    assert workdir.read_config(str(run)) is None
    for i, argv in enumerate(commands):
        workdir.record_start(str(run), {"seed": i}, argv=argv, save_tokenizer=save_tokenizer)
    assert [shlex.split(line) for line in (run / "command.txt").open()] == commands
    starts = [json.loads(line) for line in (run / "starts.jsonl").open()]
    assert [start["argv"] for start in starts] == commands
    assert [start["config"] for start in starts] == [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    assert workdir.read_config(str(run)) == {"seed": 2}
    assert (run / "tokenizer" / "tokenizer.model").read_bytes() == b"pieces"
    names = {path.name for path in run.iterdir()}
    assert names == {"command.txt", "config.json", "starts.jsonl", "tokenizer"}


def make_package(folder: Path) -> dict:
    """What `code_version` says from a copy of the file in `folder`, run by its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "workdir.py").write_text(Path(workdir.__file__).read_text())
    code = (
        "import importlib.metadata as m; m.version = lambda name: 'V'\n"
        "import workdir, json; print(json.dumps(workdir.code_version()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_the_commit_and_whether_it_is_dirty(tmp_path):
    def git(*args: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *who, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert make_package(tmp_path / "outside") == {"version": "V"}
    git("init")
    (tmp_path / ".gitignore").write_text("venv\n__pycache__\noutside\n")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "workdir.py").write_text(Path(workdir.__file__).read_text())
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert make_package(tmp_path / "code") == {"commit": head, "dirty": False}
    assert make_package(tmp_path / "venv") == {"version": "V"}  # inside a checkout, not of it
    (tmp_path / "code" / "new.py").write_text("")
    assert make_package(tmp_path / "code") == {"commit": head, "dirty": True}


def test_differences_of_configurations():
    old = {"seed": 1, "model": {"dim": 8, "rope": {"theta": 1e4}}, "mesh": (1, -1), "tags": {}}
    new = {"seed": 1, "model": {"dim": 9, "rope": None}, "mesh": [1, -1], "log": {"every": 5}}
    differences = compare_config(old, new)
    assert differences == [
        Difference("log.every", workdir.ABSENT, 5),
        Difference("model.dim", 8, 9),
        Difference("model.rope", workdir.ABSENT, None),
        Difference("model.rope.theta", 1e4, workdir.ABSENT),
        Difference("tags", {}, workdir.ABSENT),
    ]
    assert str(differences[1]) == "model.dim: 8 -> 9"
    assert compare_config(new, json.loads(json.dumps(new))) == []


def test_free_prefixes_end_at_a_dot():
    keys = ["eval", "eval.every", "evaluate", "model.eval", "total_steps"]
    differences = [Difference(key, 0, 1) for key in keys]
    left = without(differences, ["eval", "total_steps"])
    assert [d.key for d in left] == ["evaluate", "model.eval"]
