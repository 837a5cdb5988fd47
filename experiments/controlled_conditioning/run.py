"""Conditioning where it must work: good answers are of one grammar, bad ones of another.

Every question has two answers of eight digits: the good one has even digits, the bad one odd ones.
Nothing but the marker before an answer tells which is to come. Three models are trained, alike but
for the markers: true ones, none, and true ones dealt out anew at random. Then each answers new
questions under either marker.

    python experiments/controlled_conditioning/run.py --out=runs/controlled_conditioning

prints and writes table.json; about a minute and a half on two cores.
"""

import argparse
import json
import random
from pathlib import Path

import easylm_jax as el
from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.data.source import DataConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.train import CheckpointConfig, EvalConfig, TrainConfig, train

EVEN, ODD = "02468", "13579"
MARKERS = ("good", "bad")


def write_pairs(path: Path, *, num: int, shuffled: bool, rng: random.Random) -> None:
    """Conversations in the form at rest (data/conversation.py), two answers to every question."""
    lines = []
    for n in range(num):
        user = {"role": "user", "content": question(rng)}
        for quality, digits in zip(MARKERS, (EVEN, ODD), strict=True):
            answer = {"role": "assistant", "content": "".join(rng.choices(digits, k=8))}
            said = rng.choice(MARKERS) if shuffled else quality
            one = {"id": f"{n}/{quality}", "messages": [user, answer], "quality": said}
            lines.append(json.dumps(one | {"pair": str(n)}))
    path.write_text("\n".join(lines))


def question(rng: random.Random) -> str:
    return "say " + "".join(rng.choices("abcdefgh", k=4))


def run(out: Path, *, arm: str, seed: int, steps: int) -> dict[str, float]:
    """Train one model; the share of its answers that are good, under either marker."""
    rng = random.Random(seed)
    folder = out / arm
    folder.mkdir(parents=True, exist_ok=True)
    write_pairs(folder / "pairs.jsonl", num=512, shuffled=arm == "shuffled", rng=rng)
    chat = ChatConfig(
        template="hindsight",
        judged=MARKERS,
        conditional=arm != "unmarked",
    )
    config = TrainConfig(
        model=preset("debug"),
        tokenizer="bytes",
        data=DataConfig(files=(str(folder / "pairs.jsonl"),), chat=chat, seed=seed),
        duration=f"{steps} steps",
        batch_size=16,
        seq_len=128,
        optim=OptimConfig(lr=3e-3, warmup="5%"),
        checkpoint=CheckpointConfig(every=f"{steps} steps"),
        eval=EvalConfig(every=f"{steps} steps"),
        seed=seed,
        log_every=20,
    )
    train(config, str(folder / "run"))
    lm = el.load(str(folder / "run"))
    questions = [[{"role": "user", "content": question(rng)}] for _ in range(100)]
    found = {}
    for marker in ("", *MARKERS):
        if arm != "unmarked" and not marker:
            continue
        answers = [
            lm.chat(q, quality=marker, temperature=1.0, top_p=1.0, max_new_tokens=16, seed=i)
            for i, q in enumerate(questions)
        ]
        found[marker or "unmarked"] = sum(is_good(a) for a in answers) / len(answers)
    return found


def is_good(answer: str) -> bool:
    return len(answer) == 8 and set(answer) <= set(EVEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/controlled_conditioning"))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    arms = ("marked", "unmarked", "shuffled")
    table = {arm: run(args.out, arm=arm, seed=args.seed, steps=args.steps) for arm in arms}
    (args.out / "table.json").write_text(json.dumps(table, indent=2))
    for arm, shares in table.items():
        print(f"{arm:<10}" + "".join(f"  P(good | {m}) = {p:.2f}" for m, p in shares.items()))


if __name__ == "__main__":
    main()
