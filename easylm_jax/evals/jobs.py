"""Names of tasks and recipes to jobs, and jobs to items. Called by evaluate.py.

What it is not: the task files (`task.py`, `recipes.py`), or the asking (`runner.py`).
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from easylm_jax.evals.code import require_permission
from easylm_jax.evals.recipes import Entry, find_recipe, recipe_names
from easylm_jax.evals.task import Item, Task, find_task, limit_items, make_items, task_names


@dataclasses.dataclass(frozen=True)
class Job:
    """A task as this run asks it. `name` is its own in OUT, since recipes ask tasks twice."""

    name: str
    task: Task
    shots: int
    published: tuple[Mapping[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A job with what to ask; or with the reason why nothing can be asked.

    `ask_with` makes the same items with another number of shots; `shortened` items have fewer than
    the job says, as the model's context has no room for more.
    """

    job: Job
    items: list[Item]
    available: int = 0
    ask_with: Callable[[int], list[Item]] | None = None
    shortened: int = 0
    reason: str = ""


def plan(names: Sequence[str], *, shots: int | None = None) -> list[Job]:
    """Jobs of tasks and recipes. `shots` replaces those that they say themselves.

    Raises:
      ValueError: an unknown name; one name for two things to ask.
    """
    entries = []
    for name in names:
        if name in recipe_names():
            entries += find_recipe(name).entries
        elif name in task_names() or name.endswith((".yaml", ".yml")) or name.startswith("text:"):
            entries.append(Entry(find_task(name)))
        else:
            known = [*recipe_names(), *task_names()]
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
            raise ValueError(f"there is no task or recipe {name!r}; near it: {', '.join(near)}")
    jobs: dict[str, Job] = {}
    for job in (_job(entry, shots) for entry in entries):
        if jobs.setdefault(job.name, job) != job:
            raise ValueError(
                f"{job.name} is asked for in two ways, such as by a recipe and by its name: give "
                "each an --out of its own, or another name in its file"
            )
    return list(jobs.values())


def _job(entry: Entry, shots: int | None) -> Job:
    task = entry.task
    wanted = next(n for n in (shots, entry.shots, task.shots) if n is not None)
    wanted = 0 if task.kind in ("text", "chat") else wanted
    name = task.name if wanted == task.shots else f"{task.name}_{wanted}shot"
    return Job(name, task, wanted, entry.published)


def prepare(job: Job, data: str, *, limit: int | None, allow_code: bool) -> Prepared:
    """The job's items. What is wrong with its data is a reason, for the other jobs to go on."""

    def ask_with(shots: int) -> list[Item]:
        return limit_items(make_items(job.task, data, shots=shots), limit)

    try:
        if job.task.kind == "code":
            require_permission(allow_code)
        items = make_items(job.task, data, shots=job.shots)
    except (ValueError, OSError) as error:
        return Prepared(job, [], reason=str(error))
    return Prepared(job, limit_items(items, limit), len(items), ask_with)
