"""Checkpoints survive kills, full disks and flipped bytes, and come back bit for bit anywhere."""

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from easylm_jax.checkpoint import COMMIT, Checkpointer, CheckpointError, checksum, restore_params
from easylm_jax.tree import named_leaves

jax.config.update("jax_num_cpu_devices", 8)

MESHES = {"one": (1, 1, 1), "eight": (8, 1, 1), "cube": (2, 2, 2)}


def make_mesh(name: str) -> Mesh:
    shape = MESHES[name]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("x", "y", "z"), devices=devices, axis_types=(AxisType.Auto,) * 3)


def abstract(state, mesh: Mesh):
    """Shardings that really split whatever can be split."""

    def leaf(x):
        axes = ["x", ("y", "z")][: x.ndim]
        fits = all(dim % 8 == 0 for dim in x.shape[: len(axes)])
        spec = PartitionSpec(*axes) if fits else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(leaf, state)


def make_state(seed: int):
    """Every dtype that a train state may hold, with the awkward values among them."""
    bits = np.random.default_rng(seed)
    floats = bits.integers(0, 2**32, (16, 24), dtype=np.uint32).view(np.float32)  # NaNs too
    params = {
        "layers": {"w": jnp.asarray(floats), "b": jnp.asarray(bits.normal(size=8), jnp.bfloat16)},
        "scale": jnp.float32(bits.normal()),
        "empty": {},
    }
    return {
        "step": jnp.int32(seed),
        "params": params,
        "opt_state": optax.adamw(1e-3).init({"w": params["layers"]["w"]}),
        "rng": jax.random.key(seed),
        "more_rngs": jax.random.split(jax.random.key(seed, impl="rbg"), 8),
        "flags": jnp.asarray(bits.integers(0, 2, 5), bool),
    }


def as_bytes(state) -> dict[str, tuple[str, bytes]]:
    def leaf(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return str(x.dtype), np.asarray(jax.random.key_data(x) if is_key else x).tobytes()

    return {name: leaf(x) for name, x in named_leaves(state).items()}


def save_all(directory, steps, **options) -> None:
    """Step n holds `make_state(n)`."""
    checkpointer = Checkpointer(str(directory), **({"keep_last": 2} | options))
    for step in steps:
        checkpointer.save(step, make_state(step), {"step": step})
    checkpointer.close()


def restore(directory):
    state = abstract(make_state(0), make_mesh("one"))
    return Checkpointer(str(directory), keep_last=2).restore_latest(state)


@pytest.mark.parametrize("saved, wanted", list(itertools.permutations(MESHES, 2)))
def test_restores_bit_for_bit_on_another_mesh(tmp_path, saved, wanted):
    state = make_state(5)
    shardings = jax.tree.map(lambda a: a.sharding, abstract(state, make_mesh(saved)))
    checkpointer = Checkpointer(str(tmp_path), keep_last=1)
    checkpointer.save(5, jax.device_put(state, shardings), {"source": {"row": 7}})
    target = abstract(state, make_mesh(wanted))
    restored = checkpointer.restore_latest(target)
    assert (restored.step, restored.side, restored.skipped) == (5, {"source": {"row": 7}}, ())
    assert as_bytes(restored.state) == as_bytes(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    for x, a in zip(jax.tree.leaves(restored.state), jax.tree.leaves(target), strict=True):
        assert x.sharding.is_equivalent_to(a.sharding, x.ndim)


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    update = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    x, side = jnp.arange(4_000_000.0), {"rows": [1]}
    checkpointer = Checkpointer(str(tmp_path), keep_last=9)
    expected = {}
    for step in range(4):
        expected[step] = np.array(x)
        checkpointer.save(step, {"x": x}, side)
        x = update(x)
        side["rows"].append(step)  # nor does the side data follow later changes
    checkpointer.close()
    for step in range(4):
        path = tmp_path / f"{step:08d}"
        target = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
        other = tmp_path / f"alone{step}"
        other.mkdir()
        path.rename(other / path.name)
        restored = Checkpointer(str(other), keep_last=1).restore_latest(target)
        np.testing.assert_array_equal(restored.state["x"], expected[step])
        assert restored.side["rows"] == [1, *range(step)]


def test_keeps_the_newest_and_the_milestones_and_nothing_else(tmp_path):
    killed = tmp_path / "00000003.orbax-checkpoint-tmp" / "d"
    killed.mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    save_all(tmp_path, range(4, 16), keep_last=2, milestone_every=5)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00000005", "00000010", "00000014", "00000015", "notes"]
    checkpointer = Checkpointer(str(tmp_path), keep_last=2)
    assert checkpointer.all_steps() == [5, 10, 14, 15] and checkpointer.latest_step() == 15


def test_the_best_step_is_kept_until_another_is_better(tmp_path):
    checkpointer = Checkpointer(str(tmp_path), keep_last=1)
    best_of = {1: 1, 2: 1, 3: 3, 4: 3, 5: 3}
    for step, best in best_of.items():
        checkpointer.best_step = best
        checkpointer.save(step, make_state(step), {})
        checkpointer.wait()
        assert checkpointer.all_steps() == sorted({best, step})
    checkpointer.close()
    resumed = Checkpointer(str(tmp_path), keep_last=1)
    resumed.best_step = 3
    assert resumed.restore_latest(abstract(make_state(0), make_mesh("one"))).step == 5
    resumed.save(6, make_state(6), {})
    resumed.close()
    assert resumed.all_steps() == [3, 6]


def test_a_relative_directory_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_all("runs/x", [1])
    params = make_state(1)["params"]
    restored = restore_params("runs/x", abstract(params, make_mesh("one")))
    assert as_bytes(restored) == as_bytes(params)


def test_nothing_saved_is_a_fresh_start(tmp_path):
    assert restore(tmp_path / "absent") is None
    (tmp_path / "00000001.orbax-checkpoint-tmp").mkdir()
    assert restore(tmp_path) is None


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


DATA_FILES = ["d/*", "ocdbt.process_0/d/*", "manifest.ocdbt", "_METADATA", COMMIT]


@pytest.mark.parametrize("harm", [truncate, Path.unlink, flip_a_byte])
@pytest.mark.parametrize("pattern", DATA_FILES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path, pattern, harm):
    save_all(tmp_path, [1, 2])
    files = sorted((tmp_path / "00000002").glob(pattern))
    harm(max(files, key=lambda path: path.stat().st_size))
    restored = restore(tmp_path)
    if harm is flip_a_byte and restored.step == 2:  # a byte that says nothing about the arrays
        assert as_bytes(restored.state) == as_bytes(make_state(2))
        assert restored.side == {"step": 2}
        return
    assert restored.step == 1 and restored.side == {"step": 1}
    assert as_bytes(restored.state) == as_bytes(make_state(1))
    (sentence,) = restored.skipped
    assert str(tmp_path / "00000002") in sentence and "\n" not in sentence


def test_each_flipped_byte_of_the_arrays_is_noticed(tmp_path):
    """The layout of a data file is Orbax's, so look for the bytes of a known array in it."""
    save_all(tmp_path, [1, 2])
    needle = np.asarray(make_state(2)["params"]["layers"]["w"]).tobytes()
    (file,) = [
        f for f in (tmp_path / "00000002").rglob("*") if f.is_file() and needle in f.read_bytes()
    ]
    whole = file.read_bytes()
    for offset in random.sample(range(len(needle)), 5):
        data = bytearray(whole)
        data[whole.index(needle) + offset] ^= 1 << random.randrange(8)
        file.write_bytes(data)
        restored = restore(tmp_path)
        assert restored.step == 1
        assert "params/layers/w" in restored.skipped[0] and "checksum" in restored.skipped[0]


def test_a_changed_digit_of_the_side_data_is_noticed(tmp_path):
    save_all(tmp_path, [1, 2])
    path = tmp_path / "00000002" / COMMIT
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    restored = restore(tmp_path)
    assert restored.side == {"step": 1} and "hash" in restored.skipped[0]


def test_training_goes_on_past_a_damaged_checkpoint(tmp_path):
    save_all(tmp_path, [1, 2, 4])
    truncate(tmp_path / "00000004" / "manifest.ocdbt")
    checkpointer = Checkpointer(str(tmp_path), keep_last=1)
    assert checkpointer.restore_latest(abstract(make_state(0), make_mesh("one"))).step == 2
    checkpointer.save(3, make_state(3), {})
    checkpointer.wait()
    assert checkpointer.all_steps() == [3]  # 4 does not count as the newest, nor is it deleted
    assert "manifest.ocdbt" in (tmp_path / "00000004" / "damaged.txt").read_text()
    checkpointer.save(4, make_state(4), {})
    checkpointer.close()
    assert restore(tmp_path).step == 4


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    save_all(tmp_path, [1, 2])
    for step in (1, 2):
        truncate(tmp_path / f"{step:08d}" / "manifest.ocdbt")
    with pytest.raises(CheckpointError, match="all 2 checkpoints .* are damaged"):
        restore(tmp_path)


def test_another_shape_lists_what_differs(tmp_path):
    save_all(tmp_path, [1])
    state = make_state(1)
    state["params"]["layers"]["w"] = jnp.zeros((16, 32))
    state["params"]["scale"] = jnp.bfloat16(0)
    del state["flags"]
    state["params"]["new"] = {str(i): jnp.zeros(1) for i in range(13)}
    with pytest.raises(ValueError) as caught:
        Checkpointer(str(tmp_path), keep_last=1).restore_latest(abstract(state, make_mesh("one")))
    text = str(caught.value)
    assert "params/layers/w (expected (16, 32) float32, got (16, 24) float32)" in text
    assert "params/scale (expected () bfloat16, got () float32)" in text
    assert "missing: params/new/0, " in text and "and 3 more" in text
    assert "unexpected: flags" in text and "opt_state" not in text and "\n" not in text


def test_restore_params_reads_the_parameters_alone_and_casts(tmp_path):
    save_all(tmp_path, [1, 2])
    params = make_state(2)["params"]
    wanted = abstract(params, make_mesh("cube"))
    assert as_bytes(restore_params(str(tmp_path), wanted)) == as_bytes(params)
    older = restore_params(str(tmp_path / "00000001"), wanted)
    assert as_bytes(older) == as_bytes(make_state(1)["params"])
    half = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=a.sharding), wanted
    )
    assert as_bytes(restore_params(str(tmp_path), half)) == as_bytes(
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    )
    del wanted["scale"]
    with pytest.raises(ValueError, match="unexpected: params/scale"):
        restore_params(str(tmp_path), wanted)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        restore_params(str(tmp_path / "absent"), wanted)


def test_the_checksum_sees_values_and_places_on_every_mesh():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 8)).astype(np.float32)
    expected = int(checksum(x))
    for name in MESHES:
        sharding = NamedSharding(make_mesh(name), PartitionSpec("x", ("y", "z")))
        assert int(checksum(jax.device_put(x, sharding))) == expected
    changes = [np.roll(x, 1, axis=0), x[:, ::-1], np.negative(x), np.where(x > 1, 0, x)]
    for _ in range(20):
        data = bytearray(x.tobytes())
        for byte in rng.integers(0, len(data), 2):
            data[byte] ^= 0x80  # the top bit twice cancels out in weaker sums
        changes.append(np.frombuffer(data, np.float32).reshape(x.shape))
    for changed in changes:
        assert int(checksum(changed)) != expected


# What happens to the process, the disk and the number of hosts

HELPER = "from checkpoint_test import *\n"  # with the helpers above, starts in two seconds


def start(code: str, *args) -> subprocess.Popen:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    env = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HELPER + textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE)


SAVE_UNTIL_KILLED = """
    if sys.argv[2] == "marker":  # as on gs://: written in place, a marker file says it is whole
        import functools
        import orbax.checkpoint as ocp
        ocp.AsyncCheckpointer = functools.partial(
            ocp.AsyncCheckpointer,
            temporary_path_class=ocp.path.atomicity.CommitFileTemporaryPath,
        )
    checkpointer = Checkpointer(sys.argv[1], keep_last=2)
    restored = checkpointer.restore_latest(abstract(make_state(0), make_mesh("one")))
    step = restored.step if restored else 0
    if restored:
        assert as_bytes(restored.state) == as_bytes(make_state(step)), step
        assert not restored.skipped, restored.skipped
    print(step, flush=True)
    for step in itertools.count(step + 1):
        print(step, flush=True)  # step - 2 is on disk: save(step - 1) waited for it
        checkpointer.save(step, make_state(step), {"step": step})
"""


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["rename", "marker"])
def test_kill_9_at_any_moment_loses_no_checkpoint_that_was_whole(tmp_path, protocol):
    """Timed by what the child says it does, not by the clock: starting takes it seconds."""
    began, in_the_middle = 0, 0  # the step that the last child began to save
    for _ in range(10):
        child = start(SAVE_UNTIL_KILLED, tmp_path, protocol)
        found = child.stdout.readline()
        assert found, "the child could not restore what the one before it left"
        assert began - 2 <= int(found) <= began
        for _ in range(random.randint(4, 7)):  # by the fourth save two are on disk
            began = int(child.stdout.readline())
        time.sleep(random.uniform(0, 0.08))  # a save takes about that long
        child.send_signal(signal.SIGKILL)
        began = max(map(int, child.communicate()[0].split()), default=began)
        steps = Checkpointer(str(tmp_path), keep_last=2).all_steps()
        assert len(steps) >= 2
        for path in [tmp_path / f"{step:08d}" for step in steps]:  # none is half deleted
            sizes = json.loads((path / COMMIT).read_text())["files"]
            assert {name: (path / name).stat().st_size for name in sizes} == sizes
        halves = [path.name for path in tmp_path.iterdir() if not (path / COMMIT).exists()]
        half_steps = [int(name[:8]) for name in halves]
        assert all(step >= began - 3 for step in half_steps)  # the save before swept older ones
        in_the_middle += any(step >= began - 1 for step in half_steps)  # the rest: in deleting
    restored = restore(tmp_path)
    assert began - 2 <= restored.step <= began and not restored.skipped
    assert as_bytes(restored.state) == as_bytes(make_state(restored.step))
    assert in_the_middle >= 3, f"only {in_the_middle} of 10 kills came in the middle of a save"
    save_all(tmp_path, [restored.step + 1])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a 2 MB tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


SAVE_ON_A_FULL_DISK = """
    disk = Path(sys.argv[1])
    filler = disk / "filler"
    checkpointer = Checkpointer(str(disk), keep_last=2)
    checkpointer.save(1, make_state(1), {})
    checkpointer.wait()
    for space in (0, 2_000, 10_000, 100_000):  # runs out in Orbax's first, later and last file
        filler.write_bytes(bytes(1_600_000))
        big = make_state(2) | {"big": jnp.ones(100_000)}
        with open(filler, "ab") as file:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            file.write(bytes(max(0, free - space)))
        with pytest.raises(CheckpointError) as caught:
            checkpointer.save(2, big, {})
            checkpointer.wait()
        assert "00000002 could not be written" in str(caught.value)
        assert "\\n" not in str(caught.value)
        filler.unlink()
        assert checkpointer.all_steps() == [1]
        assert restore(disk).step == 1
    checkpointer.save(2, make_state(2), {})
    checkpointer.close()
    assert restore(disk).step == 2
    print(*sorted(path.name for path in disk.iterdir()))
"""


def test_a_full_disk_is_one_sentence_and_older_checkpoints_stay(small_disk):
    # A process of its own: TensorStore's threads go on failing after the save has.
    process = start(SAVE_ON_A_FULL_DISK, small_disk)
    assert process.communicate(timeout=120)[0] == "00000001 00000002\n"
    assert process.returncode == 0


def test_a_sweep_leaves_a_directory_that_is_still_written_to_for_the_next(tmp_path, monkeypatch):
    late = tmp_path / "00000001.orbax-checkpoint-tmp" / "d"
    late.mkdir(parents=True)

    def as_if_written_to(path, **options):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    checkpointer = Checkpointer(str(tmp_path), keep_last=2)
    monkeypatch.setattr(type(epath.Path(tmp_path)), "rmtree", as_if_written_to)
    checkpointer.save(2, make_state(2), {})
    checkpointer.wait()
    assert late.exists() and checkpointer.all_steps() == [2]
    monkeypatch.undo()
    checkpointer.save(3, make_state(3), {})
    checkpointer.close()
    assert not late.exists() and checkpointer.all_steps() == [2, 3]


SAVE_TOO_MUCH = """
    checkpointer = Checkpointer(sys.argv[1], keep_last=2)
    checkpointer.save(1, {"x": jnp.ones(1_000_000)}, {})  # 4 MB
    time.sleep(0.5)
    with pytest.raises(CheckpointError, match="00000001 could not be written"):
        checkpointer.save(2, {"x": jnp.ones(1_000)}, {})
    checkpointer.close()
    print(checkpointer.all_steps())
"""


def test_a_failed_save_does_not_cost_the_next_one(small_disk):
    process = start(SAVE_TOO_MUCH, small_disk)
    assert process.communicate(timeout=120)[0] == "[2]\n"
    assert process.returncode == 0


AS_ONE_OF_TWO_HOSTS = """
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", 2, int(sys.argv[2]))
    target = abstract(make_state(0), make_mesh("cube"))
    checkpointer = Checkpointer(sys.argv[1], keep_last=2)
    restored = checkpointer.restore_latest(target)
    print(restored.step, restored.skipped)
    replicated = NamedSharding(make_mesh("cube"), PartitionSpec())
    gather = jax.jit(lambda state: state, out_shardings=replicated)
    assert as_bytes(gather(restored.state)) == as_bytes(make_state(1))
    step, state = restored.step + 1, jax.tree.map(lambda x: x, restored.state)
    checkpointer.save(step, state, {"step": step})
    checkpointer.close()
"""


@pytest.mark.slow
def test_the_number_of_hosts_may_change_and_damage_is_agreed_upon(tmp_path):
    save_all(tmp_path, [1, 7])
    truncate(tmp_path / "00000007" / "manifest.ocdbt")
    port = random.randrange(20_000, 30_000)
    hosts = [start(AS_ONE_OF_TWO_HOSTS, tmp_path, index, port) for index in range(2)]
    outputs = [host.communicate(timeout=120)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0]
    assert all("1 ('checkpoint" in output and "00000007" in output for output in outputs)
    restored = restore(tmp_path)
    assert restored.step == 2 and restored.side == {"step": 2}
    assert as_bytes(restored.state) == as_bytes(make_state(1))
    assert len(list((tmp_path / "00000002").glob("ocdbt.process_*"))) == 2
