"""A model in a foreign format, and the two streams between it and our parameter tree.

Every reader of a format (`hf.py`, `gguf.py`, ...) opens a path as a `Foreign`: the configuration
and the names and shapes of its tensors, with nothing big read yet. `import_params` then reads one
tensor at a time into the shards this host owns. Every writer takes a `Model` and pulls the tensors
from `foreign_tensors`, one at a time. Which names mean what is in `names.py`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils

from easylm_jax.array_types import Params
from easylm_jax.formats.names import Entry, Table, to_foreign, to_ours
from easylm_jax.models.llama import LlamaConfig, init_params
from easylm_jax.text.template import ChatTemplate
from easylm_jax.text.tokenizer import Tokenizer
from easylm_jax.tree import named_leaves

MAX_LISTED = 5


@dataclasses.dataclass(frozen=True)
class Foreign:
    """An opened model. `read(name)` gives one tensor as the format has it, dequantised to float.

    Tensors whose name matches one of `ignored` (regular expressions) may be there and are not read.
    `tokenizer()` builds the tokenizer that came with it. `chat_template` is its Jinja source. Each
    of `stop_ids` ends an answer: Llama 3 Instruct has three.
    """

    path: str
    config: LlamaConfig
    table: Table
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    tokenizer: Callable[[], Tokenizer] | None = None
    chat_template: str | None = None
    ignored: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Model:
    """What a writer writes. `params` may be sharded; only one tensor at a time is gathered."""

    config: LlamaConfig
    params: Params
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    stop_ids: tuple[int, ...] = ()
    template: ChatTemplate | None = None  # it was fine-tuned with; only our own format keeps it


def abstract_params(config: LlamaConfig) -> Params:
    """The shapes and dtypes of the parameters, `jax.ShapeDtypeStruct`, nothing computed."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def foreign_shapes(table: Table, config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Foreign name -> shape of every tensor that a model of this configuration has."""
    leaves = named_leaves(abstract_params(dataclasses.replace(config, scan_layers=True)))
    shapes = {}
    for entry in table:
        if entry.ours in leaves:
            shape = leaves[entry.ours].shape
            if "{layer}" in entry.foreign:
                num_layers, *shape = shape
                names = [entry.foreign.format(layer=i) for i in range(num_layers)]
            else:
                names = [entry.foreign]
            shapes |= dict.fromkeys(names, tuple(shape[::-1] if entry.transpose else shape))
    return shapes


def check_tensors(foreign: Foreign) -> None:
    """ValueError that names the tensors which are missing, left over or of another shape."""
    expected = foreign_shapes(foreign.table, foreign.config)
    missing = [name for name in expected if name not in foreign.shapes]
    left_over = [
        name
        for name in foreign.shapes
        if name not in expected and not any(re.search(p, name) for p in foreign.ignored)
    ]
    differing = [
        f"{name} (expected {list(shape)}, got {list(foreign.shapes[name])})"
        for name, shape in expected.items()
        if name in foreign.shapes and tuple(foreign.shapes[name]) != shape
    ]
    kinds = {"missing": missing, "left over": left_over, "of another shape": differing}
    parts = [f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    if parts:
        raise ValueError(
            f"the tensors of {foreign.path} are not those of the model its own configuration "
            f"describes; {'; '.join(parts)}"
        )


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def import_params(foreign: Foreign, target: Params) -> Params:
    """The parameters, laid out and typed as `target` (`jax.ShapeDtypeStruct` with shardings) asks.

    Layers may be stacked or not. Host memory at any moment: one foreign tensor and the shards of
    this host of one parameter, beside the parameters that are finished. Raises ValueError as
    `check_tensors` does, and for a parameter that the format has no name for.
    """
    _check_named(target, foreign.table, f"the format of {foreign.path}")
    check_tensors(foreign)
    entries = {entry.ours: entry for entry in foreign.table}
    done = {}
    for path, leaf in named_leaves(target).items():
        if one_layer := re.fullmatch(r"layers_(\d+)/(.*)", path):
            layer, rest = one_layer.groups()
            entry = entries[f"layers/{rest}"]
            entry = dataclasses.replace(entry, foreign=entry.foreign.format(layer=layer))
        else:
            entry = entries[path]
        done[path] = _import_leaf(foreign, entry, leaf)
    return unflatten_dict(done, sep="/")


def _import_leaf(foreign: Foreign, entry: Entry, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Fill this host's distinct shards, layer by layer where the leaf has L, and place them."""
    by_device = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    regions = {_bounds(index, leaf.shape): None for index in by_device.values()}
    shards = {r: _aligned_empty([hi - lo for lo, hi in r], leaf.dtype) for r in regions}
    if "{layer}" in entry.foreign:
        for layer in range(leaf.shape[0]):
            holders = {r: s for r, s in shards.items() if r[0][0] <= layer < r[0][1]}
            if holders:
                x = foreign.read(entry.foreign.format(layer=layer))
                x = to_ours(entry, x, foreign.config)
                for region, shard in holders.items():
                    shard[layer - region[0][0]] = x[_slices(region[1:])]
    else:
        x = to_ours(entry, foreign.read(entry.foreign), foreign.config)
        for region, shard in shards.items():
            shard[...] = x[_slices(region)]
    arrays = [
        jax.device_put(shards[_bounds(index, leaf.shape)], device)
        for device, index in by_device.items()
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _slices(bounds: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(lo, hi) for lo, hi in bounds)


def _aligned_empty(shape: list[int], dtype: Any) -> np.ndarray:
    """An array on a 64-byte border: jax takes such a one over on CPU without copying it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def foreign_tensors(model: Model, table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """Foreign name and array of every tensor of the model, one at a time, in the table's order.

    Layers may be stacked or not. Each tensor is gathered from its shards, and every process must
    take part. Raises ValueError for a parameter that has no name in the table.
    """
    leaves = named_leaves(model.params)
    held = _check_named(model.params, table, "the format to write")
    for entry in table:
        if entry.ours not in held:
            continue
        for layer in range(model.config.num_layers if "{layer}" in entry.foreign else 1):
            x = _to_host(_leaf_of_layer(leaves, entry, layer))
            yield entry.foreign.format(layer=layer), to_foreign(entry, x, model.config)


def _check_named(params: Params, table: Table, what: str) -> set[str]:
    """The paths of the parameters, stacked; ValueError for those that are not in the table."""
    paths = {re.sub(r"^layers_\d+/", "layers/", path) for path in named_leaves(params)}
    if nameless := sorted(paths - {entry.ours for entry in table}):
        raise ValueError(
            f"{what} has no tensor for {_listed(nameless)}: take another format, or another model"
        )
    return paths


def _leaf_of_layer(leaves: Mapping[str, jax.Array], entry: Entry, layer: int) -> jax.Array:
    if "{layer}" not in entry.foreign:
        return leaves[entry.ours]
    own = entry.ours.replace("layers/", f"layers_{layer}/", 1)
    return leaves[own] if own in leaves else leaves[entry.ours][layer]


def _to_host(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
