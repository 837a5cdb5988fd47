"""Which keys a query sees, as every implementation of attention means it."""

from jax import Array
from jaxtyping import Int

MASKED = -1e30  # a finite stand-in for -inf: exp() of it is 0, and differences of it are not NaN


def visible(
    q_seg: Int[Array, "*B T"],
    k_seg: Int[Array, "*B S"],
    q_pos: Int[Array, "*B T"],
    k_pos: Int[Array, "*B S"],
    window: int | None,
) -> Array:
    """The mask [*B, T, S] that `attention` states; True where query t sees key s."""
    back = q_pos[..., :, None] - k_pos[..., None, :]
    mask = (q_seg[..., :, None] == k_seg[..., None, :]) & (k_seg[..., None, :] > 0) & (back >= 0)
    return mask if window is None else mask & (back < window)
