"""What llama.cpp makes of two GGUF files: perplexity on two texts, continuations, a chat.

    python experiments/smollm2/compare.py BEFORE.gguf AFTER.gguf

The texts are the held-out documents of runs/smollm2_data. Nothing of easylm_jax runs here. Needs
`llama-cpp-python`.
"""

import sys

import llama_cpp
import numpy as np
import tensorflow_datasets as tfds
from llama_cpp import Llama

DATA = "runs/smollm2_data"
PROMPTS = ("This PEP proposes", "The main idea is", "Once upon a time")
QUESTION = "What is a PEP?"
WINDOW, NUM_WINDOWS = 256, 16


def perplexity(llama: Llama, text: str) -> float:
    """Over windows that do not overlap, each but its first token scored."""
    ids = llama.tokenize(text.encode(), add_bos=False)[: WINDOW * NUM_WINDOWS]
    losses = []
    for start in range(0, len(ids), WINDOW):
        window = ids[start : start + WINDOW]
        llama.reset()
        llama.eval(window)
        logits = np.array(llama.scores[: len(window) - 1], np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-log_probs[i, token] for i, token in enumerate(window[1:])]
    return float(np.exp(np.mean(losses)))


def heldout_text(source: str) -> str:
    """The held-out documents, one after another."""
    documents = tfds.builder("documents", data_dir=f"{DATA}/{source}").as_data_source("validation")
    return "\n\n".join(document["text"].decode() for document in documents)


def main(paths: list[str]) -> None:
    # llama-cpp-python 0.3.36 crashes on quantised files where the CPU has AMX: leave it unused.
    defaults = llama_cpp.llama_model_default_params()
    defaults.use_extra_bufts = False
    llama_cpp.llama_cpp.llama_model_default_params = lambda: defaults
    for path in paths:
        llama = Llama(path, n_ctx=512, n_batch=WINDOW, logits_all=True, verbose=False, seed=0)
        print(f"== {path}")
        for source in ("peps", "gov"):
            print(f"perplexity of {source}: {perplexity(llama, heldout_text(source)):.2f}")
        for prompt in PROMPTS:
            said = llama.create_completion(prompt, max_tokens=40, temperature=0.0)
            print(f"{prompt!r}: {said['choices'][0]['text']!r}")
        messages = [{"role": "user", "content": QUESTION}]
        said = llama.create_chat_completion(messages, max_tokens=80, temperature=0.0)
        print(f"{QUESTION!r}: {said['choices'][0]['message']['content']!r}")


if __name__ == "__main__":
    main(sys.argv[1:])
