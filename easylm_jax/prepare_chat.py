"""Conversations of many layouts to clean fine-tuning data: the part of `prepare.py` for chat.

    DIR/<dataset>/train.jsonl, validation.jsonl    for the reader "messages"
    DIR/<dataset>/counts.json                      what every stage dropped and why
    DIR/counts.json                                the same of all, with the config

The stages, in this order: read, verdicts without the other answer, clean web pages, keywords,
languages, lengths, duplicates, near duplicates, evaluation prompts, `max_examples`, splitting of
what is long, sides. Which side a conversation is on follows from its first question alone, so no
first question is on both sides, in no two data sets. The pieces of a split one stay together: those
that begin with a question of the other side are left out and counted. A data set is held in memory
while it is prepared.

A finished data set is not done again; one that was made with other settings is an error. What it
is not: the stages themselves (`data/cleaning.py`, `dedup.py`, `decontaminate.py`).
"""

import dataclasses
import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from etils import epath
from tqdm import tqdm

from easylm_jax.data import cleaning, decontaminate, dedup
from easylm_jax.data.cleaning import Group
from easylm_jax.data.conversation import Conversation, message_text, prompt_key, to_json
from easylm_jax.data.documents import BadLines, match_files
from easylm_jax.data.readers import read_conversations
from easylm_jax.data.rows import stable_hash
from easylm_jax.loading import find_tokenizer

Stage = Callable[[Iterable[Group], Counter[str]], Iterator[Group]]
SIDES = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """One data set: where it is and what is done to it."""

    reader: str  # of data/readers.py
    files: tuple[str, ...]  # globs
    max_examples: int | None = None  # of those that are left, chosen by their hash
    web_pages: bool = False  # HTML, buttons and error pages, as in ShareGPT
    forbidden: tuple[str, ...] = ()  # drop what holds one of these in any turn, in any case
    keep_languages: tuple[str, ...] = ()  # such as ("en",); empty: all
    min_characters: int = 0  # of the whole conversation
    max_characters: int | None = None
    duplicates: dedup.Same = "conversation"  # same "question", "exchange"; "": keep them
    near_duplicates: float = 0.0  # drop from this similarity of words on, such as 0.8; 0: keep

    def __post_init__(self) -> None:
        least = dedup.LEAST_SIMILARITY
        _demand(
            self.near_duplicates == 0 or least <= self.near_duplicates <= 1,
            f"near_duplicates is {self.near_duplicates}: expected {least} to 1, or 0 to keep them",
        )
        _demand(
            self.max_examples is None or self.max_examples >= 1,
            f"max_examples is {self.max_examples}: expected at least 1, or None to take all",
        )


@dataclasses.dataclass(frozen=True)
class ChatPrepareConfig:
    """What to make fine-tuning data from."""

    datasets: dict[str, DatasetConfig]
    decontaminate: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    ngram: int = 13  # words that must agree with a prompt of `decontaminate`
    tokenizer: str = ""  # what `find_tokenizer` takes; needed for max_tokens
    max_tokens: int | None = None  # split longer conversations between turns
    validation_fraction: float = 0.01  # of first questions
    on_bad_line: BadLines = "error"

    def __post_init__(self) -> None:
        _demand(
            self.max_tokens is None or self.max_tokens >= 1,
            f"max_tokens is {self.max_tokens}: expected at least 1, or None not to split",
        )
        _demand(
            self.max_tokens is None or bool(self.tokenizer),
            "max_tokens counts tokens: name the tokenizer as well",
        )
        _demand(self.ngram >= 1, f"ngram is {self.ngram}: expected a number of words, at least 1")
        _demand(
            0 <= self.validation_fraction < 1,
            f"validation_fraction is {self.validation_fraction}: expected 0 or more and under 1",
        )


def _demand(met: bool, sentence: str) -> None:
    if not met:
        raise ValueError(sentence)


def prepare_chat(cfg: ChatPrepareConfig, out: str) -> dict[str, dict[str, Any]]:
    """Do what is not done yet; returns the counts per data set."""
    if not cfg.datasets:
        raise ValueError(
            "datasets is empty: expected at least one; if the config printed which files it looked "
            "for, put some of them there"
        )
    prompts = {name: decontaminate.read_prompts(globs) for name, globs in cfg.decontaminate.items()}
    index = decontaminate.index_prompts(prompts, ngram=cfg.ngram)
    tokenizer = find_tokenizer(cfg.tokenizer) if cfg.max_tokens else None
    reports = {}
    for name, dataset in cfg.datasets.items():
        origin = f"{stable_hash(*_origin(cfg, dataset), tokenizer and tokenizer.fingerprint):016x}"
        if report := _read_report(epath.Path(out) / name, origin):
            print(f"{name}: already done")
        else:
            lost_turns: Counter[str] = Counter()
            hits: dict[str, dict[str, list[str]]] = {}
            stages = _stages(dataset, index=index, hits=hits)
            if tokenizer:
                stages["split long"] = functools.partial(
                    cleaning.split_long,
                    max_tokens=cfg.max_tokens,
                    count_tokens=lambda text: len(tokenizer.encode(text)),
                    lost_turns=lost_turns,
                )
            stages["sides"] = functools.partial(
                _keep_one_side,
                validation_fraction=cfg.validation_fraction,
                lost_turns=lost_turns,
            )
            report = {"origin": origin, "lost_turns": lost_turns, "contamination": hits}
            groups = _run_stages(cfg, name, stages, report)
            _write(epath.Path(out) / name, groups, cfg.validation_fraction, report)
        reports[name] = report
    everything = {"config": dataclasses.asdict(cfg), "datasets": reports}
    (epath.Path(out) / "counts.json").write_text(json.dumps(everything, indent=2))
    return reports


def _stages(
    dataset: DatasetConfig,
    *,
    index: decontaminate.PromptIndex,
    hits: dict[str, dict[str, list[str]]],
) -> dict[str, Stage]:
    """The stages that the settings ask for, by name and in order."""
    asked = {
        "verdicts": cleaning.drop_lone_verdicts,
        "web pages": dataset.web_pages and cleaning.clean_web_pages,
        "forbidden": dataset.forbidden
        and functools.partial(cleaning.drop_forbidden, words=dataset.forbidden),
        "languages": dataset.keep_languages
        and functools.partial(cleaning.drop_other_languages, keep=dataset.keep_languages),
        "lengths": functools.partial(
            cleaning.drop_by_length,
            min_characters=dataset.min_characters,
            max_characters=dataset.max_characters,
        ),
        "duplicates": dataset.duplicates
        and functools.partial(dedup.drop_duplicates, same=dataset.duplicates),
        "near duplicates": dataset.near_duplicates
        and functools.partial(dedup.drop_near_duplicates, threshold=dataset.near_duplicates),
        "evaluation prompts": (index.runs or index.short)
        and functools.partial(decontaminate.drop_contaminated, index=index, hits=hits),
        "max_examples": functools.partial(_shuffle_and_limit, limit=dataset.max_examples),
    }
    return {name: stage for name, stage in asked.items() if stage}


def _run_stages(
    cfg: ChatPrepareConfig, name: str, stages: dict[str, Stage], report: dict[str, Any]
) -> list[Group]:
    """The groups that are left; `report` gains the counts, and the speed of every stage."""
    dataset = cfg.datasets[name]
    left_out: Counter[str] = Counter()
    conversations = read_conversations(
        dataset.files,
        reader=dataset.reader,
        source=name,
        counts=left_out,
        on_bad_line=cfg.on_bad_line,
    )
    started = time.perf_counter()
    groups = cleaning.group_answers(
        iter(tqdm(conversations, desc=f"{name}: read", unit=" conversations"))
    )
    report |= {
        "left_out_by_reader": left_out,
        "read": sum(map(len, groups)),
        "read_mb": _megabytes(groups),
        "stages": {"read": _speed(groups, started)},
        "dropped": {},
    }
    for stage_name, stage in stages.items():
        dropped: Counter[str] = Counter()
        before, started = groups, time.perf_counter()
        bar = tqdm(before, desc=f"{name}: {stage_name}", unit=" groups", leave=False)
        groups = list(stage(iter(bar), dropped))
        report["stages"][stage_name] = _speed(before, started)
        report["dropped"] |= dropped
    report["kept"] = report["read"] - sum(report["dropped"].values())
    report["written"] = sum(map(len, groups))  # more than kept where long ones were split
    seconds = sum(stage["seconds"] for stage in report["stages"].values())
    report["mb_per_second"] = round(report["read_mb"] / max(seconds, 1e-9), 2)
    return groups


def _shuffle_and_limit(
    groups: Iterable[Group], counts: Counter[str], *, limit: int | None
) -> Iterator[Group]:
    """In the order of their hashes, up to `limit` conversations."""
    room = limit
    for group in sorted(groups, key=lambda group: stable_hash(*(c.id for c in group))):
        if room is not None and len(group) > room:
            counts["beyond max_examples"] += len(group)
            continue
        room = None if room is None else room - len(group)
        yield group


def _side(conversation: Conversation, validation_fraction: float) -> str:
    key = prompt_key(conversation)
    return SIDES[int(key, 16) / 16 ** len(key) < validation_fraction]


def _keep_one_side(
    groups: Iterable[Group],
    counts: Counter[str],
    *,
    validation_fraction: float,
    lost_turns: Counter[str],
) -> Iterator[Group]:
    """Every group without the pieces that are on another side than the first.

    Compared answers to questions on both sides go, since none of them is of use alone.
    """
    for group in groups:
        sides = [_side(conversation, validation_fraction) for conversation in group]
        own = tuple(c for c, side in zip(group, sides, strict=True) if side == sides[0])
        if len(own) < len(group) and group[0].pair:
            counts["questions on both sides"] += len(group)
            continue
        turns_left = sum(m["role"] == "user" for c in own for m in c.messages)
        if lost := sum(m["role"] == "user" for c in group for m in c.messages) - turns_left:
            lost_turns["turns on the other side of the split"] += lost
        yield own


def _write(
    folder: epath.Path, groups: Sequence[Group], validation_fraction: float, report: dict[str, Any]
) -> None:
    """The folder of one data set, whole or not at all."""
    lines: dict[str, list[str]] = {side: [] for side in SIDES}
    for group in groups:
        lines[_side(group[0], validation_fraction)] += (
            json.dumps(to_json(c), ensure_ascii=False) for c in group
        )
    partial = folder.with_name(f"{folder.name}.partial")
    partial.rmtree(missing_ok=True)
    partial.mkdir(parents=True)
    for side in SIDES:
        report[side] = len(lines[side])
        (partial / f"{side}.jsonl").write_text("".join(line + "\n" for line in lines[side]))
    (partial / "counts.json").write_text(json.dumps(report, indent=2))
    partial.rename(folder)


def counts_table(reports: dict[str, dict[str, Any]]) -> str:
    """One line per data set and their sum, under each what was dropped and why."""
    names = ("read", "dropped", "kept", "written", "train", "validation")
    width = max(map(len, [*reports, "data set"]))
    heads = (*names, "read MB", "MB/s")
    lines = [f"{'data set':<{width}}" + "".join(f"{head:>12}" for head in heads)]
    total: Counter[str] = Counter()
    for name, report in reports.items():
        row = Counter({key: report[key] for key in names if key != "dropped"})
        row["dropped"] = sum(report["dropped"].values())
        total += row
        cells = [f"{row[key]:,}" for key in names]
        cells += [f"{report['read_mb']:,.2f}", f"{report['mb_per_second']:,.1f}"]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
        for said, counts in (
            ("left out by the reader", report["left_out_by_reader"]),
            ("dropped", report["dropped"]),
            ("lost", report["lost_turns"]),
        ):
            lines += [f"  {said}: {count:,} {reason}" for reason, count in counts.items()]
        for evaluation, found in report["contamination"].items():
            lines.append(f"  found: {len(found):,} prompts of {evaluation}")
    lines.append(f"{'all':<{width}}" + "".join(f"{total[key]:>12,}" for key in names))
    return "\n".join(lines)


def _read_report(folder: epath.Path, origin: str) -> dict[str, Any] | None:
    """The counts of a finished data set, None if there is none yet."""
    if not folder.exists():
        return None
    file = folder / "counts.json"
    report = json.loads(file.read_text()) if file.exists() else {"origin": ""}
    if report["origin"] != origin:
        raise ValueError(
            f"{folder} was made with other settings or files: choose another --out, or delete that "
            "folder to make it anew"
        )
    return report


def _origin(cfg: ChatPrepareConfig, dataset: DatasetConfig) -> tuple[Any, ...]:
    """What a data set depends on; files by name and size, as whoever reads them all would say."""

    def files(globs: Sequence[str]) -> list[tuple[str, int]]:
        return [(file.name, file.stat().length) for file in match_files(globs)]

    return (
        dataclasses.replace(dataset, files=()),
        files(dataset.files),
        [(name, files(globs)) for name, globs in cfg.decontaminate.items()],
        (cfg.ngram, cfg.max_tokens, cfg.validation_fraction, cfg.on_bad_line),
    )


def _megabytes(groups: Iterable[Group]) -> float:
    """UTF-8 text of all messages."""
    return sum(len(message_text(m).encode()) for g in groups for c in g for m in c.messages) / 1e6


def _speed(groups: Sequence[Group], started: float) -> dict[str, float]:
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 4),
        "mb_per_second": round(_megabytes(groups) / max(seconds, 1e-9), 2),
    }
