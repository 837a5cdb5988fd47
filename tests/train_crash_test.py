"""The command line as a user meets it: kills, signals, full disks and wrong commands."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("crash")


@pytest.fixture(scope="module")
def files(folder) -> tuple[str, str]:
    return command.from_files(command.write_text(folder))


@pytest.fixture(scope="module")
def start(folder) -> Callable[..., subprocess.Popen]:
    def start(*arguments: str, **popen) -> subprocess.Popen:
        return command.start(*arguments, cache=folder / "compiled", **popen)

    return start


@pytest.fixture(scope="module")
def finished(folder, files, start) -> Path:
    """The workdir of an undisturbed run of 8 steps."""
    workdir = folder / "finished"
    command.finish(start(*command.small(workdir, *files)))
    return workdir


def _wait_for(what: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + command.TIMEOUT
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _steps(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("data", ["files", "root"])
def test_a_run_killed_three_times_ends_with_the_same_bits(data):
    script = [sys.executable, "experiments/kill_resume/run.py", "--kills=3", f"--data={data}"]
    environment = os.environ | {"PYTHONPATH": str(command.ROOT)}
    done = subprocess.run(
        script, cwd=command.ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(json.loads(done.stdout)["kills"].values()) == 3


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_line_shown_continues(signum, folder, files, start):
    """Continued on four devices, it ends as an undisturbed run does, to rounding."""
    workdir = folder / signum.name
    settings = command.small(workdir, *files, "--config.duration=2000 steps")
    process = start(*settings)
    _wait_for(lambda: _steps(workdir) > 3, process)
    process.send_signal(signum)
    out, err = command.finish(process)
    step = int(re.search(r"stopped after step ([\d,]+)/2,000", out)[1].replace(",", ""))
    assert err == "" and out.splitlines()[-1].startswith("continue    ")
    assert (workdir / "checkpoints" / f"{step:08d}" / "commit.json").exists()

    again = shlex.split(out.splitlines()[-1].removeprefix("continue"))[3:]
    until = f"--config.duration={step + 2} steps"
    undisturbed = folder / f"{signum.name}_undisturbed"
    # The schedule depends on the length of the run, so the undisturbed one has the same two.
    shutil.copytree(workdir, undisturbed)
    out, _ = command.finish(start(*again, until, devices=4))
    assert f"resuming after step {step}" in out and "4 x cpu" in out
    command.finish(start(*again, until, f"--workdir={undisturbed}"))
    a, b = command.arrays(workdir, step + 2), command.arrays(undisturbed, step + 2)
    assert command.largest_difference(a, b) < 1e-4


def test_a_second_interrupt_kills_and_a_workdir_has_one_run(folder, files, start):
    workdir = folder / "twice"
    settings = command.small(workdir, *files, "--config.duration=100000 steps")
    process = start(*settings)
    _wait_for(lambda: _steps(workdir) > 3, process)
    _, err = command.finish(start(*settings), status=2)
    assert re.fullmatch(r"error: workdir \S+ is in use by process \d+ on host .*\n", err)
    # While it is stopped it cannot answer the first one.
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    for _ in range(50):
        time.sleep(0.002)
        process.send_signal(signal.SIGINT)
    _, err = command.finish(process, status=-signal.SIGINT)
    assert "Traceback" not in err


@pytest.mark.parametrize("on_failure, last", [("continue", 24), ("stop", 16)])
def test_a_full_disk_leaves_the_last_good_checkpoint(on_failure, last, folder, finished, start):
    workdir = folder / f"full_{on_failure}"
    shutil.copytree(finished, workdir)
    arguments = shlex.split((finished / "command.txt").read_text().splitlines()[0])[3:]
    arguments += [f"--workdir={workdir}", f"--config.checkpoint.on_failure={on_failure}"]
    arguments += ["--config.duration=24 steps"]
    process = command.start(*arguments, cache=folder / on_failure)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))  # bytes per file
    out, err = command.finish(process, status=2)
    # Orbax and the cache of compiled programs tell of it at length, from threads of their own.
    assert err.count("error: checkpoint ") == 1, err[-1000:]
    assert err.count("could not be written") == 1
    assert ("training goes on" in out) == (on_failure == "continue")
    assert max(row["step"] for row in command.rows(workdir)) == last
    out, _ = command.finish(start(*arguments))
    assert "resuming after step 8" in out and "finished after step 24/24" in out


WRONG = [
    (["--config.optim.lrr=1"], r"--config has no setting 'lrr'; near it: lr"),
    (["--config.zzz=1"], r"--config has no setting 'zzz'; .*"),
    (["--config.batch_size=abc"], r".*--config.batch_size=abc.*"),
    (["--config.data.packing=best"], r"config.data.packing = 'best' is not one of 'stream', .*"),
    (["stray"], r"arguments \['stray'\] are not understood; .*"),
    (["--config=configs/none.py"], r"the config file cannot be loaded: .*'configs/none.py'"),
    (["--config=configs/llama_pretrain.py:99b"], r".*: unknown model .llama_99b.; near it: .*"),
    (["--workdir=/proc/none"], r"workdir /proc/none cannot be written \(.*\): pass another .*"),
    (["--workdir="], r"--config and --workdir are needed, such as .*"),
    (["--config.mesh=1,3,1,1"], r"mesh '1,3,1,1' needs 3 devices, but there are 1; .*"),
    (["--config.profile=5"], r"profile = '5' is not a window of steps such as '100:105'"),
]


@pytest.mark.parametrize("arguments, message", WRONG, ids=lambda x: str(x)[:30])
def test_a_wrong_command_is_answered_by_one_sentence(arguments, message, folder, files, start):
    settings = ["--config=configs/debug.py", *files, f"--workdir={folder / 'wrong'}", *arguments]
    out, err = command.finish(start(*settings), status=2)
    assert re.fullmatch(f"error: {message}\n", err), err
    assert out == ""


def test_a_bug_keeps_its_traceback(folder, files, start):
    config = folder / "buggy.py"
    config.write_text("def get_config():\n    return {}['no such key']\n")
    _, err = command.finish(start(f"--config={config}", f"--workdir={folder}"), status=1)
    assert "Traceback" in err and "buggy.py" in err


def test_what_a_user_sees(folder, files, start):
    workdir = folder / "seen"
    settings = command.small(workdir, *files, "--config.profile=3:5")
    out, err = command.finish(start(*settings))
    lines = out.splitlines()
    assert err == ""
    assert lines[0] == "1 x cpu: replica 1, fsdp 1, sequence 1, tensor 1"
    assert lines[1] == "data: 200 examples"
    assert "parameters, 8 steps of 8 rows x 32 tokens = 2,048 tokens" in lines[2]
    assert str(workdir) in lines[3]
    assert any(line.startswith("step 8/8  loss ") for line in lines)
    assert [line.split()[0] for line in lines[-4:]] == [
        "finished",
        "checkpoint",
        "report",
        "continue",
    ]
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    out, err = command.finish(start(*shlex.split(lines[-1])[4:]))
    assert "resuming after step 8" in out and "finished after step 16/16" in out and err == ""
