"""Style of answers, against counts by hand and AlpacaEval's published mean lengths."""

import json
import os
from pathlib import Path

import pytest

from easylm_jax.evals.style import ABOUT, measure

LABELS = Path(os.environ.get("EASYLM_ALPACA_EVAL_LABELS", "/nowhere"))
ANSWER = """# Sorting, quickly!

There are two ways:
1. Use `sorted`.
2) Write it yourself, as an AI language model would:

```python
# a comment, no heading!
- 1
```

* Done 3-4 times
- and again - and again
## No #hashtag, and 5. no item
```
unclosed
- x"""


def test_an_answer_by_hand():
    found = measure(ANSWER)
    assert set(found) == set(ABOUT)
    expected = dict(list_items=4, headings=2, code_blocks=2, exclamations=1, as_an_ai=1)
    expected |= dict(refuses=0, empty=0, words=len(ANSWER.split()), characters=len(ANSWER))
    assert {name: found[name] for name in expected} == {
        name: (float(count), 1.0) for name, count in expected.items()
    }


def test_repetition_is_seen_inside_an_answer():
    assert measure("a b c d")["distinct_2"] == (3.0, 3.0)
    assert measure("a b a b a b a")["distinct_2"] == (2.0, 6.0)
    assert measure("alone")["distinct_2"] == (0.0, 0.0)
    assert measure(" \n")["empty"] == (1.0, 1.0)


@pytest.mark.parametrize(
    "answer, refuses, as_an_ai",
    [
        ("I'm sorry, but I cannot help with that.", True, False),
        ("I’m sorry, but no.", True, False),
        ("As an AI language model, I am unable to feel.", True, True),
        ("As a large language model I like it.", False, True),
        ("I'm an AI, and here it is: 4.", False, True),
        ("I can do that. " + "Sure. " * 50 + "I cannot stress this enough.", False, False),
        ("I am sorry to hear that. Try tea.", False, False),
        ("As an aim, take 5 steps.", False, False),
    ],
)
def test_refusals_and_self_description(answer, refuses, as_an_ai):
    found = measure(answer)
    assert (found["refuses"][0], found["as_an_ai"][0]) == (refuses, as_an_ai)


@pytest.mark.parametrize(
    "model, length", [("alpaca-7b", 396), ("vicuna-13b", 1037), ("guanaco-65b", 1249)]
)
def test_mean_lengths_are_alpaca_evals(model, length):
    path = LABELS / f"{model}.alpaca_eval_gpt4.json"
    if not path.exists():
        pytest.skip("no labels")
    lengths = [measure(row["output_2"])["characters"][0] for row in json.loads(path.read_text())]
    assert int(sum(lengths) / len(lengths)) == length
