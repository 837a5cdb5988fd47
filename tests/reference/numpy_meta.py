"""LLaMA as Meta published it, in float64 NumPy: [out, in] matrices, neighbours as complex numbers.

It takes Meta's own tensors by Meta's own names, so that readers of files in that layout are tested
without a table of names and without our order of the rotated pairs.
"""

import numpy as np
from numpy import ndarray


def rms_norm(x: ndarray, scale: ndarray, eps: float) -> ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def rotate(x_TNH: ndarray, theta: float) -> ndarray:
    T, N, H = x_TNH.shape
    pairs = np.ascontiguousarray(x_TNH).view(np.complex128)  # (2i, 2i + 1) is one number
    angles = np.arange(T)[:, None] * theta ** (-np.arange(0, H, 2) / H)
    return (pairs * np.exp(1j * angles)[:, None]).view(np.float64)


def attend(q_TNH: ndarray, k_TKH: ndarray, v_TKH: ndarray) -> ndarray:
    T, N, H = q_TNH.shape
    k, v = (np.repeat(x, N // x.shape[1], axis=1) for x in (k_TKH, v_TKH))
    scores = np.einsum("tnh,snh->nts", q_TNH, k) / np.sqrt(H)
    weights = np.exp(np.where(np.tri(T, dtype=bool), scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("nts,snh->tnh", weights, v).reshape(T, N * H)


def logits(w: dict[str, ndarray], tokens: ndarray, *, heads: int, theta: float, eps: float):
    """Logits [T, V] of one row of tokens."""
    w = {name: np.asarray(x, np.float64) for name, x in w.items()}
    x, H = w["tok_embeddings.weight"][tokens], w["norm.weight"].size // heads
    for i in range(sum(name.endswith("attention.wq.weight") for name in w)):
        layer = {n.split(".")[-2]: t for n, t in w.items() if n.startswith(f"layers.{i}.")}
        h = rms_norm(x, layer["attention_norm"], eps)
        q, k, v = ((h @ layer[n].T).reshape(len(x), -1, H) for n in ("wq", "wk", "wv"))
        x = x + attend(rotate(q, theta), rotate(k, theta), v) @ layer["wo"].T
        h = rms_norm(x, layer["ffn_norm"], eps)
        gate = h @ layer["w1"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["w3"].T)) @ layer["w2"].T
    output = w.get("output.weight", w["tok_embeddings.weight"])
    return rms_norm(x, w["norm.weight"], eps) @ output.T
