"""The LLaMA model (Touvron et al. 2023, arXiv:2302.13971; Llama 2 2307.09288; Llama 3 2407.21783).

Pre-norm decoder: RMSNorm, rotary positions, grouped-query causal attention, SwiGLU. The same code
is Mistral (sliding window) and Qwen2 (biases on q, k, v). The mathematics are plain functions on
arrays; the Linen modules own the parameters, their names and nothing else.

    params = Llama(config).init(key, tokens, segment_ids, positions)["params"]
    hidden_BTD, _ = Llama(config).apply({"params": params}, tokens, segment_ids, positions)
    logits_BTV = output_logits(params, hidden_BTD)

The model stops at the hidden states, because a loss should not have to hold full logits. Layers are
scanned: every parameter under "layers" has a leading dimension L, however the scan is unrolled.
What only generating needs, the cache and layers that are not stacked, is in decoding.py.
This file knows no text, no loss and no optimiser.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from easylm_jax.array_types import Hidden, Logits, Params, PRNGKey, Tokens
from easylm_jax.batch import Batch
from easylm_jax.mesh import BATCH_AXES
from easylm_jax.models.attention import AttentionConfig, attention
from easylm_jax.models.attention_choice import check_forgetting
from easylm_jax.models.decoding import KVCache, read_cache, write_cache
from easylm_jax.models.embedding import look_up
from easylm_jax.models.linear import Linear, dot
from easylm_jax.models.regularizers import dropout, forget_keys, noisy_embeddings
from easylm_jax.models.remat import jax_policy, parse_policy, tag
from easylm_jax.sharding import constrain

FloatName = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the long wavelengths, for contexts beyond the pretraining length."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape, numerics and execution of one model. `presets.py` has the published ones."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_seq_len: int  # tokens; longest row the model was made for
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False  # the output head is the transposed embedding
    qkv_bias: bool = False
    init_std: float = 0.02  # o and down: init_std / sqrt(2 * num_layers)

    attention: AttentionConfig = AttentionConfig()
    remat: str = "linear_outputs"  # see models/remat.py
    layer_unroll: int = 1  # layers per step of the scan over layers; changes speed only
    scan_layers: bool = True  # False: parameters "layers_0", "layers_1", ...; decodes twice as fast
    dtype: FloatName = "float32"  # of activations and matrix products
    param_dtype: FloatName = "float32"

    # For training alone: models/regularizers.py. Pairs of rates are for the first and last layer.
    embedding_dropout: float = 0.0
    residual_dropout: tuple[float, float] = (0.0, 0.0)  # on what attention and MLP add
    feedforward_dropout: tuple[float, float] = (0.0, 0.0)  # inside the MLP, before `down`
    # Forgetful causal masking: each row forgets a share of its keys drawn from this range.
    fcm_min_ratio: float = 0.0
    fcm_max_ratio: float = 0.0
    neftune_alpha: float = 0.0  # noise on the embeddings
    lora_dropout: float = 0.0  # on the input of adapters, if there are any

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = "
                f"{self.num_kv_heads}; every group of query heads shares one key/value head"
            )
        parse_policy(self.remat)
        check_forgetting(self.attention, self.fcm_max_ratio)

    @property
    def has_dropout(self) -> bool:
        """Whether training needs a key."""
        rates = (*self.residual_dropout, *self.feedforward_dropout, self.embedding_dropout)
        others = (self.attention.dropout, self.fcm_max_ratio, self.neftune_alpha, self.lora_dropout)
        return any(rates + others)


# Which mesh axes split each parameter, [in, out], stacked layers first. See sharding.py.
# Adapters and quantised kernels are split like the kernel; ranks and blocks are not split.
_LAYER_RULES = (
    (r"/(q|k|v|gate|up)/(kernel|nf4|int4|int8)", P("fsdp", "tensor")),
    (r"/(q|k|v|gate|up)/lora_a", P("fsdp", None)),
    (r"/(q|k|v|gate|up)/(lora_b|absmax)", P(None, "tensor")),
    (r"/(o|down)/(kernel|nf4|int4|int8)", P("tensor", "fsdp")),
    (r"/(o|down)/lora_a", P("tensor", None)),
    (r"/(o|down)/(lora_b|absmax)", P(None, "fsdp")),
    (r"/(q|k|v)/bias", P("tensor")),
    (r"/\w+_norm/scale", P(None)),
)
PARAM_RULES = (
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"lm_head/kernel", P("fsdp", "tensor")),
    (r"final_norm/scale", P(None)),
    *((rf"layers\b.*{name}", P(None, *spec)) for name, spec in _LAYER_RULES),
    *((rf"layers_\d+.*{name}", spec) for name, spec in _LAYER_RULES),
)


# ---- mathematics ------------------------------------------------------------------------------


def rms_norm(x: Float[Array, "*R D"], scale: Float[Array, " D"], eps: float) -> Array:
    """x / rms(x) * scale (Zhang & Sennrich 2019), computed in float32, in the type of x."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x32 * inverse * scale).astype(x.dtype)


def rope_frequencies(config: LlamaConfig) -> Float[np.ndarray, " half"]:
    """Radians per position of each of the H/2 rotated pairs: theta^(-2i/H), stretched if asked."""
    pair = np.arange(0, config.head_dim, 2, dtype=np.float64)  # constants: rounded once, at the end
    freq = config.rope_theta ** (-pair / config.head_dim)
    if (scaling := config.rope_scaling) is None:
        return freq
    # Llama 3.1: wavelengths longer than the old context / low_freq_factor are stretched by
    # `factor`, those shorter than the old context / high_freq_factor are not, linear between.
    turns = scaling.original_max_position * freq / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return freq * (keep + (1 - keep) / scaling.factor)


def rope_angles(positions: Tokens, config: LlamaConfig) -> tuple[Array, Array]:
    """cos and sin [B, T, 1, H/2] of the rotary angles (Su et al. 2021), float32."""
    frequencies = jnp.asarray(rope_frequencies(config), jnp.float32)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Float[Array, "B T M H"], cos: Array, sin: Array) -> Float[Array, "B T M H"]:
    """Rotate the pairs (i, i + H/2) of the last dim: Hugging Face's layout, not Meta's (2i, 2i+1).

    In float32, since bfloat16 cannot tell position 256 from 257. M is N or K heads.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


# ---- modules ----------------------------------------------------------------------------------


class Norm(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.config.param_dtype)
        return rms_norm(x, scale, self.config.norm_eps)


def _linear(cfg: LlamaConfig, features: int, name: str, *, residual=False, bias=False) -> Linear:
    std = cfg.init_std / math.sqrt(2 * cfg.num_layers) if residual else cfg.init_std
    init = nn.initializers.normal(std)
    return Linear(features, init, bias, cfg.param_dtype, cfg.lora_dropout, name=name)


class Embed(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, tokens: Tokens) -> Hidden:
        cfg = self.config
        init, shape = nn.initializers.normal(cfg.init_std), (cfg.vocab_size, cfg.d_model)
        return look_up(self.param("embedding", init, shape, cfg.param_dtype), tokens, cfg.dtype)


class Attention(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BTD, context, cache, key):
        cfg = self.config
        heads = {"q": cfg.num_heads, "k": cfg.num_kv_heads, "v": cfg.num_kv_heads}
        projected = {}
        for name, num in heads.items():
            linear = _linear(cfg, num * cfg.head_dim, name, bias=cfg.qkv_bias)
            y = tag(linear(x_BTD), name).reshape(*x_BTD.shape[:2], num, cfg.head_dim)
            projected[name] = constrain(y, BATCH_AXES, "sequence", "tensor", None)
        q_BTNH = apply_rope(projected["q"], *context.rope)
        k_BSKH = apply_rope(projected["k"], *context.rope)
        v_BSKH = projected["v"]
        if cache is not None:
            cache = write_cache(cache, k_BSKH, v_BSKH, context.index)
            if context.index is not None:
                k_BSKH, v_BSKH = read_cache(cache)
        out_BTNH = attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            q_segments=context.segment_ids,
            k_segments=context.k_segment_ids,
            q_positions=context.positions,
            k_positions=context.k_positions,
            config=cfg.attention,
            cache_index=context.index,
            dropout_key=key if cfg.attention.dropout else None,
        )
        out = out_BTNH.reshape(*x_BTD.shape[:2], -1)
        return tag(_linear(cfg, cfg.d_model, "o", residual=True)(out), "o"), cache


class MLP(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BTD, dropout_rate, key):
        cfg = self.config
        gate = tag(_linear(cfg, cfg.d_ff, "gate")(x_BTD), "gate")
        up = tag(_linear(cfg, cfg.d_ff, "up")(x_BTD), "up")
        hidden_BTF = constrain(nn.silu(gate) * up, BATCH_AXES, "sequence", "tensor")
        hidden_BTF = dropout(hidden_BTF, dropout_rate, key)
        return tag(_linear(cfg, cfg.d_model, "down", residual=True)(hidden_BTF), "down")


@flax.struct.dataclass
class Context:
    """What is the same for every layer of one call."""

    rope: tuple[Array, Array]
    segment_ids: Tokens
    positions: Tokens
    k_segment_ids: Int[Array, "B S"]
    k_positions: Int[Array, "B S"]
    index: Int[Array, ""] | None  # first cache slot to write; None: no cache, or an empty one


class Block(nn.Module):
    """One layer. `rates` and `key` are this layer's dropout; key None means none."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BTD, context, cache, rates, key):
        residual_rate, ff_rate = rates
        keys = (None,) * 4 if key is None else tuple(jax.random.split(key, 4))
        cfg = self.config
        h_BTD = Norm(cfg, name="attention_norm")(x_BTD)
        h_BTD, cache = Attention(cfg, name="attention")(h_BTD, context, cache, keys[0])
        x_BTD = _to_stream(x_BTD + dropout(h_BTD, residual_rate, keys[1]))
        h_BTD = Norm(cfg, name="mlp_norm")(x_BTD)
        h_BTD = MLP(cfg, name="mlp")(h_BTD, ff_rate, keys[2])
        return _to_stream(x_BTD + dropout(h_BTD, residual_rate, keys[3])), cache


def _to_stream(x_BTD: Hidden) -> Hidden:
    """The sharding of the residual stream, pinned at the edges of every block."""
    return constrain(x_BTD, BATCH_AXES, "sequence", None)


class Llama(nn.Module):
    """Tokens to final hidden states; see the top of this file."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        segment_ids: Tokens,
        positions: Tokens,
        *,
        cache: KVCache | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> tuple[Hidden, KVCache | None]:
        """Final normed hidden states [B, T, D], and the cache with these tokens added.

        Dropout and forgetful masking act only when a key is given.
        """
        cfg = self.config
        keys = (None,) * 4
        if dropout_key is not None and cfg.has_dropout:
            keys = tuple(jax.random.split(dropout_key, 4))
        x_BTD = Embed(cfg, name="embed")(tokens)
        x_BTD = noisy_embeddings(x_BTD, segment_ids, alpha=cfg.neftune_alpha, key=keys[3])
        x_BTD = _to_stream(dropout(x_BTD, cfg.embedding_dropout, keys[0]))

        ratios = (cfg.fcm_min_ratio, cfg.fcm_max_ratio)
        k_segment_ids = forget_keys(segment_ids, positions, ratios=ratios, key=keys[1])
        k_positions, index = positions, None
        if cache is not None:
            index = cache.index
            cache = cache.with_ids(segment_ids, positions)
            if index is not None:
                k_segment_ids, k_positions = cache.segment_ids, cache.positions
        context = Context(
            rope=rope_angles(positions, cfg),
            segment_ids=segment_ids,
            positions=positions,
            k_segment_ids=k_segment_ids,
            k_positions=k_positions,
            index=index,
        )
        x_BTD, layer_cache = self._layers(x_BTD, context, cache, keys[2])
        if cache is not None:
            cache = cache.replace(layers=layer_cache)

        if self.is_initializing() and not cfg.tie_embeddings:
            _linear(cfg, cfg.vocab_size, "lm_head")(x_BTD)  # made here, applied by the loss
        return Norm(cfg, name="final_norm")(x_BTD), cache

    def _layers(self, x_BTD, context, cache, key):
        cfg = self.config
        num = cfg.num_layers
        rates = tuple(
            jnp.linspace(*ends, num, dtype=jnp.float32)
            for ends in (cfg.residual_dropout, cfg.feedforward_dropout)
        )
        keys = None if key is None else jax.random.split(key, num)
        layer_cache = None if cache is None else cache.layers
        block = Block
        if (actions := parse_policy(cfg.remat)) is not None:
            block = nn.remat(Block, policy=jax_policy(actions), prevent_cse=not cfg.scan_layers)
        if not cfg.scan_layers:
            new_cache = []
            for i in range(num):
                own_rates, own_key = jax.tree.map(lambda x, i=i: x[i], (rates, keys))
                own_cache = None if layer_cache is None else layer_cache[i]
                layer = block(cfg, name=f"layers_{i}")
                x_BTD, own_cache = layer(x_BTD, context, own_cache, own_rates, own_key)
                new_cache.append(own_cache)
            return x_BTD, tuple(new_cache)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "lora": True},
            in_axes=(nn.broadcast, 0, 0, 0),
            length=num,
            unroll=cfg.layer_unroll,
        )
        return scanned(cfg, name="layers")(x_BTD, context, layer_cache, rates, keys)


def output_kernel(params: Params) -> Float[Array, "D V"]:
    """The output head; with tied embeddings the transposed embedding."""
    if "lm_head" in params:
        return params["lm_head"]["kernel"]
    return params["embed"]["embedding"].T


def output_logits(params: Params, hidden_BTD: Hidden) -> Logits:
    """Logits in float32, all of them. For sampling and tests; losses work in chunks."""
    return dot(hidden_BTD, output_kernel(params)).astype(jnp.float32)


def init_params(config: LlamaConfig, key: PRNGKey) -> Params:
    """Fresh parameters: normal(0, init_std) throughout, residual outputs scaled, norms at 1."""
    config = dataclasses.replace(config, attention=AttentionConfig())  # owns none of them
    mesh = jax.sharding.get_abstract_mesh()
    size = 1 if mesh.empty else mesh.size  # any batch that the mesh divides; only shapes matter
    ids = jnp.ones((size, size), jnp.int32)
    return Llama(config).init(key, ids, ids, ids)["params"]


def num_params(config: LlamaConfig) -> int:
    """How many parameters the model has, by shape evaluation: no memory is used."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def make_forward(config: LlamaConfig) -> Callable[[Params, Batch, PRNGKey | None], tuple]:
    """The function an objective calls: hidden states [B, T, D] of a batch, and the head [D, V]."""

    def forward(params: Params, batch: Batch, dropout_key: PRNGKey | None) -> tuple:
        hidden_BTD, _ = Llama(config).apply(
            {"params": params},
            batch.tokens,
            batch.segment_ids,
            batch.positions,
            dropout_key=dropout_key,
            rngs=None if dropout_key is None else {"lora": dropout_key},  # folded with each path
        )
        return hidden_BTD, output_kernel(params)

    return forward
