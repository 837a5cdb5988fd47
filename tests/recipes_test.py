"""Fine-tuning recipes of configs/ on tiny data in the layouts that they name.

All of them make a batch whose loss is on what it should be; the two that differ most train.
"""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest

from easylm_jax.config import from_config_dict
from easylm_jax.data.source import DataConfig, make_source
from easylm_jax.loading import training_template
from easylm_jax.optim import OptimConfig
from easylm_jax.text.tokenizer import train_sentencepiece
from easylm_jax.train import CheckpointConfig, TrainConfig, train
from tests import command
from tests.config_test import CONFIGS, RECIPES, load
from tests.tiny import tiny_config

CASES = [*RECIPES, "koala_sft:distill", "koala_sft:all", "orca:gpt4"]
EXAMPLES = 12
# Letters that no template has tell what a text is.
ASKED, GOOD, BAD = "012", "345", "678"


def record(reader: str, rng: random.Random) -> dict | list[dict]:
    """An example in the layout that the data set was published in."""
    ask, good, bad = ("".join(rng.choices(letters, k=12)) for letters in (ASKED, GOOD, BAD))
    replies = [{"role": "assistant", "text": t, "rank": r} for t, r in ((bad, 1), (good, 0))]
    asked, key = {"role": "user", "content": ask}, f"{rng.random()}"
    answers = {"good": {"role": "assistant", "content": good}}
    answers["bad"] = {"role": "assistant", "content": bad}
    return {
        "alpaca": {"instruction": ask, "input": rng.choice(["", ask]), "output": good},
        "baize": {"input": f"The conversation ...\n[|Human|] {ask}\n[|AI|] {good}\n[|Human|] "},
        "gpt4all": {"prompt": ask, "response": good, "source": ""},
        "lima": {"conversations": [ask, good], "source": ""},
        "messages": [  # of preferences, as `prepare` writes them
            {"messages": [asked, answer], "quality": quality, "pair": key}
            for quality, answer in answers.items()
        ],
        "oasst_best": {"prompt": {"role": "prompter", "text": ask, "replies": replies}},
        "orca": {"id": "1", "system_prompt": "", "question": ask, "response": good},
    }[reader]


def recipe(case: str, folder: Path) -> TrainConfig:
    """The recipe, with data of its layout."""
    name, *arguments = case.split(":")
    cfg = from_config_dict(TrainConfig, load(CONFIGS / f"{name}.py").get_config(*arguments))
    rng, file = random.Random(0), folder / "data.jsonl"
    records = [record(cfg.data.chat.reader, rng) for _ in range(EXAMPLES)]
    flat = [r for one in records for r in (one if isinstance(one, list) else [one])]
    file.write_text("".join(json.dumps(r) + "\n" for r in flat))
    heldout = (str(file),) if cfg.data.heldout_files else ()
    data = dataclasses.replace(cfg.data, files=(str(file),), heldout_files=heldout)
    return dataclasses.replace(cfg, data=data)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"{ASKED} {GOOD} {BAD}"] * 50
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    return train_sentencepiece(texts, str(path), vocab_size=269)  # characters and bytes, no more


@pytest.mark.parametrize("case", CASES)
def test_the_loss_of_a_recipe_is_on_what_it_should_be(case, tokenizer, tmp_path):
    cfg = recipe(case, tmp_path)
    shape = dict(batch_size=4, seq_len=512, rows=range(4), tokenizer=tokenizer)
    template = training_template(cfg.data.chat, "", tokenizer)
    data = dataclasses.replace(cfg.data, window=4)
    batch, _ = make_source(data, template=template, **shape).next()
    text = tokenizer.decode([int(i) for i in batch.targets[batch.weights > 0]])
    given = tokenizer.decode([int(i) for i in batch.tokens.ravel()])
    assert set(ASKED) <= set(given) and set(GOOD) <= set(text)
    everything = case.split("_")[0] in ("baize", "guanaco")
    assert bool(set(ASKED) & set(text)) == everything
    assert bool(set(BAD) & set(text)) == (case == "koala_sft")  # by default conditional
    assert ("An Unhelpful Answer:" in given) == (case == "koala_sft")
    assert "GPT:" not in text and "Unhelpful" not in text
    assert len(set(batch.segment_ids.max(1)) | {1}) == 1 or cfg.data.packing == "best_fit"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A model that was pretrained for a step."""
    folder = tmp_path_factory.mktemp("base")
    cfg = TrainConfig(
        model=tiny_config(vocab_size=264),
        tokenizer="bytes",
        data=DataConfig(files=(command.write_text(folder),)),
        duration="1 step",
        batch_size=8,
        seq_len=16,
        optim=OptimConfig(warmup="0 steps"),
        seed=1,  # not that of the recipes, so that one which ignored init_from would show
    )
    train(cfg, str(folder / "run"))
    return str(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["koala_sft", "guanaco_qlora"])
def test_a_recipe_trains(case, base, tmp_path):
    cfg, tiny = recipe(case, tmp_path), tiny_config(vocab_size=264)
    shape = ("d_model", "num_layers", "d_ff", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    sizes = {key: getattr(tiny, key) for key in (*shape, "norm_eps")}
    changes = dict(tokenizer="bytes", init_from=base, duration="2 steps", batch_size=8, seq_len=128)
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, **sizes),
        optim=dataclasses.replace(cfg.optim, warmup="1 step"),
        checkpoint=CheckpointConfig(every="2 steps"),
        log_every=1,
        **changes,
    )
    train(cfg, str(tmp_path / "run"))
    after, rows = command.arrays(tmp_path / "run", 2), command.rows(tmp_path / "run")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 2 and np.isfinite(losses).all() and min(losses) > 0
    measured = {key for row in rows for key in row}
    assert ("eval/heldout/loss" in measured) == bool(cfg.data.heldout_files)
    assert any(key.startswith("eval/pairs/") for key in measured) == bool(cfg.eval.pairs)
    trained = {key: value for key, value in after.items() if key.startswith("params")}
    if cfg.lora:  # adapters alone; B was zero
        assert {key[-6:] for key in trained} == {"lora_a", "lora_b"}
        assert all(np.any(value) for value in trained.values())
    else:  # the model that was named, a little changed
        assert 0 < command.largest_difference(trained, command.arrays(Path(base), 1)) < 0.1
