"""The adapter says to lm-eval what the model says to us."""

import json
import os

import numpy as np
import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before lm_eval starts
lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from easylm_jax.lm_eval_adapter import HarnessModel  # noqa: E402
from easylm_jax.text.example import encode_segment  # noqa: E402
from easylm_jax.text.template import find_template, render  # noqa: E402
from tests.language_model_test import _model  # noqa: E402

LM = _model()
ADAPTER = HarnessModel(LM)
BOS = LM.tokenizer.bos_id


def _ask(kind, *requests, adapter=ADAPTER):
    instances = [Instance(kind, {}, args, i) for i, args in enumerate(requests)]
    return getattr(adapter, kind)(instances, disable_tqdm=True)


def test_likelihoods_are_those_of_the_model():
    pairs = [("ab", " c"), ("the cat ", "sat"), ("", "hello"), ("", " "), (" ", "a")]
    found = _ask("loglikelihood", *pairs)
    for (log_prob, is_greedy), (context, continuation) in zip(found, pairs, strict=True):
        ids = [BOS, *LM.tokenizer.encode(context + continuation)]
        start = 1 + len(context.rstrip())
        ((table, best),) = LM.token_log_probs([ids])
        np.testing.assert_allclose(log_prob, table[start - 1 :].sum(), rtol=1e-4)
        assert is_greedy == best[start - 1 :].all()


def test_a_long_context_loses_its_beginning():
    """The model reads all but the last id, so that one more than the context fits: `hf` does so."""
    size = LM.config.max_seq_len
    text = "".join(np.random.default_rng(0).choice(list("abcdef "), size)) + "x"
    ((log_prob, _),) = _ask("loglikelihood", (text, "yz"))
    ids = LM.tokenizer.encode(text + "yz")[-size - 1 :]
    logits = np.asarray(LM.logits(ids[:-1]), np.float64)[-2:]
    own = logits[[0, 1], ids[-2:]] - np.logaddexp.reduce(logits, axis=-1)
    np.testing.assert_allclose(log_prob, own.sum(), rtol=1e-4)


def test_rolling_scores_every_token_once():
    text = "The quick brown fox jumps over the lazy dog"
    found = _ask("loglikelihood_rolling", (text,), ("",))
    ((table, _),) = LM.token_log_probs([[BOS, *LM.tokenizer.encode(text)]])
    np.testing.assert_allclose(found, [table.sum(), 0.0], rtol=1e-4)


def test_generation_stops_before_the_strings_and_obeys_the_settings():
    free = LM.generate(["A cat"], max_new_tokens=12, temperature=0.0)[0].text
    stop = next(c for c in free[2:] if c != "\ufffd")  # which a byte alone is shown as
    ends, short, drawn, again = _ask(
        "generate_until",
        ("A cat", {"until": [stop], "max_gen_toks": 12}),
        ("A cat", {"until": stop, "max_gen_toks": 2}),
        ("A cat", {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 5.0}),
        ("A cat", {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 5.0}),
    )
    assert ends == free[: free.index(stop)]
    assert short == LM.generate(["A cat"], max_new_tokens=2, temperature=0.0)[0].text
    assert len({free, drawn, again}) == 3  # repeated requests are other draws
    with pytest.raises(ValueError, match="num_beams"):
        _ask("generate_until", ("A cat", {"until": [], "num_beams": 4}))


@pytest.mark.parametrize("name", ["vicuna", "koala", "llama2"])
def test_a_rendered_prompt_has_the_ids_of_the_template(name):
    lm = _model(template=find_template("plain"))
    adapter = HarnessModel(lm)
    adapter.chat_template(name)
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    segments = render(find_template(name), turns, generate=True)
    expected = [i for s in segments for i in encode_segment(s, lm.tokenizer)]
    assert adapter.tok_encode(adapter.apply_chat_template(turns)) == expected
    begun = adapter.apply_chat_template([*turns, {"role": "assistant", "content": "So"}], False)
    assert adapter.tok_encode(begun) == expected + lm.tokenizer.encode("So")


TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}, cache_dir: {folder}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}} A:"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def test_a_whole_evaluation_by_lm_eval(tmp_path):
    rng = np.random.default_rng(1)
    words = ["".join(rng.choice(list("abcdefgh"), n)) for n in rng.integers(1, 12, 40)]
    docs = [
        {"question": a, "choices": [b, c], "gold": int(rng.integers(2))}
        for a, b, c in zip(words[::2], words[1::2], words[::-2], strict=True)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, docs)))
    (tmp_path / "letters.yaml").write_text(TASK.format(folder=tmp_path))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(ADAPTER, tasks=["letters"], task_manager=manager)

    pairs = [(f"Q: {d['question']} A:", f" {choice}") for d in docs for choice in d["choices"]]
    scores = np.array([one.log_prob for one in LM.loglikelihood(pairs)]).reshape(-1, 2)
    lengths = np.array([[len(choice) for choice in d["choices"]] for d in docs])
    gold = [d["gold"] for d in docs]
    results = found["results"]["letters"]
    assert results["acc,none"] == np.mean(scores.argmax(1) == gold)
    assert results["acc_norm,none"] == np.mean((scores / lengths).argmax(1) == gold)
