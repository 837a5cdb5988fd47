"""How much faster is fine-tuning on packed rows than on one example per row?

    python experiments/packing/run.py --rounds=3

The quickstart's preference data (or --data=FILE, --reader=NAME) and its model, rows of --seq_len
tokens, best-fit packed and padded. Steps of both are timed in turn, in one process; the first of
each compiles and does not count. A real token is one that is not padding.
"""

import argparse
import functools
import statistics
import time

import jax
import numpy as np

from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.data.source import DataConfig, make_source
from easylm_jax.loading import find_tokenizer
from easylm_jax.models.llama import init_params, make_forward
from easylm_jax.models.presets import preset
from easylm_jax.objectives import cross_entropy
from easylm_jax.optim import OptimConfig, make_optimizer, make_schedule
from easylm_jax.step import GuardConfig, train_step
from easylm_jax.text.template import find_template
from easylm_jax.train_state import init_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="runs/quickstart_chat_data/hh/train.jsonl")
    parser.add_argument("--reader", default="messages")
    parser.add_argument("--tokenizer", default="runs/quickstart_data/tokenizer")
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    tokenizer, model = find_tokenizer(args.tokenizer), preset("tiny")
    optim = OptimConfig(warmup="1 steps")
    schedule = make_schedule(optim, total_steps=100, tokens_per_step=1)
    optimizer = make_optimizer(optim, schedule)
    step = jax.jit(
        functools.partial(
            train_step,
            objective=cross_entropy(make_forward(model)),
            optimizer=optimizer,
            num_micro_batches=1,
            guard=GuardConfig(),
        ),
        donate_argnums=0,
    )
    sources = {}
    for packing in ("best_fit", "padded"):
        sources[packing] = make_source(
            DataConfig(
                files=(args.data,),
                chat=ChatConfig(template="koala", reader=args.reader, judged=("good", "bad")),
                packing=packing,
                on_bad_line="skip",
            ),
            batch_size=16,
            seq_len=args.seq_len,
            tokenizer=tokenizer,
            rows=range(16),
            template=find_template("koala"),
        )
    state = jax.jit(
        functools.partial(init_state, functools.partial(init_params, model), optimizer, 0)
    )()
    speeds = {packing: [] for packing in sources}
    shares = {packing: [] for packing in sources}
    for number in range(args.rounds + 1):
        for packing, source in sources.items():
            started, real, steps = time.perf_counter(), 0, 3
            for _ in range(steps):
                batch, _ = source.next()
                state, metrics = step(state, batch)
                real += int((batch.segment_ids > 0).sum())
            jax.block_until_ready(metrics)
            if number:
                speeds[packing].append(real / (time.perf_counter() - started))
                shares[packing].append(real / (steps * 16 * args.seq_len))
    for packing in sources:
        print(
            f"{packing:<9} {np.mean(shares[packing]):6.1%} of positions are real tokens, "
            f"{statistics.median(speeds[packing]):7,.0f} real tokens/s"
        )
    ratio = statistics.median(speeds["best_fit"]) / statistics.median(speeds["padded"])
    print(f"packed is {ratio:.2f}x as fast")


if __name__ == "__main__":
    main()
