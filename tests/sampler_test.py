"""Generating with a cache against full forwards; rules of picking against transformers."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_jax.mesh import make_mesh
from easylm_jax.models.decoding import init_cache, unstack_layers
from easylm_jax.models.llama import PARAM_RULES, Llama, output_logits
from easylm_jax.sampler import (
    SamplingConfig,
    bucket,
    decode,
    filter_logits,
    generate,
    make_settings,
    pad_prompts,
    penalise,
    prefill,
    read_prefix,
)
from easylm_jax.sharding import tree_shardings
from tests.tiny import BLOCKS, VOCAB, assert_close, tiny_config, tiny_params

WINDOW = dataclasses.replace(BLOCKS, sliding_window=4)
GREEDY = SamplingConfig(temperature=0.0)
PROMPTS = [[5, 9, 2, 40, 33], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]


def run(prompts=PROMPTS, *, params=None, sampling=GREEDY, seeds=None, **changes):
    """`generate` on the tiny model, 6 tokens unless told otherwise."""
    options = dict(config=tiny_config(), max_new_tokens=6, vocab_size=VOCAB) | changes
    rows = len(prompts) * options.get("samples", 1)
    seeds = range(rows) if seeds is None else seeds
    params = tiny_params() if params is None else params
    return generate(params, prompts, sampling=sampling, seeds=list(seeds), **options)


WINDOWED = pytest.param(WINDOW, marks=pytest.mark.slow, id="window")


@pytest.fixture(scope="module", params=[pytest.param(BLOCKS, id="full"), WINDOWED])
def full_forward(request):
    """(config, function from rows of ids to their logits [B, T, V], without a cache)."""
    config = tiny_config(attention=request.param)

    @jax.jit
    def logits(tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden, _ = Llama(config).apply(
            {"params": tiny_params()}, tokens, jnp.ones_like(tokens), positions
        )
        return output_logits(tiny_params(), hidden)

    return config, logits


def test_greedy_equals_the_argmax_of_full_forwards_for_ragged_prompts(full_forward):
    """And the log-probabilities are those of the full forwards."""
    config, logits = full_forward
    got = run(config=config)
    tokens, lengths = pad_prompts(PROMPTS)
    rows, at = np.pad(tokens, ((0, 0), (0, 6))), np.arange(3)
    for step in range(6):
        log_probs = jax.nn.log_softmax(logits(jnp.asarray(rows)))[at, lengths + step - 1]
        rows[at, lengths + step] = log_probs.argmax(-1)
        np.testing.assert_array_equal(got.tokens[:, step], log_probs.argmax(-1))
        assert_close(got.log_probs[:, step], log_probs.max(-1), rtol=1e-5)
    np.testing.assert_array_equal(got.count, 6)


def test_logits_from_the_cache_equal_those_of_a_full_forward(full_forward):
    """Two rows in pieces of 7, 1, 1, 3 tokens into a cache longer than needed."""
    config, logits = full_forward
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, size=(2, 12)), jnp.int32)
    cache, seen, start = init_cache(config, 2, 20), [], 0
    for size in (7, 1, 1, 3):
        piece = tokens[:, start : start + size]
        positions = jnp.broadcast_to(jnp.arange(start, start + size)[None], piece.shape)
        hidden, cache = jax.jit(Llama(config).apply)(
            {"params": tiny_params()}, piece, jnp.ones_like(piece), positions, cache=cache
        )
        seen.append(output_logits(tiny_params(), hidden))
        start += size
    assert cache.index == 12
    assert_close(jnp.concatenate(seen, axis=1), logits(tokens), rtol=2e-6)


def test_layers_with_arrays_of_their_own_give_the_same():
    stacked = run()
    unstacked = run(params=unstack_layers(tiny_params()))
    np.testing.assert_array_equal(stacked.tokens, unstacked.tokens)
    assert_close(unstacked.log_probs, stacked.log_probs, rtol=1e-5)


def test_a_row_depends_on_its_prompt_and_seed_alone():
    """One by one, in another company, watched in pieces: the same draws."""
    options = dict(sampling=SamplingConfig(temperature=0.8, top_k=9, repetition_penalty=1.3))
    together = run(seeds=[3, 4, 5], **options)
    assert len({tuple(row) for row in together.tokens.tolist()}) == 3
    seen = []
    watched = run(
        seeds=[3, 4, 5], callback=lambda made: seen.append(made) or [], chunk=2, **options
    )
    np.testing.assert_array_equal(watched.tokens, together.tokens)
    assert [made.count.tolist() for made in seen] == [[n] * 3 for n in (1, 3, 5, 6)]
    for row, prompt in enumerate(PROMPTS):
        alone = run([prompt], seeds=[3 + row], **options)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        assert_close(alone.log_probs[0], together.log_probs[row], rtol=1e-5)


def test_samples_of_a_prompt_are_rows_of_their_own():
    options = dict(sampling=SamplingConfig(temperature=0.8))
    got = run(samples=2, seeds=[3, 4, 5, 6, 7, 8], **options)
    twice = run([p for p in PROMPTS for _ in range(2)], seeds=[3, 4, 5, 6, 7, 8], **options)
    np.testing.assert_array_equal(got.tokens, twice.tokens)


@pytest.mark.parametrize(
    "mesh", ["1,2,2,2", *(pytest.param(m, marks=pytest.mark.slow) for m in ("2,2,1,2", "1,8,1,1"))]
)
def test_a_mesh_changes_nothing(mesh):
    options = dict(sampling=SamplingConfig(temperature=0.8, top_p=0.9))
    expected = run(**options)
    mesh = make_mesh(mesh)
    for params in (tiny_params(), unstack_layers(tiny_params())):
        params = jax.device_put(params, tree_shardings(params, mesh, PARAM_RULES))
        with jax.set_mesh(mesh):
            got = run(params=params, **options)
        np.testing.assert_array_equal(got.tokens, expected.tokens)
        assert_close(got.log_probs, expected.log_probs, rtol=1e-5)


@pytest.mark.parametrize(
    "mesh, attention",
    [(None, BLOCKS), (None, WINDOW), pytest.param("1,2,2,2", BLOCKS, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_prefix_read_once_is_as_if_every_prompt_began_with_it(mesh, attention):
    shared = np.random.default_rng(1).integers(0, VOCAB, 21).tolist()  # padded to 32
    config = tiny_config(attention=attention)
    penalty = SamplingConfig(temperature=0.8, repetition_penalty=1.5)
    options = dict(config=config, sampling=penalty, samples=2, seeds=range(6))
    whole = run([shared + prompt for prompt in PROMPTS], **options)
    for params in (tiny_params(), unstack_layers(tiny_params())):
        with contextlib.ExitStack() as stack:
            if mesh:
                mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
                params = jax.device_put(params, tree_shardings(params, mesh, PARAM_RULES))
                stack.enter_context(jax.set_mesh(mesh))
            prefix = read_prefix(params, shared, config=config)
            got = run(PROMPTS, params=params, prefix=prefix, **options)
        np.testing.assert_array_equal(got.tokens, whole.tokens)
        assert_close(got.log_probs, whole.log_probs, rtol=1e-5)


def test_a_stop_id_or_the_watcher_ends_a_row_and_no_other():
    options = dict(sampling=SamplingConfig(temperature=0.7), max_new_tokens=24)
    endless = run([PROMPTS[0]], samples=32, **options)
    ended = run([PROMPTS[0]], samples=32, stop_ids=[7, 2], **options)
    for row in range(32):
        stops = np.flatnonzero(np.isin(endless.tokens[row], [2, 7]))
        length = stops[0] + 1 if len(stops) else 24
        assert ended.count[row] == length
        np.testing.assert_array_equal(
            ended.tokens[row], np.where(np.arange(24) < length, endless.tokens[row], 0)
        )
    assert 2 < len(set(ended.count.tolist()))
    watched = run(PROMPTS, max_new_tokens=9, callback=lambda made: [1], chunk=4)
    assert watched.count.tolist() == [9, 1, 9]


def test_rows_that_only_fill_the_mesh_keep_nobody_waiting():
    """One prompt on eight devices is stopped at once; the loop does not go on for the others."""
    seen = []
    with jax.set_mesh(make_mesh("1,8,1,1")):
        run([PROMPTS[0]], max_new_tokens=48, callback=lambda made: seen.append(made) or [0])
    assert len(seen) == 1


def test_each_row_has_a_limit_of_its_own():
    made = run(max_new_tokens=[2, 9, 5])
    assert made.count.tolist() == [2, 9, 5] and made.tokens.shape == (3, 9)
    np.testing.assert_array_equal(made.tokens[1], run([PROMPTS[1]], max_new_tokens=9).tokens[0])


def test_ending_early_saves_the_work():
    """Every row ends in the first tokens; the loop must not go on to a million."""
    tokens, lengths = pad_prompts(PROMPTS)
    settings = make_settings(
        GREEDY, [0] * 3, max_new_tokens=[9] * 3, vocab_size=VOCAB, stop_ids=range(VOCAB)
    )
    state = prefill(tiny_params(), tokens, lengths, settings, config=tiny_config(), capacity=16)
    assert state.done.all()
    state = decode(tiny_params(), state, settings, 10**6, config=tiny_config())
    assert state.index == 1


def test_a_new_prompt_length_compiles_nothing():
    run([[1] * 3])
    before = prefill._cache_size(), decode._cache_size()
    for length in (1, 9, 16):
        run([[1] * length], max_new_tokens=5)
    assert (prefill._cache_size(), decode._cache_size()) == before


def test_buckets_are_at_most_a_quarter_too_large():
    sizes = [bucket(n) for n in range(1, 5000)]
    assert sizes == sorted(sizes) and set(sizes[15:63]) <= {16, 32, 48, 64}
    assert all(n <= size <= max(16, n * 5 / 4 + 16) for n, size in enumerate(sizes, start=1))
    assert {bucket(2**k) for k in range(4, 12)} == {2**k for k in range(4, 12)}


def test_frequencies_of_pairs_are_those_of_the_softmax(full_forward):
    """Chi-square of 16 cells: mean 15, deviation 5.5. Ids 4 and above are never picked."""
    if full_forward[0].attention.sliding_window:
        pytest.skip("the model without a window is enough")
    pairs = run(
        [PROMPTS[0]],
        samples=4096,
        max_new_tokens=2,
        vocab_size=4,
        sampling=SamplingConfig(temperature=0.7),
    ).tokens
    assert pairs.max() < 4
    contexts = jnp.asarray([PROMPTS[0] + [first] for first in range(4)], jnp.int32)
    logits = np.asarray(full_forward[1](contexts), np.float64)[:, :, :4] / 0.7
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = len(pairs) * p[0, -2][:, None] * p[:, -1]
    counts = np.zeros((4, 4))
    np.add.at(counts, tuple(pairs.T), 1)
    assert expected.min() > 4
    assert ((counts - expected) ** 2 / expected).sum() < 15 + 5 * 5.5


@pytest.mark.parametrize(
    "rules",
    [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.8, "min_p": 0.05}],
    ids=str,
)
def test_what_is_kept_is_what_transformers_keeps(rules):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(0, 3, (6, 200)).astype(np.float32)
    settings = make_settings(
        SamplingConfig(**rules), [0] * 6, max_new_tokens=[9] * 6, vocab_size=200, stop_ids=[]
    )
    kept = np.isfinite(filter_logits(jnp.asarray(logits), settings))
    warpers = {
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    expected = torch.tensor(logits)
    for name, value in rules.items():
        expected = warpers[name](value)(None, expected)
    np.testing.assert_array_equal(kept, np.isfinite(expected.numpy()))
    assert 0 < kept.sum() < kept.size


def test_the_penalty_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (4, 50)).astype(np.float32)
    ids = rng.integers(0, 50, (4, 12))
    seen = np.zeros((4, 50), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor(ids), torch.tensor(logits)
    )
    got = penalise(jnp.asarray(logits), jnp.asarray(seen), jnp.full(4, 1.7))
    assert_close(got, expected.numpy(), rtol=1e-6)


def test_the_penalty_is_for_ids_of_the_prompt_and_new_ones_not_for_padding():
    tokens, lengths = pad_prompts(PROMPTS)
    penalty = SamplingConfig(temperature=0.0, repetition_penalty=1.2)
    settings = make_settings(
        penalty, [0] * 3, max_new_tokens=[9] * 3, vocab_size=VOCAB, stop_ids=[]
    )
    state = prefill(tiny_params(), tokens, lengths, settings, config=tiny_config(), capacity=16)
    state = decode(tiny_params(), state, settings, 5, config=tiny_config())
    for row, prompt in enumerate(PROMPTS):
        expected = {*prompt, *state.tokens[row, :5].tolist()}
        assert set(np.flatnonzero(state.seen[row])) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
    ],
    ids=str,
)
def test_values_out_of_range(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"{name} = .* must be"):
        SamplingConfig(**wrong)


def test_padding_of_prompts():
    tokens, lengths = pad_prompts([[1, 2], [3]], rows_multiple=4)
    assert tokens.shape == (4, 16) and tokens[:, 2:].sum() == 0
    np.testing.assert_array_equal(tokens[:, :2], [[1, 2], [3, 0], [3, 0], [3, 0]])
    np.testing.assert_array_equal(lengths, [2, 1, 1, 1])
