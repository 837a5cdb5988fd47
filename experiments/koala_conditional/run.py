"""Does a marker of quality make a fine-tuned model prefer, and give, better answers?

SmolLM2-135M-Instruct is fine-tuned with LoRA on people's preferences (HH, WebGPT, PandaLM), on both
answers of every pair: once with the marker of its quality before each answer, once without. On
held-out questions each model is asked how likely the chosen and the rejected answer are, under
either marker and under none, and for answers of its own.

    python experiments/koala_conditional/run.py --model=PATH/SmolLM2-135M-Instruct.Q4_1.gguf \
        --data=FOLDER --out=runs/koala_conditional

FOLDER holds hh_rlhf/, webgpt/ and pandalm/ with the published files. Each part is done once: what
lies in --out already is not made again. The scorer needs scikit-learn.
"""

import argparse
import functools
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np

import easylm_jax as el
from easylm_jax.data.conversation import Pair, find_pairs
from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.data.readers import read_conversations
from easylm_jax.data.source import DataConfig
from easylm_jax.evals.preference import (
    PairScores,
    make_answer_losses,
    pair_metrics,
    prepare_pairs,
    score_pairs,
)
from easylm_jax.language_model import LanguageModel
from easylm_jax.models.llama import make_forward
from easylm_jax.models.lora import LoraConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.prepare_chat import ChatPrepareConfig, DatasetConfig, prepare_chat
from easylm_jax.text.example import encode_segment
from easylm_jax.text.template import end_token, find_template, render
from easylm_jax.train import CheckpointConfig, EvalConfig, TrainConfig, train

HERE = Path(__file__).parent
TEMPLATE = str(HERE / "template.json")
DATASETS = {
    "hh_helpful": ("hh", "hh_rlhf/*helpful*"),
    "hh_harmless": ("hh", "hh_rlhf/harmless-base*"),
    "webgpt": ("webgpt", "webgpt/*"),
    "pandalm": ("pandalm", "pandalm/testset*"),
}
ARMS = ("marked", "unmarked")
MAX_CHARACTERS = 1200  # of a conversation
SEQ_LEN = 320


def prepare(data: Path, out: Path) -> Path:
    """Clean pairs, split by their first question."""
    datasets = {
        name: DatasetConfig(
            reader=reader, files=(str(data / files),), max_characters=MAX_CHARACTERS
        )
        for name, (reader, files) in DATASETS.items()
    }
    config = ChatPrepareConfig(datasets, validation_fraction=0.12, on_bad_line="skip")
    prepare_chat(config, str(out / "data"))
    return out / "data"


def fine_tune(arm: str, args: argparse.Namespace, data: Path) -> Path:
    """One model of the two; the same data in the same order, the same seed."""
    folder = args.out / arm
    last = folder / "checkpoints" / f"{args.steps:08d}"
    if last.exists():
        return folder
    config = TrainConfig(
        model=preset("smollm2_135m", dtype="bfloat16", remat="none"),
        tokenizer=args.model,
        init_from=args.model,
        lora=LoraConfig(rank=16, alpha=32.0),
        data=DataConfig(
            files=(str(data / "*" / "train.jsonl"),),
            chat=ChatConfig(
                template=TEMPLATE,
                judged=("good", "bad"),
                conditional=arm == "marked",
                loss_on="last",
            ),
            seed=args.seed,
        ),
        duration=f"{args.steps} steps",
        batch_size=4,
        micro_batches=2,
        seq_len=SEQ_LEN,
        optim=OptimConfig(lr=5e-4, warmup="5%", weight_decay=0.0),
        checkpoint=CheckpointConfig(every="50 steps", keep_last=1),
        eval=EvalConfig(every=f"{args.steps} steps"),
        seed=args.seed,
        log_every=5,
    )
    train(config, str(folder))
    if not last.exists():
        raise SystemExit(f"{folder} was stopped before its end: start again to go on")
    return folder


def read_pairs(data: Path, side: str) -> list[Pair]:
    """All pairs of one side of the split."""
    files = [str(data / "*" / f"{side}.jsonl")]
    return find_pairs(read_conversations(files, reader="messages", source="", counts=Counter()))


def heldout(data: Path, num_pairs: int, seed: int) -> list[Pair]:
    """Pairs nobody trained on, drawn by the seed."""
    pairs = read_pairs(data, "validation")
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[i] for i in order[:num_pairs]]


def prefer(lm: LanguageModel, pairs: list[Pair], out: Path) -> PairScores:
    """log p of both answers of every pair, under every marker."""
    if out.exists():
        with np.load(out) as saved:
            return PairScores(tuple(saved["conditions"]), saved["log_probs"], saved["num_tokens"])
    batches = prepare_pairs(
        pairs,
        template=find_template(TEMPLATE),
        tokenizer=lm.tokenizer,
        batch_size=8,
        seq_len=SEQ_LEN + 64,
    )
    with jax.set_mesh(lm.mesh):
        losses = jax.jit(make_answer_losses(make_forward(lm.config)))
        scores = score_pairs(losses, lm.params, batches)
    np.savez(out, **scores._asdict())
    return scores


def answers(lm: LanguageModel, pairs: list[Pair], arm: str, out: Path) -> list[dict]:
    """One sampled answer per question and marker."""
    if out.exists():
        return json.loads(out.read_text())
    template, tokenizer = find_template(TEMPLATE), lm.tokenizer
    made = []
    for quality in ("", "good", "bad") if arm == "marked" else ("",):
        prompts = [
            render(template, pair.chosen.messages[:-1], generate=True, quality=quality)
            for pair in pairs
        ]
        completions = lm.generate(
            [
                [i for segment in prompt for i in encode_segment(segment, tokenizer)]
                for prompt in prompts
            ],
            temperature=0.7,
            top_p=0.9,
            max_new_tokens=96,
            stop_ids=[tokenizer.special_id(end_token(template))],
            seed=list(range(len(pairs))),
        )
        for pair, completion in zip(pairs, completions, strict=True):
            made.append(
                {
                    "quality": quality,
                    "source": pair.chosen.source,
                    "prompt": pair.chosen.messages[:-1],
                    "text": completion.text.strip(),
                    "ended": completion.finish_reason == "stop",
                }
            )
    out.write_text(json.dumps(made, indent=1, ensure_ascii=False))
    return made


def train_scorer(data: Path) -> tuple[Any, float, int]:
    """Words and letters to "was preferred": logistic regression, no part of our models.

    Returns it, the share of held-out pairs that it orders right, and their number.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    def texts(side: str) -> tuple[list[str], list[str]]:
        pairs = read_pairs(data, side)
        return tuple([pair[i].messages[-1]["content"] for pair in pairs] for i in (0, 1))

    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), min_df=5, sublinear_tf=True),
    )
    scorer = make_pipeline(features, LogisticRegression(C=1.0, max_iter=2000))
    good, bad = texts("train")
    scorer.fit(good + bad, [1] * len(good) + [0] * len(bad))
    good, bad = texts("validation")
    right = scorer.decision_function(good) > scorer.decision_function(bad)
    return scorer, float(right.mean()), len(right)


def mean(values) -> tuple[float, float]:
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def summarise(samples: list[dict], scorer) -> dict[str, dict[str, tuple[float, float]]]:
    """Length in words and the scorer's verdict, by marker."""
    found = {}
    for quality in dict.fromkeys(s["quality"] for s in samples):
        texts = [s["text"] for s in samples if s["quality"] == quality]
        found[quality or "none"] = {
            "words": mean([len(t.split()) for t in texts]),
            "scorer": mean(scorer.decision_function(texts)),
        }
    return found


def paired(samples: list[dict], scorer) -> dict[str, tuple[float, float]]:
    """Answers under the good marker minus those under the bad one, question by question."""
    good, bad = ([s["text"] for s in samples if s["quality"] == q] for q in ("good", "bad"))
    words = [len(a.split()) - len(b.split()) for a, b in zip(good, bad, strict=True)]
    scores = scorer.decision_function(good) - scorer.decision_function(bad)
    return {"words": mean(words), "scorer": mean(scores)}


def plot(metrics: dict, samples: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 3.6), width_ratios=(1.7, 1, 1), constrained_layout=True
    )
    bars = [
        ("base", metrics["base"]["unmarked/prefers_chosen"]),
        ("no markers\nin training", metrics["unmarked"]["unmarked/prefers_chosen"]),
        ("marked,\nasked plain", metrics["marked"]["unmarked/prefers_chosen"]),
        ("marked,\ngood", metrics["marked"]["good/prefers_chosen"]),
        ("marked,\nbad", metrics["marked"]["bad/prefers_chosen"]),
        ("told by\nmarkers", metrics["marked"]["tells"]),
    ]
    colours = ["#8c8c8c", "#4878a8", "#8cb4d9", "#2e8b57", "#c0504d", "#7b5ea7"]
    names, values = zip(*bars, strict=True)
    shares, errors = zip(*values, strict=True)
    left.bar(range(len(bars)), shares, yerr=[1.96 * e for e in errors], color=colours, capsize=3)
    left.axhline(0.5, color="black", lw=0.8, ls=":")
    left.set_xticks(range(len(bars)), names, fontsize=7)
    left.set_ylim(0.35, 0.75)
    left.set_title("share of held-out pairs with the chosen\nanswer likelier per token", fontsize=9)
    for axis, what, title in (
        (middle, "words", "words per sampled answer"),
        (right, "scorer", "scorer's verdict on sampled answers (log odds)"),
    ):
        rows = [("without\nmarkers", samples["unmarked"]["none"][what], colours[1])]
        rows += [
            (f"{name}\nmarker", samples["marked"][key][what], colour)
            for name, key, colour in (
                ("no", "none", colours[2]),
                ("good", "good", colours[3]),
                ("bad", "bad", colours[4]),
            )
        ]
        axis.bar(
            [r[0] for r in rows],
            [r[1][0] for r in rows],
            yerr=[1.96 * r[1][1] for r in rows],
            color=[r[2] for r in rows],
            capsize=3,
        )
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/koala_conditional"))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    times, metrics, samples = {}, {}, {}

    def timed(name, function, *arguments):
        started = time.time()
        result = function(*arguments)
        times[name] = round(time.time() - started, 1)
        return result

    data = timed("prepare", prepare, args.data, args.out)
    pairs = heldout(data, args.pairs, args.seed)
    paths = {"base": args.model}
    for arm in ARMS:
        paths[arm] = str(timed(f"train {arm}", functools.partial(fine_tune, arm), args, data))
    scorer, accuracy, num = timed("scorer", train_scorer, data)
    for name, path in paths.items():
        lm = el.load(path, dtype="bfloat16", template="chatml")
        metrics[name] = pair_metrics(
            timed(f"score {name}", prefer, lm, pairs, args.out / f"{name}.npz")
        )
        if name in ARMS:
            questions = pairs[: args.questions]
            made = timed(f"answer {name}", answers, lm, questions, name, args.out / f"{name}.json")
            samples[name] = summarise(made, scorer)
            if name == "marked":
                samples["good_minus_bad"] = paired(made, scorer)
    table = {
        "config": {k: str(v) for k, v in vars(args).items() if k not in ("model", "data", "out")},
        "pairs": len(pairs),
        "scorer": {"heldout_accuracy": accuracy, "pairs": num},
        "preferences": metrics,
        "answers": samples,
        "seconds": times,
    }
    (args.out / "table.json").write_text(json.dumps(table, indent=1))
    plot(metrics, samples, args.out / "results.png")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
