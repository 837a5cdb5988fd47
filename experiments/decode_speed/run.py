"""Prefill and decode of one GGUF model beside transformers and llama.cpp, interleaved, one machine.

    python experiments/decode_speed/run.py MODEL.gguf --rounds=3

Every engine runs in a process of its own, in turn, `rounds` times, with two threads: 512 tokens
read, then 128 written greedily with a cache. Printed are medians over the rounds and each engine's
peak memory. llama.cpp runs float32 and 8-bit copies of the model, made by our converter.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

PROMPT, NEW, REPEATS = 512, 128, 3
COLUMNS = ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_mb", "load1")


def transformers(path: str, batch: int) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    folder, name = os.path.split(os.path.abspath(path))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, PROMPT))
    prompt = torch.from_numpy(ids)

    @torch.no_grad()
    def once() -> tuple[float, float]:
        start = time.perf_counter()
        out = model(prompt, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        middle = time.perf_counter()
        for _ in range(NEW - 1):
            out = model(token, use_cache=True, past_key_values=out.past_key_values)
            token = out.logits[:, -1:].argmax(-1)
        return middle - start, time.perf_counter() - middle

    return _summary([once() for _ in range(REPEATS + 1)], batch)


def llama_cpp(path: str, batch: int) -> dict[str, float]:
    import llama_cpp
    from llama_cpp import Llama

    assert batch == 1
    # Version 0.3.36 crashes on quantised files where the CPU has AMX; this leaves AMX unused.
    defaults = llama_cpp.llama_model_default_params()
    defaults.use_extra_bufts = False
    llama_cpp.llama_model_default_params = lambda: defaults
    llama_cpp.llama_cpp.llama_model_default_params = lambda: defaults
    llama = Llama(
        path, n_ctx=1024, n_batch=512, n_ubatch=512, n_threads=2, n_threads_batch=2, verbose=False
    )
    ids = np.random.default_rng(0).integers(0, llama.n_vocab(), PROMPT).tolist()

    def best() -> int:
        return int(np.argmax(llama._ctx.get_logits_ith(-1)[: llama.n_vocab()]))

    def once() -> tuple[float, float]:
        llama.reset()
        start = time.perf_counter()
        llama.eval(ids)
        token = best()
        middle = time.perf_counter()
        for _ in range(NEW - 1):
            llama.eval([token])
            token = best()
        return middle - start, time.perf_counter() - middle

    return _summary([once() for _ in range(REPEATS + 1)], 1)


def _summary(times: list[tuple[float, float]], batch: int) -> dict[str, float]:
    prefill, decode = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return {
        "prefill_tokens_per_s": batch * PROMPT / prefill,
        "decode_tokens_per_s": batch * (NEW - 1) / decode,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "load1": os.getloadavg()[0],
    }


def ours(path: str, batch: int, dtype: str) -> list[str]:
    work = ["-m", "easylm_jax.bench", "--work=decode", f"--model={path}", f"--batch={batch}"]
    sizes = [f"--prompt={PROMPT}", f"--new={NEW}", f"--steps={REPEATS}", f"--dtype={dtype}"]
    return [sys.executable, *work, *sizes, "--json"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", help="(one engine, in this process)")
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    if options.engine:
        engine = {"transformers": transformers, "llama.cpp": llama_cpp}[options.engine]
        print(json.dumps(engine(options.model, options.batch)))
        return
    with tempfile.TemporaryDirectory() as folder:
        copies = {dtype: f"{folder}/{dtype}.gguf" for dtype in ("float32", "q8_0")}
        for dtype, copy in copies.items():
            convert = ["-m", "easylm_jax.convert", f"--from={options.model}", f"--to={copy}"]
            subprocess.run([sys.executable, *convert, f"--dtype={dtype}"], check=True)

        def peer(engine: str, path: str, batch: int = 1) -> list[str]:
            return [sys.executable, __file__, path, f"--engine={engine}", f"--batch={batch}"]

        runs = {
            "easylm_jax float32, batch 1": ours(options.model, 1, "float32"),
            "transformers float32, batch 1": peer("transformers", options.model),
            "llama.cpp float32, batch 1": peer("llama.cpp", copies["float32"]),
            "llama.cpp Q8_0, batch 1": peer("llama.cpp", copies["q8_0"]),
            "easylm_jax float32, batch 8": ours(options.model, 8, "float32"),
            "transformers float32, batch 8": peer("transformers", options.model, 8),
            "easylm_jax bfloat16, batch 1": ours(options.model, 1, "bfloat16"),
        }
        found = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, command in runs.items():
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[name].append(json.loads(out.splitlines()[-1]))
                print(f"{name:32s}", *(f"{found[name][-1][c]:10.1f}" for c in COLUMNS), flush=True)
    print(f"\nmedians of {options.rounds} rounds: {', '.join(COLUMNS)}")
    for name, rounds in found.items():
        medians = (statistics.median(r[c] for r in rounds) for c in COLUMNS)
        print(f"{name:32s}", *(f"{m:10.1f}" for m in medians))


if __name__ == "__main__":
    main()
