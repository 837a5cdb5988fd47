"""The reference itself: its backward against finite differences, its forward against transformers.

Nothing of the package's models is used here. What the reference says is trusted elsewhere
(`tests/models/llama_reference_test.py`) because of this file.
"""

import jax
import numpy as np
import pytest

from easylm_jax.batch import Batch, check_batch
from tests.reference.numpy_llama import (
    Dims,
    RopeScaling,
    forward,
    loss_and_grads,
    random_batch,
    random_params,
    rope_angles,
)

# Head dimension 8 with these numbers: one frequency kept, one interpolated, two divided.
SCALING = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=8.0, original_max_position=256
)
MHA = Dims(num_heads=4, num_kv_heads=4, head_dim=8)
GQA = Dims(num_heads=4, num_kv_heads=2, head_dim=8)
CASES = {  # name -> (dims, biases of random_params)
    "mha": (MHA, {}),
    "gqa": (GQA, {}),
    "mqa_wide_heads": (Dims(num_heads=3, num_kv_heads=1, head_dim=10), {}),
    "tied": (Dims(num_heads=4, num_kv_heads=2, head_dim=8, tied=True), {}),
    "theta": (Dims(num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=500.0), {}),
    "scaled_rope": (Dims(num_heads=4, num_kv_heads=2, head_dim=8, rope_scaling=SCALING), {}),
    "norm_eps": (Dims(num_heads=4, num_kv_heads=2, head_dim=8, norm_eps=0.3), {}),
    "window": (Dims(num_heads=4, num_kv_heads=2, head_dim=8, sliding_window=3), {}),
    "qkv_bias": (GQA, {"qkv_bias": True}),
    "all_biases": (GQA, {"qkv_bias": True, "o_bias": True}),
    "window_qkv_bias_tied": (
        Dims(num_heads=4, num_kv_heads=2, head_dim=8, tied=True, sliding_window=4),
        {"qkv_bias": True},
    ),
}
each_case = pytest.mark.parametrize("case", CASES)


def draw(case: str, **batch_options):
    rng = np.random.default_rng(sorted(CASES).index(case))
    dims, biases = CASES[case]
    return dims, random_params(dims, rng, **biases), random_batch(rng, **batch_options), rng


@each_case
def test_backward_equals_central_differences(case):
    dims, params, batch, rng = draw(case)
    _, _, grads = loss_and_grads(params, dims, **batch)
    leaves, treedef = jax.tree.flatten(params)
    assert jax.tree.structure(grads) == treedef
    step = 1e-5
    for index, (path, grad) in enumerate(jax.tree.leaves_with_path(grads)):
        assert grad.shape == leaves[index].shape
        direction = rng.normal(size=grad.shape)

        def loss(offset, index=index, direction=direction):
            moved = [*leaves]
            moved[index] = leaves[index] + offset * direction
            return loss_and_grads(jax.tree.unflatten(treedef, moved), dims, **batch)[0]

        difference = (loss(step) - loss(-step)) / (2 * step)
        # Rounding of the loss over `step` is about 1e-9, truncation step^2 about 1e-8.
        np.testing.assert_allclose(
            np.sum(grad * direction), difference, rtol=1e-6, atol=1e-6, err_msg=str(path)
        )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_random_batch_keeps_the_contract(packed, padding):
    batch = random_batch(np.random.default_rng(0), packed=packed, padding=padding)
    check_batch(Batch(**batch), vocab_size=37)
    assert (batch["segment_ids"].max() > 1) == packed
    assert np.any(batch["segment_ids"] == 0) == padding
    follows = (np.diff(batch["segment_ids"]) == 0) & (batch["segment_ids"][:, 1:] > 0)
    np.testing.assert_array_equal(
        batch["targets"][:, :-1][follows], batch["tokens"][:, 1:][follows]
    )
    assert not np.any(batch["weights"][:, :-1][~follows]) and not np.any(batch["weights"][:, -1])


def test_scaled_frequencies_reach_all_three_branches():
    positions = np.ones((1, 1))
    ratio = rope_angles(positions, CASES["scaled_rope"][0]) / rope_angles(positions, GQA)
    kept, divided = np.isclose(ratio, 1.0), np.isclose(ratio, 1 / 8)
    assert kept.any() and divided.any() and not (kept | divided).all()


def test_loss_is_the_weighted_log_likelihood_of_forward():
    dims, params, batch, _ = draw("gqa")
    inputs = {name: batch[name] for name in ("tokens", "segment_ids", "positions")}
    logits = forward(params, dims, **inputs)
    expected = 0.0
    for b, t in np.ndindex(batch["tokens"].shape):
        p = np.exp(logits[b, t]) / np.sum(np.exp(logits[b, t]))
        expected -= batch["weights"][b, t] * np.log(p[batch["targets"][b, t]])
    loss_sum, weight_sum, _ = loss_and_grads(params, dims, **batch)
    np.testing.assert_allclose(loss_sum, expected, rtol=1e-12)
    np.testing.assert_allclose(weight_sum, batch["weights"].sum(), rtol=1e-12)


def test_attention_adds_only_the_output_bias_to_padding():
    dims, params, batch, _ = draw("all_biases")
    inputs = {name: batch[name] for name in ("tokens", "segment_ids", "positions")}
    before = forward(params, dims, **inputs)
    params["layers"]["attention"]["o"]["kernel"] *= 0
    same = np.all(forward(params, dims, **inputs) == before, axis=-1)
    np.testing.assert_array_equal(same, batch["segment_ids"] == 0)


@pytest.mark.torch
@pytest.mark.parametrize("packed_and_padded", [False, True])
@each_case
def test_forward_and_backward_equal_transformers(case, packed_and_padded):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.reference.torch_llama import hf_logits_loss_and_grads, to_hf

    dims, params, batch, _ = draw(case, packed=packed_and_padded, padding=packed_and_padded)
    model = to_hf(params, dims, dtype=torch.float64)
    logits, loss_sum, grads = hf_logits_loss_and_grads(model, params, **batch)

    # transformers casts norms, softmax and angles to fp32 in every dtype: hence 1e-5, not 1e-12.
    real = batch["segment_ids"] > 0  # on padding transformers attends to padding, we to nothing
    inputs = {name: batch[name] for name in ("tokens", "segment_ids", "positions")}
    assert_close(logits[real], forward(params, dims, **inputs)[real], "logits")
    expected_loss, _, expected_grads = loss_and_grads(params, dims, **batch)
    np.testing.assert_allclose(loss_sum, expected_loss, rtol=1e-6)
    jax.tree.map_with_path(
        lambda path, got, expected: assert_close(got, expected, str(path)), grads, expected_grads
    )


def assert_close(got, expected, name: str, tolerance: float = 1e-5) -> None:
    """Largest error relative to the largest entry."""
    error = np.max(np.abs(got - expected)) / np.max(np.abs(expected))
    assert error < tolerance, f"{name}: relative error {error:.1e}"
