"""What training adds so as not to overfit and evaluation never sees. Called by the model's modules.

Plain functions on arrays, each the identity without a key. How strongly they act is in
`LlamaConfig`. Dropout of attention probabilities is in attention.py, where the probabilities are.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from easylm_jax.array_types import Hidden, PRNGKey, Tokens


def dropout(
    x: Float[Array, "..."], rate: Array | float, key: PRNGKey | None
) -> Float[Array, "..."]:
    """Inverted dropout with a rate that may be traced."""
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - jnp.asarray(rate, x.dtype)), 0)


def forget_keys(
    segment_ids: Tokens, positions: Tokens, *, ratios: tuple[float, float], key: PRNGKey | None
) -> Tokens:
    """Segment ids of the keys, with the forgotten ones set to -1, which no query matches.

    Forgetful causal masking (Liu et al. 2022, arXiv:2210.13432): each row draws a ratio uniformly
    between the two and forgets each key with that probability, never a document's first one.
    """
    if key is None or ratios[1] == 0:
        return segment_ids
    key_ratio, key_drop = jax.random.split(key)
    low, high = ratios
    ratio = jax.random.uniform(key_ratio, (segment_ids.shape[0], 1), minval=low, maxval=high)
    forgotten = jax.random.uniform(key_drop, segment_ids.shape) < ratio
    return jnp.where(forgotten & (positions > 0), -1, segment_ids)


def noisy_embeddings(
    x_BTD: Hidden, segment_ids: Tokens, *, alpha: float, key: PRNGKey | None
) -> Hidden:
    """NEFTune (Jain et al. 2023, arXiv:2310.05914): x + uniform(-1, 1) * alpha / sqrt(n * D).

    n is the number of tokens of the token's own document, as in the authors' code, so that noise
    does not depend on packing; nothing is added to padding.
    """
    if key is None or alpha == 0:
        return x_BTD
    lengths_BT = jax.vmap(lambda ids: jnp.bincount(ids, length=ids.size + 1)[ids])(segment_ids)
    bound_BT = jnp.where(segment_ids > 0, alpha / jnp.sqrt(lengths_BT * x_BTD.shape[-1]), 0.0)
    noise_BTD = jax.random.uniform(key, x_BTD.shape, minval=-1.0, maxval=1.0)
    return x_BTD + (noise_BTD * bound_BT[:, :, None]).astype(x_BTD.dtype)
