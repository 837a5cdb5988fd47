"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): what is trained beside a frozen base.

An adapter is two leaves beside a kernel, {"kernel": [in, out], "lora_a": [in, r], "lora_b":
[r, out]}, to which `Linear` adds its product. So the adapters of a model are a tree of the same
paths, which is all that training, the optimiser and checkpoints see, and

    forward(combine(base, adapters, config), batch, key)

is the adapted model, for objectives, the sampler and evaluation alike. Layers may be stacked or
not, the base may be quantised (quantized.py). This file knows no training.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import DTypeLike

from easylm_jax.array_types import Params, PRNGKey
from easylm_jax.models.llama import LlamaConfig, init_params
from easylm_jax.models.quantized import CODES, KERNEL, dequantize, quantize
from easylm_jax.tree import map_named, matches, named_leaves


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which linear layers get adapters, of what rank, and how the base is held meanwhile."""

    rank: int = 8
    alpha: float = 16.0  # the product counts alpha / rank times
    rs_lora: bool = False  # alpha / sqrt(rank) times (Kalajdzievski 2023, arXiv:2312.03732)
    dropout: float = 0.0  # on the input of A; belongs into LlamaConfig.lora_dropout
    # Names of linear layers, or regular expressions that a path such as "layers/mlp/up" ends on.
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    base: Literal["full", "nf4", "int4", "int8"] = "full"  # QLoRA: nf4

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; it must be 1 or more")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rs_lora else self.rank)


def init_adapters(base_shapes: Params, config: LoraConfig, key: PRNGKey) -> Params:
    """Fresh float32 adapters for a base of these shapes, not quantised. They change nothing yet.

    B is zero; A is uniform within 1 / sqrt(in), as in the authors' code and in PEFT (their
    `kaiming_uniform_(a=sqrt(5))`). To be evaluated by `jax.eval_shape` for shapes alone.
    """
    shapes = target_shapes(base_shapes, config)
    flat = {}
    for (path, (*lead, D, F)), k in zip(
        shapes.items(), jax.random.split(key, len(shapes)), strict=True
    ):
        bound = 1 / math.sqrt(D)
        a_shape, b_shape = (*lead, D, config.rank), (*lead, config.rank, F)
        flat[f"{path}/lora_a"] = jax.random.uniform(k, a_shape, minval=-bound, maxval=bound)
        flat[f"{path}/lora_b"] = jnp.zeros(b_shape, jnp.float32)
    return unflatten_dict(flat, sep="/")


def target_shapes(base_shapes: Params, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Path of a linear layer -> shape of its kernel, for those that `config.targets` name.

    Raises:
      ValueError: a target matches nothing.
    """
    linears = {
        name.removesuffix("/kernel"): leaf.shape
        for name, leaf in named_leaves(base_shapes).items()
        if matches(KERNEL, name)
    }
    patterns = {target: rf"(^|/)({target})$" for target in config.targets}
    for target, pattern in patterns.items():
        if not any(matches(pattern, path) for path in linears):
            known = sorted({path.split("/")[-1] for path in linears} | set(linears))
            near = difflib.get_close_matches(target, known, n=3) or known[:10]
            raise ValueError(
                f"lora.targets: {target!r} matches no linear layer; near it: {', '.join(near)}"
            )
    return {
        path: shape
        for path, shape in linears.items()
        if any(matches(pattern, path) for pattern in patterns.values())
    }


def combine(base: Params, adapters: Params, config: LoraConfig) -> Params:
    """One tree of both, the scale multiplied into B. No array of the base is copied."""
    scaled = {
        name: leaf * config.scale if name.endswith("lora_b") else leaf
        for name, leaf in flatten_dict(adapters, sep="/").items()
    }
    return unflatten_dict(flatten_dict(base, sep="/") | scaled, sep="/")


def merge(base: Params, adapters: Params, config: LoraConfig, dtype: DTypeLike) -> Params:
    """Plain parameters of type `dtype`: kernel + scale * A B in place of each kernel.

    Summed in float32, one layer at a time. `base`, all of the model or a part of it, is the plain
    one that the run started from, in the type that it had there; if the run quantised it, the same
    is done here first, because the adapters were fitted to what was left of it.

    Raises:
      ValueError: `base` is quantised; a merged kernel would have to be rounded again.
    """
    leaves = {name.split("/")[-1]: name for name in named_leaves(base)}
    if quantized := [leaves[how] for how in CODES if how in leaves]:
        raise ValueError(
            f"merging into a quantised kernel ({quantized[0]}) would round the adapters away; "
            "merge into the plain parameters that it was made of"
        )
    beside = named_leaves(adapters)

    def merged(name: str, leaf: Array) -> Array:
        if not matches(KERNEL, name):
            return leaf.astype(dtype)
        path = name.removesuffix("kernel")
        a, b = (beside.get(f"{path}{part}") for part in ("lora_a", "lora_b"))
        return _merge_kernel(leaf, a, b, config=config, dtype=dtype)

    return map_named(merged, base)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _merge_kernel(
    kernel: Array, a: Array | None, b: Array | None, *, config: LoraConfig, dtype: DTypeLike
) -> Array:
    merge_one = functools.partial(_merge_kernel, config=config, dtype=dtype)
    if kernel.ndim > 2:
        return jax.lax.map(lambda layer: merge_one(*layer), (kernel, a, b))
    if config.base != "full":
        kernel = dequantize(quantize(kernel, config.base), jnp.float32)
    kernel = kernel.astype(jnp.float32)
    if a is not None:
        kernel += jnp.matmul(a, b * config.scale, precision="highest")
    return kernel.astype(dtype)


def trainable(
    model: LlamaConfig, lora: LoraConfig | None
) -> tuple[Callable[[PRNGKey], Params], Callable[[Params, Params | None], Params]]:
    """How the parameters that train are made, and `whole(trained, frozen)`, the model's of both.

    Without adapters everything trains and nothing is frozen.
    """
    if lora is None:
        return functools.partial(init_params, model), lambda params, frozen: params
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    return (
        functools.partial(init_adapters, shapes, lora),
        lambda adapters, base: combine(base, adapters, lora),
    )


def with_adapter_dropout(model: LlamaConfig, lora: LoraConfig | None) -> LlamaConfig:
    """The model with the rate that `lora` gives to the input of its adapters."""
    return dataclasses.replace(model, lora_dropout=lora.dropout) if lora else model
