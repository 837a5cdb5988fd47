"""Text in, text out: what `LanguageModel` adds to the sampler, by its own full forwards."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from easylm_jax import language_model
from easylm_jax.language_model import GenerationRequest, LanguageModel
from easylm_jax.mesh import make_mesh
from easylm_jax.models.llama import PARAM_RULES, init_params
from easylm_jax.sampler import generate, read_prefix
from easylm_jax.sharding import tree_shardings
from easylm_jax.text.template import find_template
from easylm_jax.text.tokenizer import ByteTokenizer
from tests.tiny import tiny_config

CONFIG = tiny_config(vocab_size=300)
TEXT = "A cat"


@functools.cache
def _params():
    made = jax.jit(functools.partial(init_params, CONFIG))(jax.random.key(0))
    return jax.tree.map(lambda x: 6 * x, made)  # so that it prefers some bytes to others


def _model(**changes) -> LanguageModel:
    own = dict(tokenizer=ByteTokenizer(), template=find_template("plain"))
    return LanguageModel(**dict(config=CONFIG, params=_params()) | own | changes)


LM = _model()


def _same(a, b):
    assert [(x.text, x.ids, x.finish_reason) for x in a] == [
        (x.text, x.ids, x.finish_reason) for x in b
    ]
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x.log_probs, y.log_probs, atol=1e-4)


def _log_softmax(ids):
    logits = np.asarray(LM.logits(ids), np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def test_likelihoods_are_sums_of_log_softmax():
    guesses = {a: int(LM.logits([1, ord(a) + 3])[-1].argmax()) for a in "abcdefghijklmnop"}
    likely = next((a, chr(i - 3)) for a, i in guesses.items() if 36 <= i < 130)  # is ASCII
    pairs = [("ab", "c"), ("", "hello"), ("the cat ", "sat on a mat"), likely]
    for (context, continuation), found in zip(pairs, LM.loglikelihood(pairs), strict=True):
        ids = LM.tokenizer.prompt_ids(context + continuation)
        start = len(LM.tokenizer.prompt_ids(context.rstrip()))
        table = _log_softmax(ids)
        own = [table[i - 1, ids[i]] for i in range(start, len(ids))]
        best = [table[i - 1].argmax() == ids[i] for i in range(start, len(ids))]
        np.testing.assert_allclose(found.log_prob, sum(own), rtol=1e-5)
        assert (found.is_greedy, found.num_tokens) == (all(best), len(own))
    assert found.is_greedy


def _log_prob(ids, start):
    """Summed log p of ids[start:], and whether each is the best guess, by one full forward."""
    table = _log_softmax(ids[:-1])
    own = [table[i - 1, ids[i]] for i in range(start, len(ids))]
    return sum(own), all(table[i - 1].argmax() == ids[i] for i in range(start, len(ids)))


@pytest.mark.parametrize("length", [1, 64, 65, 150])
def test_a_rolling_likelihood_counts_every_token_once(length):
    """By hand: windows of 64 ids that follow one another, the last one ends with the text."""
    text = "".join(chr(c) for c in np.random.default_rng(length).integers(97, 123, length))
    row = [1, *LM.tokenizer.encode(text)]
    starts = range(1, len(row), 64)
    by_hand = 0.0
    for start in starts:
        end = min(start + 64, len(row))
        by_hand += _log_prob(row[max(end - 65, 0) : end], start - max(end - 65, 0))[0]
    heard = []
    short, found, empty = LM.loglikelihood_rolling(["cat", text, ""], on_done=heard.append)
    np.testing.assert_allclose(found.log_prob, by_hand, rtol=1e-5)
    assert found.num_tokens == length and not found.is_greedy
    np.testing.assert_allclose(short.log_prob, _log_prob([1, 102, 100, 119], 1)[0], rtol=1e-5)
    assert tuple(empty) == (0.0, True, 0)
    assert sum(heard) == 3


def test_what_does_not_fit_is_refused_or_cut_on_the_left():
    rng = np.random.default_rng(0)
    context, continuation = rng.integers(3, 99, 90).tolist(), rng.integers(3, 99, 20).tolist()
    heard = []
    pairs = [(context, continuation), (context[:3], continuation)]
    cut, short = LM.loglikelihood_tokens(pairs, truncate=True, on_done=heard.append)
    np.testing.assert_allclose(
        cut.log_prob, _log_prob((context + continuation)[-65:], 45)[0], rtol=1e-5
    )
    (alone,) = LM.loglikelihood_tokens(pairs[1:])
    np.testing.assert_allclose(short.log_prob, alone.log_prob, rtol=1e-5)
    assert sum(heard) == 2
    LM.loglikelihood_tokens([(context[:45], continuation)])  # the last id is never read
    for wrong in [(context[:46], continuation), ([], continuation), (context[:3], [])]:
        with pytest.raises(ValueError, match="do not fit|at least"):
            LM.loglikelihood_tokens([wrong])
    with pytest.raises(ValueError, match="^179 tokens do not fit into the model's context of 64:"):
        LM.loglikelihood_tokens([(context, context)], truncate=True)


def test_bos_or_eos_stands_for_an_empty_context():
    ids = LM.tokenizer.encode(" cat")
    without = ByteTokenizer()
    without.bos_id, without.add_bos = None, False
    for tokenizer, first in ((ByteTokenizer(), 1), (without, 2)):
        found = _model(tokenizer=tokenizer).loglikelihood([("", " cat"), (" ", "cat")])
        for one in found:
            np.testing.assert_allclose(one.log_prob, _log_prob([first, *ids], 1)[0], rtol=1e-5)


def test_requests_get_what_they_would_get_alone(monkeypatch):
    """In batches, with a long beginning in common that is read once, and in their own order."""
    read = []
    monkeypatch.setattr(language_model, "MIN_PREFIX_WORK", 50)
    monkeypatch.setattr(
        language_model,
        "read_prefix",
        lambda params, ids, **options: read.append(len(ids)) or read_prefix(params, ids, **options),
    )
    shots = "a shot and another, so "
    requests = [
        GenerationRequest(shots + chr(97 + i), max_new_tokens=2 + i % 4, seed=i, temperature=0.9)
        for i in range(7)
    ]
    requests[3] = dataclasses.replace(requests[3], until=("e", "</s>"))
    requests[5] = GenerationRequest((5, 6, 7), max_new_tokens=3, n=2)
    heard = []
    made = LM.generate_until(requests, batch_size=4, on_done=heard.append)
    assert sum(heard) == len(requests) and read == [1 + len(shots)]
    for request, completions in zip(requests, made, strict=True):
        options = dict(n=request.n, seed=request.seed, stop=request.until)
        options |= dict(temperature=request.temperature, max_new_tokens=request.max_new_tokens)
        prompt = request.prompt
        prompts = [prompt] if isinstance(prompt, str) else [list(prompt)]
        _same(completions, LM.generate(prompts, **options))
    long = GenerationRequest("x" * 200, max_new_tokens=9)
    (((cut,),), ((tail,),)) = (
        LM.generate_until([long], truncate=True),
        LM.generate_until([GenerationRequest((123,) * 55, max_new_tokens=9)]),
    )
    assert cut.ids == tail.ids and len(cut.ids) == 9
    with pytest.raises(ValueError, match="do not fit"):
        LM.generate_until([long])
    with pytest.raises(ValueError, match="n = 0 must be"):
        GenerationRequest("x", n=0)


def test_conversations_in_batches_are_answered_as_alone():
    conversations = [[{"role": "user", "content": c}] for c in ("hi", "longer than that", "go")]
    heard = []
    options = dict(max_new_tokens=8, seed=3)
    said = LM.chat_batch(conversations, batch_size=2, on_done=heard.append, **options)
    assert said == [LM.chat(c, **options) for c in conversations] and heard == [2, 1]
    same, seeds = [conversations[0]] * 3, [3, 4, 3]
    said = LM.chat_batch(same, **options | {"seed": seeds})
    assert said == [LM.chat(same[0], **options | {"seed": seed}) for seed in seeds]
    assert said[0] != said[1]


def test_log_probs_are_those_of_the_model_whatever_the_sampling():
    made = LM.generate([TEXT], max_new_tokens=8, temperature=2.0, top_k=50, seed=3)[0]
    prompt = LM.tokenizer.prompt_ids(TEXT)
    table = _log_softmax(prompt + made.ids)
    expected = [table[len(prompt) - 1 + i, token] for i, token in enumerate(made.ids)]
    np.testing.assert_allclose(made.log_probs, expected, atol=1e-4)


def test_a_stop_string_cuts_text_ids_and_log_probs():
    whole = LM.generate([TEXT], max_new_tokens=12, seed=1)[0]
    assert whole.finish_reason == "length" and len(whole.ids) == len(whole.log_probs) == 12
    stop = next(c for i, c in enumerate(whole.text) if c.isascii() and whole.text.index(c) > 1)
    position = whole.text.index(stop)
    cut = LM.generate([TEXT], max_new_tokens=12, seed=1, stop=[stop])[0]
    assert cut.text == whole.text[:position] and cut.finish_reason == "stop"
    count = len(cut.ids)
    assert LM.tokenizer.decode(cut.ids).startswith(cut.text) and count < 12
    assert cut.ids == whole.ids[:count] and len(cut.log_probs) == count
    np.testing.assert_allclose(cut.log_probs, whole.log_probs[:count], atol=1e-4)


def test_samples_of_a_prompt_stand_next_to_one_another_in_the_order_of_prompts():
    prompts = ["a long prompt", "b", "a prompt"]  # batches are by length
    seeds = [11, 12, 13, 14, 15, 16]
    made = LM.generate(prompts, n=2, seed=seeds, max_new_tokens=5, batch_size=2)
    alone = [
        LM.generate([prompts[i // 2]], seed=[seed], max_new_tokens=5)[0]
        for i, seed in enumerate(seeds)
    ]
    _same(made, alone)
    assert made[0].ids != made[1].ids


@pytest.mark.parametrize("mesh", [None, pytest.param("1,4,1,2", marks=pytest.mark.slow)])
def test_samples_are_made_a_few_rows_at_a_time_and_the_same(monkeypatch, mesh):
    sizes, mesh = [], mesh and make_mesh(mesh)
    params = _params()
    if mesh:
        params = jax.device_put(params, tree_shardings(params, mesh, PARAM_RULES))
    lm = _model(params=params, mesh=mesh)

    def spy(params, prompts, *, samples, **options):
        shards = 4 if mesh else 1
        sizes.append((-(-len(prompts) // shards) * shards * samples, len(options["seeds"])))
        return generate(params, prompts, samples=samples, **options)

    requests = [GenerationRequest(p, n=5, seed=3, temperature=1.0, max_new_tokens=4) for p in "abc"]
    whole = LM.generate_until(requests, batch_size=15)
    monkeypatch.setattr(language_model, "generate", spy)
    heard = []
    parts = lm.generate_until(requests, batch_size=4, on_done=heard.append)
    assert max(rows for rows, _ in sizes) == 4 and sum(own for _, own in sizes) == 15
    assert sum(heard) == 3
    for a, b in zip(whole, parts, strict=True):
        _same(a, b)
    three = LM.generate_until([dataclasses.replace(r, n=3) for r in requests])
    assert [[x.ids for x in r] for r in three] == [[x.ids for x in r[:3]] for r in whole]


def test_the_context_ends_each_row_on_its_own():
    prompts = [[5] * 60, [9] * 40, [7] * 63]
    made = LM.generate(prompts, seed=[1, 2, 3], max_new_tokens=30)
    assert [len(x.ids) for x in made] == [4, 24, 1]
    assert {x.finish_reason for x in made} == {"length"}
    alone = [
        LM.generate([p], seed=[s], max_new_tokens=30)[0]
        for p, s in zip(prompts, [1, 2, 3], strict=True)
    ]
    _same(made, alone)


@pytest.mark.parametrize("wrong", [[5, 300], [-1], [], [5] * 65])
def test_ids_that_the_model_does_not_know_are_refused(wrong):
    sentence = {0: "at least one", 65: "65 tokens.* do not fit into the model's context of 64"}.get(
        len(wrong), "not of the model's vocabulary"
    )
    for use in (lambda ids: LM.generate([ids]), LM.logits, lambda ids: LM.token_log_probs([ids])):
        with pytest.raises(ValueError, match=sentence):
            use(wrong)


def test_chat_is_generate_of_the_rendered_conversation_and_streams_its_text():
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "go"},
    ]
    bytes_of = LM.tokenizer.encode
    ids = [1, *bytes_of("hi"), *bytes_of("yes"), 2, *bytes_of("go")]
    pieces = []
    said = LM.chat(messages, max_new_tokens=20, seed=5, on_text=pieces.append)
    options = dict(max_new_tokens=20, seed=5, temperature=0.7, top_p=0.9)
    assert said == LM.generate([ids], **options)[0].text.strip()
    assert "".join(pieces).strip() == said and len(pieces) > 1 and said
    with pytest.raises(ValueError, match="without a chat template"):
        _model(template=None).chat(messages)


def test_chat_asks_for_the_quality_and_stops_where_the_template_says():
    messages = [{"role": "user", "content": "hi"}]
    hindsight = _model(template=dataclasses.replace(find_template("hindsight"), stop=()))
    options = dict(max_new_tokens=20, seed=5)
    answers = {}
    for quality, marker in {"good": "A helpful answer:", "bad": "An unhelpful answer:"}.items():
        prompt = [1, *LM.tokenizer.encode(f"User: hi {marker}")]
        (expected,) = LM.generate([prompt], temperature=0.7, top_p=0.9, **options)
        answers[quality] = hindsight.chat(messages, quality=quality, **options)
        assert answers[quality] == expected.text.strip()
    said = answers["good"]
    assert said != answers["bad"] and len(said) > 4
    stopping = dataclasses.replace(hindsight.template, stop=(said[2:4],))
    heard = []
    lm = _model(template=stopping)
    stopped = lm.chat(messages, quality="good", on_text=heard.append, **options)
    assert stopped == "".join(heard).strip() == said.split(said[2:4])[0].strip()
    with pytest.raises(ValueError, match="no marker"):
        LM.chat(messages, quality="good")


def test_what_is_streamed_is_the_text_of_each_row():
    heard = {0: "", 1: "", 2: ""}

    def hear(row: int, text: str) -> None:
        heard[row] += text

    made = LM.generate(["a", "bcd", "ef"], max_new_tokens=16, on_text=hear, stop=["\n", "x"])
    assert [heard[i] for i in range(3)] == [x.text for x in made] and any(heard.values())


def test_eight_devices_give_what_one_gives():
    mesh = make_mesh("1,4,1,2")
    shardings = tree_shardings(_params(), mesh, PARAM_RULES)
    spread = _model(params=jax.device_put(_params(), shardings), mesh=mesh)
    prompts, options = ["one", "two words", "3"], dict(max_new_tokens=6, seed=2)
    _same(spread.generate(prompts, **options), LM.generate(prompts, **options))
    pairs = [("ab", "cd"), ("x", "yz")]
    ours, theirs = spread.loglikelihood(pairs), LM.loglikelihood(pairs)
    np.testing.assert_allclose([x[0] for x in ours], [x[0] for x in theirs], atol=1e-3)
    np.testing.assert_allclose(spread.logits([5, 6]), LM.logits([5, 6]), atol=1e-3)
