"""Perplexity of one model on one fixed text, in easylm_jax and, if asked, in two other engines.

    python experiments/smollm2/parity.py MODEL.gguf
    python experiments/smollm2/parity.py MODEL.gguf --against=transformers,llama.cpp

The text is the first 20,000 bytes of the shipped government posts, in windows of 512 tokens that do
not overlap, without BOS; all but the first token of a window are scored. With `--against` it also
prints, on the first windows, the largest difference of logits and how often the best guess differs.
All engines are given our ids. llama.cpp is given a float32 copy of the model, since it rounds
activations to 8 bits where weights are quantised.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable

import numpy as np
import zstandard

import easylm_jax as el
from easylm_jax.convert import convert
from easylm_jax.language_model import LanguageModel

CORPUS = "experiments/quickstart/corpus/gov.jsonl.zst"
BYTES, WINDOW, COMPARED = 20_000, 512, 4

Logits = Callable[[list[int]], np.ndarray]  # ids of a window -> [T, V], float32


def text() -> str:
    """The text, cut at a character."""
    with zstandard.open(CORPUS, "rt") as lines:
        documents = "\n\n".join(json.loads(line)["text"] for line in lines)
    return documents.encode()[:BYTES].decode(errors="ignore")


def ours(lm: LanguageModel) -> Logits:
    return lambda ids: lm.logits(ids)


def transformers(path: str) -> Logits:
    import torch
    from transformers import AutoModelForCausalLM

    folder, name = os.path.split(os.path.abspath(path))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    model.eval()

    def logits(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()

    return logits


def llama_cpp(path: str) -> Logits:
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory() as folder:
        convert(path, f"{folder}/f32.gguf", dtype="float32")
        llama = Llama(
            f"{folder}/f32.gguf", n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False
        )

    def logits(ids: list[int]) -> np.ndarray:
        llama.reset()
        llama.eval(ids)
        return np.array(llama.scores[: len(ids)])

    return logits


def loss(logits: np.ndarray, ids: list[int]) -> tuple[float, int]:
    """Summed -log p of all ids but the first, and their number."""
    logits = logits[:-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_probs[np.arange(len(ids) - 1), ids[1:]].sum(), len(ids) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--against", default="", help="transformers,llama.cpp")
    options = parser.parse_args()
    lm = el.load(options.model)
    ids = lm.tokenizer.encode(text())
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    engines = {"easylm_jax": ours(lm)}
    makers = {"transformers": transformers, "llama.cpp": llama_cpp}
    for name in filter(None, options.against.split(",")):
        engines[name] = makers[name](options.model)
    first: list[np.ndarray] = []
    for name, logits in engines.items():
        made = [(logits(window), window) for window in windows[:COMPARED]]
        losses = [loss(*pair) for pair in made]
        losses += [loss(logits(window), window) for window in windows[COMPARED:]]
        total, count = np.sum(losses, axis=0)
        line = f"{name:13s} perplexity {np.exp(total / count):.4f} of {int(count):,} tokens"
        if first:
            pairs = [(a, b) for (a, _), b in zip(made, first, strict=True)]
            furthest = max(np.abs(a - b).max() for a, b in pairs)
            other = sum((a.argmax(-1) != b.argmax(-1)).sum() for a, b in pairs)
            line += f"; logits differ by {furthest:.1e} at most, the best guess {other} times"
            line += f" in {sum(len(a) for a, _ in pairs):,}"
        print(line)
        first = first or [logits for logits, _ in made]


if __name__ == "__main__":
    main()
