"""Text files to training data: a tokenizer and one token store per source.

    python -m easylm_jax.prepare --config=configs/data/quickstart.py --out=DIR

writes

    DIR/tokenizer/       for `load_tokenizer`
    DIR/<source>/        a token store (`data/token_store.py`)
    DIR/prepare.json     the config and all counts

A config with `datasets` in place of `sources` makes fine-tuning data of conversations, which are
cleaned and deduplicated on the way: `prepare_chat.py`.

What it is not: a cleaner of the documents of `sources`. A stage that is finished is not done again;
one that was made with other settings is an error, never overwritten. Afterwards train with
`data.root=DIR`.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from absl import flags
from etils import epath
from ml_collections import config_flags
from tqdm import tqdm

from easylm_jax.config import from_config_dict, run_main
from easylm_jax.data.documents import BadLines, Document, match_files, read_documents
from easylm_jax.data.token_store import StoreInfo, read_info, write_store
from easylm_jax.loading import find_tokenizer
from easylm_jax.prepare_chat import ChatPrepareConfig, prepare_chat
from easylm_jax.prepare_chat import counts_table as chat_counts_table
from easylm_jax.text.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

TRAIN_TOKENIZER = "train"


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What to make training data from."""

    sources: dict[str, tuple[str, ...]]  # name -> globs of JSONL or text files, .gz or .zst too
    tokenizer: str = TRAIN_TOKENIZER  # "train", or what `find_tokenizer` takes
    vocab_size: int = 32_000  # of a trained tokenizer
    tokenizer_bytes: int = 100_000_000  # of text to train it on, the same from every source
    validation_fraction: float = 0.005  # of the documents
    text_field: str = "text"
    on_bad_line: BadLines = "error"


def prepare(cfg: PrepareConfig, out: str) -> dict[str, StoreInfo]:
    """Do what is not done yet; returns the counts per source."""
    tokenizer = make_tokenizer(cfg, out)
    infos = {name: build_source(cfg, out, name=name, tokenizer=tokenizer) for name in cfg.sources}
    report = {
        "config": dataclasses.asdict(cfg),
        "sources": {name: dataclasses.asdict(info) for name, info in infos.items()},
    }
    (epath.Path(out) / "prepare.json").write_text(json.dumps(report, indent=2))
    return infos


def make_tokenizer(cfg: PrepareConfig, out: str) -> Tokenizer:
    """The tokenizer in `out`, trained on the sources or copied there if it is not there yet."""
    folder = epath.Path(out) / "tokenizer"
    origin_file = folder / "origin"
    if cfg.tokenizer == TRAIN_TOKENIZER:
        tokenizer = None
        origin = _origin(
            [_files_digest(globs) for globs in cfg.sources.values()],
            (cfg.vocab_size, cfg.tokenizer_bytes, cfg.text_field, cfg.on_bad_line),
        )
    else:
        tokenizer = find_tokenizer(cfg.tokenizer)
        origin = tokenizer.fingerprint
    if origin_file.exists():
        found = load_tokenizer(str(folder))
        if origin not in (origin_file.read_text(), found.fingerprint):
            raise ValueError(
                f"{folder} holds a tokenizer made with other settings or text: choose another "
                "--out, or delete that folder to make it anew"
            )
        return found
    if tokenizer is None:
        print(f"tokenizer: training {cfg.vocab_size:,} pieces", flush=True)
        texts = iter(tqdm(_tokenizer_texts(cfg), desc="tokenizer: read", unit=" documents"))
        path = str(folder / "tokenizer.model")
        tokenizer = train_sentencepiece(texts, path, vocab_size=cfg.vocab_size)
    else:
        tokenizer.save(str(folder))
    origin_file.write_text(origin)  # last: marks the folder as finished
    return tokenizer


def build_source(cfg: PrepareConfig, out: str, *, name: str, tokenizer: Tokenizer) -> StoreInfo:
    """The token store of one source, unless it is there already."""
    folder = epath.Path(out) / name
    origin = _origin(
        _files_digest(cfg.sources[name]),
        (tokenizer.fingerprint, cfg.validation_fraction, cfg.text_field, cfg.on_bad_line),
    )
    if folder.exists():
        info = read_info(str(folder))
        if info.origin != origin:
            raise ValueError(
                f"{folder} was made with other settings or text: choose another --out, or delete "
                "that folder to make it anew"
            )
        print(f"{name}: already done")
        return info
    counts: Counter[str] = Counter()
    documents = iter(tqdm(_documents(cfg, name, counts), desc=f"{name}: read", unit=" documents"))
    bar = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(desc=f"{name}: tokenise", unit="B", unit_scale=True, total=total)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return write_store(
        documents,
        str(folder),
        tokenizer=tokenizer,
        validation_fraction=cfg.validation_fraction,
        origin=origin,
        left_out=counts,
        progress=progress,
    )


def counts_table(infos: dict[str, StoreInfo]) -> str:
    """One line per source and their sum."""
    heads = ("documents", "text MB", "tokens", "bytes/token", "held-out tokens", "left out")
    width = max(map(len, [*infos, "source"]))
    lines = [f"{'source':<{width}}" + "".join(f"{head:>17}" for head in heads)]
    total = Counter()
    for name, info in infos.items():
        counts = Counter(
            documents=sum(info.documents.values()),
            text_bytes=sum(info.text_bytes.values()),
            tokens=sum(info.tokens.values()),
            heldout=info.tokens["validation"],
            left_out=sum(info.left_out.values()),
        )
        total += counts
        lines.append(_table_line(name, counts, width))
        lines += [f"  left out: {count:,} {reason}" for reason, count in info.left_out.items()]
    return "\n".join([*lines, _table_line("all", total, width)])


def _table_line(name: str, counts: Counter[str], width: int) -> str:
    cells = (
        f"{counts['documents']:,}",
        f"{counts['text_bytes'] / 1e6:,.2f}",
        f"{counts['tokens']:,}",
        f"{counts['text_bytes'] / max(1, counts['tokens']):.2f}",
        f"{counts['heldout']:,}",
        f"{counts['left_out']:,}",
    )
    return f"{name:<{width}}" + "".join(f"{cell:>17}" for cell in cells)


def _documents(cfg: PrepareConfig, name: str, counts: Counter[str]) -> Iterator[Document]:
    return read_documents(
        cfg.sources[name],
        counts=counts,
        text_field=cfg.text_field,
        on_bad_line=cfg.on_bad_line,
    )


def _tokenizer_texts(cfg: PrepareConfig) -> Iterator[str]:
    """The first documents of every source, up to the same number of bytes each."""
    for name in cfg.sources:
        room = cfg.tokenizer_bytes / len(cfg.sources)
        for document in _documents(cfg, name, Counter()):
            if room <= 0:
                break
            yield document.text
            room -= len(document.text.encode())


def _files_digest(globs: tuple[str, ...]) -> list[tuple[str, int]]:
    """Name and size of every file: what changes when the text does, without reading it."""
    return [(file.name, file.stat().length) for file in match_files(globs)]


def _origin(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ValueError(f"unexpected argument {argv[1]!r}: write settings as --config.NAME=VALUE")
    config, out = flags.FLAGS.config, flags.FLAGS.out
    if "datasets" in config:
        reports = prepare_chat(from_config_dict(ChatPrepareConfig, config), out)
        print(chat_counts_table(reports))
        print(f"done: train with data.files=('{out}/*/train.jsonl',)")
    else:
        print(counts_table(prepare(from_config_dict(PrepareConfig, config), out)))
        print(f"done: train with data.root={out}")


if __name__ == "__main__":  # flags are defined here because the config file imports this module
    config_flags.DEFINE_config_file(
        "config", None, "What to prepare, documents or conversations: a file of configs/data/."
    )
    flags.DEFINE_string("out", None, "Folder to write to; starting again there continues.")
    flags.mark_flags_as_required(["config", "out"])
    run_main(main)
