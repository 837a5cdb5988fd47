"""Sharing prefixes against reading every row whole, and against the NumPy reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_jax import scoring
from easylm_jax.mesh import make_mesh
from easylm_jax.models.decoding import unstack_layers
from easylm_jax.models.llama import PARAM_RULES
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

    trunk, rows = ids(40, 60), []
    for shots in (trunk, trunk, trunk, trunk, ids(0, 3)):
        context = shots + ids(14, 40)
        choices = [ids(1, 20), ids(1, 1), ids(1, 1), ids(18, 24)]
        nested = choices[3][: rng.integers(2, 17)]
        rows += [Scored(context + c, len(context)) for c in (*choices, nested, choices[0])]
    other = ids(30, 50)  # the contexts differ, the continuation is the same
    rows += [Scored(other + ids(1, 3) + trunk[:9], len(other) + 3) for _ in range(2)]
    rows += [Scored(ids(2, 80), 1) for _ in range(4)]
    return [rows[i] for i in rng.permutation(len(rows))]


@functools.cache
def expected_of(seed: int):
    return reference(random_rows(seed))


@pytest.mark.parametrize("batch_tokens", [1, 128, 2048])
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


@pytest.mark.parametrize("mesh", ["1,8,1,1", "1,2,2,2"])
@pytest.mark.parametrize("seed", [1])
def test_a_mesh_and_layers_of_their_own_change_nothing(mesh, seed):
    mesh = make_mesh(mesh)
    for params in (tiny_params(), unstack_layers(tiny_params())):
        params = jax.device_put(params, tree_shardings(params, mesh, PARAM_RULES))
        with jax.set_mesh(mesh):
            got = score(params, random_rows(seed), config=CONFIG, batch_tokens=512)
        assert_same(got, expected_of(seed))


def test_a_sliding_window_reaches_into_the_prefix():
    windowed = dataclasses.replace(BLOCKS, sliding_window=30, block_k=64)
    config = dataclasses.replace(CONFIG, attention=windowed)
    got = score(tiny_params(), random_rows(2), config=config, batch_tokens=512)
    assert_same(got, reference(random_rows(2), window=30))


def test_bfloat16_is_near():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    got = score(tiny_params(), random_rows(0), config=config)
    for (log_probs, _), (expected, _) in zip(got, expected_of(0), strict=True):
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


def test_stacked_quantised_and_adapted_layers_are_those_of_their_rows():
    """`index` picks a layer of every leaf: another order of layers gives another model."""
    rows = random_rows(0)[:3]
    swapped = dict(tiny_params())
    swapped["layers"] = jax.tree.map(lambda x: jnp.flip(x, 0), swapped["layers"])
    ours = score(tiny_params(), rows, config=CONFIG)
    theirs = score(swapped, rows, config=CONFIG)
    assert abs(ours[0][0] - theirs[0][0]).max() > 0.1


def test_no_rows():
    assert score(tiny_params(), [], config=CONFIG) == []
