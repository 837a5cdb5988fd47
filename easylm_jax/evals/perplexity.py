"""Loss, accuracy and bits per byte on held-out text. Called by the trainer on a fixed batch list.

Bits per byte does not depend on the tokenizer: the summed -log2 p of all text tokens, over the
number of UTF-8 bytes they stand for. Special tokens (BOS, EOS) count in neither sum.
"""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from easylm_jax.array_types import Params
from easylm_jax.batch import Batch
from easylm_jax.objectives import Forward, Sums, token_losses


def make_eval_sums(
    forward: Forward, token_bytes: Int[np.ndarray, " V"]
) -> Callable[[Params, Batch], Sums]:
    """A pure function to the sums of one batch; `token_bytes` as `Tokenizer.token_bytes` gives."""

    def eval_sums(params: Params, batch: Batch) -> Sums:
        hidden_BTD, head_DV = forward(params, batch, None)
        loss_BT, correct_BT = token_losses(hidden_BTD, head_DV, batch.targets)
        bytes_BT = jnp.asarray(token_bytes, jnp.float32)[batch.targets]
        bytes_BT = bytes_BT * (batch.weights > 0)
        is_text_BT = (bytes_BT > 0).astype(jnp.float32)
        weight = batch.weights.sum()
        return {
            "loss": ((loss_BT * batch.weights).sum(), weight),
            "accuracy": ((correct_BT * batch.weights).sum(), weight),
            "bits_per_byte": ((loss_BT * is_text_BT).sum() / math.log(2), bytes_BT.sum()),
        }

    return eval_sums


def evaluate(
    eval_sums: Callable[[Params, Batch], Sums], params: Params, batches: Iterable[Batch]
) -> dict[str, float]:
    """The means over all batches: sums added in float64 on the host, divided once."""
    totals: dict[str, np.ndarray] = {}
    for batch in batches:
        for name, pair in jax.device_get(eval_sums(params, batch)).items():
            totals[name] = totals.get(name, 0.0) + np.asarray(pair, np.float64)
    return {name: float(total / max(weight, 1e-9)) for name, (total, weight) in totals.items()}
