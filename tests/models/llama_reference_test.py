"""Promise 1: logits and gradients equal the NumPy reference, and transformers on the same weights.

Everything is float32 here and float64 in the reference. An error is measured against the largest
entry of its array; the largest seen on a CPU is 2e-6, so 1e-5 leaves room for another summation
order and for nothing else.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_jax.models.attention import AttentionConfig
from easylm_jax.models.llama import Llama, LlamaConfig, RopeScaling, init_params, output_logits
from tests.reference import numpy_llama
from tests.reference.numpy_llama import Dims, forward, loss_and_grads, random_batch, random_params

TOLERANCE = 1e-5
MHA = Dims(num_heads=4, num_kv_heads=4, head_dim=8)
GQA = Dims(num_heads=4, num_kv_heads=2, head_dim=8)
# One frequency of four is kept, one interpolated, two are divided.
SCALING = numpy_llama.RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=8.0, original_max_position=256
)
WINDOW_TIED = dataclasses.replace(GQA, sliding_window=5, tied=True)
CASES = {  # name -> (dims, whether q, k and v have biases)
    "mha": (MHA, False),
    "gqa": (GQA, False),
    "mqa_wide_heads": (Dims(num_heads=3, num_kv_heads=1, head_dim=10), False),
    "tied": (dataclasses.replace(GQA, tied=True), False),
    "scaled_rope": (dataclasses.replace(GQA, rope_scaling=SCALING, rope_theta=9000.0), False),
    "norm_eps": (dataclasses.replace(GQA, norm_eps=0.3), False),
    "window": (dataclasses.replace(GQA, sliding_window=3), False),
    "qkv_bias": (GQA, True),
    "window_qkv_bias_tied": (WINDOW_TIED, True),
}
ATTENTION = {
    "reference": AttentionConfig(implementation="reference"),
    "blockwise": AttentionConfig(implementation="blockwise", block_q=8, block_k=8),
    "blockwise_uneven": AttentionConfig(implementation="blockwise", block_q=8, block_k=16),
}


def make_config(params, dims: Dims, attention: AttentionConfig) -> LlamaConfig:
    vocab, width = params["embed"]["embedding"].shape
    num_layers, _, ffn = params["layers"]["mlp"]["up"]["kernel"].shape
    scaling = dims.rope_scaling
    return LlamaConfig(
        vocab_size=vocab,
        d_model=width,
        num_layers=num_layers,
        num_heads=dims.num_heads,
        num_kv_heads=dims.num_kv_heads,
        head_dim=dims.head_dim,
        d_ff=ffn,
        max_seq_len=64,
        norm_eps=dims.norm_eps,
        rope_theta=dims.rope_theta,
        rope_scaling=scaling and RopeScaling(**dataclasses.asdict(scaling)),
        tie_embeddings=dims.tied,
        qkv_bias="bias" in params["layers"]["attention"]["q"],
        attention=dataclasses.replace(attention, sliding_window=dims.sliding_window),
    )


def flax_logits_loss_and_grads(config: LlamaConfig, params, batch):
    """Logits, sum of weights * -log p(target) and its gradients, by the Flax model in float32."""

    def loss(params):
        ids = (batch["tokens"], batch["segment_ids"], batch["positions"])
        hidden, _ = Llama(config).apply({"params": params}, *ids)
        logits = output_logits(params, hidden)
        log_probs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_probs, batch["targets"][:, :, None], axis=-1)[:, :, 0]
        return -jnp.sum(batch["weights"] * chosen), logits

    params = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), params)
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    # Compiling is nearly all of the time these tests take; this halves it.
    fast_compile = {"xla_backend_optimization_level": 0}
    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=fast_compile)
    (loss_sum, logits), grads = step(params)
    return logits, loss_sum, grads


def draw(case: str, **batch_options):
    rng = np.random.default_rng(list(CASES).index(case))
    dims, qkv_bias = CASES[case]
    return dims, random_params(dims, rng, qkv_bias=qkv_bias), random_batch(rng, **batch_options)


def assert_close(got, expected, name: str) -> None:
    error = np.max(np.abs(got - expected)) / np.max(np.abs(expected))
    assert error < TOLERANCE, f"{name}: {error:.1e} of the largest entry"


def assert_grads_close(got, expected) -> None:
    jax.tree.map_with_path(lambda path, *pair: assert_close(*pair, str(path)), got, expected)


def assert_equals_reference(dims: Dims, params, batch, attention: AttentionConfig) -> None:
    config = make_config(params, dims, attention)
    logits, loss_sum, grads = flax_logits_loss_and_grads(config, params, batch)
    ids = {name: batch[name] for name in ("tokens", "segment_ids", "positions")}
    expected_loss, _, expected_grads = loss_and_grads(params, dims, **batch)
    assert_close(logits, forward(params, dims, **ids), "logits")  # on padding too
    np.testing.assert_allclose(loss_sum, expected_loss, rtol=1e-6)
    assert_grads_close(grads, expected_grads)


@pytest.mark.parametrize("case", CASES)
def test_init_makes_the_tree_of_the_reference(case):
    dims, params, _ = draw(case)
    config = make_config(params, dims, ATTENTION["blockwise"])
    fresh = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("case", CASES)
def test_packed_and_padded_rows_equal_the_reference(case, implementation):
    assert_equals_reference(*draw(case), ATTENTION[implementation])


@pytest.mark.parametrize("implementation", ["blockwise", "blockwise_uneven"])
@pytest.mark.parametrize(
    "length, packed, padding", [(7, True, True), (16, True, False), (41, False, True)]
)
def test_any_length_equals_the_reference(length, packed, padding, implementation):
    """Less than a tile, whole tiles, tiles and a rest; a window of 5 over tiles of 8 and 16."""
    batch_options = {"length": length, "packed": packed, "padding": padding}
    drawn = draw("window_qkv_bias_tied", **batch_options)
    assert_equals_reference(*drawn, ATTENTION[implementation])


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_packed_and_padded_rows_equal_transformers(case):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.reference.torch_llama import hf_logits_loss_and_grads, to_hf

    dims, params, batch = draw(case)
    expected = hf_logits_loss_and_grads(to_hf(params, dims), params, **batch)
    config = make_config(params, dims, ATTENTION["blockwise"])
    logits, loss_sum, grads = flax_logits_loss_and_grads(config, params, batch)
    real = batch["segment_ids"] > 0  # on padding transformers attends to padding, we to nothing
    assert_close(logits[real], expected[0][real], "logits")
    np.testing.assert_allclose(loss_sum, expected[1], rtol=1e-6)
    assert_grads_close(grads, expected[2])
