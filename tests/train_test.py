"""Whole runs in this process: resuming changes nothing, the guard works, bad input says so.

Kills, signals and the command line are in `train_crash_test.py`.
"""

import contextlib
import dataclasses
import io
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from easylm_jax.config import as_config_dict, from_config_dict
from easylm_jax.data.source import DataConfig
from easylm_jax.monitor import profiler
from easylm_jax.optim import OptimConfig
from easylm_jax.prepare import PrepareConfig, prepare
from easylm_jax.step import GuardConfig
from easylm_jax.train import CheckpointConfig, EvalConfig, TrainConfig, train
from tests import command
from tests.command import largest_difference
from tests.tiny import tiny_config

STEPS, SAVED = 8, 4


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return command.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def root(tmp_path_factory, text) -> str:
    folder = str(tmp_path_factory.mktemp("prepared"))
    prepare(PrepareConfig({"a": (text,)}, tokenizer="bytes", validation_fraction=0.3), folder)
    return folder


@pytest.fixture(scope="module")
def base(text) -> TrainConfig:
    return TrainConfig(
        model=tiny_config(vocab_size=264, residual_dropout=(0.1, 0.1)),
        tokenizer="bytes",
        data=DataConfig(files=(text,), heldout_files=(text,)),
        duration=f"{STEPS} steps",
        batch_size=16,
        seq_len=16,
        optim=OptimConfig(lr=1e-2, warmup="2 steps"),
        checkpoint=CheckpointConfig(every=f"{SAVED} steps"),
        eval=EvalConfig(every="4 steps", max_batches=1),
        log_every=2,
    )


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> str:
    """The workdir of an undisturbed run."""
    workdir = str(tmp_path_factory.mktemp("finished"))
    train(base, workdir)
    return workdir


def _shown(cfg: TrainConfig, workdir: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        train(cfg, workdir)
    return out.getvalue()


def _interrupted(finished: str, tmp_path: Path) -> str:
    """As a kill after the last step but before its checkpoint leaves it."""
    workdir = tmp_path / "interrupted"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints" / f"{STEPS:08d}")
    return str(workdir)


def _arrays(workdir: str, step: int = STEPS) -> dict[str, np.ndarray]:
    return command.arrays(Path(workdir), step)


def _logged(workdir: str) -> list[dict]:
    rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").open()]
    return [
        {k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")} for row in rows
    ]


@pytest.mark.parametrize("kind", ["files", "root"])
def test_a_resumed_run_ends_as_the_undisturbed_one(kind, base, root, finished, tmp_path):
    if kind == "root":
        base = dataclasses.replace(base, data=DataConfig(root=root))
        finished = str(tmp_path / "finished")
        train(base, finished)
    workdir = _interrupted(finished, tmp_path)
    assert f"resuming after step {SAVED}" in _shown(base, workdir)
    expected, got = _arrays(finished), _arrays(workdir)
    assert got.keys() == expected.keys()
    assert all(got[name].tobytes() == expected[name].tobytes() for name in expected)
    assert _logged(workdir) == _logged(finished)
    assert [row["step"] for row in _logged(workdir)] == [0, 2, 4, 4, 6, 8, 8]


# Sums over devices are made in another order; Adam amplifies that where gradients are near 0.
@pytest.mark.slow
@pytest.mark.parametrize("change", [dict(mesh="2,2,1,2"), dict(mesh="1,2,4,1")])
def test_another_mesh_changes_rounding_only(change, base, finished, tmp_path):
    workdir = _interrupted(finished, tmp_path)
    train(dataclasses.replace(base, **change), workdir)
    assert largest_difference(_arrays(workdir), _arrays(finished)) < 1e-4


@pytest.mark.slow
def test_micro_batches_change_rounding_only(base, tmp_path):
    """Without dropout, whose masks are drawn per micro-batch."""
    base = dataclasses.replace(base, model=tiny_config(vocab_size=264))
    train(base, str(tmp_path / "one"))
    workdir = _interrupted(str(tmp_path / "one"), tmp_path)
    train(dataclasses.replace(base, micro_batches=2), workdir)
    assert largest_difference(_arrays(workdir), _arrays(str(tmp_path / "one"))) < 1e-4


@pytest.mark.slow
def test_a_finished_run_goes_on_for_longer(base, finished, tmp_path):
    workdir = str(tmp_path / "longer")
    shutil.copytree(finished, workdir)
    train(base, workdir)  # nothing left to do
    assert _logged(workdir) == _logged(finished)
    train(dataclasses.replace(base, duration="10 steps"), workdir)
    assert [row["step"] for row in _logged(workdir)] == [0, 2, 4, 4, 6, 8, 8, 10, 10]


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(base, finished, tmp_path):
    workdir = str(tmp_path / "damaged")
    shutil.copytree(finished, workdir)
    for file in (Path(workdir) / "checkpoints" / f"{STEPS:08d}" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    shown = _shown(base, workdir)
    assert f"{STEPS:08d} is damaged and was skipped" in shown
    assert f"resuming after step {SAVED}" in shown
    assert _logged(workdir) == _logged(finished)
    for path in (Path(workdir) / "checkpoints").glob("*/commit.json"):
        path.write_text("{")
    with pytest.raises(OSError, match="checkpoints in .* are damaged"):
        train(base, workdir)


def test_init_from_takes_the_parameters_alone(base, finished, tmp_path):
    cfg = dataclasses.replace(base, init_from=f"{finished}/checkpoints", duration="0 steps")
    train(dataclasses.replace(cfg, optim=OptimConfig(warmup="0 steps")), str(tmp_path))
    expected, got = _arrays(finished), _arrays(str(tmp_path), 0)
    for name, value in got.items():
        if name.startswith("params"):
            assert value.tobytes() == expected[name].tobytes()
    assert got["step"] == 0 and not any(
        v.any() for k, v in got.items() if k.endswith("kernel") and "/mu/" in k
    )


@pytest.mark.slow
def test_the_guard_names_the_bad_step(base, tmp_path):
    explodes = OptimConfig(lr=1e30, warmup="0 steps", clip_norm=0.0)
    skip = dataclasses.replace(base, optim=explodes)
    shown = _shown(skip, str(tmp_path / "skip"))
    assert "step 2 is bad: loss" in shown and "its update was not made" in shown
    assert sum(row.get("guard/skipped", 0) for row in _logged(str(tmp_path / "skip"))) == STEPS - 1
    stop = dataclasses.replace(skip, guard=GuardConfig(on_bad_loss="stop"), log_every=1)
    with pytest.raises(ValueError, match="step 2 is bad.*its update was not made"):
        train(stop, str(tmp_path / "stop"))
    first = _arrays(str(tmp_path / "skip"))  # the only update that was made is the first
    stopped = _arrays(str(tmp_path / "stop"), 3)
    assert all(stopped[n].tobytes() == first[n].tobytes() for n in first if "params" in n)
    steps = [row["step"] for row in _logged(str(tmp_path / "stop"))]
    assert steps == [0, 1, 2, 3]  # also the rows of the bad step and of the one under way


def test_left_out_documents_are_counted(base, text, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(Path(text).read_text() + 'no json\n{"txt": "x"}\n')
    data = DataConfig(files=(str(bad),), on_bad_line="skip")
    train(dataclasses.replace(base, data=data, duration="2 steps"), str(tmp_path / "run"))
    told = [row.get("data/documents_left_out") for row in _logged(str(tmp_path / "run"))]
    assert 2 in told
    data = dataclasses.replace(data, on_bad_line="error")
    with pytest.raises(ValueError, match="bad.jsonl, line 201 is not JSON"):
        train(dataclasses.replace(base, data=data), str(tmp_path / "other"))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(mesh="1,3,1,1"), "mesh '1,3,1,1' needs 3 devices, but there are 8"),
        (dict(batch_size=12), "12 rows per micro-batch do not split"),
        (dict(mesh="1,1,1,8"), "num_kv_heads = 2 do not split over mesh axis tensor = 8"),
        (
            dict(mesh="1,4,1,2", model=tiny_config(vocab_size=265)),
            "embedding has size 265 in dim 0, which mesh axis tensor = 2 does not divide",
        ),
        (dict(data=DataConfig(files=("/none/*.jsonl",))), "no file matches /none"),
        (dict(data=DataConfig(root="/none")), "no prepared data set in /none"),
        (dict(model=tiny_config(vocab_size=64)), "set model.vocab_size to at least 259"),
        (dict(eval=EvalConfig(every="0 steps")), "at least 1 step"),
        (dict(duration="3%"), "a percentage of what"),
        (dict(init_from="/none"), "/none is not a checkpoint"),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_leaves_nothing(change, message, base, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(base, **change), str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} <= {"lock"}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model=tiny_config(vocab_size=272)), "model.vocab_size: 264 -> 272"),
        (dict(seq_len=32), "seq_len: 16 -> 32"),
        (dict(seed=1), "seed: 0 -> 1"),
    ],
)
def test_a_workdir_with_another_run_is_not_touched(change, message, base, finished, tmp_path):
    workdir = Path(_interrupted(finished, tmp_path))
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(base, **change), str(workdir))
    del before[workdir / "lock"]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_init_from_another_shape_lists_what_differs(base, finished, tmp_path):
    model = tiny_config(vocab_size=264, d_ff=64)
    cfg = dataclasses.replace(base, model=model, init_from=f"{finished}/checkpoints")
    with pytest.raises(ValueError, match=r"different: .*gate/kernel \(expected"):
        train(cfg, str(tmp_path))


def test_the_profiler_traces_its_window_even_if_the_run_ends_in_it(tmp_path):
    flushed = []
    with profiler("3:6", str(tmp_path), flush=lambda: flushed.append(1)) as at:
        for step in range(4, 6):  # resumed inside the window
            at(step)
            jax.numpy.ones(3).block_until_ready()
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert flushed == []


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("packing", "best", "config.data.packing = 'best' is not one of 'stream'"),
        ("files", "a.txt", "config.data.files = 'a.txt' is not of type tuple"),
        ("window", "many", "config.data.window = 'many' is not of type int"),
    ],
)
def test_a_config_file_with_a_wrong_type_is_told(key, value, message, base):
    config = as_config_dict(base)
    with config.data.ignore_type():
        config.data[key] = value
    with pytest.raises(ValueError, match=message):
        from_config_dict(TrainConfig, config)
