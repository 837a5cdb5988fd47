"""LLaMA in float64 NumPy, forward and hand-written backward: what the Flax model is tested against.

It is written from the published formulas, one function per formula and its derivative beside it,
with no automatic differentiation and no import from the package; jax only maps over the nested
dicts. It is not fast and knows nothing of dtypes, caches or sharding. Tests call it, and the
helpers at the end, which draw random parameters and random (packed, padded) batches.

Letters as in `easylm_jax/array_types.py`. `dy` is the derivative of the loss with respect to `y`.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from numpy import ndarray

Tree = dict[str, Any]


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling, as `rope_scaling` in the config of Llama 3.1."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class Dims:
    """What the shapes of the parameters do not say. Biases are used where the tree has them."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    sliding_window: int | None = None


def linear(x: ndarray, p: Tree) -> ndarray:
    y = x @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def linear_backward(dy: ndarray, x: ndarray, p: Tree) -> tuple[ndarray, Tree]:
    grads = {"kernel": np.einsum("bti,bto->io", x, dy)}
    if "bias" in p:
        grads["bias"] = dy.sum(axis=(0, 1))
    return dy @ p["kernel"].T, grads


def rms_norm(x: ndarray, p: Tree, eps: float) -> ndarray:
    """Zhang and Sennrich 2019, equation 4."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * p["scale"]


def rms_norm_backward(dy: ndarray, x: ndarray, p: Tree, eps: float) -> tuple[ndarray, Tree]:
    """With r = rms(x): y_i = scale_i x_i / r and dr/dx_j = x_j / (D r)."""
    r = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    dx_hat = dy * p["scale"]
    dx = dx_hat / r - x * np.mean(dx_hat * x, axis=-1, keepdims=True) / r**3
    return dx, {"scale": np.sum(dy * x / r, axis=(0, 1))}


def rope_angles(positions: ndarray, dims: Dims) -> ndarray:
    """Angles [B, T, H/2]: position times theta^(-2i/H), where Llama-3 scaling slows long waves."""
    freqs = dims.rope_theta ** (-np.arange(0, dims.head_dim, 2, dtype=np.float64) / dims.head_dim)
    if dims.rope_scaling is not None:
        freqs = np.array([scale_frequency(freq, dims.rope_scaling) for freq in freqs])
    return positions[:, :, None] * freqs


def scale_frequency(freq: float, s: RopeScaling) -> float:
    """Keep short waves, divide long ones by `factor`, interpolate linearly in between."""
    turns = s.original_max_position * freq / (2 * np.pi)  # full turns within the original context
    if turns > s.high_freq_factor:
        return freq
    if turns < s.low_freq_factor:
        return freq / s.factor
    keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return keep * freq + (1 - keep) * freq / s.factor


def rotate(x_BTNH: ndarray, angles: ndarray) -> ndarray:
    """Turn pairs (x_i, x_{i+H/2}) (Su et al. 2021). The derivative turns by minus the angle."""
    cos, sin = np.cos(angles)[:, :, None, :], np.sin(angles)[:, :, None, :]
    half = x_BTNH.shape[-1] // 2
    first, second = x_BTNH[..., :half], x_BTNH[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def visible(segment_ids: ndarray, positions: ndarray, window: int | None) -> ndarray:
    """Mask [B, T, S], true where query t sees key s. Padding (segment 0) is apart."""
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    distance = positions[:, :, None] - positions[:, None, :]
    mask = (query == key) & (key != 0) & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def softmax(scores: ndarray, mask: ndarray) -> ndarray:
    """Softmax over the visible keys; a row without any is all zeros."""
    highest = np.max(scores, axis=-1, keepdims=True, initial=-np.inf, where=mask)
    weights = np.exp(np.where(mask, scores - highest, -np.inf))
    total = weights.sum(axis=-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def attend(q_BTNH: ndarray, k_BSKH: ndarray, v_BSKH: ndarray, mask: ndarray):
    """Outputs [B, T, N, H] and the probabilities [B, N, T, S] that the backward needs."""
    B, T, N, H = q_BTNH.shape
    group = N // k_BSKH.shape[2]
    out, probs = np.zeros((B, T, N, H)), np.zeros((B, N, T, T))
    for n in range(N):
        q, k, v = q_BTNH[:, :, n], k_BSKH[:, :, n // group], v_BSKH[:, :, n // group]
        scores = np.einsum("bth,bsh->bts", q, k) / np.sqrt(H)
        probs[:, n] = softmax(scores, mask)
        out[:, :, n] = np.einsum("bts,bsh->bth", probs[:, n], v)
    return out, probs


def attend_backward(dout: ndarray, q_BTNH: ndarray, k_BSKH: ndarray, v_BSKH: ndarray, probs):
    """A key/value head gathers the derivatives of every query head that reads it."""
    N, H = q_BTNH.shape[2:]
    group = N // k_BSKH.shape[2]
    dq, dk, dv = np.zeros_like(q_BTNH), np.zeros_like(k_BSKH), np.zeros_like(v_BSKH)
    for n in range(N):
        kv, p = n // group, probs[:, n]
        dp = np.einsum("bth,bsh->bts", dout[:, :, n], v_BSKH[:, :, kv])
        dscores = p * (dp - np.sum(p * dp, axis=-1, keepdims=True)) / np.sqrt(H)
        dq[:, :, n] = np.einsum("bts,bsh->bth", dscores, k_BSKH[:, :, kv])
        dk[:, :, kv] += np.einsum("bts,bth->bsh", dscores, q_BTNH[:, :, n])
        dv[:, :, kv] += np.einsum("bts,bth->bsh", p, dout[:, :, n])
    return dq, dk, dv


def attention(h: ndarray, p: Tree, dims: Dims, mask: ndarray, angles: ndarray):
    B, T, _ = h.shape
    q = rotate(linear(h, p["q"]).reshape(B, T, dims.num_heads, dims.head_dim), angles)
    k = rotate(linear(h, p["k"]).reshape(B, T, dims.num_kv_heads, dims.head_dim), angles)
    v = linear(h, p["v"]).reshape(B, T, dims.num_kv_heads, dims.head_dim)
    out, probs = attend(q, k, v, mask)
    heads = out.reshape(B, T, dims.num_heads * dims.head_dim)
    return linear(heads, p["o"]), (q, k, v, probs, heads)


def attention_backward(dy: ndarray, h: ndarray, p: Tree, angles: ndarray, saved):
    q, k, v, probs, heads = saved
    B, T, _ = h.shape
    grads = {}
    dheads, grads["o"] = linear_backward(dy, heads, p["o"])
    dq, dk, dv = attend_backward(dheads.reshape(q.shape), q, k, v, probs)
    dh_q, grads["q"] = linear_backward(rotate(dq, -angles).reshape(B, T, -1), h, p["q"])
    dh_k, grads["k"] = linear_backward(rotate(dk, -angles).reshape(B, T, -1), h, p["k"])
    dh_v, grads["v"] = linear_backward(dv.reshape(B, T, -1), h, p["v"])
    return dh_q + dh_k + dh_v, grads


def mlp(h: ndarray, p: Tree) -> ndarray:
    """SwiGLU: Shazeer 2020, equation 6, without biases."""
    gate, up = linear(h, p["gate"]), linear(h, p["up"])
    return linear(gate / (1 + np.exp(-gate)) * up, p["down"])


def mlp_backward(dy: ndarray, h: ndarray, p: Tree):
    gate, up = linear(h, p["gate"]), linear(h, p["up"])
    s = 1 / (1 + np.exp(-gate))  # silu(gate) = gate * s, and s' = s (1 - s)
    grads = {}
    dhidden, grads["down"] = linear_backward(dy, gate * s * up, p["down"])
    dh_gate, grads["gate"] = linear_backward(dhidden * up * s * (1 + gate * (1 - s)), h, p["gate"])
    dh_up, grads["up"] = linear_backward(dhidden * gate * s, h, p["up"])
    return dh_gate + dh_up, grads


def run(params: Tree, dims: Dims, tokens: ndarray, segment_ids: ndarray, positions: ndarray):
    """Logits [B, T, V] and everything the backward reads again."""
    eps = dims.norm_eps
    mask = visible(segment_ids, positions, dims.sliding_window)
    angles = rope_angles(positions, dims)
    x = params["embed"]["embedding"][tokens]
    layers = []
    for index in range(len(params["layers"]["mlp_norm"]["scale"])):
        p = jax.tree.map(lambda stacked, index=index: stacked[index], params["layers"])
        h = rms_norm(x, p["attention_norm"], eps)
        y, saved = attention(h, p["attention"], dims, mask, angles)
        middle = x + y
        h2 = rms_norm(middle, p["mlp_norm"], eps)
        layers.append((p, x, h, saved, middle, h2))
        x = middle + mlp(h2, p["mlp"])
    final = rms_norm(x, params["final_norm"], eps)
    return final @ head_kernel(params, dims), (angles, layers, x, final)


def forward(params: Tree, dims: Dims, tokens, segment_ids, positions) -> ndarray:
    """Logits [B, T, V] in float64."""
    return run(as_float64(params), dims, tokens, segment_ids, positions)[0]


def loss_and_grads(
    params: Tree, dims: Dims, tokens, targets, weights, segment_ids, positions
) -> tuple[float, float, Tree]:
    """Sum of weights * -log p(target), sum of weights, and d(first)/d(params), shaped as params."""
    params, eps = as_float64(params), dims.norm_eps
    weights = np.asarray(weights, np.float64)
    logits, (angles, layers, x, final) = run(params, dims, tokens, segment_ids, positions)

    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    is_target = targets[:, :, None] == np.arange(logits.shape[-1])
    loss_sum = -np.sum(weights[:, :, None] * is_target * log_probs)
    dlogits = weights[:, :, None] * (np.exp(log_probs) - is_target)

    kernel = head_kernel(params, dims)
    dkernel = np.einsum("btd,btv->dv", final, dlogits)
    dx, dfinal_norm = rms_norm_backward(dlogits @ kernel.T, x, params["final_norm"], eps)
    dlayers = []
    for p, x_in, h, saved, middle, h2 in reversed(layers):
        grads = {}
        dh2, grads["mlp"] = mlp_backward(dx, h2, p["mlp"])
        dmiddle, grads["mlp_norm"] = rms_norm_backward(dh2, middle, p["mlp_norm"], eps)
        dx = dx + dmiddle
        dh, grads["attention"] = attention_backward(dx, h, p["attention"], angles, saved)
        dx_in, grads["attention_norm"] = rms_norm_backward(dh, x_in, p["attention_norm"], eps)
        dx = dx + dx_in
        dlayers.insert(0, grads)

    dembedding = np.zeros_like(params["embed"]["embedding"])
    np.add.at(dembedding, tokens, dx)  # a token that occurs twice gathers both derivatives
    grads = {
        "embed": {"embedding": dembedding + dkernel.T if dims.tied else dembedding},
        "layers": jax.tree.map(lambda *arrays: np.stack(arrays), *dlayers),
        "final_norm": dfinal_norm,
    }
    if not dims.tied:
        grads["lm_head"] = {"kernel": dkernel}
    return float(loss_sum), float(weights.sum()), grads


def head_kernel(params: Tree, dims: Dims) -> ndarray:
    return params["embed"]["embedding"].T if dims.tied else params["lm_head"]["kernel"]


def as_float64(tree: Tree) -> Tree:
    return jax.tree.map(lambda array: np.asarray(array, np.float64), tree)


def random_params(
    dims: Dims, rng, *, vocab=37, width=24, ffn=40, layers=2, qkv_bias=False, o_bias=False
) -> Tree:
    """Parameters at which every term of the model matters: no zero biases, no unit gains."""

    def kernel(num_in: int, num_out: int, bias: bool = False) -> Tree:
        p = {"kernel": rng.normal(size=(layers, num_in, num_out)) / np.sqrt(num_in)}
        return p | {"bias": 0.3 * rng.normal(size=(layers, num_out))} if bias else p

    def gain(*shape: int) -> Tree:
        return {"scale": 1 + 0.3 * rng.normal(size=shape)}

    heads, kv_heads = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    attention = {"q": kernel(width, heads, qkv_bias), "o": kernel(heads, width, o_bias)}
    attention |= {name: kernel(width, kv_heads, qkv_bias) for name in ("k", "v")}
    swiglu = {name: kernel(width, ffn) for name in ("gate", "up")} | {"down": kernel(ffn, width)}
    norms = {name: gain(layers, width) for name in ("attention_norm", "mlp_norm")}
    params = {
        "embed": {"embedding": rng.normal(size=(vocab, width))},
        "layers": {"attention": attention, "mlp": swiglu, **norms},
        "final_norm": gain(width),
    }
    if not dims.tied:
        params["lm_head"] = {"kernel": rng.normal(size=(width, vocab)) / np.sqrt(width)}
    return params


def random_batch(
    rng, *, vocab=37, batch_size=3, length=17, packed=True, padding=True
) -> dict[str, ndarray]:
    """The five arrays of `easylm_jax.batch.Batch`: two or three documents a row, a padded tail."""
    shape = (batch_size, length)
    tokens, targets = rng.integers(0, vocab, size=(2, *shape))  # no next token: any valid target
    weights = rng.uniform(0.5, 1.5, size=shape) * (rng.uniform(size=shape) > 1 / 3)
    segment_ids, positions = np.zeros(shape, int), np.zeros(shape, int)
    for b in range(batch_size):
        end = length - int(rng.integers(1, length // 3)) if padding else length
        num_cuts = int(rng.integers(1, 3)) if packed else 0
        cuts = sorted(rng.choice(np.arange(1, end), size=num_cuts, replace=False))
        weights[b, end:] = 0
        for i, (start, stop) in enumerate(itertools.pairwise([0, *cuts, end])):
            segment_ids[b, start:stop] = i + 1
            positions[b, start:stop] = np.arange(stop - start)
            targets[b, start : stop - 1] = tokens[b, start + 1 : stop]
            weights[b, stop - 1] = 0
    ids = {"segment_ids": segment_ids, "positions": positions}
    return {"tokens": tokens, "targets": targets, "weights": weights} | ids
