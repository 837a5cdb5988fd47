"""What the backward pass keeps of each layer, keeps on the host, or computes again.

The model tags its big intermediate arrays by name (`tag`); a policy says what happens to each name.
Everything untagged (norms, rope, silu, residual sums) is cheap and is always recomputed, except
under `none`, which leaves the choice to autodiff. The input of every layer is kept by the scan over
layers and is no policy's business.

LLaMA (Touvron et al. 2023, section 2.4) saves "the outputs of linear layers" by a hand-written
backward pass; `linear_outputs` is that, stated as a policy.
"""

import difflib
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION = ("attention_out", "attention_lse")  # what the attention kernel leaves for its backward
NAMES = LINEAR + ATTENTION
ACTIONS = ("keep", "recompute", "offload")

# Policy name -> the names it keeps. `none` is not here: it is the absence of rematerialisation.
POLICIES: dict[str, tuple[str, ...]] = {
    "full": (),
    "attention_only": ATTENTION,
    "linear_outputs": LINEAR,
    "linear_outputs_and_attention": LINEAR + ATTENTION,
}
# EasyLM's names. No policy ever stores the [T, S] attention matrix, so its `checkpoint_dots` keeps
# what the attention kernel needs instead.
ALIASES = {
    "everything_saveable": "none",
    "nothing_saveable": "full",
    "checkpoint_dots": "linear_outputs_and_attention",
    "checkpoint_dots_with_no_batch_dims": "linear_outputs",
}


def tag(x: Array, name: str) -> Array:
    """Give an intermediate array the name by which policies speak of it."""
    assert name in NAMES, name
    return checkpoint_name(x, name)


def parse_policy(spec: str) -> dict[str, str] | None:
    """Name -> action for every name in `NAMES`; None for `none`, no rematerialisation.

    `spec` is a policy, an EasyLM alias, or a map such as "q:keep,gate:offload" whose other names
    are recomputed.

    Raises:
      ValueError: unknown policy, name or action; names the near ones.
    """
    spec = ALIASES.get(spec, spec)
    if spec == "none":
        return None
    if spec in POLICIES:
        return {name: "keep" if name in POLICIES[spec] else "recompute" for name in NAMES}
    known = ["none", *POLICIES, *ALIASES]
    if ":" not in spec:
        near = difflib.get_close_matches(spec, known, n=3) or known
        raise ValueError(
            f"unknown remat policy {spec!r}; near it: {', '.join(near)}; or write a map such as "
            "'q:keep,gate:offload'"
        )
    actions: dict[str, str] = {}
    for field in spec.split(","):
        name, _, action = field.strip().partition(":")
        if name not in NAMES or action not in ACTIONS:
            raise ValueError(
                f"remat map {spec!r}: {field!r} is not name:action with a name of "
                f"{', '.join(NAMES)} and an action of {', '.join(ACTIONS)}"
            )
        if name in actions:
            raise ValueError(f"remat map {spec!r} names {name} twice; leave one of them")
        actions[name] = action
    return dict.fromkeys(NAMES, "recompute") | actions


def jax_policy(actions: dict[str, str]) -> Callable[..., Any]:
    """The `jax.checkpoint` policy of parsed actions."""
    kept = [name for name, action in actions.items() if action == "keep"]
    offloaded = [name for name, action in actions.items() if action == "offload"]
    if offloaded:
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=kept,
            names_which_can_be_offloaded=offloaded,
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint_policies.save_only_these_names(*kept)
