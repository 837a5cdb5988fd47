"""Continue prompts token by token with a key/value cache. Knows token ids only, no text.

`prefill` reads all prompts at once, padded to one length, and picks the first token of each; what
many prompts begin with is read once, by `read_prefix`.
`decode` is a `lax.while_loop` on the devices that goes on until a number of tokens or until every
row has ended. `generate` calls both, in pieces if somebody watches: to print the tokens, or to stop
rows. What is picked for a row depends on its own prompt and seed, never on its neighbours. Chat,
evaluation, serving and on-line methods share this file.

Shapes are rounded up to `bucket` sizes, so that a new prompt length seldom compiles anything.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from easylm_jax.array_types import Params
from easylm_jax.mesh import BATCH_AXES
from easylm_jax.models.decoding import KVCache, init_cache
from easylm_jax.models.llama import Llama, LlamaConfig, output_logits
from easylm_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are picked, applied in this order; the defaults sample the model's distribution.

    `repetition_penalty` divides the positive and multiplies the negative logits of ids that the row
    already has; `temperature` 0 takes the most likely token; `top_k` keeps the k most likely, 0
    all; `top_p` the fewest that together have this probability (Holtzman et al. 2020,
    arXiv:1904.09751); `min_p` those with at least this share of the most likely one's. Equally
    likely ids at a border are all kept.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (off) and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 is off"),
        ):
            if not fits:
                raise ValueError(f"{name} = {getattr(self, name)} must be {expected}")


@flax.struct.dataclass
class Settings:
    """A SamplingConfig as the devices see it: one value per row, so that rows may differ."""

    keys: Key[Array, " B"]
    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    max_new_tokens: Int[Array, " B"]  # a row always gets one
    stop_ids: Int[Array, " E"]  # of all rows; -1 is no id
    draws: bool = flax.struct.field(pytree_node=False)  # some row has a temperature
    filters: bool = flax.struct.field(pytree_node=False)  # some row uses top_k, top_p or min_p
    penalises: bool = flax.struct.field(pytree_node=False)
    vocab_size: int = flax.struct.field(pytree_node=False)  # ids from here on are never picked


def make_settings(
    config: SamplingConfig,
    seeds: Sequence[int],
    *,
    max_new_tokens: Sequence[int],
    vocab_size: int,
    stop_ids: Sequence[int],
) -> Settings:
    """The same settings for every row, with a seed and a number of tokens of its own for each."""
    rows = len(seeds)
    return Settings(
        keys=jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32)),
        temperature=jnp.full(rows, config.temperature, jnp.float32),
        top_k=jnp.full(rows, config.top_k, jnp.int32),
        top_p=jnp.full(rows, config.top_p, jnp.float32),
        min_p=jnp.full(rows, config.min_p, jnp.float32),
        repetition_penalty=jnp.full(rows, config.repetition_penalty, jnp.float32),
        max_new_tokens=jnp.asarray(max_new_tokens, jnp.int32),
        stop_ids=jnp.asarray([*stop_ids] or [-1], jnp.int32),
        draws=config.temperature > 0,
        filters=config.top_k > 0 or config.top_p < 1 or config.min_p > 0,
        penalises=config.repetition_penalty != 1,
        vocab_size=vocab_size,
    )


@flax.struct.dataclass
class State:
    """The rows in the making. Row b has `count[b]` new tokens; a stop id that ended it is one."""

    tokens: Int[Array, "B M"]
    log_probs: Float[Array, "B M"]  # of each token under the model itself, at temperature 1
    count: Int[Array, " B"]
    done: Bool[Array, " B"]
    lengths: Int[Array, " B"]  # of the prompts
    index: Int[Array, ""]  # tokens made so far by the rows that have not ended
    seen: Bool[Array, "B V"] | None  # ids in the row, for the repetition penalty
    cache: KVCache


def bucket(n: int) -> int:
    """`n` rounded up to one of four sizes per octave, 16 at least: at most a quarter too large."""
    step = max(16, 1 << max(n - 1, 1).bit_length() >> 3)
    return -(-n // step) * step


def pad_prompts(
    prompts: Sequence[Sequence[int]], *, rows_multiple: int = 1
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Prompts as one array, zeros on the right, and their lengths.

    The number of rows is rounded up to `rows_multiple` by repeating the last prompt.
    """
    rows = [*prompts, *([prompts[-1]] * (-len(prompts) % rows_multiple))]
    tokens = np.zeros((len(rows), bucket(max(map(len, rows)))), np.int32)
    for row, prompt in zip(tokens, rows, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(row) for row in rows], np.int32)


def num_row_shards() -> int:
    """Over how many devices the mesh that is set splits the rows of a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


# ---- which token ------------------------------------------------------------------------------


def penalise(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], penalty_B: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Logits of ids the row already has, made smaller (after arXiv:1909.05858)."""
    penalty_B1 = penalty_B[:, None]
    smaller = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, smaller, logits_BV)


def filter_logits(logits_BV: Float[Array, "B V"], settings: Settings) -> Float[Array, "B V"]:
    """Logits with -inf for what top_k, top_p and min_p leave out.

    Each rule is a threshold, found by bisection over the 2^32 floats in order instead of by sorting
    the vocabulary: 32 passes of adding up, which every backend does well.
    """
    k_B1, p_B1 = settings.top_k[:, None], settings.top_p[:, None]
    ranks_BV = _ordered_bits(logits_BV)

    def largest_with(enough: Callable[[Array], Array]) -> Array:
        """The largest threshold [B, 1] at which `enough` of what is not below it remains."""

        def halve(bit, low_B1):
            middle = low_B1 | (jnp.uint32(1) << (31 - bit).astype(jnp.uint32))
            return jnp.where(enough(ranks_BV >= middle), middle, low_B1)

        return jax.lax.fori_loop(0, 32, halve, jnp.zeros_like(k_B1, jnp.uint32))

    def at_least_k(kept_BV):
        return kept_BV.sum(-1, keepdims=True) >= jnp.where(k_B1 > 0, k_B1, kept_BV.shape[-1])

    kept_BV = ranks_BV >= largest_with(at_least_k)
    probs_BV = jax.nn.softmax(jnp.where(kept_BV, logits_BV, -jnp.inf))

    def at_least_p(kept_BV):
        return (probs_BV * kept_BV).sum(-1, keepdims=True) >= p_B1

    nucleus_BV = ranks_BV >= largest_with(at_least_p)
    kept_BV &= nucleus_BV | (p_B1 >= 1)  # rounded sums may stay below 1
    probs_BV = jax.nn.softmax(jnp.where(kept_BV, logits_BV, -jnp.inf))
    kept_BV &= probs_BV >= settings.min_p[:, None] * probs_BV.max(-1, keepdims=True)
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


def _ordered_bits(x: Float[Array, "B V"]) -> Array:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def sample_tokens(
    logits_BV: Float[Array, "B V"], seen_BV: Array | None, settings: Settings, index: Array
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Token `index` of every row, and its log-probability under the model itself."""
    chosen_BV = logits_BV[:, : settings.vocab_size]
    if settings.penalises:
        seen_BV = seen_BV[:, : settings.vocab_size]
        chosen_BV = penalise(chosen_BV, seen_BV, settings.repetition_penalty)
    greedy_B1 = (settings.temperature == 0)[:, None]
    chosen_BV = chosen_BV / jnp.where(greedy_B1, 1.0, settings.temperature[:, None])
    if settings.filters:
        chosen_BV = filter_logits(chosen_BV, settings)
    if settings.draws:
        keys = jax.vmap(jax.random.fold_in, (0, None))(settings.keys, index)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, chosen_BV.shape[1:]))(keys)
        chosen_BV = jnp.where(greedy_B1, chosen_BV, chosen_BV + noise_BV)
    token_B = jnp.argmax(chosen_BV, axis=-1)
    log_probs_BV = jax.nn.log_softmax(logits_BV)
    log_prob_B = jnp.take_along_axis(log_probs_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B.astype(jnp.int32), log_prob_B


# ---- prefill and decode -----------------------------------------------------------------------


def inference_model(params: Params, config: LlamaConfig) -> Llama:
    """The model whose layers lie as those of `params` do, stacked or not."""
    return Llama(dataclasses.replace(config, scan_layers="layers" in params, remat="none"))


@flax.struct.dataclass
class Prefix:
    """Ids that all prompts of some batches begin with, and their keys and values; rows alike."""

    tokens: Int[Array, "R P"]  # padded on the right
    length: Int[Array, ""]
    cache: KVCache


def read_prefix(params: Params, ids: Sequence[int], *, config: LlamaConfig) -> Prefix:
    """Read once what `generate` shall put before every prompt."""
    tokens, lengths = pad_prompts([ids], rows_multiple=num_row_shards())
    return _read_prefix(params, tokens, lengths, config=config)


@functools.partial(jax.jit, static_argnames=("config",))
def _read_prefix(
    params: Params, tokens: Int[Array, "R P"], lengths: Int[Array, " R"], *, config: LlamaConfig
) -> Prefix:
    model = inference_model(params, config)
    R, P = tokens.shape
    slots = jnp.broadcast_to(jnp.arange(P)[None], (R, P))
    segments = (slots < lengths[:, None]).astype(jnp.int32)
    empty = init_cache(model.config, R, P)
    _, cache = model.apply({"params": params}, tokens, segments, slots, cache=empty)
    return Prefix(tokens, lengths[0], cache)


def _begin_with(prefix: Prefix, cache: KVCache, rows_axis: int) -> KVCache:
    """The empty `cache` with the prefix in the first slots of every row."""

    def put(empty: Array, own: Array, axis: int = 0) -> Array:
        shape = [*own.shape]
        shape[axis] = empty.shape[axis]
        one = jax.lax.slice_in_dim(own, 0, 1, axis=axis)
        return jax.lax.dynamic_update_slice(empty, jnp.broadcast_to(one, shape), [0] * empty.ndim)

    own = prefix.cache
    return KVCache(
        layers=jax.tree.map(functools.partial(put, axis=rows_axis), cache.layers, own.layers),
        segment_ids=put(cache.segment_ids, own.segment_ids),
        positions=put(cache.positions, own.positions),
        index=own.index,
    )


def _add_token(params: Params, state: State, hidden_BD: Array, settings: Settings) -> State:
    """Give the rows that go on their token `state.index`; `hidden_BD` is of the token before it."""
    logits_BV = output_logits(params, hidden_BD[:, None])[:, 0]
    token_B, log_prob_B = sample_tokens(logits_BV, state.seen, settings, state.index)
    rows, seen = jnp.arange(token_B.size), state.seen
    if seen is not None:
        seen = seen.at[rows, token_B].set(True)
    column = jnp.where(state.done, state.tokens.shape[1], state.index)  # past the end: dropped
    count = state.count + ~state.done
    stops = (token_B[:, None] == settings.stop_ids[None]).any(-1)
    made = dict(
        tokens=state.tokens.at[rows, column].set(token_B, mode="drop"),
        log_probs=state.log_probs.at[rows, column].set(log_prob_B, mode="drop"),
        count=count,
        done=state.done | stops | (count >= settings.max_new_tokens),
    )
    made = jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), made)  # every host reads them
    return state.replace(index=state.index + 1, seen=seen, **made)


@functools.partial(jax.jit, static_argnames=("config", "capacity", "samples"))
def prefill(
    params: Params,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    settings: Settings,
    *,
    config: LlamaConfig,
    capacity: int,
    samples: int = 1,
    prefix: Prefix | None = None,
) -> State:
    """Read the prompts, pick the first token of each row; it may get `capacity` tokens at most.

    Prompt b is `prefix`, if there is one, then `prompts[b, :lengths[b]]`; padding takes cache slots
    that nothing attends to. With `samples` each prompt becomes that many rows, next to one another;
    `settings` is of the rows.
    """
    B, T = prompts.shape
    model = inference_model(params, config)
    prompts = constrain(prompts, BATCH_AXES, None)
    slots = jnp.arange(T)[None]
    segments = (slots < lengths[:, None]).astype(jnp.int32)
    before = 0 if prefix is None else prefix.tokens.shape[1]
    cache = init_cache(model.config, B, before + T + capacity)
    rows_axis = 1 if model.config.scan_layers else 0
    if prefix is not None:
        cache = _begin_with(prefix, cache, rows_axis)
    first = 0 if prefix is None else prefix.length
    hidden, cache = model.apply(
        {"params": params},
        prompts,
        segments,
        jnp.broadcast_to(first + slots, (B, T)),
        cache=cache,
    )
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    lengths = first + lengths
    seen = None
    if settings.penalises:
        # Padding marks an id past the end of the vocabulary, which is dropped.
        ids = jnp.where(segments == 1, prompts, config.vocab_size)
        if prefix is not None:
            known = jnp.where(jnp.arange(before) < first, prefix.tokens[0], config.vocab_size)
            ids = jnp.concatenate([jnp.broadcast_to(known[None], (B, before)), ids], axis=1)
        seen = jnp.zeros((B, config.vocab_size), bool)
        seen = seen.at[jnp.arange(B)[:, None], ids].set(True, mode="drop")
    if samples > 1:

        def repeat(tree, axis=0):
            return jax.tree.map(lambda x: jnp.repeat(x, samples, axis=axis), tree)

        cache = cache.replace(
            layers=repeat(cache.layers, axis=rows_axis),
            segment_ids=repeat(cache.segment_ids),
            positions=repeat(cache.positions),
        )
        last, lengths, seen = repeat((last, lengths, seen))
    rows = B * samples
    state = State(
        tokens=jnp.zeros((rows, capacity), jnp.int32),
        log_probs=jnp.zeros((rows, capacity), jnp.float32),
        count=jnp.zeros(rows, jnp.int32),
        done=jnp.zeros(rows, bool),
        lengths=lengths,
        index=jnp.int32(0),
        seen=seen,
        cache=cache,
    )
    return _add_token(params, state, last, settings)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnums=1)
def decode(
    params: Params,
    state: State,
    settings: Settings,
    limit: Int[Array, ""] | int,
    *,
    config: LlamaConfig,
) -> State:
    """Go on until every row has ended or has `limit` tokens; `limit` is at most the capacity."""
    model = inference_model(params, config)

    def unfinished(state: State) -> Array:
        return (state.index < limit) & ~state.done.all()

    def one(state: State) -> State:
        before = jax.lax.dynamic_slice_in_dim(state.tokens, state.index - 1, 1, axis=1)
        hidden, cache = model.apply(
            {"params": params},
            before,
            jnp.ones_like(before),
            (state.lengths + state.index - 1)[:, None],
            cache=state.cache,
        )
        return _add_token(params, state.replace(cache=cache), hidden[:, 0], settings)

    return jax.lax.while_loop(unfinished, one, state)


class Generated(NamedTuple):
    """What `generate` made: row b is `tokens[b, :count[b]]`, a stop id that ended it included."""

    tokens: Int[np.ndarray, "B M"]
    log_probs: Float[np.ndarray, "B M"]
    count: Int[np.ndarray, " B"]


Callback = Callable[[Generated], Sequence[int]]


def generate(
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    config: LlamaConfig,
    sampling: SamplingConfig,
    seeds: Sequence[int],
    max_new_tokens: int | Sequence[int],
    vocab_size: int,
    stop_ids: Sequence[int] = (),
    samples: int = 1,
    prefix: Prefix | None = None,
    callback: Callback | None = None,
    chunk: int = 8,
) -> Generated:
    """Up to `max_new_tokens` ids after `prefix` and each prompt, `samples` rows per prompt.

    Works on any mesh that `jax.set_mesh` has set. `seeds` has one number per row, and so may
    `max_new_tokens`; a row's tokens are a function of its prompt and its seed. `callback` sees what
    there is after the first and then after every `chunk` tokens, and returns the rows that shall
    stop.
    """
    tokens, lengths = pad_prompts(prompts, rows_multiple=num_row_shards())
    rows = len(prompts) * samples
    limits = [max_new_tokens] * rows if isinstance(max_new_tokens, int) else list(max_new_tokens)
    longest = max(limits)
    padding = [0] * (len(tokens) * samples - rows)  # rows that only fill the mesh end at once
    settings = make_settings(
        sampling,
        [*seeds, *padding],
        max_new_tokens=[*limits, *padding],
        vocab_size=vocab_size,
        stop_ids=stop_ids,
    )
    state = prefill(
        params,
        tokens,
        lengths,
        settings,
        config=config,
        capacity=bucket(longest),
        samples=samples,
        prefix=prefix,
    )

    def so_far() -> Generated:
        tokens, log_probs, count = jax.device_get((state.tokens, state.log_probs, state.count))
        size = (slice(rows), slice(longest))
        return Generated(tokens[size], log_probs[size], count[:rows])

    limit = 1 if callback else longest
    while True:
        if limit > 1:
            state = decode(params, state, settings, jnp.int32(limit), config=config)
        if callback:
            stopped = np.zeros(state.done.shape, bool)
            stopped[list(callback(so_far()))] = True
            state = state.replace(done=state.done | stopped)
        if limit == longest or np.asarray(state.done).all():
            return so_far()
        limit = min(limit + chunk, longest)
