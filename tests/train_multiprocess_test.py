"""Several processes train as one with the same devices, also when one is killed on the way."""

import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from easylm_jax.prepare import PrepareConfig, prepare
from tests import command

pytestmark = pytest.mark.slow
STEPS, SAVED = 8, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def files(folder) -> tuple[str, ...]:
    return command.from_files(command.write_text(folder))


def _one(folder: Path, workdir: Path, *arguments: str, devices: int = 2) -> str:
    settings = command.small(workdir, *arguments)
    return command.finish(command.start(*settings, devices=devices, cache=folder / "compiled"))[0]


def _start(
    folder: Path, workdir: Path, *arguments: str, number: int, devices: int = 1, **by_process
) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    join = ("initialize=True", f"coordinator_address={address}", f"num_processes={number}")
    join = tuple(f"--config.distributed.{setting}" for setting in join)
    return [
        command.start(
            *command.small(workdir, *arguments, *join, f"--config.distributed.process_id={i}"),
            cache=folder / f"compiled_{i}",
            devices=devices,
            **by_process.get(f"process_{i}", {}),
        )
        for i in range(number)
    ]


def _two(
    folder: Path, workdir: Path, *arguments: str, status: int = 0, devices: int = 1
) -> list[tuple[str, str]]:
    processes = _start(folder, workdir, *arguments, number=2, devices=devices)
    try:
        return [command.finish(process, status=status) for process in processes]
    finally:
        for process in processes:
            process.kill()


def _losses(workdir: Path) -> list[tuple]:
    names = ("train/loss", "eval/heldout/loss")
    return [
        (row["step"], name, row[name])
        for row in command.rows(workdir)
        for name in names
        if name in row
    ]


def _assert_same(got: Path, expected: Path) -> None:
    """Rounding alone differs: the processes add gradients in another order."""
    ours, theirs = _losses(got), _losses(expected)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    worst = max(abs(a[2] - b[2]) for a, b in zip(ours, theirs, strict=True))
    moved = command.largest_difference(command.arrays(got, STEPS), command.arrays(expected, STEPS))
    print(f"largest difference: loss {worst:.1e}, parameters {moved:.1e}")
    assert worst < 1e-5 and moved < 1e-4


def _before_the_last_checkpoint(workdir: Path, name: str) -> Path:
    copy = workdir.parent / name
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / f"{STEPS:08d}")
    return copy


def test_two_processes_train_as_one(folder, files):
    one, two = folder / "one", folder / "two"
    _one(folder, one, *files)
    shown = _two(folder, two, *files)
    _assert_same(two, one)
    assert "finished after step 8/8" in shown[0][0]
    ours = [line for line in shown[1][0].splitlines() if not line.startswith("[Gloo]")]
    assert (ours, shown[1][1]) == ([], "")  # only the first process speaks

    other = _before_the_last_checkpoint(one, "one_then_two")
    shown = _two(folder, other, *files)
    assert f"resuming after step {SAVED}" in shown[0][0]
    _assert_same(other, one)

    other = _before_the_last_checkpoint(two, "two_then_one")
    _one(folder, other, *files)
    _assert_same(other, one)


def test_a_wrong_setting_ends_both(folder, files):
    shown = _two(folder, folder / "wrong", *files, "--config.mesh=3,1,1,1", status=2)
    for _, err in shown:
        assert err.startswith("error: mesh '3,1,1,1' needs 3 devices, but there are 2"), err


# Writes down which rows a process reads, and kills the victim before its seventh step.
WATCHED = """
import os, pathlib, runpy, time
from easylm_jax.data.mixture import EpochRows
from easylm_jax.data.prefetch import Prefetch

index, victim, folder = {index}, {victim}, pathlib.Path({folder!r})
read, take, steps = EpochRows.read, Prefetch.next, []

def read_noted(self, number):
    with open(folder / f"rows_{{index}}", "a") as file:
        print(number, file=file)
    return read(self, number)

def take_or_die(self):
    steps.append(self)
    while index == victim and len(steps) == 7:
        if (folder / "checkpoints/00000004").exists():  # written in the background
            os.kill(os.getpid(), 9)
        time.sleep(0.01)
    return take(self)

EpochRows.read, Prefetch.next = read_noted, take_or_die
runpy.run_module("easylm_jax.train", run_name="__main__")
"""


def test_one_of_three_is_killed_and_the_run_goes_on_with_two_or_one(folder):
    """The two have two devices each, the mesh is split within and across them."""
    root = str(folder / "rows")  # without held-out text: fewer programs to compile
    text = command.write_text(folder)
    prepare(PrepareConfig({"a": (text,)}, tokenizer="bytes", validation_fraction=0.0), root)
    nothing = ("--config.data.files=()", "--config.data.heldout_files=()")
    steady = "--config.optim.eps=0.001"  # Adam makes much of rounding where gradients are nothing
    settings = (f"--config.data.root={root}", *nothing, "--config.batch_size=12", steady)
    flat = (*settings, "--config.mesh=replica:2,fsdp:-1")
    undisturbed, workdir, victim = folder / "undisturbed", folder / "killed", 1
    _one(folder, undisturbed, *flat)
    programs = {
        f"process_{i}": {
            "program": ("-c", WATCHED.format(index=i, victim=victim, folder=str(workdir)))
        }
        for i in range(3)
    }
    three = (*settings, "--config.mesh=replica:-1")
    workdir.mkdir()
    processes = _start(folder, workdir, *three, number=3, **programs)
    try:
        shown = [
            command.finish(process, status=-9 if i == victim else 2)
            for i, process in enumerate(processes)
        ]
    finally:
        for process in processes:
            process.kill()
    sentence = (
        rf"error: process {victim} on host \S+ died near step [67]: start the same command .*"
    )
    for i in {0, 1, 2} - {victim}:
        assert re.fullmatch(sentence, shown[i][1].strip()), shown[i][1]
    for i in range(3):  # of each batch of 12 rows, the i-th third
        numbers = [int(line) for line in (workdir / f"rows_{i}").read_text().split()]
        assert len(numbers) >= 7 * 4 and {number % 12 // 4 for number in numbers} == {i}

    other = workdir.parent / "killed_then_one"
    shutil.copytree(workdir, other)
    assert f"resuming after step {SAVED}" in _one(folder, other, *flat)
    _assert_same(other, undisturbed)

    hybrid = (*settings, "--config.mesh=fsdp:-1@replica:2")
    out = _two(folder, workdir, *hybrid, devices=2)[0][0]
    assert f"resuming after step {SAVED}" in out
    assert "replica 2, fsdp 2, sequence 1, tensor 1" in out
    _assert_same(workdir, undisturbed)
