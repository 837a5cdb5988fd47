"""Recipes: every entry can be asked, and the numbers are those of the papers."""

import pytest

from easylm_jax.evals.recipes import find_recipe, recipe_names
from easylm_jax.evals.results import MACRO


def test_published_numbers_of_llama():
    """Rows of the paper's tables 3, 4, 5, 7, 8 and 9, in the order of their columns."""
    zero_shot = ["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"]
    wanted = {
        "LLaMA-7B": [76.5, 79.8, 48.9, 76.1, 70.1, 72.8, 47.6, 57.2],
        "LLaMA-65B": [85.3, 82.8, 52.3, 84.2, 77.0, 78.9, 56.0, 60.2],
    }
    found = {}
    for entry in find_recipe("llama1").entries:
        for one in entry.published:
            key = (one["model"], entry.task.name, one["metric"], one["group"], one["shots"])
            assert key not in found and one["source"].startswith("Touvron et al. 2023, arXiv 2302")
            found[key] = round(one["value"] * 100, 4)
    for model, row in wanted.items():
        names = [*zero_shot, "openbookqa"]
        for name, value in zip(names, row, strict=True):
            [same] = [v for (m, n, *_), v in found.items() if (m, n) == (model, name)]
            assert same == value
    for name, row in [
        ("nq_open_llama", [20.1, 23.4, 28.1, 31.9]),
        ("triviaqa_llama", [56.6, 60.5, 63.1, 64.0]),
    ]:
        shots = [found["LLaMA-13B", name, "exact_match", "", shots] for shots in (0, 1, 5, 64)]
        assert shots == row
    groups = ["humanities", "STEM", "social sciences", "other", ""]
    mmlu = [found["LLaMA-33B", "mmlu_original", "acc", group, 5] for group in groups]
    assert mmlu == [55.8, 46.0, 66.7, 63.4, 57.8]
    assert found["LLaMA-7B", "gsm8k", "maj@100", "", 8] == 18.1
    assert found["LLaMA-65B", "humaneval", "pass@100", "", 0] == 79.3
    assert found["LLaMA-13B", "mbpp", "pass@1", "", 3] == 22.0


def test_settings():
    llama = {e.task.name: (e.task.headline, e.shots) for e in find_recipe("llama1").entries}
    assert llama["boolq"] == llama["openbookqa"] == ("acc_uncond", 0)
    assert llama["hellaswag"] == ("acc_norm", 0) and llama["mmlu_original"] == ("acc", 5)
    openllm = {e.task.name: (e.task.headline, e.shots) for e in find_recipe("openllm_v1").entries}
    assert openllm == {
        "arc_challenge": ("acc_norm", 25),
        "hellaswag": ("acc_norm", 10),
        "mmlu": ("acc", 5),
        "truthfulqa": ("mc2", 0),
        "winogrande": ("acc", 5),
        "gsm8k": ("exact_match", 5),
    }


def test_published_numbers_are_of_metrics_and_groups_that_there_are():
    for name in recipe_names():
        for entry in find_recipe(name).entries:
            groups = {"", MACRO, *entry.task.categories}
            for one in entry.published:
                assert one["metric"] in entry.task.metrics or "@" in one["metric"]
                assert one["group"] in groups and 0 < one["value"] < 1


def test_unknown():
    with pytest.raises(ValueError, match="there is no recipe 'llama'; near it: llama1"):
        find_recipe("llama")
