"""Checkpoints of a run: save in the background, keep some, restore the newest that is whole.

What it is not: a converter of foreign formats (`formats/`), or the rest of what a run writes
(`workdir.py`). `train.py` saves and resumes with `Checkpointer`; whoever starts from trained
weights calls `restore_params`. No other file touches Orbax.

A checkpoint is a directory `00001200` that Orbax wrote (any Orbax program can read it), plus our
`commit.json`: the caller's side data and, for every array, its shape, dtype and a checksum. The
checksum is computed on the devices before anything is copied and once more after restoring, so it
covers the whole way through host memory, network and disk, costs no second reading of the files,
and is the same on every mesh. `commit.json` also lists the size of every file, and hashes itself.

Kill -9 at any moment is safe: Orbax writes to `00001200.orbax-checkpoint-tmp` and renames (on
gs://, where renaming is not atomic, it writes a marker file last), and `commit.json` is there
before the rename. Nothing is fsynced: losing power may damage the newest checkpoint, which is then
skipped, so keep two.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.experimental import multihost_utils
from jaxtyping import UInt32

from easylm_jax.tree import named_leaves

COMMIT = "commit.json"
DAMAGED = "damaged.txt"  # holds the reason; such a directory is neither used nor deleted
ORBAX_COMMIT = "commit_success.txt"
STEP_DIRECTORY = re.compile(r"(\d{8,})(\.orbax-checkpoint-tmp)?$")
HOST_TIMEOUT_SECONDS = 600  # how long the hosts wait for one that failed to write its part
MAX_LISTED = 10


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep. The last step is always saved."""

    every: str = "1000 steps"
    keep_last: int = 2
    milestone_every: int = 0  # steps; multiples of it are kept for ever; 0: none
    on_failure: Literal["continue", "stop"] = (
        "continue"  # when one cannot be written; the last must
    )


class CheckpointError(OSError):
    """A checkpoint could not be written, or none can be read. One sentence."""


class Restored(NamedTuple):
    """What `restore_latest` found; `skipped` has a sentence for each newer, damaged one."""

    step: int
    state: Any
    side: dict[str, Any]
    skipped: tuple[str, ...]


class _Damaged(Exception):
    """This checkpoint cannot be trusted; the message says why."""


class Checkpointer:
    """The checkpoints of one run. Every host calls every method, in the same order.

    Keeps the newest `keep_last`, every multiple of `milestone_every` steps for ever, and the step
    that `best_step` names. Only `save` changes anything in `directory`, so a second process may
    restore while a run goes on.
    """

    best_step: int | None = None

    def __init__(self, directory: str, *, keep_last: int, milestone_every: int = 0) -> None:
        self._directory = _absolute(directory)
        self._keep_last = keep_last
        self._milestone_every = milestone_every
        self._orbax = ocp.AsyncCheckpointer(
            _handler(),
            async_options=ocp.options.AsyncOptions(
                timeout_secs=HOST_TIMEOUT_SECONDS, post_finalization_callback=self._write_commit
            ),
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._current: tuple[int, dict[str, Any], dict[str, Array]] | None = None
        self._step_on_disk: int | None = None
        self._damaged: dict[int, str] = {}

    # Writing

    def save(self, step: int, state: Any, side: Mapping[str, Any]) -> None:
        """Write `state` (a pytree of jax.Arrays) and `side` (JSON) in the background.

        Returns when the devices' buffers may be donated. Waits for the save before; when that one
        failed this one is started all the same, and then the CheckpointError about the other is
        raised: a caller that goes on has lost nothing more. The step that was just saved or
        restored is not written again. Of `side`, the first host's is kept.
        """
        failure = self._failure()
        if step == self._step_on_disk:
            return
        if jax.process_index() == 0:
            self._set_damaged_aside()
            self._sweep()
        arrays = named_leaves(state)
        record = {
            "step": step,
            "side": json.loads(json.dumps(side)),  # a copy: the caller's may change meanwhile
            "arrays": {name: _describe(x) for name, x in arrays.items()},
        }
        raw = {name: _without_key_type(x) for name, x in arrays.items()}
        self._current = (step, record, _checksums(raw))
        try:
            item = unflatten_dict(raw, sep="/")
            self._orbax.save(self._path(step), args=ocp.args.PyTreeSave(item), force=True)
        except Exception as error:
            raise CheckpointError(self._not_written(step, error)) from error
        self._step_on_disk = step
        self._pending = self._thread.submit(self._finish, step)
        if failure:
            raise CheckpointError(failure)

    def wait(self) -> None:
        """Return when the last save is on disk; CheckpointError if it failed."""
        if failure := self._failure():
            raise CheckpointError(failure)

    def close(self) -> None:
        """`wait`, and stop the threads, also when the last save failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def _failure(self) -> str | None:
        """Wait for the save under way; why it failed, once."""
        pending, self._pending = self._pending, None
        try:
            return pending.result() if pending else None
        except CheckpointError as error:
            self._step_on_disk = None
            return str(error)

    def _finish(self, step: int) -> None:
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            raise CheckpointError(self._not_written(step, error)) from error
        finally:
            if jax.process_index() == 0:
                self._sweep()

    def _write_commit(self) -> None:
        """Orbax calls it on the first host, when all hosts' data is written, before the rename."""
        step, record, checksums = self._current
        path = self._orbax.get_temporary_path(self._path(step)).get()
        for name, value in jax.device_get(checksums).items():
            record["arrays"][name]["checksum"] = int(value)
        record["files"] = _file_sizes(path)
        record["sha256"] = _sha256(record)
        unfinished = path / f"{COMMIT}.tmp"
        unfinished.write_text(json.dumps(record, indent=1))
        unfinished.rename(path / COMMIT)

    def _not_written(self, step: int, error: Exception) -> str:
        return f"checkpoint {self._path(step)} could not be written: {_first_line(error)}"

    def _set_damaged_aside(self) -> None:
        """Only a run that goes on from an older checkpoint may do this, hence not in restoring."""
        for step, reason in self._damaged.items():
            (self._path(step) / DAMAGED).write_text(reason + "\n")
        self._damaged = {}

    def _sweep(self) -> None:
        """Delete what killed and failed saves left behind, and checkpoints past their time."""
        steps = self.all_steps()
        keep = {*steps[-self._keep_last :], self.best_step}
        if self._milestone_every:
            keep |= {step for step in steps if step % self._milestone_every == 0}
        for path in _step_directories(self._directory):
            step, is_temporary = _parse(path)
            if not is_temporary and (step in keep or (path / DAMAGED).exists()):
                continue
            # This order: killed half way, it is still whole, or it is not a checkpoint.
            (path / ORBAX_COMMIT).unlink(missing_ok=True)
            (path / COMMIT).unlink(missing_ok=True)
            try:
                path.rmtree(missing_ok=True)
            except OSError:  # threads of a failed save may still write there: the next sweep
                if not is_temporary:
                    raise

    # Reading

    def all_steps(self) -> list[int]:
        """The steps on disk whose saving was completed, oldest first; they may yet be damaged."""
        return _finished_steps(self._directory)

    def latest_step(self) -> int | None:
        """The last of `all_steps`."""
        return max(self.all_steps(), default=None)

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """The newest checkpoint that is whole, laid out as `abstract_state` asks; None if none is.

        `abstract_state` is a pytree of `jax.ShapeDtypeStruct` with shardings, on any mesh. Raises
        CheckpointError when there are checkpoints and all are damaged, and ValueError when one
        holds arrays of other names, shapes or dtypes.
        """
        self.wait()
        wanted = named_leaves(abstract_state)
        bound = np.iinfo(np.int32).max
        while (step := self._newest_below(bound)) >= 0:
            path = self._path(step)
            try:
                record = _read_commit(path)
                _check_same_arrays(path, record["arrays"], wanted, check_dtypes=True)
                arrays = _load(path, record["arrays"], wanted)
            except _Damaged as error:
                self._damaged[step] = f"checkpoint {path} is damaged and was skipped: {error}"
                bound = step
                continue
            self._step_on_disk = step
            state = jax.tree.unflatten(jax.tree.structure(abstract_state), arrays.values())
            return Restored(step, state, record["side"], tuple(self._damaged.values()))
        if self._damaged:
            raise CheckpointError(
                f"all {len(self._damaged)} checkpoints in {self._directory} are damaged: expected "
                f"at least one that is whole, or an empty directory to start from step 0; "
                + "; ".join(self._damaged.values())
            )
        return None

    def _newest_below(self, bound: int) -> int:
        """As the first host sees the directory, so that all hosts try the same one; -1 if none."""
        newest = max((s for s in self.all_steps() if s < bound), default=-1)
        if jax.process_count() > 1:
            newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
        return newest

    def _path(self, step: int) -> epath.Path:
        return self._directory / f"{step:08d}"


def restore_params(path: str, abstract_params: Any) -> Any:
    """The parameters alone, from one checkpoint or the newest one in a directory of checkpoints.

    Laid out as `abstract_params` (`jax.ShapeDtypeStruct` with shardings) asks, and cast to its
    dtypes. There is no falling back: a damaged checkpoint is a CheckpointError.
    """
    directory = _absolute(path)
    if steps := _finished_steps(directory):
        directory = directory / f"{steps[-1]:08d}"
    if not (directory / COMMIT).exists():
        raise ValueError(f"{path} is not a checkpoint and holds none: expected {COMMIT} in it")
    wanted = {f"params/{name}": leaf for name, leaf in named_leaves(abstract_params).items()}
    try:
        saved = _read_commit(directory)["arrays"]
        saved = {name: entry for name, entry in saved.items() if name.startswith("params/")}
        _check_same_arrays(directory, saved, wanted, check_dtypes=False)
        arrays = _load(directory, saved, wanted)
    except _Damaged as error:
        raise CheckpointError(f"checkpoint {directory} is damaged: {error}") from error
    cast = [arrays[name].astype(leaf.dtype) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract_params), cast)


@jax.jit
def checksum(x: Array) -> UInt32[Array, ""]:
    """A 32-bit hash of the bits of `x` and their places, the same however `x` is laid out.

    Each element is hashed with its index (the finaliser of MurmurHash3), and the hashes are added
    modulo 2**32. A change of one element always shows; one of many is missed once in 2**32.
    """
    if jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize <= 4 or x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:  # 64-bit types get a last dimension of two words
        word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
        bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for dim, size in enumerate(bits.shape):
        index = index * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(
            jnp.uint32, bits.shape, dim
        )
    h = bits ^ (index * np.uint32(0x9E3779B9))
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


@jax.jit
def _all_checksums(arrays: dict[str, Array]) -> dict[str, Array]:
    return {name: checksum(x) for name, x in arrays.items()}


def _checksums(arrays: dict[str, Array]) -> dict[str, Array]:
    """One program, and nothing beside it: several CPU devices deadlock when two are under way."""
    return jax.block_until_ready(_all_checksums(arrays))


def _absolute(path: str) -> epath.Path:
    """Orbax wants no relative paths."""
    return epath.Path(path if "://" in path else os.path.abspath(path))


def _handler() -> ocp.PyTreeCheckpointHandler:
    # Compression makes saving four times slower, and trained weights a tenth smaller at best.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _without_key_type(x: Array) -> Array:
    return jax.random.key_data(x) if _is_key(x) else x


def _describe(x: Array) -> dict[str, Any]:
    entry = {"shape": list(x.shape), "dtype": str(x.dtype)}
    return entry | {"key_impl": str(jax.random.key_impl(x))} if _is_key(x) else entry


def _step_directories(directory: epath.Path) -> list[epath.Path]:
    if not directory.exists():
        return []
    return [path for path in directory.iterdir() if STEP_DIRECTORY.match(path.name)]


def _parse(path: epath.Path) -> tuple[int, bool]:
    step, suffix = STEP_DIRECTORY.match(path.name).groups()
    return int(step), suffix is not None


def _finished_steps(directory: epath.Path) -> list[int]:
    """Either mark will do: one lost mark makes a damaged checkpoint, not one that never was."""
    return sorted(
        step
        for path in _step_directories(directory)
        for step, is_temporary in [_parse(path)]
        if not is_temporary
        and ((path / COMMIT).exists() or (path / ORBAX_COMMIT).exists())
        and not (path / DAMAGED).exists()
    )


def _file_sizes(path: epath.Path) -> dict[str, int]:
    """Of the files that Orbax no longer changes once the data is written."""
    return {
        str((folder / name).relative_to(path)): (folder / name).stat().length
        for folder, _, names in path.walk()
        for name in names
        if name not in (COMMIT, ORBAX_COMMIT, "_CHECKPOINT_METADATA")
    }


def _sha256(record: dict[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_commit(path: epath.Path) -> dict[str, Any]:
    """The verified `commit.json`; raises _Damaged on all hosts when one of them cannot trust it."""
    record, problem = {}, None
    try:
        record = json.loads((path / COMMIT).read_text())
        if record["sha256"] != _sha256(record):
            problem = f"{COMMIT} does not match its own hash"
        elif jax.process_index() == 0:
            problem = _wrong_files(path, record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{COMMIT} cannot be read ({_first_line(error)})"
    _agree(problem)
    return record


def _wrong_files(path: epath.Path, expected: dict[str, int]) -> str | None:
    found = _file_sizes(path)
    for name, size in expected.items():
        if name not in found:
            return f"the file {name} is missing"
        if found[name] != size:
            return f"the file {name} has {found[name]} bytes, expected {size}"
    return None


def _load(path: epath.Path, saved: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Array]:
    """The arrays named in `wanted`, with its shardings and the saved dtypes, verified."""
    raw = {name: _raw_abstract(leaf, saved[name]) for name, leaf in wanted.items()}
    item, problem, arrays = unflatten_dict(raw, sep="/"), None, {}
    try:
        args = ocp.args.PyTreeRestore(
            item=item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=True,
        )
        # Not through the Checkpointer: its barrier would hang the others when one host fails.
        arrays = flatten_dict(_handler().restore(path, args=args), sep="/")
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # out of memory, not damage
    except Exception as error:  # tensorstore's errors have many types
        problem = f"Orbax cannot read it ({_first_line(error)})"
    _agree(problem)
    if absent := [name for name in wanted if not isinstance(arrays[name], Array)]:
        raise _Damaged(f"{_listed(absent)} could not be read")
    sums = jax.device_get(_checksums({name: arrays[name] for name in wanted}))
    wrong = [name for name in wanted if sums[name] != saved[name]["checksum"]]
    if wrong:
        raise _Damaged(f"{_listed(wrong)} differ from what was saved (wrong checksum)")
    return {name: _with_key_type(arrays[name], saved[name]) for name in wanted}


def _raw_abstract(leaf: jax.ShapeDtypeStruct, entry: dict[str, Any]) -> jax.ShapeDtypeStruct:
    """As it lies on disk: keys as their uint32 words, parameters in the saved dtype."""
    if _is_key(leaf):
        words = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=leaf.sharding)
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(entry["dtype"]), sharding=leaf.sharding)


def _with_key_type(x: Array, entry: dict[str, Any]) -> Array:
    return jax.random.wrap_key_data(x, impl=entry["key_impl"]) if "key_impl" in entry else x


def _check_same_arrays(
    path: epath.Path, saved: dict[str, Any], wanted: dict[str, Any], *, check_dtypes: bool
) -> None:
    """ValueError that lists what differs between the checkpoint and the model that asks for it."""

    def text(shape: Any, dtype: Any) -> str:
        return f"{tuple(shape)} {dtype}" if check_dtypes else f"{tuple(shape)}"

    differing = []
    for name in [name for name in wanted if name in saved]:
        expected = text(wanted[name].shape, wanted[name].dtype)
        got = text(saved[name]["shape"], saved[name]["dtype"])
        if expected != got:
            differing.append(f"{name} (expected {expected}, got {got})")
    missing = [name for name in wanted if name not in saved]
    unexpected = [name for name in saved if name not in wanted]
    parts = {"different": differing, "missing": missing, "unexpected": unexpected}
    listed = [f"{kind}: {_listed(names)}" for kind, names in parts.items() if names]
    if listed:
        raise ValueError(
            f"checkpoint {path} does not fit this configuration, use that of the run which wrote "
            f"it or another directory; {'; '.join(listed)}"
        )


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _agree(problem: str | None) -> None:
    """Raise _Damaged on every host if any host has a problem, so that they go on together."""
    if jax.process_count() > 1:
        flags = multihost_utils.process_allgather(np.int32(problem is not None))
        if problem is None and flags.any():
            problem = f"host {int(flags.argmax())} cannot read its part"
    if problem:
        raise _Damaged(problem)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
