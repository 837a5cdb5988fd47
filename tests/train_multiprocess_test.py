"""Two processes train as one with the same devices, and go on from one another's checkpoints."""

import shutil
import socket
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
def data(folder) -> dict[str, tuple[str, ...]]:
    text = command.write_text(folder)
    root = str(folder / "data")
    prepare(PrepareConfig({"a": (text,)}, tokenizer="bytes", validation_fraction=0.3), root)
    nothing = ("--config.data.files=()", "--config.data.heldout_files=()")
    return {"files": command.from_files(text), "root": (f"--config.data.root={root}", *nothing)}


def _one(folder: Path, workdir: Path, *arguments: str) -> None:
    settings = command.small(workdir, *arguments)
    command.finish(command.start(*settings, devices=2, cache=folder / "compiled"))


def _two(folder: Path, workdir: Path, *arguments: str, status: int = 0) -> list[tuple[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    join = ("initialize=True", f"coordinator_address={address}", "num_processes=2")
    join = tuple(f"--config.distributed.{setting}" for setting in join)
    processes = [
        command.start(
            *command.small(workdir, *arguments, *join, f"--config.distributed.process_id={i}"),
            cache=folder / f"compiled_{i}",
        )
        for i in range(2)
    ]
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


@pytest.mark.parametrize("kind", ["files", "root"])
def test_two_processes_train_as_one(kind, folder, data):
    one, two = folder / f"{kind}_one", folder / f"{kind}_two"
    _one(folder, one, *data[kind])
    shown = _two(folder, two, *data[kind])
    _assert_same(two, one)
    assert "finished after step 8/8" in shown[0][0]
    ours = [line for line in shown[1][0].splitlines() if not line.startswith("[Gloo]")]
    assert (ours, shown[1][1]) == ([], "")  # only the first process speaks

    other = _before_the_last_checkpoint(one, f"{kind}_one_then_two")
    shown = _two(folder, other, *data[kind])
    assert f"resuming after step {SAVED}" in shown[0][0]
    _assert_same(other, one)

    other = _before_the_last_checkpoint(two, f"{kind}_two_then_one")
    _one(folder, other, *data[kind])
    _assert_same(other, one)


def test_a_wrong_setting_ends_both(folder, data):
    shown = _two(folder, folder / "wrong", *data["files"], "--config.mesh=3,1,1,1", status=2)
    for _, err in shown:
        assert err.startswith("error: mesh '3,1,1,1' needs 3 devices, but there are 2"), err
