"""Which of two answers a model prefers, and whether a marker of quality changes that.

For held-out pairs of answers, of which somebody chose one: log p of either, after the prompt as the
template writes it for each condition: unmarked, with the marker of good answers, with that of bad
ones (Koala, Geng et al. 2023; Chain of Hindsight, Liu et al. 2023, arXiv:2302.02676). What it is
not: a reward model, or a judge of what the model itself would answer. Called by the trainer and by
experiments:

    batches = prepare_pairs(pairs, template=..., tokenizer=..., batch_size=16, seq_len=1024)
    losses = jax.jit(make_answer_losses(forward))
    pair_metrics(score_pairs(losses, params, batches))

Letters here: C conditions, P pairs; the last dimension, 2, is chosen and rejected.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from easylm_jax.array_types import Params, TokenFloats
from easylm_jax.batch import Batch
from easylm_jax.data.conversation import Conversation, Pair
from easylm_jax.data.packing import Piece, lay_out, pack_all
from easylm_jax.objectives import Forward, token_losses
from easylm_jax.sharding import constrain
from easylm_jax.text.example import Example, encode_example
from easylm_jax.text.template import ChatTemplate, render
from easylm_jax.text.tokenizer import Tokenizer

CONDITIONS = {"unmarked": "", "good": "good", "bad": "bad"}  # and the quality that is rendered

AnswerLosses = Callable[[Params, Batch], TokenFloats]


@dataclasses.dataclass(frozen=True)
class PairBatches:
    """Made once, scored as often as the model changes.

    `answer_of[i][b, t]` is n if the target there belongs to the answer number n (from 1; 0 to
    none), for all rows of batch i, and `batches[i]` has this process's rows. Answers are numbered
    in the order of an array [C, P, 2].
    """

    batches: list[Batch]
    answer_of: list[Int[np.ndarray, "B T"]]
    conditions: tuple[str, ...]
    num_pairs: int
    left_out: int  # pairs of which an answer does not fit in a row


class PairScores(NamedTuple):
    """Summed log-probabilities of answers with their end tokens, and numbers of these tokens."""

    conditions: tuple[str, ...]
    log_probs: Float[np.ndarray, "C P 2"]
    num_tokens: Int[np.ndarray, "C P 2"]

    def of(self, condition: str) -> Float[np.ndarray, "P 2"]:
        return self.log_probs[self.conditions.index(condition)]

    def per_token(self, condition: str) -> Float[np.ndarray, "P 2"]:
        return self.of(condition) / self.num_tokens[self.conditions.index(condition)]


def prepare_pairs(
    pairs: Sequence[Pair],
    *,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    batch_size: int,
    seq_len: int,
    rows: Sequence[int] | None = None,
) -> PairBatches:
    """All answers of `pairs` under every condition that the template has a marker of its own for.

    Pairs that do not fit under one condition are left out under all. `rows` of each batch are those
    that this process holds; None: all.
    """
    known = dict(template.markers or [("", "")])
    conditions = tuple(name for name, quality in CONDITIONS.items() if quality in known)
    if known[""] in (known.get("good"), known.get("bad")):  # as in Koala's template
        conditions = tuple(name for name in conditions if name != "unmarked")
    encoded = [
        [[encode_answer(c, condition, template, tokenizer) for c in pair] for pair in pairs]
        for condition in conditions
    ]
    fits = [
        all(p.num_pairs <= seq_len for answers in of_pair for p in answers)
        for of_pair in zip(*encoded, strict=True)
    ]
    if not any(fits):
        raise ValueError(
            f"none of the {len(fits)} held-out pairs fits in rows of seq_len = {seq_len}: raise "
            "it, or give pairs with shorter answers"
        )
    pieces = [
        answer
        for of_condition in encoded
        for answers, is_kept in zip(of_condition, fits, strict=True)
        for answer in answers
        if is_kept
    ]
    # An answer's number travels as its tokens' weight, since packing reorders answers.
    numbered = (Piece(ids, (w > 0) * np.float32(n)) for n, (ids, w) in enumerate(pieces, start=1))
    packed = pack_all(numbered, strategy="best_fit", seq_len=seq_len)
    packed += [[]] * (-len(packed) % batch_size)
    whole = [
        lay_out(packed[i : i + batch_size], seq_len) for i in range(0, len(packed), batch_size)
    ]
    own = list(range(batch_size) if rows is None else rows)
    return PairBatches(
        batches=[
            jax.tree.map(lambda x: x[own], batch.replace(weights=np.sign(batch.weights)))
            for batch in whole
        ],
        answer_of=[batch.weights.astype(np.int32) for batch in whole],
        conditions=conditions,
        num_pairs=sum(fits),
        left_out=len(fits) - sum(fits),
    )


def encode_answer(
    conversation: Conversation, condition: str, template: ChatTemplate, tokenizer: Tokenizer
) -> Piece:
    """The conversation with the condition's marker before its last answer, which has weight 1."""
    *prompt, answer = conversation.messages
    judged = {**answer, "quality": CONDITIONS[condition]}
    segments = render(template, [*prompt, judged], loss_on="last")
    return Piece(*encode_example(Example(tuple(segments)), tokenizer))


def make_answer_losses(forward: Forward) -> AnswerLosses:
    """A pure function to the -log p of every target of a batch, for every process to read."""

    def answer_losses(params: Params, batch: Batch) -> TokenFloats:
        hidden_BTD, head_DV = forward(params, batch, None)
        losses_BT, _ = token_losses(hidden_BTD, head_DV, batch.targets)
        return constrain(losses_BT, None, None)

    return answer_losses


def score_pairs(
    answer_losses: AnswerLosses,
    params: Params,
    pairs: PairBatches,
    *,
    place: Callable[[Batch], Batch] = jax.device_put,
) -> PairScores:
    """Every answer's log p, added up in float64. `place` puts a batch where `params` are."""
    shape = (len(pairs.conditions), pairs.num_pairs, 2)
    log_probs, counts = np.zeros(math.prod(shape) + 1), np.zeros(math.prod(shape) + 1, np.int64)
    for batch, answer_of in zip(pairs.batches, pairs.answer_of, strict=True):
        losses = jax.device_get(answer_losses(params, place(batch)))
        log_probs -= np.bincount(answer_of.ravel(), losses.ravel(), minlength=log_probs.size)
        counts += np.bincount(answer_of.ravel(), minlength=counts.size)
    return PairScores(pairs.conditions, log_probs[1:].reshape(shape), counts[1:].reshape(shape))


def pair_metrics(scores: PairScores) -> dict[str, tuple[float, float]]:
    """Name -> (value, standard error over pairs).

    Of every condition `CONDITION/`:
      prefers_chosen        share of pairs whose chosen answer has the higher log p per token; ties
                            count half
      prefers_chosen_total  the same by summed log p, in which short answers have the advantage
      log_prob_chosen, log_prob_rejected   mean over pairs of log p per token

    With both markers, also `good_minus_bad/` of each, paired, and what conditional training says of
    answers. By Bayes' rule, p(good | answer) / p(bad | answer) is p(answer | good) / p(answer |
    bad) times the odds before the answer, which both answers of a pair share:
      margin   mean over pairs of the difference that follows, in nats: chosen minus rejected of
               log p(answer | good) - log p(answer | bad), summed over tokens
      tells    share of pairs where it is above 0: the classifier agrees with the people
    """
    measured = {
        name: _measure(scores.of(name), scores.per_token(name)) for name in scores.conditions
    }
    found = {
        f"{condition}/{name}": _share(x) if name in SHARES else _mean(x)
        for condition, of_condition in measured.items()
        for name, x in of_condition.items()
    }
    if "good" in measured and "bad" in measured:
        for name, x in measured["good"].items():
            found[f"good_minus_bad/{name}"] = _mean(x - measured["bad"][name])
        evidence = scores.of("good") - scores.of("bad")
        margin = evidence[:, 0] - evidence[:, 1]
        found |= {"margin": _mean(margin), "tells": _share(_wins(evidence))}
    return found


SHARES = ("prefers_chosen", "prefers_chosen_total")


def _measure(
    total: Float[np.ndarray, "P 2"], per_token: Float[np.ndarray, "P 2"]
) -> dict[str, Float[np.ndarray, " P"]]:
    wins = dict(zip(SHARES, (_wins(per_token), _wins(total)), strict=True))
    return wins | {"log_prob_chosen": per_token[:, 0], "log_prob_rejected": per_token[:, 1]}


def _wins(values: Float[np.ndarray, "P 2"]) -> Float[np.ndarray, " P"]:
    """1 where the chosen answer has more, 0 where it has less, 1/2 where it has as much."""
    return (np.sign(values[:, 0] - values[:, 1]) + 1) / 2


def _share(wins: Float[np.ndarray, " P"]) -> tuple[float, float]:
    share = float(wins.mean())
    return share, math.sqrt(share * (1 - share) / len(wins))


def _mean(values: Float[np.ndarray, " P"]) -> tuple[float, float]:
    """The standard error of one value is not known: nan."""
    spread = values.std(ddof=1) if len(values) > 1 else math.nan
    return float(values.mean()), float(spread / math.sqrt(len(values)))
