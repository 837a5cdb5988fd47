"""Preferences of a tiny model against its answers scored one by one, and metrics worked by hand."""

import functools
import math

import jax
import numpy as np
import pytest

from easylm_jax.data.conversation import Conversation, Pair
from easylm_jax.evals.preference import (
    PairScores,
    make_answer_losses,
    pair_metrics,
    prepare_pairs,
    score_pairs,
)
from easylm_jax.language_model import LanguageModel
from easylm_jax.mesh import make_mesh
from easylm_jax.models.llama import PARAM_RULES, init_params, make_forward
from easylm_jax.sharding import local_rows, to_global, tree_shardings
from easylm_jax.text.example import encode_segment
from easylm_jax.text.template import find_template, render
from easylm_jax.text.tokenizer import ByteTokenizer
from tests.tiny import tiny_config

CONFIG = tiny_config(vocab_size=304, max_seq_len=160)
TOKENIZER, HINDSIGHT = ByteTokenizer(), find_template("hindsight")
SHAPE = dict(tokenizer=TOKENIZER, batch_size=8, seq_len=160)
QUALITIES = ("", "good", "bad")


def _pair(number, question, chosen, rejected, earlier=()) -> Pair:
    prompt = (*earlier, {"role": "user", "content": question})

    def conversation(quality, answer):
        messages = (*prompt, {"role": "assistant", "content": answer})
        return Conversation(f"x:{number}/{quality}", messages, quality=quality, pair=f"x:{number}")

    return Pair(conversation("good", chosen), conversation("bad", rejected))


def _random_pairs(count=5) -> list[Pair]:
    rng = np.random.default_rng(0)

    def text():
        return bytes(rng.integers(97, 123, size=rng.integers(1, 25)).tolist()).decode()

    earlier = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"})
    return [_pair(i, text(), text(), text(), earlier[: 2 * (i % 2)]) for i in range(count)]


@functools.cache
def _params():
    made = jax.jit(functools.partial(init_params, CONFIG))(jax.random.key(0))
    return jax.tree.map(lambda x: 6 * x, made)


def _alone(conversation, quality) -> tuple[float, int]:
    """log p of the last answer, by a forward of this conversation alone, and its tokens."""

    def ids(segments):
        return [i for segment in segments for i in encode_segment(segment, TOKENIZER)]

    *prompt, answer = conversation.messages
    start = len(ids(render(HINDSIGHT, prompt, generate=True, quality=quality)))
    row = ids(render(HINDSIGHT, [*prompt, {**answer, "quality": quality}]))
    lm = LanguageModel(config=CONFIG, params=_params(), tokenizer=TOKENIZER)
    ((log_probs, _),) = lm.token_log_probs([row])
    assert row[-1] == TOKENIZER.eos_id
    return log_probs[start - 1 :].sum(dtype=np.float64), len(row) - start


def test_packed_answers_score_as_alone_and_a_mesh_changes_nothing():
    pairs = _random_pairs()
    batches = prepare_pairs(pairs, template=HINDSIGHT, **SHAPE)
    filled = np.concatenate([batch.segment_ids for batch in batches.batches])
    assert filled.max() > 1 and not filled[-1].any()  # answers share rows; there is padding
    losses = make_answer_losses(make_forward(CONFIG))
    scores = score_pairs(jax.jit(losses), _params(), batches)
    expected = [[[_alone(c, q) for c in pair] for pair in pairs] for q in QUALITIES]
    np.testing.assert_allclose(scores.log_probs, np.array(expected)[..., 0], rtol=1e-5)
    np.testing.assert_array_equal(scores.num_tokens, np.array(expected)[..., 1])
    assert scores.conditions == ("unmarked", "good", "bad")
    np.testing.assert_array_equal(scores.of("bad"), scores.log_probs[2])
    assert abs(scores.of("good") - scores.of("bad")).min() > 1e-3

    mesh = make_mesh("1,4,1,2")
    with jax.set_mesh(mesh):
        params = jax.device_put(_params(), tree_shardings(_params(), mesh, PARAM_RULES))
        own = prepare_pairs(pairs, template=HINDSIGHT, **SHAPE, rows=local_rows(mesh, 8))
        place = functools.partial(to_global, mesh=mesh, batch_size=8)
        split = score_pairs(jax.jit(losses), params, own, place=place)
    np.testing.assert_allclose(split.log_probs, scores.log_probs, rtol=1e-5)


def test_a_process_takes_its_rows_and_knows_the_answers_of_all():
    whole = prepare_pairs(_random_pairs(30), template=HINDSIGHT, **SHAPE)
    part = prepare_pairs(_random_pairs(30), template=HINDSIGHT, **SHAPE, rows=[2, 5])
    assert len(whole.batches) > 1
    for one, all_rows in zip(part.batches, whole.batches, strict=True):
        jax.tree.map(
            np.testing.assert_array_equal, one, jax.tree.map(lambda x: x[[2, 5]], all_rows)
        )
    jax.tree.map(np.testing.assert_array_equal, part.answer_of, whole.answer_of)


def test_pairs_that_do_not_fit_under_one_condition_are_left_out_under_all():
    long = _pair(9, "a", "b" * 95, "c")  # its bad marker alone makes it too long
    pairs = [_random_pairs()[0], long, _random_pairs()[1]]
    cut = functools.partial(prepare_pairs, template=HINDSIGHT, tokenizer=TOKENIZER, batch_size=2)
    length = len(TOKENIZER.encode("User: a A helpful answer: " + "b" * 95)) + 1
    batches = cut(pairs, seq_len=length)
    assert (batches.num_pairs, batches.left_out) == (2, 1)
    length += len("An unhelpful answer:") - len("A helpful answer:")
    assert [cut(pairs, seq_len=length - i).left_out for i in (0, 1)] == [0, 1]
    with pytest.raises(
        ValueError, match="none of the 1 held-out pairs fits in rows of seq_len = 20"
    ):
        cut([long], seq_len=20)
    unmarked = prepare_pairs(pairs, template=find_template("vicuna"), **SHAPE | {"seq_len": 400})
    assert (unmarked.conditions, unmarked.left_out) == (("unmarked",), 0)


def test_a_uniform_model_ties_per_token_and_prefers_short_answers_in_sum():
    pairs = [_pair(0, "q", "ab", "abcdef"), _pair(1, "q", "abcd", "a"), _pair(2, "q", "ab", "cd")]
    batches = prepare_pairs(pairs, template=HINDSIGHT, **SHAPE)

    def forward(params, batch, key):
        return jax.numpy.zeros((*batch.tokens.shape, 4)), jax.numpy.zeros((4, 64))

    found = pair_metrics(score_pairs(make_answer_losses(forward), {}, batches))
    np.testing.assert_allclose(found["good/log_prob_chosen"], (-math.log(64), 0), rtol=1e-6)
    for condition in ("unmarked", "good", "bad"):
        assert found[f"{condition}/prefers_chosen"] == (0.5, math.sqrt(0.25 / 3))
        assert found[f"{condition}/prefers_chosen_total"][0] == 0.5  # won, lost and tied
    assert found["tells"][0] == 0.5 and found["margin"] == (0, 0)
    won = pair_metrics(
        score_pairs(
            make_answer_losses(forward), {}, prepare_pairs(pairs[:1], template=HINDSIGHT, **SHAPE)
        )
    )
    assert won["unmarked/prefers_chosen_total"] == (1.0, 0.0)
    assert math.isnan(won["margin"][1])


def test_metrics_by_hand():
    unmarked = [[-4, -6], [-9, -2], [-3, -3], [-8, -20]]
    good = [[-2, -8], [-6, -2], [-2, -4], [-6, -20]]
    bad = [[-6, -4], [-8, -3], [-4, -2], [-8, -22]]
    num_tokens = np.array([[2, 2], [3, 2], [1, 1], [2, 10]])
    scores = PairScores(
        ("unmarked", "good", "bad"),
        np.array([unmarked, good, bad], float),
        np.stack([num_tokens] * 3),
    )
    found = pair_metrics(scores)
    expected = {  # name: one value per pair
        "unmarked/prefers_chosen": [1, 0, 0.5, 0],
        "unmarked/prefers_chosen_total": [1, 0, 0.5, 1],
        "good/prefers_chosen": [1, 0, 1, 0],
        "good/prefers_chosen_total": [1, 0, 1, 1],
        "bad/prefers_chosen": [0, 0, 0, 0],
        "bad/prefers_chosen_total": [0, 0, 0, 1],
        "bad/log_prob_chosen": [-3, -8 / 3, -4, -4],
        "bad/log_prob_rejected": [-2, -1.5, -2, -2.2],
        "good_minus_bad/prefers_chosen": [1, 0, 1, 0],
        "good_minus_bad/log_prob_chosen": [2, 2 / 3, 2, 1],
        "margin": [4 - -4, 2 - 1, 2 - -2, 2 - 2],
        "tells": [1, 1, 1, 0.5],
    }
    for name, values in expected.items():
        mean = np.mean(values)
        is_share = "minus" not in name and ("prefers" in name or name == "tells")
        error = math.sqrt(mean * (1 - mean) / 4) if is_share else np.std(values, ddof=1) / 2
        np.testing.assert_allclose(found[name], (mean, error), rtol=1e-12, err_msg=name)
    alone = pair_metrics(PairScores(("unmarked",), scores.log_probs[:1], scores.num_tokens[:1]))
    assert all(name.startswith("unmarked/") for name in alone) and len(alone) == 4
