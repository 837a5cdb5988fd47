"""`prepare` makes data that trains, counts what it made, and does nothing twice."""

import dataclasses
import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from configs.data import quickstart
from easylm_jax.config import as_config_dict, from_config_dict
from easylm_jax.data.source import DataConfig, heldout_batches, make_source
from easylm_jax.prepare import PrepareConfig, counts_table, prepare
from easylm_jax.text.tokenizer import load_tokenizer


def _write(path: Path, seed: int, count: int) -> None:
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 7))) for _ in range(300)]
    texts = [" ".join(rng.choices(words, k=rng.randint(5, 90))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, " "]))


@pytest.fixture
def cfg(tmp_path):
    for seed, name in enumerate(("a", "b")):
        _write(tmp_path / f"{name}.jsonl", seed, 80)
    return PrepareConfig(
        sources={name: (str(tmp_path / f"{name}.jsonl"),) for name in ("a", "b")},
        vocab_size=500,
        validation_fraction=0.2,
    )


def test_prepared_data_trains_and_its_counts_are_true(cfg, tmp_path):
    out = str(tmp_path / "out")
    infos = prepare(from_config_dict(PrepareConfig, as_config_dict(cfg)), out)
    tokenizer = load_tokenizer(f"{out}/tokenizer")
    shape = {"batch_size": 4, "seq_len": 32, "tokenizer": tokenizer, "rows": range(4)}
    batch, _ = make_source(DataConfig(root=out), **shape).next()
    assert batch.tokens.shape == (4, 32)
    sizes = tokenizer.token_bytes()
    for name, info in infos.items():
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines][:-1]
        assert sum(info.documents.values()) == len(texts) == 80
        assert sum(info.text_bytes.values()) == sum(len(text.encode()) for text in texts)
        ids = [i for text in texts for i in tokenizer.encode(text)]
        assert sum(info.tokens.values()) == len(ids) + 2 * len(texts)
        assert info.left_out == {"empty": 1}
        # Bits per byte can be had from held-out batches: their targets spell the text.
        heldout = heldout_batches(DataConfig(root=out), source=name, **shape)
        spelled = sum(int(np.sum(sizes[b.targets] * b.weights)) for b in heldout)
        assert spelled == info.text_bytes["validation"]
    report = json.loads((tmp_path / "out/prepare.json").read_text())
    assert report["sources"]["b"] == dataclasses.asdict(infos["b"])
    table = counts_table(infos)
    tokens = sum(sum(info.tokens.values()) for info in infos.values())
    assert re.search(rf"^all +160 .* {tokens:,} ", table, re.M)
    assert "left out: 1 empty" in table


def test_finished_stages_are_kept_and_missing_ones_made_again(cfg, tmp_path):
    out = tmp_path / "out"

    def snapshot():
        return {
            p: (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
            for p in out.rglob("*")
            if p.is_file() and p.name != "prepare.json"
        }

    infos = prepare(cfg, str(out))
    first = snapshot()
    assert prepare(cfg, str(out)) == infos
    assert snapshot() == first
    (out / "b").rename(tmp_path / "elsewhere")  # as if the run had stopped before b
    assert prepare(cfg, str(out)) == infos
    second = snapshot()
    kept = [path for path in first if "b" not in path.relative_to(out).parts]
    assert {path: second[path] for path in kept} == {path: first[path] for path in kept}


def test_other_settings_or_other_text_never_overwrite(cfg, tmp_path):
    out = str(tmp_path / "out")
    prepare(cfg, out)
    for change in ({"validation_fraction": 0.1}, {"vocab_size": 400}, {"tokenizer": "bytes"}):
        with pytest.raises(ValueError, match="made with other settings or text.*another --out"):
            prepare(dataclasses.replace(cfg, **change), out)
    _write(tmp_path / "b.jsonl", 7, 81)
    with pytest.raises(ValueError, match="made with other settings or text"):
        prepare(cfg, out)
    # With the tokenizer named, a source can be added to what is there.
    named = dataclasses.replace(
        cfg, tokenizer=f"{out}/tokenizer", sources={"c": (str(tmp_path / "b.jsonl"),)}
    )
    assert sum(prepare(named, out)["c"].documents.values()) == 81


def test_the_shipped_corpus_is_the_one_described():
    described = (quickstart.CORPUS / "PROVENANCE.md").read_text()
    cfg = from_config_dict(PrepareConfig, quickstart.get_config())
    for (path,) in cfg.sources.values():
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() in described


@pytest.mark.slow
def test_the_quickstart_corpus_prepares(tmp_path):
    infos = prepare(from_config_dict(PrepareConfig, quickstart.get_config()), str(tmp_path))
    assert sum(sum(info.documents.values()) for info in infos.values()) == 1494
    assert all(not info.left_out and info.tokens["validation"] > 5000 for info in infos.values())
    promised = float(re.search(r"([\d.]+) M tokens", quickstart.__doc__)[1])
    tokens = sum(sum(info.tokens.values()) for info in infos.values())
    assert tokens / 1e6 == pytest.approx(promised, abs=0.005)
