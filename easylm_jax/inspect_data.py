"""See what a run trains on: `python -m easylm_jax.inspect_data --config=configs/X.py`

Shows --n examples, drawn by --seed, token by token: grey has no loss, green has, blue has another
weight, which is written before it; where the output is no terminal, what has loss stands between
⟦ and ⟧. Above them stand the template, what was left out, lengths, and what packing saves.
--packed shows rows of the first batch instead, as the model gets them (so does a prepared
`data.root`, in which examples are not kept apart). --html=FILE writes the same as a page.

What it is not: a second way to read data. It calls what `train.py` calls. All text in the data is
untrusted: control characters are made visible, jinja2 escapes the rest, the page runs no script.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Literal, NamedTuple

import jinja2
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Float, Int
from ml_collections import config_flags

from easylm_jax.batch import Batch
from easylm_jax.config import from_config_dict, run_main
from easylm_jax.data.finetuning import Encoded
from easylm_jax.data.packing import Piece, pack_all
from easylm_jax.data.source import heldout_batches, make_source, open_examples
from easylm_jax.loading import find_tokenizer, training_template
from easylm_jax.text.stream import TextStream
from easylm_jax.text.template import ChatTemplate
from easylm_jax.text.tokenizer import Tokenizer
from easylm_jax.train import TrainConfig

Split = Literal["train", "heldout"]


class Token(NamedTuple):
    id: int
    text: str  # as it is shown; empty where a character ends in a later token
    is_special: bool


class Run(NamedTuple):
    """Neighbours of equal loss weight."""

    weight: float
    tokens: list[Token]


class Passage(NamedTuple):
    heading: str
    runs: list[Run]


class Item(NamedTuple):
    """An example, which is one passage, or a packed row with one for every segment."""

    title: str
    facts: str
    passages: list[Passage]


class Page(NamedTuple):
    name: str
    facts: list[tuple[str, str]]
    items: list[Item]


def inspect(cfg: TrainConfig, *, n: int, seed: int, split: Split, packed: bool) -> Page:
    """What there is to show of the data of `cfg`."""
    files = cfg.data.files if split == "train" else cfg.data.heldout_files
    if not (cfg.data.root or files):
        name = "data.files" if split == "train" else "data.heldout_files"
        raise ValueError(f"--split={split} has nothing to show: set {name}, or data.root")
    tokenizer = find_tokenizer(cfg.tokenizer)
    template = training_template(cfg.data.chat, cfg.tokenizer, tokenizer)
    rng = np.random.default_rng(seed)
    facts = [
        ("data", f"{cfg.data.root or ', '.join(files)} ({split})"),
        ("template", f"{template.name}, hash {template.hash}" if template else _no_template(cfg)),
        ("tokenizer", f"{tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint[:12]}"),
    ]
    items: list[Item] = []
    if not cfg.data.root:
        examples = open_examples(cfg.data, files, tokenizer, seq_len=cfg.seq_len, template=template)
        pieces = [Piece(*example) for example in examples]
        facts.append(("left out", _counted(examples.counts)))
        facts += measure(pieces, cfg)
        for i in _draw(rng, len(pieces), n):
            meta = examples.meta[i] if isinstance(examples, Encoded) else {}
            items.append(_example_item(pieces[i], {"id": f"document {i + 1}"} | meta, tokenizer))
    if packed or cfg.data.root:
        batch = _first_batch(cfg, split, tokenizer, template)
        rows = np.flatnonzero(batch.segment_ids.any(axis=1)).tolist()
        items = [_row_item(batch, rows[i], tokenizer) for i in _draw(rng, len(rows), n)]
    return Page("Training data" if split == "train" else "Held-out data", facts, items)


def measure(pieces: Sequence[Piece], cfg: TrainConfig) -> list[tuple[str, str]]:
    """Numbers of examples and tokens, their lengths, and what of the rows is not padding."""
    lengths = np.array([len(piece.ids) for piece in pieces])
    with_loss = sum(int((piece.weights[1:] > 0).sum()) for piece in pieces)
    named = {"least": 0, "10 %": 10, "median": 50, "90 %": 90, "99 %": 99, "most": 100}
    percentiles = np.percentile(lengths, list(named.values()), method="inverted_cdf")
    pairs = int((lengths - 1).sum())
    packed = len(pack_all(iter(pieces), strategy=cfg.data.packing, seq_len=cfg.seq_len))
    alone = len(pack_all(iter(pieces), strategy="padded", seq_len=cfg.seq_len))
    efficiency, without = (pairs / (rows * cfg.seq_len) for rows in (packed, alone))
    return [
        ("examples", f"{len(pieces):,}"),
        ("tokens", f"{lengths.sum():,}, of which {with_loss / lengths.sum():.1%} have loss"),
        ("lengths", ", ".join(f"{x:,} ({of})" for of, x in zip(named, percentiles, strict=True))),
        (
            f"rows of {cfg.seq_len:,}",
            f"{packed:,} by packing={cfg.data.packing}, {efficiency:.1%} not padding; "
            f"{alone:,} with one example each, {without:.1%}",
        ),
    ]


def _no_template(cfg: TrainConfig) -> str:
    return f"none; data.fields = {cfg.data.fields.fields!r}" if cfg.data.fields else "none"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count) or "none"


def _draw(rng: np.random.Generator, total: int, n: int) -> list[int]:
    return sorted(rng.choice(total, size=min(n, total), replace=False).tolist())


def _first_batch(
    cfg: TrainConfig, split: Split, tokenizer: Tokenizer, template: ChatTemplate | None
) -> Batch:
    shape = dict(batch_size=cfg.batch_size, seq_len=cfg.seq_len, rows=range(cfg.batch_size))
    shape |= dict(tokenizer=tokenizer, template=template)
    if split == "train":
        return make_source(cfg.data, **shape).next()[0]
    return next(heldout_batches(cfg.data, **shape, max_batches=1))


def _example_item(piece: Piece, meta: dict[str, str], tokenizer: Tokenizer) -> Item:
    known = [meta["id"], *(meta.get(key, "") for key in ("source", "quality"))]
    passage = Passage("", runs(piece.ids, piece.weights, tokenizer))
    with_loss = (piece.weights[1:] > 0).sum()
    facts = f"{len(piece.ids):,} tokens, {with_loss:,} with loss"
    return Item(visible(" · ".join(filter(None, known))).replace("\n", ""), facts, [passage])


def _row_item(batch: Batch, row: int, tokenizer: Tokenizer) -> Item:
    """A row of the batch; what its last token of a segment is to predict is shown with it."""
    segments, passages = batch.segment_ids[row], []
    for segment in range(1, segments.max() + 1):
        (where,) = np.nonzero(segments == segment)
        targets, weights = batch.targets[row, where], batch.weights[row, where]
        after = where[-1] + 1
        begins_next = after < len(segments) and targets[-1] == batch.tokens[row, after]
        if begins_next and not weights[-1]:  # a row of a stream, where BOS follows EOS
            targets, weights = targets[:-1], weights[:-1]
        first = batch.positions[row, where[0]]
        passages.append(
            Passage(
                f"segment {segment}, positions {first} to {first + len(where) - 1}",
                runs(
                    np.append(batch.tokens[row, where[0]], targets),
                    np.append(np.float32(0), weights),
                    tokenizer,
                ),
            )
        )
    facts = f"{(segments > 0).sum():,} of {len(segments):,} tokens are not padding, "
    facts += f"{(batch.weights[row] > 0).sum():,} targets have loss"
    return Item(f"row {row} of the first batch", facts, passages)


# ---- tokens -------------------------------------------------------------------------------------


def runs(
    ids: Int[np.ndarray, " n"], weights: Float[np.ndarray, " n"], tokenizer: Tokenizer
) -> list[Run]:
    """Tokens as they are shown, by their weights as targets; the first is none, so has none."""
    weighted = zip([0.0, *weights[1:].tolist()], tokens(ids.tolist(), tokenizer), strict=True)
    groups = itertools.groupby(weighted, key=lambda pair: pair[0])
    return [Run(weight, [token for _, token in group]) for weight, group in groups]


def tokens(ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[Token]:
    """A character that several tokens spell is shown with the last of them."""
    names = {i: name for name, i in tokenizer.specials().items()}
    stream = TextStream(tokenizer, continuation=True)
    for i, after in itertools.zip_longest(ids, ids[1:]):
        if not tokenizer.pieces[i]:
            yield Token(i, visible(f"⟨{names.get(i, i)}⟩"), True)
            continue
        text = stream.push([i])
        if after is None or not tokenizer.pieces[after]:  # no character goes on there
            text += stream.close()
            stream = TextStream(tokenizer, continuation=True)
        yield Token(i, visible(text), False)


_REORDERING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)
_CODES = (*range(32), *range(0x7F, 0xA0), *_REORDERING)
_SHOWN = {code: f"⟨U+{code:04X}⟩" for code in _CODES} | {ord("\n"): "↵\n", ord("\t"): "⇥\t"}


def visible(text: str) -> str:
    """Nothing in it moves a cursor, changes a colour or reorders what is shown."""
    return text.translate(_SHOWN)


# ---- as text and as a page ----------------------------------------------------------------------

BOLD, PLAIN = "\033[1m", "\033[0m"
# Of 256 colours, for tokens in turn, so that their borders are seen: no loss, weight 1, others.
SHADES = {"none": (245, 248), "one": (34, 77), "other": (33, 75)}


def kind(weight: float) -> str:
    return {0.0: "none", 1.0: "one"}.get(weight, "other")


def as_text(page: Page, *, colour: bool) -> str:
    """For a terminal in colours, or without any."""
    bold, plain = (BOLD, PLAIN) if colour else ("", "")
    width = max(len(name) for name, _ in page.facts)
    lines = [f"{bold}{name:{width}s}{plain}  {value}" for name, value in page.facts]
    for item in page.items:
        lines += ["", f"{bold}── {item.title}{plain}", f"   {item.facts}"]
        for passage in item.passages:
            lines += ["", f"   {passage.heading}"] if passage.heading else [""]
            lines.append("".join(map(_coloured if colour else _bracketed, passage.runs)))
    return "\n".join(lines) + "\n"


def _coloured(run: Run) -> str:
    texts = [f"\033[2m×{run.weight:.3g}{PLAIN}"] if kind(run.weight) == "other" else []
    for token, shade in zip(run.tokens, itertools.cycle(SHADES[kind(run.weight)])):
        style = "1;7;" if token.is_special else ""
        texts.append(f"\033[{style}38;5;{shade}m{token.text}{PLAIN}")
    return "".join(texts)


def _bracketed(run: Run) -> str:
    text = "".join(token.text for token in run.tokens)
    shapes = {"none": text, "one": f"⟦{text}⟧", "other": f"⟦×{run.weight:.3g} {text}⟧"}
    return shapes[kind(run.weight)]


def as_html(page: Page) -> str:
    """One page that needs nothing else."""
    source = (resources.files("easylm_jax") / "inspect_data.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(page=page, kind=kind)


def main(argv: list[str]) -> None:
    """The command line."""
    options = flags.FLAGS
    if options.config is None or len(argv) > 1:
        raise ValueError(
            "--config is needed and no argument without a name, such as `python -m "
            "easylm_jax.inspect_data --config=configs/alpaca.py --n=3`; --help says more"
        )
    page = inspect(
        from_config_dict(TrainConfig, options.config),
        n=options.n,
        seed=options.seed,
        split=options.split,
        packed=options.packed,
    )
    if options.html:
        epath.Path(options.html).write_bytes(as_html(page).encode("utf-8", "replace"))
    print(as_text(page, colour=sys.stdout.isatty()), end="")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "As of train.py, --config.KEY=VALUE as well.")
    flags.DEFINE_integer("n", 5, "How many examples, or rows.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Another draws others.")
    flags.DEFINE_string("html", "", "Write a page to this file as well.")
    flags.DEFINE_enum("split", "train", ["train", "heldout"], "Which of the data.")
    flags.DEFINE_bool("packed", False, "Rows of the first batch in place of examples.")
    run_main(main)
