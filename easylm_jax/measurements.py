"""What a run measures of its model as it trains: held-out loss, preferences, tasks, samples.

What it is not: an evaluator (`evals/` has them). Called by `train.py` before the first step, every
so often, and after the last.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax

from easylm_jax.array_types import Params
from easylm_jax.batch import Batch
from easylm_jax.data.source import DataConfig, heldout_batches, heldout_pairs
from easylm_jax.evals.perplexity import evaluate, make_eval_sums
from easylm_jax.evals.preference import (
    make_answer_losses,
    pair_metrics,
    prepare_pairs,
    score_pairs,
)
from easylm_jax.evals.results import summarise
from easylm_jax.evals.runner import run_items
from easylm_jax.evals.samples import sample_texts
from easylm_jax.evals.task import Item, Task, find_task, make_items
from easylm_jax.language_model import LanguageModel
from easylm_jax.models.llama import LlamaConfig, make_forward
from easylm_jax.text.example import encode_segment
from easylm_jax.text.template import ChatTemplate, end_token, render
from easylm_jax.text.tokenizer import Tokenizer

WATCHED = (
    "unmarked/prefers_chosen",
    "good/prefers_chosen",
    "bad/prefers_chosen",
    "tells",
    "margin",
)
MEASURED = ("choice", "generate", "text")  # kinds of tasks; others run programs or need a judge


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out loss, tasks, samples: before the first step, every so often, and after the last."""

    every: str = "1000 steps"
    max_batches: int | None = None  # spread over the held-out text; None: all of it
    pairs: int = 0  # held-out comparisons: is the preferred answer the likelier one?
    tasks: tuple[str, ...] = ()  # such as "hellaswag", of evals/tasks/, or YAML files
    task_data: str = ""  # the folder that holds their data, as --data of evaluate.py
    task_items: int | None = 200  # of each task, spread over its subjects; None: all
    prompts: tuple[str, ...] = ()  # texts to continue or, with data.chat, questions to answer
    sample_tokens: int = 64
    temperature: float = 0.8


class Measurements:
    """`values` and `samples` of parameters; what is wrong with the data shows when it is made."""

    def __init__(
        self,
        cfg: EvalConfig,
        *,
        data: DataConfig,
        model: LlamaConfig,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        batch_size: int,
        seq_len: int,
        rows: Sequence[int],
        place: Callable[[Batch], Batch],
        seed: int,
    ):
        self._cfg, self._model, self._tokenizer, self._seed = cfg, model, tokenizer, seed
        self._place = place
        self._heldout = functools.partial(
            heldout_batches,
            data,
            batch_size=batch_size,
            seq_len=seq_len,
            tokenizer=tokenizer,
            rows=rows,
            template=template,
            max_batches=cfg.max_batches,
        )
        batches = self._heldout()  # what is wrong with the data shows here
        if not data.root:
            kept = list(batches)
            self._heldout = lambda: kept
        forward = make_forward(model)
        self._eval_sums = jax.jit(make_eval_sums(forward, tokenizer.token_bytes()))
        self._answer_losses = jax.jit(make_answer_losses(forward))
        self._pairs = None
        if cfg.pairs:
            pairs = heldout_pairs(data, template)
            number = min(cfg.pairs, len(pairs))
            self._pairs = prepare_pairs(
                [pairs[i * len(pairs) // number] for i in range(number)],  # of all files
                template=template,
                tokenizer=tokenizer,
                batch_size=batch_size,
                seq_len=seq_len,
                rows=rows,
            )
        self._tasks = measured_tasks(cfg)
        self._template = template
        self._prompts = _prompts(cfg.prompts, data, template, tokenizer)
        end = end_token(template) if template else None
        self._stop_ids = {tokenizer.eos_id} | ({tokenizer.special_id(end)} if end else set())

    def values(self, params: Params) -> dict[str, float]:
        """By name, such as "heldout/loss"."""
        means = evaluate(self._eval_sums, params, map(self._place, self._heldout()))
        values = {f"heldout/{name}": value for name, value in means.items()}
        if self._pairs is not None:
            scores = score_pairs(self._answer_losses, params, self._pairs, place=self._place)
            values["pairs/number"] = float(self._pairs.num_pairs)
            for name, (value, error) in pair_metrics(scores).items():
                if name in WATCHED:
                    values |= {f"pairs/{name}": value, f"pairs/{name}_stderr": error}
        for task, items in self._tasks:
            lm = LanguageModel(self._model, params, self._tokenizer, self._template)
            samples = [sample for new in run_items(lm, task, items) for sample in new]
            metric = task.headline
            rows = summarise(task, samples, shots=task.shots)
            row = next(row for row in rows if row.metric == metric)  # over all items
            values[f"{task.name}/{metric}"] = row.value
            if row.stderr is not None:
                values[f"{task.name}/{metric}_stderr"] = row.stderr
            if task.kind == "choice":
                shares = [1 / len(item.pairs) for item in items]
                values[f"{task.name}/chance"] = sum(shares) / len(shares)
        return values

    def samples(self, params: Params) -> list[dict[str, str]]:
        """A continuation or answer for every prompt, and for every marker if there are some."""
        if not self._prompts:
            return []
        texts = sample_texts(
            params,
            list(self._prompts.values()),
            config=self._model,
            tokenizer=self._tokenizer,
            max_new_tokens=self._cfg.sample_tokens,
            temperature=self._cfg.temperature,
            seed=self._seed,
            stop_ids=sorted(self._stop_ids),
        )
        return [{"prompt": p, "text": t} for p, t in zip(self._prompts, texts, strict=True)]


def measured_tasks(cfg: EvalConfig) -> list[tuple[Task, list[Item]]]:
    """The tasks of `cfg` and their items.

    Raises:
      ValueError: an unknown task, or one that cannot be asked in training; data that are not there.
    """
    tasks = [find_task(name) for name in cfg.tasks]
    for task in tasks:
        if task.kind not in MEASURED:
            raise ValueError(
                f"eval.tasks has {task.name!r}, of the kind {task.kind!r}; in training there are "
                f"only {', '.join(MEASURED)}: use `python -m easylm_jax.evaluate` for it"
            )
    return [(task, make_items(task, cfg.task_data, limit=cfg.task_items)) for task in tasks]


def _prompts(
    texts: tuple[str, ...], data: DataConfig, template: ChatTemplate | None, tokenizer: Tokenizer
) -> dict[str, list[int]]:
    """Ids of every prompt, by what the reader is shown."""
    if template is None:
        return {text: tokenizer.prompt_ids(text) for text in texts}
    prompts = {}
    for text in texts:
        for quality in ("good", "bad") if data.chat.conditional else ("",):
            user = [{"role": "user", "content": text}]
            segments = render(template, user, generate=True, quality=quality)
            ids = [i for segment in segments for i in encode_segment(segment, tokenizer)]
            prompts[f"{text} [{quality}]" if quality else text] = ids
    return prompts
