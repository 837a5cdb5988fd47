"""Which kernel serves a call of `attention`, and what each one refuses. Called by attention.py.

Nothing falls back silently: what an implementation cannot do is an error, at the latest when the
call is traced. A kernel here is called with q, k, v, the four ids, the row of keys in which the
first query lies, and a dropout key or None.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from easylm_jax.array_types import Queries
from easylm_jax.models.attention_mesh import check_splits
from easylm_jax.models.attention_reference import reference
from easylm_jax.models.blockwise import blockwise
from easylm_jax.models.decoding import attend_one_query

IMPLEMENTATIONS = ("blockwise", "reference", "splash", "tokamax")
PLATFORMS = {"splash": "tpu", "tokamax": "gpu"}  # the others run everywhere
ACROSS_SEQUENCE = ("gather", "ring", "all_to_all")

Kernel = Callable[..., Queries]


def check_choice(config: Any) -> None:
    """Raise ValueError for an AttentionConfig that no platform and no mesh could serve."""
    name, across = config.implementation, config.across_sequence
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown attention implementation {name!r}; there are {', '.join(IMPLEMENTATIONS)}"
        )
    if across not in ACROSS_SEQUENCE:
        raise ValueError(
            f"unknown attention.across_sequence {across!r}; there are {', '.join(ACROSS_SEQUENCE)}"
        )
    if min(config.block_q, config.block_k) < 1:
        raise ValueError(
            "attention.block_q and block_k are numbers of rows, 1 or more, got "
            f"{config.block_q} and {config.block_k}; 256 for both is the default"
        )
    if config.sliding_window is not None and config.sliding_window < 1:
        raise ValueError(
            f"attention.sliding_window is a number of tokens, 1 or more, got "
            f"{config.sliding_window}; None is no window"
        )
    if not 0 <= config.dropout < 1:
        raise ValueError(f"attention.dropout is at least 0 and below 1, got {config.dropout}")
    if across == "ring" and name != "blockwise":
        raise ValueError(
            f"attention.across_sequence = 'ring' works with implementation = 'blockwise' alone, "
            f"got {name!r}; use 'all_to_all' or 'gather' with {name}"
        )
    if config.dropout and name in ("splash", "tokamax"):
        raise ValueError(
            f"the {name} kernel has no attention dropout, got attention.dropout = "
            f"{config.dropout}; set it to 0 or use implementation = 'blockwise'"
        )
    if name == "splash" and (config.block_q % 128 or config.block_k % 128):
        raise ValueError(
            "splash attention needs block_q and block_k in multiples of 128, got "
            f"{config.block_q} and {config.block_k}; 512 for both is a good start"
        )


def check_forgetting(config: Any, fcm_max_ratio: float) -> None:
    """Raise ValueError where keys are to be forgotten and the kernel cannot. For LlamaConfig."""
    if fcm_max_ratio and config.implementation == "tokamax":
        raise ValueError(
            "the tokamax kernel cannot forget single keys, got fcm_max_ratio = "
            f"{fcm_max_ratio}; set it to 0 or use attention.implementation = 'blockwise'"
        )


def check_attention(config: Any, *, seq_len: int, num_kv_heads: int) -> None:
    """Raise ValueError for what `attention` would refuse on the mesh that is set: the trainer asks
    before it touches anything."""
    if config.implementation in PLATFORMS:
        check_platform(config.implementation)
    mesh = jax.sharding.get_abstract_mesh()
    check_splits(mesh.shape, seq_len, num_kv_heads, config.across_sequence)


def choose(config: Any, *, cached: bool, num_queries: int) -> tuple[Kernel, str]:
    """The kernel of a call, and how its queries are split over mesh axis `sequence`.

    That is a name of ACROSS_SEQUENCE, or "whole" for a single query. Over a cache blockwise or
    `attend_one_query` runs, whichever kernel trains, with the keys gathered.
    """
    window = dict(window=config.sliding_window)
    blocks = dict(block_q=config.block_q, block_k=config.block_k, **window)
    name, across = config.implementation, "gather" if cached else config.across_sequence
    if cached and num_queries == 1:
        return functools.partial(attend_one_query, **window), "whole"
    if jax.sharding.get_abstract_mesh().shape.get("sequence", 1) == 1:
        across = "gather"  # of one part
    if name == "reference":
        return functools.partial(reference, dropout=config.dropout, **window), across
    if cached or name == "blockwise":
        tiles = dict(dropout=config.dropout, **blocks)
        if across == "ring":
            return _ring(**tiles), across
        return functools.partial(blockwise, cached=cached, **tiles), across
    check_platform(name)
    if name == "splash":
        from easylm_jax.models.splash import splash

        return functools.partial(splash, **blocks), across
    from easylm_jax.models.tokamax_attention import tokamax_attention

    return functools.partial(tokamax_attention, **window), across


def _ring(**tiles: Any) -> Kernel:
    from easylm_jax.models.ring import ring

    def kernel(q, k, v, q_seg, k_seg, q_pos, k_pos, first_row, key):
        del first_row  # `ring` asks the mesh
        return ring(q, k, v, q_seg, k_seg, q_pos, k_pos, key, axis="sequence", **tiles)

    return kernel


def check_platform(name: str) -> None:
    """Raise ValueError unless the devices that the call is traced for have this kernel.

    They are those of the mesh, not of this host: a TPU topology may be compiled for on a CPU.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    needed = PLATFORMS[name]
    if platform != needed:
        raise ValueError(
            f"attention implementation {name!r} runs on {needed.upper()}s, but this program is "
            f"for {platform}; set attention.implementation = 'blockwise'"
        )
