"""Shows what the sandbox of HumanEval and MBPP holds back, and that it lets right programs pass.

    python experiments/code_sandbox/run.py --data=DIR

DIR has humaneval/HumanEval.jsonl[.gz] and mbpp/mbpp.jsonl[.gz]; experiments/quickstart/eval has all
of the first and 70 problems of the second. Prints two tables of Markdown: attacks, aimed at a decoy
folder, server and process of this script's own, with what became of them; and how many reference
solutions pass, how many functions with an empty body do, and the seconds that took.
"""

import argparse
import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from easylm_jax.evals import code, sandbox  # noqa: E402
from easylm_jax.evals.task import find_task, make_items  # noqa: E402
from experiments.code_sandbox import attacks  # noqa: E402


def show_attacks() -> None:
    found = attacks.QUICK | attacks.SLOW
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0)) as server,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim,
    ):
        decoy = Path(folder, "decoy")
        decoy.mkdir()
        (decoy / "kept").write_text("kept")
        first = attacks.facts(decoy, server, victim)
        outcomes = sandbox.run_programs([first + source for source in found.values()], timeout_s=1)
        harm = attacks.traces(decoy, server, victim)
        victim.kill()
    print("| program | ended | because | seconds |\n|---|---|---|---|")
    for name, outcome in zip(found, outcomes, strict=True):
        because = outcome.message.replace(str(decoy), "DECOY")[:80]
        print(f"| {name} | {outcome.status} | {because} | {outcome.seconds:.2f} |")
    succeeded = sum(outcome.status == "passed" for outcome in outcomes)
    print(
        f"\n{succeeded} of {len(found)} attacks succeeded. Traces: {', '.join(harm) or 'none'}.\n"
    )


def show_problems(data: str) -> None:
    print("| problems | programs | passed | seconds |\n|---|---|---|---|")
    for name in ("humaneval", "mbpp"):
        task = find_task(name)
        if name == "mbpp":  # all of them, not only those that a model is asked
            task = dataclasses.replace(
                task, data=tuple(dataclasses.replace(s, keep="") for s in task.data)
            )
        items = make_items(task, data)
        right = [{"texts": ["\n" + item.gold]} for item in items]
        empty = [{"texts": ["\n    pass\n"]} for _ in items]
        for what, responses in (("reference solutions", right), ("`pass`", empty)):
            start = time.monotonic()
            found = code.run(task, items, responses)
            seconds = time.monotonic() - start
            passed = sum(response["outcomes"][0]["status"] == "passed" for response in found)
            print(f"| {name} | {what} | {passed} of {len(items)} | {seconds:.1f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="experiments/quickstart/eval")
    options = parser.parse_args()
    print(f"{sandbox.protection()}\n{os.cpu_count()} processors.\n")
    show_attacks()
    show_problems(options.data)
