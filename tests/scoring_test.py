"""Sharing prefixes against reading every row whole, and against the NumPy reference."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from easylm_jax import scoring
from easylm_jax.mesh import make_mesh
from easylm_jax.models.decoding import unstack_layers
from easylm_jax.models.llama import PARAM_RULES, Llama, output_logits
from easylm_jax.models.lora import LoraConfig, combine, init_adapters
from easylm_jax.models.quantized import quantize_base
from easylm_jax.scoring import Scored, score
from easylm_jax.sharding import tree_shardings
from tests.reference import numpy_llama
from tests.tiny import BLOCKS, DIMS, VOCAB, tiny_config, tiny_params

CONFIG = tiny_config(max_seq_len=256)


def reference(rows, window=None):
    """(log p, best guess) of every row by the float64 reference, whole, one at a time."""
    dims, found = dataclasses.replace(DIMS, sliding_window=window), []
    for ids, start in rows:
        tokens = np.array([ids])
        table = numpy_llama.forward(
            tiny_params(), dims, tokens, np.ones_like(tokens), np.arange(len(ids))[None]
        )[0]
        table = table - np.logaddexp.reduce(table, axis=-1, keepdims=True)
        at = np.arange(start, len(ids))
        log_probs = table[at - 1, tokens[0, at]]
        found.append((log_probs, log_probs >= table[at - 1].max(-1)))
    return found


def assert_same(got, expected):
    for (log_probs, is_best), (expected_log_probs, expected_best) in zip(
        got, expected, strict=True
    ):
        np.testing.assert_allclose(log_probs, expected_log_probs, atol=2e-5)
        np.testing.assert_array_equal(is_best, expected_best)


@functools.cache
def random_rows(seed: int) -> list[Scored]:
    """A trunk, questions below it, choices below those: nested, identical, of one token, alone."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, VOCAB, rng.integers(low, high + 1)).tolist())

    trunk, rows = ids(37, 40), []
    for shots in (trunk, trunk, trunk, ids(1, 3)):
        context = shots + ids(25, 28)
        choices = [ids(1, 12), ids(1, 1), ids(1, 1), ids(14, 17)]
        nested = choices[3][: rng.integers(2, 13)]
        rows += [Scored(context + c, len(context)) for c in (*choices, nested, choices[0])]
    other = ids(37, 40)  # the contexts differ, the continuation is the same
    rows += [Scored(other + ids(1, 3) + trunk[:9], len(other) + 3) for _ in range(2)]
    rows += [Scored(ids(2, 40), 1), Scored(ids(60, 64), 1)]  # shorter and longer than a trunk
    return [rows[i] for i in rng.permutation(len(rows))]


@functools.cache
def expected_of(seed: int):
    return reference(random_rows(seed))


@pytest.mark.parametrize("batch_tokens", [pytest.param(1, marks=pytest.mark.slow), 128])
def test_a_tree_gives_what_whole_rows_give(batch_tokens):
    heard = []
    got = score(
        tiny_params(),
        random_rows(0),
        config=CONFIG,
        batch_tokens=batch_tokens,
        on_done=heard.append,
    )
    assert_same(got, expected_of(0))
    assert sorted(i for done in heard for i in done) == list(range(len(got))) and all(heard)


@pytest.mark.parametrize("mesh", ["1,2,2,2", pytest.param("1,8,1,1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layers", ["stacked", "of their own"])
def test_a_mesh_changes_nothing(mesh, layers):
    mesh = make_mesh(mesh)
    params = tiny_params() if layers == "stacked" else unstack_layers(tiny_params())
    params = jax.device_put(params, tree_shardings(params, mesh, PARAM_RULES))
    with jax.set_mesh(mesh):
        got = score(params, random_rows(1), config=CONFIG, batch_tokens=128)
    assert_same(got, expected_of(1))


def test_layers_of_their_own_change_nothing():
    got = score(unstack_layers(tiny_params()), random_rows(0), config=CONFIG)
    assert_same(got, expected_of(0))


def test_a_sliding_window_reaches_into_the_prefix():
    windowed = dataclasses.replace(BLOCKS, sliding_window=30, block_k=64)
    config = dataclasses.replace(CONFIG, attention=windowed)
    got = score(tiny_params(), random_rows(0), config=config)
    assert_same(got, reference(random_rows(0), window=30))


def test_bfloat16_is_near():
    config, rows = dataclasses.replace(CONFIG, dtype="bfloat16"), random_rows(0)[:4]
    for (log_probs, _), (expected, _) in zip(
        score(tiny_params(), rows, config=config), expected_of(0)[:4], strict=True
    ):
        np.testing.assert_allclose(log_probs, expected, atol=0.3)


def read_tokens(monkeypatch, rows) -> tuple[int, int]:
    """How many ids and how many nodes are read for `rows`."""
    nodes = []
    forward = scoring._Reader._forward

    def spy(self, batch, *args, **options):
        nodes.extend(batch)
        return forward(self, batch, *args, **options)

    monkeypatch.setattr(scoring._Reader, "_forward", spy)
    score(tiny_params(), rows, config=CONFIG)
    return sum(len(node.ids) for node in nodes), len(nodes)


def test_what_is_shared_is_read_once_and_last_ids_never(monkeypatch):
    rng = np.random.default_rng(3)
    trunk, *questions = (tuple(rng.integers(0, 60, n).tolist()) for n in (50, 30, 30))
    letters = [
        Scored(trunk + (60 + i, *q, letter), 81)
        for i, q in enumerate(questions)
        for letter in (1, 2, 3, 4)
    ]
    assert read_tokens(monkeypatch, letters) == (50 + 2 * 31, 3)
    one = Scored(trunk, 1)
    assert read_tokens(monkeypatch, [one, one, Scored(trunk[:20], 5)]) == (49, 1)
    short = [Scored((5, 6, i, 8), 2) for i in range(4)]  # two ids in common are not worth a level
    assert read_tokens(monkeypatch, short) == (12, 4)


def test_the_head_is_applied_to_what_is_asked_alone(monkeypatch):
    sizes = []
    rate = scoring._rate

    def spy(head, x, rows, *args, **options):
        sizes.append(rows.size)
        return rate(head, x, rows, *args, **options)

    monkeypatch.setattr(scoring, "_rate", spy)
    context = tuple(range(60))
    score(tiny_params(), [Scored((*context, i, i), 60) for i in range(4)], config=CONFIG)
    assert sum(sizes) <= 2 * 16


def test_adapters_and_quantised_kernels_are_used():
    """Against one full forward of the same parameters."""
    row, (ids, start) = max(enumerate(random_rows(0)), key=lambda x: len(x[1].ids) - x[1].start)
    tokens, at = np.array([ids], np.int32), np.arange(start, len(ids))
    lora = LoraConfig(rank=4)
    adapters = init_adapters(jax.eval_shape(tiny_params), lora, jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)  # half of them are 0 at first
    for params in (combine(tiny_params(), adapters, lora), quantize_base(tiny_params(), "nf4")):
        ((log_probs, _),) = score(params, [Scored(ids, start)], config=CONFIG)
        hidden, _ = jax.jit(Llama(CONFIG).apply)(
            {"params": params}, tokens, np.ones_like(tokens), np.arange(len(ids))[None]
        )
        table = jax.nn.log_softmax(output_logits(params, hidden))[0]
        np.testing.assert_allclose(log_probs, table[at - 1, tokens[0, at]], atol=1e-4)
        assert abs(log_probs - expected_of(0)[row][0]).max() > 1e-2


def test_leaves_longer_than_the_parents_beside_them():
    """As of TruthfulQA: questions with choices that share something, and single long rows."""
    rng = np.random.default_rng(5)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, VOCAB, n).tolist())

    trunk, rows = ids(40), []
    for size in (25, 28):
        question = trunk + ids(size)
        rows += [Scored(question + ids(3), len(question)) for _ in range(2)]
    rows += [Scored(trunk + ids(40), 41)]
    assert_same(score(tiny_params(), rows, config=CONFIG), reference(rows))


def test_sizes_are_multiples_and_at_most_a_part_larger():
    rng = np.random.default_rng(0)
    for _ in range(500):
        n, least, parts = (int(rng.integers(1, high)) for high in (5000, 40, 20))
        size = scoring._size(n, least, parts)
        assert size % least == 0 and n <= size < n * (1 + 1 / parts) + 2 * least


def test_rows_are_split_over_any_number_of_devices():
    """So many places are asked for that their number is rounded to a part of an octave."""
    mesh = make_mesh("3,1,1,1", devices=jax.devices()[:3])
    params = jax.device_put(tiny_params(), tree_shardings(tiny_params(), mesh, PARAM_RULES))
    ids = np.random.default_rng(4).integers(0, VOCAB, (2, 200))
    rows = [Scored(tuple(row.tolist()), 1) for row in ids]
    with jax.set_mesh(mesh):
        assert_same(score(params, rows, config=CONFIG), reference(rows))


def test_no_rows():
    assert score(tiny_params(), [], config=CONFIG) == []
