"""Conversions keep every bit, and a conversion that fails leaves nothing under the final name."""

import dataclasses
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easylm_jax.convert import convert, whole_or_absent, write_native
from easylm_jax.loading import open_model, target_params
from easylm_jax.mesh import make_mesh
from easylm_jax.text.tokenizer import ByteTokenizer
from tests.loading_test import TEMPLATE, WRITERS, random_model, same_bits
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[1]
FORMATS = ("hf", "gguf", "meta", "easylm")


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("native") / "model")
    write_native(random_model(tokenizer=ByteTokenizer(), chat_template=TEMPLATE), folder)
    return folder


def params_in(path):
    opened = open_model(str(path))
    return opened.read(target_params(opened.config, make_mesh("1,1,1,1", jax.devices()[:1])))


@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back_is_the_same_bits(name, native, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    told = convert(native, str(there), to_format=name)
    convert(str(there), str(back))
    assert same_bits(params_in(back), params_in(native))
    assert told.parameters == sum(x.size for x in jax.tree.leaves(params_in(native)))
    assert told.parameter_bytes == 4 * told.parameters <= told.bytes_written
    assert {path.name for path in tmp_path.iterdir()} == {"there", "back"}


def test_the_type_of_the_file_is_kept_unless_another_is_asked_for(tmp_path):
    half = random_model(tiny_config(vocab_size=264, param_dtype="bfloat16"))
    write_native(half, str(tmp_path / "a"))
    convert(str(tmp_path / "a"), str(tmp_path / "b"), to_format="hf")
    convert(str(tmp_path / "b"), str(tmp_path / "c"))
    assert open_model(str(tmp_path / "c")).config.param_dtype == "bfloat16"
    assert same_bits(params_in(tmp_path / "c"), half.params)
    convert(str(tmp_path / "b"), str(tmp_path / "d"), dtype="float32")
    whole = jax.tree.map(lambda x: x.astype("float32"), half.params)
    assert same_bits(params_in(tmp_path / "d"), whole)


def test_a_file_of_mixed_types_is_not_narrowed_unasked(tmp_path):
    half = random_model(tiny_config(vocab_size=264, param_dtype="bfloat16"))
    WRITERS["hf"](half, str(tmp_path / "hf"), dtype="bfloat16")
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].astype(np.float32)}, file)
    with pytest.raises(ValueError, match=f"mixes types: {name} is float32, .* bfloat16.*--dtype"):
        convert(str(tmp_path / "hf"), str(tmp_path / "out"))
    convert(str(tmp_path / "hf"), str(tmp_path / "out"), dtype="float32")


@pytest.mark.parametrize("kind", ["make", "make_exact"])
def test_a_diff_applied_to_its_base_is_the_model(kind, tmp_path, capsys):
    paths = {name: str(tmp_path / name) for name in ("base", "model", "diff", "back")}
    base = random_model()
    rng = np.random.default_rng(0)
    tuned = jax.tree.map(lambda x: x + 0.01 * rng.normal(size=x.shape).astype("f"), base.params)
    WRITERS["meta"](base, paths["base"])
    WRITERS["hf"](dataclasses.replace(base, params=tuned), paths["model"])
    convert(paths["model"], paths["diff"], base=paths["base"], diff=kind)
    convert(paths["diff"], paths["back"], base=paths["base"], diff="apply")
    back = params_in(paths["back"])
    if kind == "make_exact":
        assert same_bits(back, tuned)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, tuned)
    sums = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert len(set(sums)) == 1 and len(sums[0]) == 64
    with pytest.raises(ValueError, match="checksum .* expected"):
        convert(paths["diff"], str(tmp_path / "x"), base=paths["model"], diff="apply")
    with pytest.raises(ValueError, match="--diff=make needs --base=PATH"):
        convert(paths["model"], str(tmp_path / "x"), diff="make")
    assert not (tmp_path / "x").exists()


def test_nothing_is_overwritten_unless_asked(native, tmp_path):
    target = tmp_path / "there"
    target.write_text("precious")
    with pytest.raises(ValueError, match="there is there already.*--overwrite"):
        convert(native, str(target))
    assert target.read_text() == "precious"
    for name in ("native", "gguf"):  # a folder over a file, and a file over that folder
        convert(native, str(target), to_format=name, overwrite=True)
        assert same_bits(params_in(target), params_in(native))
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(to_format="onnx"), "--format=onnx is not one of native, hf, gguf"),
        (dict(dtype="q8_0"), r"--dtype=q8_0 is not one of float32, .* \(native output\)"),
        (dict(diff="make", base="x"), "is a native model: convert it to hf first"),
    ],
)
def test_wrong_options_are_told(options, message, native, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(native, str(tmp_path / "out"), **options)
    assert not list(tmp_path.iterdir())


def test_garbage_is_told_and_leaves_nothing(native, tmp_path):
    (tmp_path / "noise.gguf").write_bytes(np.random.default_rng(0).bytes(5_000))
    with pytest.raises(ValueError, match="noise.gguf is not a checkpoint or model: the file is"):
        convert(str(tmp_path / "noise.gguf"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="not a local path"):
        convert(native, "gs://bucket/model")
    assert [path.name for path in tmp_path.iterdir()] == ["noise.gguf"]


def test_two_at_once_do_not_meet(native, tmp_path):
    with whole_or_absent(tmp_path / "out") as path:
        path.write_text("done")
        with pytest.raises(ValueError, match="another process is converting to .*out"):
            convert(native, str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_appears_at_the_target_meanwhile_is_kept(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(ValueError, match="out is there already: .*--overwrite"):
        with whole_or_absent(target) as path:
            path.write_text("new")
            target.write_text("precious")
    assert target.read_text() == "precious" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("is_folder", [False, True])
def test_an_output_that_a_killed_overwrite_had_moved_aside_comes_back(is_folder, tmp_path, capsys):
    target, aside = tmp_path / "out", tmp_path / "out.partial"
    aside.mkdir()
    old = aside / "replaced"
    (old.mkdir() or old / "inside" if is_folder else old).write_text("precious")
    (aside / "out").write_text("half")
    with pytest.raises(ValueError, match="there already"):
        with whole_or_absent(target) as path:
            path.write_text("new")
    assert (target / "inside" if is_folder else target).read_text() == "precious"
    assert f"putting back {target}" in capsys.readouterr().out
    with whole_or_absent(target, overwrite=True) as path:
        path.write_text("new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


# What happens to the process and the disk

STRIKE = """
    import os, runpy, signal, sys, gguf
    from easylm_jax import checkpoint

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    how = int(sys.argv.pop())

    def strike(*_, **__):
        os.kill(os.getpid(), how)

    gguf.GGUFWriter.write_tensor_data = strike  # the header is written, no tensor is
    checkpoint.Checkpointer._write_commit = strike  # the arrays are written, the rename is to come
    runpy.run_module("easylm_jax.convert", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, how",
    [
        ("native", signal.SIGKILL),
        ("gguf", signal.SIGKILL),
        ("native", signal.SIGINT),
        ("gguf", signal.SIGTERM),
    ],
)
def test_a_signal_in_the_middle_leaves_nothing_under_the_name(name, how, native, tmp_path, capfd):
    target = tmp_path / "out"
    arguments = [f"--from={native}", f"--to={target}", f"--format={name}", str(int(how))]
    command = [sys.executable, "-c", textwrap.dedent(STRIKE), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    left = [path.name for path in tmp_path.iterdir()]
    if how == signal.SIGKILL:
        assert done.returncode == -how and left == ["out.partial"], done.stderr
        assert any((tmp_path / "out.partial").iterdir())
    else:
        assert done.returncode == 130 and not left, done.stderr
        assert done.stderr.strip().splitlines()[-1] == "interrupted: nothing was written"
    convert(native, str(target), to_format=name)
    assert ("which a killed conversion left" in capfd.readouterr().out) == bool(left)
    assert list(tmp_path.iterdir()) == [target]


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", ["native", *FORMATS])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(name, native, small_disk, monkeypatch):
    (small_disk / "filler").write_bytes(bytes(300_000))
    with pytest.raises(ValueError, match=r"out needs about 0.00 GB, and 0.00 GB are free"):
        convert(native, str(small_disk / "out"), to_format=name)
    monkeypatch.setattr("easylm_jax.convert._check_space", lambda *_: None)
    with pytest.raises((ValueError, OSError)) as caught:
        convert(native, str(small_disk / "out"), to_format=name)
    assert "\n" not in str(caught.value) and str(small_disk / "out") in str(caught.value)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.slow
def test_as_a_command(native, tmp_path):
    target = tmp_path / "out.gguf"
    command = [sys.executable, "-m", "easylm_jax.convert", f"--from={native}", f"--to={target}"]
    done = subprocess.run([*command, "--dtype=q8_0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("converted 3") and "MB written in" in first
    assert second.startswith("peak host memory")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.startswith(f"error: {target} is there already")
