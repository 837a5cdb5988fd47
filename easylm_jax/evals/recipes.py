"""Recipes: lists of tasks as a paper or a leaderboard asked them, with the numbers they published.

They are files in `recipes/`, data only:

    name: quiz2020
    about: "..."
    entries:
    - task: quiz
      shots: 5
      metric: acc_norm              # the headline in this recipe
      published:                    # percent, by metric and model
        acc_norm: {Model-7B: 51.2}
      groups:                       # the same of the headline alone, by group of the task
        history: {Model-7B: 48.0}
    source: "Authors 2020, arXiv 2001.00000, table 3"   # an entry may have its own

What it is not: the tasks, see `task.py`. Called by `evaluate.py`.
"""

import dataclasses
import difflib
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import yaml

from easylm_jax.evals.task import Task, find_task, select_metric

FOLDER = pathlib.Path(__file__).parent / "recipes"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A task as the recipe asks it. `published` numbers are fractions, as results are:
    {"model", "metric", "value", "group", "shots", "source"}, with the group "" for all items."""

    task: Task
    shots: int | None = None
    published: tuple[Mapping[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Recipe:
    name: str
    about: str
    entries: tuple[Entry, ...]


def recipe_names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


@functools.cache
def find_recipe(name: str) -> Recipe:
    """The recipe of that name; ValueError names those near it."""
    if name not in recipe_names():
        near = difflib.get_close_matches(name, recipe_names()) or recipe_names()
        raise ValueError(f"there is no recipe {name!r}; near it: {', '.join(near)}")
    found = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    entries = (_entry(entry, found["source"]) for entry in found["entries"])
    return Recipe(found["name"], found["about"], tuple(entries))


def _entry(found: Mapping[str, Any], source: str) -> Entry:
    known = {"task": "", "shots": None, "metric": "", "published": {}, "groups": {}}
    entry = known | {"source": source} | found
    task = find_task(entry["task"])
    task = select_metric(task, entry["metric"] or task.headline)
    numbers = [(metric, "", by_model) for metric, by_model in entry["published"].items()]
    numbers += [(task.headline, group, by_model) for group, by_model in entry["groups"].items()]
    published = tuple(
        {
            "model": model,
            "metric": metric,
            "value": round(percent / 100, 6),
            "group": group,
            "shots": entry["shots"],
            "source": entry["source"],
        }
        for metric, group, by_model in numbers
        for model, percent in by_model.items()
    )
    return Entry(task, entry["shots"], published)
