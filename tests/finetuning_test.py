"""Fine-tuning from files to answers: what is learnt, adapters, early stopping, templates.

What is made of conversations is tested in `tests/data/finetuning_test.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.data.packing import Piece, lay_out, pack_all
from easylm_jax.data.source import DataConfig, open_examples
from easylm_jax.mesh import make_mesh
from easylm_jax.models.llama import PARAM_RULES, init_params, make_forward
from easylm_jax.objectives import cross_entropy
from easylm_jax.sharding import to_global, tree_shardings
from easylm_jax.step import GuardConfig, train_step
from easylm_jax.text.template import find_template
from easylm_jax.text.tokenizer import ByteTokenizer
from easylm_jax.train_state import init_state
from tests.data.finetuning_test import talk, two_answers, write
from tests.step_test import gradient_recorder
from tests.tiny import assert_close, tiny_config

TOKENIZER = ByteTokenizer()
MODEL = tiny_config(vocab_size=264, max_seq_len=128)


@functools.cache
def params():
    return jax.jit(functools.partial(init_params, MODEL))(jax.random.key(0))


# ---- packing ------------------------------------------------------------------------------------

SEQ_LEN = 96


def pieces(folder, *, weighting: str) -> list[Piece]:
    """Conversations of very different lengths, markers and all."""
    rng = np.random.default_rng(0)

    def text(longest: int) -> str:
        return bytes(rng.integers(97, 123, rng.integers(1, longest)).tolist()).decode()

    records = [
        one
        for n in range(6)
        for one in (
            talk(text(6), text(3), text(4), text(25)),
            *two_answers(text(9), good=text(20), bad=text(2), pair=f"{n}"),
        )
    ]
    chat = ChatConfig("hindsight", judged=("good", "bad"), conditional=True, weighting=weighting)
    files = (write(folder, records),)
    cfg = DataConfig(files=files, chat=chat)
    template = find_template("hindsight")
    return [
        Piece(*one)
        for one in open_examples(cfg, files, TOKENIZER, seq_len=SEQ_LEN, template=template)
    ]


OBJECTIVE = cross_entropy(make_forward(MODEL))


def alone(examples: list[Piece]) -> tuple[dict, dict]:
    """Sums of the objective and their gradient, one example after another."""

    @jax.jit
    def one(params, batch):
        def loss_sum(params):
            sums = OBJECTIVE(params, None, batch, None)
            return sums["loss"][0], sums

        (_, sums), grads = jax.value_and_grad(loss_sum, has_aux=True)(params)
        return sums, grads

    found = [one(params(), lay_out([[piece]], SEQ_LEN)) for piece in examples]
    return jax.tree.map(lambda *parts: np.sum(np.asarray(parts, np.float64), axis=0), *found)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "weighting, packing, mesh, num_micro_batches",
    [
        ("example", "best_fit", "1,1,1,1", 4),
        ("token", "best_fit", "8,1,1,1", 1),
        slow("example", "best_fit", "8,1,1,1", 1),
        slow("token", "best_fit", "1,1,1,1", 4),
        slow("token", "padded", "2,2,1,2", 4),
        slow("example", "padded", "1,4,1,2", 1),
    ],
)
def test_packed_accumulated_and_split_conversations_are_those_alone(
    weighting, packing, mesh, num_micro_batches, tmp_path
):
    examples = pieces(tmp_path, weighting=weighting)
    sums, grads = alone(examples)
    packed = pack_all(iter(examples), strategy=packing, seq_len=SEQ_LEN)
    assert (len(packed) == len(examples)) == (packing == "padded")
    rows = packed + [[]] * (-len(packed) % 16)
    mesh = make_mesh(mesh, jax.devices()[: np.prod([int(n) for n in mesh.split(",")])])
    optimizer = gradient_recorder()
    step = functools.partial(
        train_step,
        objective=OBJECTIVE,
        optimizer=optimizer,
        num_micro_batches=num_micro_batches,
        guard=GuardConfig(),
    )
    with jax.set_mesh(mesh):
        state = init_state(lambda _: params(), optimizer, 0)
        state = jax.device_put(state, tree_shardings(state, mesh, PARAM_RULES))
        batch = to_global(lay_out(rows, SEQ_LEN), mesh, len(rows))
        state, metrics = jax.jit(step)(state, batch)
    weight = sums["loss"][1]
    expected = len(examples) if weighting == "example" else sum(p.weights.sum() for p in examples)
    assert weight == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(metrics["loss_weight"], weight, rtol=1e-6)
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(metrics[name], sums[name][0] / weight, rtol=1e-5)
    assert_close(state.opt_state, jax.tree.map(lambda g: g / weight, grads), rtol=1e-5)


def test_what_is_not_learnt_has_no_part_in_loss_or_gradient(tmp_path):
    """As targets: the prompt, the marker and the padding may be replaced by anything."""
    batch = lay_out(
        pack_all(iter(pieces(tmp_path, weighting="token")), strategy="best_fit", seq_len=SEQ_LEN),
        SEQ_LEN,
    )
    rng = np.random.default_rng(0)
    other = np.where(batch.weights > 0, batch.targets, rng.integers(0, 264, batch.targets.shape))
    loss = jax.jit(jax.value_and_grad(lambda p, b: OBJECTIVE(p, None, b, None)["loss"][0]))
    expected, grads = loss(params(), batch)
    got, other_grads = loss(params(), batch.replace(targets=other.astype(np.int32)))
    assert (other != batch.targets).sum() > 300 and got == expected
    assert all(map(np.array_equal, jax.tree.leaves(other_grads), jax.tree.leaves(grads)))


@pytest.mark.parametrize("weighting, mean", [("token", 1.75), ("example", 2.5)])
def test_two_answers_of_unlike_length_by_hand(weighting, mean, tmp_path):
    """One target that costs 4, three that cost 1 each: by a head that adds nothing to the costs."""
    template = dataclasses.replace(find_template("plain"), assistant="{assistant}")
    files = (write(tmp_path, [talk("q", "x"), talk("q", "yyy")]),)
    cfg = DataConfig(files=files, chat=ChatConfig("plain", weighting=weighting))
    examples = open_examples(cfg, files, TOKENIZER, seq_len=8, template=template)
    batch = lay_out([[Piece(*one) for one in examples]], 8)
    cost = np.where(batch.targets == ord("x") + 3, 4.0, 1.0)
    # log(e^l + V - 1) - l = cost
    logit = np.log(263 / np.expm1(cost))[..., None] * np.eye(264)[batch.targets]

    def forward(params, batch, rng):
        return jnp.asarray(logit, jnp.float32), jnp.eye(264)

    total, weight = cross_entropy(forward)({}, None, jax.tree.map(jnp.asarray, batch), None)["loss"]
    assert total / weight == pytest.approx(mean, rel=1e-5)
