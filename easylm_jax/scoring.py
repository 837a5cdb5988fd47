"""Rows of ids -> log-probabilities of their ends. What rows have in common is read once.

    score(params, [Scored(ids, start), ...], config=config) -> [(log_probs, is_best), ...]

The rows are put into a tree of prefixes: the few-shot examples of a task, below them the questions,
below those the choices, or whatever else the ids have in common; nobody says where to cut. A node
is read with the keys and values of the nodes above it in front of it, in batches of nodes of
similar length. The last id of a row is never read, it is only looked up; so of a row that ends in
one letter nothing is read but what it shares. The vocabulary's head is applied to the positions
that are asked for, never to the others.

What it is not: it knows no text (language_model.py calls it) and makes no tokens (sampler.py). A
layer is compiled by itself and called L times: a tree has many shapes, and a whole model takes L
times as long to compile. Further letters: S slots of all ancestors together, M positions asked for.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from easylm_jax.array_types import Hidden, Params, Tokens
from easylm_jax.mesh import BATCH_AXES
from easylm_jax.models.decoding import LayerCache
from easylm_jax.models.llama import (
    Block,
    Context,
    Embed,
    LlamaConfig,
    Norm,
    output_kernel,
    rope_angles,
)
from easylm_jax.objectives import token_losses
from easylm_jax.sampler import num_row_shards
from easylm_jax.sharding import constrain

MIN_SHARED = 12  # tokens; to share fewer saves less than one more level of the tree costs
PARENTS = 2  # times as many tokens of nodes with children, so that these make full batches
MAX_PADDING = 1 / 8  # of `batch_tokens`; another batch costs as much, in the reading of parameters
SLOTS_PER_TOKEN = 16  # of `batch_tokens`: how many slots of ancestors are laid out at once


class Scored(NamedTuple):
    """A row of ids, of which those from `start` on, 1 at least, are rated."""

    ids: tuple[int, ...]
    start: int


Rated = tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]


def score(
    params: Params,
    rows: Sequence[Scored],
    *,
    config: LlamaConfig,
    batch_tokens: int = 2048,
    on_done: Callable[[list[int]], None] | None = None,
) -> list[Rated]:
    """log p of each of ids[start:] given all ids before it, and whether it is the best guess.

    Works on any mesh that `jax.set_mesh` has set, with stacked layers or not. About `batch_tokens`
    tokens are read at once. `on_done` hears which rows were finished since the last call.
    """
    rated = [np.zeros((2, len(ids) - start), np.float32) for ids, start in rows]
    missing = [len(ids) - start for ids, start in rows]
    for batch, (log_probs, is_best) in _Reader(params, config, batch_tokens).read(
        _prefix_tree(rows), ()
    ):
        asked = [places for node in batch for places in node.asked.values()]
        finished = []
        for log_prob, best, places in zip(log_probs, is_best, asked, strict=True):
            for row, column in places:
                rated[row][:, column] = log_prob, best
                missing[row] -= 1
                if missing[row] == 0:
                    finished.append(row)
        if on_done and finished:
            on_done(finished)
    return [(log_probs, is_best > 0) for log_probs, is_best in rated]


# ---- the tree, on the host ----------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class _Node:
    """Ids that follow those of `parent`. `asked` says for whom which ids are rated, and where.

    Its keys are (place in `ids`, the id that may come after it), its values (row, column) of what
    `score` returns: many rows may ask the same.
    """

    ids: tuple[int, ...]
    start: int  # position of the first
    parent: "_Node | None"
    children: list["_Node"] = dataclasses.field(default_factory=list)
    asked: dict[tuple[int, int], list[tuple[int, int]]] = dataclasses.field(default_factory=dict)
    row: int = 0  # in the batch in which it is read

    def above(self) -> list["_Node"]:
        """Its ancestors, the root first."""
        return [] if self.parent is None else [*self.parent.above(), self.parent]


def _prefix_tree(rows: Sequence[Scored]) -> list[_Node]:
    """The roots. All ids but the last of a row lie on the way from a root to some node."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].ids[:-1])
    paths: list[tuple[int, ...]] = []  # in order, none the beginning of another
    path_of = {}
    for i in reversed(order):
        ids = rows[i].ids[:-1]
        if not paths or paths[-1][: len(ids)] != ids:
            paths.append(ids)
        path_of[i] = len(paths) - 1
    roots, ends = [], {}
    todo: list[tuple[int, int, int, _Node | None]] = [(0, len(paths), 0, None)]
    while todo:  # paths[low:high] agree in the first `depth` ids, which are those up to `parent`
        low, high, depth, parent = todo.pop()
        if low == high:
            continue
        end = _common(paths[low], paths[high - 1], depth)
        num = high - low
        if num == 1 or (end - depth) * (num - 1) >= MIN_SHARED * num:
            node = _Node(paths[low][depth:end], depth, parent)
            (roots if parent is None else parent.children).append(node)
            depth, parent = end, node
        if num == 1:
            ends[low] = parent
        else:
            for _, group in itertools.groupby(range(low, high), lambda i, at=end: paths[i][at]):
                same = list(group)
                todo.append((same[0], same[-1] + 1, depth, parent))
    for i, (ids, start) in enumerate(rows):
        for node in [ends[path_of[i]], *ends[path_of[i]].above()]:
            first, last = max(start - 1, node.start), min(len(ids) - 1, node.start + len(node.ids))
            for at in range(first, last):
                places = node.asked.setdefault((at - node.start, ids[at + 1]), [])
                places.append((i, at + 1 - start))
    return roots


def _common(a: Sequence[int], b: Sequence[int], start: int) -> int:
    """How many ids a and b have in common at the front; `start` of them are known to be."""
    most = min(len(a), len(b))
    return next((i for i in range(start, most) if a[i] != b[i]), most)


def _size(n: int, least: int, parts: int) -> int:
    """`n` rounded up to a multiple of `least`, to one of ~`parts` sizes per octave if it is large.

    Every size is compiled once, which takes as long as reading some hundred tokens.
    """
    octave = 1 << max(n - 1, 1).bit_length() - 1
    step = least * -(-octave // (parts * least))
    return -(-n // step) * step


# ---- reading it, on the devices -----------------------------------------------------------------


class _Level(NamedTuple):
    """A batch of nodes as their descendants see it: T slots per node."""

    layers: list[LayerCache]
    segment_ids: Int[np.ndarray, "B T"]
    positions: Int[np.ndarray, "B T"]


class _Reader:
    """Reads a tree batch by batch, each node once, its children before the next batch."""

    def __init__(self, params: Params, config: LlamaConfig, batch_tokens: int) -> None:
        self._params, self._batch_tokens = params, batch_tokens
        self._config = dataclasses.replace(config, remat="none")
        self._rows, self._columns = num_row_shards(), math.lcm(4, _num_sequence_shards())

    def read(
        self, nodes: Sequence[_Node], past: tuple[_Level, ...]
    ) -> Iterator[tuple[list[_Node], Rated]]:
        """Batches of nodes, and what was asked of them, one after the other in one array.

        The keys and values of a batch are kept only until its descendants have been read.
        """
        width = sum(level.positions.shape[1] for level in past)
        todo = sorted(nodes, key=lambda node: (not node.children, -len(node.ids)))
        while todo:
            T = _size(len(todo[0].ids), self._columns, 8)
            tokens = self._batch_tokens * (PARENTS if todo[0].children else 1)
            most = min(tokens // T, SLOTS_PER_TOKEN * self._batch_tokens // (width + T))
            most = max(most // self._rows, 1) * self._rows
            # Leaves may be longer than parents: they begin a batch of their own.
            _, alike = next(itertools.groupby(todo[:most], lambda node: bool(node.children)))
            padding = itertools.accumulate(T - len(node.ids) for node in alike)
            num = max(sum(n <= MAX_PADDING * tokens for n in padding), 1)
            batch, todo = todo[:num], todo[num:]
            B = min(_size(len(batch), self._rows, 16), most)
            children = [child for node in batch for child in node.children]
            hidden, level = self._forward(batch, B, T, past, keep=bool(children))
            yield batch, self._rate(batch, hidden)
            del hidden
            yield from self.read(children, (*past, level))

    def _forward(
        self, batch: list[_Node], B: int, T: int, past: tuple[_Level, ...], *, keep: bool
    ) -> tuple[Hidden, _Level]:
        """Hidden states [B, T, D] of the nodes, before the last norm."""
        tokens, segment_ids, positions = np.zeros((3, B, T), np.int32)
        rows_above = np.zeros((len(past), B), np.int32)
        for row, node in enumerate(batch):
            node.row = row
            size = len(node.ids)
            tokens[row, :size], segment_ids[row, :size] = node.ids, 1
            positions[row, :size] = np.arange(node.start, node.start + size)
            rows_above[:, row] = [ancestor.row for ancestor in node.above()]
        levels = list(zip(past, rows_above, strict=True))
        k_segment_ids = [*(x.segment_ids[rows] for x, rows in levels), segment_ids]
        k_positions = [*(x.positions[rows] for x, rows in levels), positions]
        params, config = self._params, self._config
        x, context = _start(
            params["embed"],
            tokens,
            segment_ids,
            positions,
            np.concatenate(k_segment_ids, axis=1),
            np.concatenate(k_positions, axis=1),
            config=config,
        )
        if context.k_positions.shape[1] <= config.attention.block_k:  # one tile, nothing to cut
            simple = dataclasses.replace(config.attention, implementation="reference")
            config = dataclasses.replace(config, attention=simple)
        layers = []
        for i in range(config.num_layers):
            cache = None
            if past or keep:
                own = tuple(level.layers[i] for level in past)
                cache = _lay_out(own, rows_above, B=B, T=T, config=config)
            stacked = "layers" in params
            layer = params["layers"] if stacked else params[f"layers_{i}"]
            x, cache = _layer(
                layer, np.int32(i) if stacked else None, x, context, cache, config=config, keep=keep
            )
            layers.append(cache)
        return x, _Level(layers, segment_ids, positions)

    def _rate(self, batch: list[_Node], hidden: Hidden) -> Rated:
        asked = [(node.row, *key) for node in batch for key in node.asked]
        if not asked:
            return np.zeros(0, np.float32), np.zeros(0, bool)
        M = _size(len(asked), 16 * self._rows, 4)
        rows, columns, targets = np.pad(
            np.array(asked, np.int32).T, ((0, 0), (0, M - len(asked)))
        ).reshape(3, self._rows, -1)
        head = {name: x for name, x in self._params.items() if "layers" not in name}
        losses, correct = jax.device_get(
            _rate(head, hidden, rows, columns, targets, config=self._config)
        )
        return -losses.reshape(-1)[: len(asked)], correct.reshape(-1)[: len(asked)] > 0


def _num_sequence_shards() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["sequence"]


@functools.partial(jax.jit, static_argnames=("config",))
def _start(
    embed: Params,
    tokens: Tokens,
    segment_ids: Tokens,
    positions: Tokens,
    k_segment_ids: Int[Array, "B S"],
    k_positions: Int[Array, "B S"],
    *,
    config: LlamaConfig,
) -> tuple[Hidden, Context]:
    """What the first layer is given."""
    x_BTD = Embed(config).apply({"params": embed}, tokens)
    before = k_positions.shape[1] - positions.shape[1]
    context = Context(
        rope=rope_angles(positions, config),
        segment_ids=segment_ids,
        positions=positions,
        k_segment_ids=k_segment_ids,
        k_positions=k_positions,
        index=jnp.int32(before) if before else None,
    )
    return constrain(x_BTD, BATCH_AXES, "sequence", None), context


@functools.partial(jax.jit, static_argnames=("B", "T", "config"))
def _lay_out(
    levels: tuple[tuple[Array, Array], ...],
    rows: Int[Array, "levels B"],
    *,
    B: int,
    T: int,
    config: LlamaConfig,
) -> LayerCache:
    """One layer's cache for a batch: row b has row `rows[l, b]` of every level, then T free slots.

    Apart from the layer, so that this is compiled for sizes of levels and the layer is not.
    """
    K, H = config.num_kv_heads, config.head_dim
    keys = [k_BKHS[own] for (k_BKHS, _), own in zip(levels, rows, strict=True)]
    values = [v_BKSH[own] for (_, v_BKSH), own in zip(levels, rows, strict=True)]
    free_k, free_v = jnp.zeros((B, K, H, T), config.dtype), jnp.zeros((B, K, T, H), config.dtype)
    cache = jnp.concatenate([*keys, free_k], axis=3), jnp.concatenate([*values, free_v], axis=2)
    return tuple(constrain(x, BATCH_AXES, "tensor", None, None) for x in cache)


@functools.partial(jax.jit, static_argnames=("config", "keep"), donate_argnames=("x_BTD",))
def _layer(
    params: Params,
    index: Int[Array, ""] | None,
    x_BTD: Hidden,
    context: Context,
    cache: LayerCache | None,
    *,
    config: LlamaConfig,
    keep: bool,
) -> tuple[Hidden, tuple[Array, Array] | None]:
    """One layer, `index` of a stack or the only one; with `keep` its keys and values [..., T]."""
    if index is not None:
        params = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, False), params)
    block = Block(config)
    x_BTD, cache = block.apply({"params": params}, x_BTD, context, cache, (0.0, 0.0), None)
    if not keep:
        return x_BTD, None
    T = x_BTD.shape[1]
    return x_BTD, (cache[0][..., -T:], cache[1][:, :, -T:])


@functools.partial(jax.jit, static_argnames=("config",))
def _rate(
    head: Params,
    x_BTD: Hidden,
    rows: Int[Array, "R m"],
    columns: Int[Array, "R m"],
    targets: Int[Array, "R m"],
    *,
    config: LlamaConfig,
) -> tuple[Array, Array]:
    """-log p of `targets` after the places (rows, columns), and 1.0 where they are the best."""
    x_RmD = constrain(x_BTD[rows, columns], BATCH_AXES, "sequence", None)
    hidden_RmD = Norm(config).apply({"params": head["final_norm"]}, x_RmD)
    rated = token_losses(hidden_RmD, output_kernel(head), targets)
    return tuple(constrain(x, None, None) for x in rated)  # every host reads them
