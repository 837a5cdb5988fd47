"""What inspect_data shows is what the run trains on, marked where it has loss, and harmless."""

import html.parser
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from easylm_jax.data import token_store
from easylm_jax.data.documents import Document
from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.data.packing import Piece
from easylm_jax.data.source import DataConfig
from easylm_jax.inspect_data import as_html, as_text, inspect, measure, tokens, visible
from easylm_jax.optim import OptimConfig
from easylm_jax.text.fields import FieldsConfig
from easylm_jax.text.tokenizer import ByteTokenizer, train_sentencepiece
from easylm_jax.train import TrainConfig
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[1]
EVIL = "<script>alert(1)</script> </s> &amp; {{7*7}} \x1b[31mred\r\u202eback\x9b é🦊\ttab\nline"
HARMLESS = (
    "<script>alert(1)</script> </s> &amp; {{7*7}} ⟨U+001B⟩[31mred⟨U+000D⟩⟨U+202E⟩back⟨U+009B⟩ "
    "é🦊⇥\ttab↵\nline"
)
CONFIG = """
from easylm_jax.config import as_config_dict
from tests.inspect_data_test import run_config
def get_config(file):
    return as_config_dict(run_config(file))
"""


def run_config(file="", *, weighting="token", **data) -> TrainConfig:
    """A run on conversations; `data` in their place."""
    chat = ChatConfig("koala", judged=("good", "bad"), conditional=True, weighting=weighting)
    data = data or dict(files=(str(file),), heldout_files=(str(file),), chat=chat)
    return TrainConfig(
        model=tiny_config(vocab_size=304),
        tokenizer="bytes",
        data=DataConfig(**data),
        duration="1 steps",
        batch_size=4,
        seq_len=600,
        optim=OptimConfig(lr=1e-3),
    )


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    rng, path = random.Random(0), tmp_path_factory.mktemp("data") / "chat.jsonl"
    lines = []
    for number in range(12):
        answer = f"answer {number} " + "".join(rng.choices("abc é\n", k=rng.randint(1, 90))) + "."
        turns = [{"role": "user", "content": EVIL}, {"role": "assistant", "content": answer}]
        known = {
            "id": f"<i>{number}\x1b[0m",
            "source": "demo",
            "quality": ("good", "bad")[number % 2],
        }
        lines.append(json.dumps(known | {"messages": turns * (1 + number // 8)}))
    long = [{"role": "user", "content": "q" * 600}, {"role": "assistant", "content": "a"}]
    lines.append(json.dumps({"messages": long}))
    path.write_text("\n".join(lines))
    return path


def _look(cfg, *, n=100, seed=0, split="train", packed=False):
    return inspect(cfg, n=n, seed=seed, split=split, packed=packed)


def _conversations(path):
    return [json.loads(line) for line in path.read_text().split("\n")][:-1]


def _expected(conversation) -> str:
    """What the terminal shows of it, brackets around what has loss."""
    marker = {"good": "GPT:", "bad": "An Unhelpful Answer:"}[conversation["quality"]]
    text, last = "⟨<s>⟩BEGINNING OF CONVERSATION: ", len(conversation["messages"]) - 2
    for i in range(0, last + 1, 2):
        answer = conversation["messages"][i + 1]["content"].replace("\n", "↵\n")
        text += f"USER: {HARMLESS} {marker if i == last else 'GPT:'}⟦{answer}⟨</s>⟩⟧"
    return text


def test_the_text_is_every_example_with_its_loss_in_brackets(chats):
    page = _look(run_config(chats))
    text = as_text(page, colour=False)
    for number, conversation in enumerate(_conversations(chats)):
        expected = _expected(conversation)
        tokens_with_loss = sum(
            len(m["content"].encode()) + 1
            for m in conversation["messages"]
            if m["role"] == "assistant"
        )
        ids = int(re.search(rf"<i>{number}⟨U\+001B⟩\[0m · demo · \w+\n +(\d+) tokens", text)[1])
        assert f"{ids} tokens, {tokens_with_loss} with loss\n\n{expected}\n" in text
        assert ids == sum(len(run.tokens) for run in page.items[number].passages[0].runs)
    assert re.search("^left out +1 too long$", text, re.MULTILINE)
    assert re.search("^template +koala, hash [0-9a-f]{16}$", text, re.MULTILINE)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text.replace("⇥\t", ""))

    weighed = as_text(_look(run_config(chats, weighting="example")), colour=False)
    answer = _conversations(chats)[0]["messages"][1]["content"]
    share = 1 / (len(answer.encode()) + 1)
    assert f"⟦×{share:.3g} answer 0 " in weighed


def test_colours_say_the_same_as_brackets(chats):
    page = _look(run_config(chats), n=3)
    coloured, plain = (as_text(page, colour=colour) for colour in (True, False))
    stripped = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert stripped == re.sub("[⟦⟧]", "", plain)
    green = "".join(re.findall(r"\x1b\[(?:1;7;)?38;5;(?:34|77)m(.*?)\x1b\[0m", coloured, re.DOTALL))
    assert green == "".join(re.findall("⟦(.*?)⟧", plain, re.DOTALL))


def test_the_seed_draws_and_n_counts(chats):
    cfg = run_config(chats)
    drawn = [[item.title for item in _look(cfg, n=4, seed=seed).items] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 4


class _Text(html.parser.HTMLParser):
    """Texts by the class of the run they are in, and names of elements."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.in_text, self.run, self.texts = set(), False, "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.in_text |= (tag, dict(attrs).get("class")) == ("p", "text")
        self.run = dict(attrs)["class"] if tag == "b" else self.run

    def handle_endtag(self, tag):
        self.in_text &= tag != "p"

    def handle_data(self, data):
        if self.in_text:
            self.texts.append({"one": f"⟦{data}⟧", "none": data}[self.run])


def test_the_page_says_the_same_and_runs_nothing(chats):
    page = _look(run_config(chats))
    written = as_html(page)
    found = _Text(written)
    shown = "".join(found.texts).replace("⟧⟦", "")
    assert shown == "".join(map(_expected, _conversations(chats)))
    assert not found.tags & {"script", "img", "link", "iframe", "i"}
    assert "default-src 'none'" in written and "&lt;i&gt;0" in written
    assert "49" not in shown


@pytest.mark.parametrize("packing", ["best_fit", "stream"])
def test_packed_rows_are_the_same_examples(chats, packing):
    chat = ChatConfig("koala", judged=("good", "bad"), conditional=True)
    cfg = run_config(files=(str(chats),), chat=chat, packing=packing, window=1)
    alone = [item.passages[0].runs for item in _look(cfg).items]
    rows = _look(cfg, packed=True).items
    assert len(rows) == 4 and max(len(row.passages) for row in rows) > 1
    for row in rows:
        whole = row.passages if packing == "best_fit" else row.passages[1:-1]
        assert all(passage.runs in alone for passage in whole)
        for number, passage in enumerate(whole, start=1 + (packing == "stream")):
            count = sum(len(run.tokens) for run in passage.runs)
            assert passage.heading == f"segment {number}, positions 0 to {count - 2}"


def test_prepared_data_and_held_out_text(tmp_path):
    texts = ["".join(random.Random(i).choices("abcdef", k=50)) for i in range(60)]
    documents = [Document(text, {}) for text in texts]
    token_store.write_store(
        documents,
        str(tmp_path / "books"),
        tokenizer=ByteTokenizer(),
        validation_fraction=0.3,
        block_tokens=100,
    )
    for split in ("train", "heldout"):
        page = _look(run_config(root=str(tmp_path)), split=split)
        shown = as_text(page, colour=False)
        inner = re.findall("⟨<s>⟩⟦([a-f]+)⟨</s>⟩⟧", shown)
        assert len(inner) > 5 and set(inner) <= set(texts)
        inside = [passage for item in page.items for passage in item.passages[:-1]]
        assert {passage.runs[-1].tokens[-1].text for passage in inside} == {"⟨</s>⟩"}

    files = tmp_path / "x.jsonl"
    files.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents = as_text(_look(run_config(files=(str(files),)), n=2), colour=False)
    assert len(re.findall(r"── document \d+\n   52 tokens, 51 with loss", documents)) == 2
    fields = run_config(files=(str(files),), fields=FieldsConfig("[text],text"))
    assert f"⟨<s>⟩{texts[0]}⟦{texts[0]}⟨</s>⟩⟧" in as_text(_look(fields), colour=False)
    with pytest.raises(ValueError, match="--split=heldout has nothing to show: set data.heldout_"):
        _look(fields, split="heldout")


def test_numbers_by_hand():
    def piece(length, with_loss):
        weights = (np.arange(length) >= length - with_loss).astype(np.float32)
        return Piece(np.arange(length, dtype=np.int32), weights)

    cfg = run_config(files=("x",))
    pieces = [piece(501, 100), piece(401, 1), piece(101, 101), piece(201, 0), piece(1201, 5)]
    facts = dict(measure(pieces, cfg))
    assert facts["examples"] == "5"
    assert facts["tokens"] == f"2,405, of which {206 / 2405:.1%} have loss"
    assert facts["lengths"].startswith("101 (least)") and "401 (median)" in facts["lengths"]
    assert dict(measure([piece(2, 2)], cfg))["tokens"] == "2, of which 50.0% have loss"
    # 500 + 100, 400 + 200 and two rows of the longest; alone six rows.
    assert facts["rows of 600"].startswith("4 by packing=best_fit, 100.0% not padding; 6 with")
    assert facts["rows of 600"].endswith(f"{2400 / 3600:.1%}")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_no_character_is_lost_between_tokens(kind, tmp_path):
    tokenizer = ByteTokenizer()
    if kind == "sentencepiece":
        words = ["the cat sat on the mat"] * 50
        tokenizer = train_sentencepiece(words, str(tmp_path / "a.model"), vocab_size=280)
    rng = np.random.default_rng(0)
    text = "".join(map(chr, rng.choice([*range(32, 127), 10, 233, 8364, 0x1F98A], size=300)))
    ids = tokenizer.encode(text)
    shown = [token.text for token in tokens([tokenizer.bos_id, *ids, tokenizer.eos_id], tokenizer)]
    assert (shown[0], shown[-1]) == ("⟨<s>⟩", "⟨</s>⟩")
    assert "".join(shown[1:-1]) == visible(tokenizer.decode(ids, continuation=True))
    cut = [token.text for token in tokens([*tokenizer.encode("é")[-2:-1], 2, 2], tokenizer)]
    assert cut == ["\ufffd", "⟨</s>⟩", "⟨</s>⟩"]  # half a character ends where a special stands


@pytest.mark.slow  # starts an interpreter
def test_command_line(chats, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG)

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "easylm_jax.inspect_data", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    page = tmp_path / "page.html"
    done = run(f"--config={config}:{chats}", "--n=2", "--seed=3", f"--html={page}")
    shown = inspect(run_config(chats), n=2, seed=3, split="train", packed=False)
    assert (done.stdout, done.returncode) == (as_text(shown, colour=False), 0), done.stderr
    assert page.read_text() == as_html(shown)
    failed = run(f"--config={config}:{chats}", "--config.data.chat.template=kaola")
    assert failed.returncode == 2 and re.fullmatch("error: .*koala.*\n", failed.stderr)
