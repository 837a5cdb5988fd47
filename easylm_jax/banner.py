"""The first and the last lines that a run prints. Called by `train.py` alone."""

import shlex
import sys
from collections.abc import Iterator, Mapping

import jax

from easylm_jax.checkpoint import Restored


def opening_lines(
    workdir: str,
    *,
    mesh_shape: Mapping[str, int],
    num_params: int,
    num_trained: int,
    data: str,
    total_steps: int,
    rows: int,
    seq_len: int,
    restored: Restored | None,
    init_from: str | None,
) -> Iterator[str]:
    """Devices, sizes, where things go, and where the parameters come from."""
    sizes = ", ".join(f"{name} {size}" for name, size in mesh_shape.items())
    yield f"{jax.device_count()} x {jax.devices()[0].device_kind}: {sizes}"
    trained = "" if num_trained == num_params else f", of which {num_trained:,} train"
    yield f"data: {data}"
    yield (
        f"{num_params:,} parameters{trained}, {total_steps:,} steps of {rows} rows x {seq_len} "
        f"tokens = {total_steps * rows * seq_len:,} tokens"
    )
    yield f"everything is written to {workdir}"
    if restored is not None:
        yield from restored.skipped
        yield f"resuming after step {restored.step:,}"
    elif init_from:
        yield f"starting from the parameters in {init_from}"


def measured_lines(step: int, values: Mapping[str, float]) -> Iterator[str]:
    """The measured values that are worth a line on the screen."""
    if "heldout/loss" in values:
        yield (
            f"step {step:,}: held-out loss {values['heldout/loss']:.4f} nats per token, "
            f"{values['heldout/bits_per_byte']:.4f} bits per byte"
        )
    if "pairs/number" in values:
        line = f"step {step:,}: of {values['pairs/number']:.0f} held-out pairs, preferred answer "
        line += "likelier per token: "
        names = [n for n in ("unmarked", "good", "bad") if f"pairs/{n}/prefers_chosen" in values]
        line += ", ".join(f"{n} {values[f'pairs/{n}/prefers_chosen']:.1%}" for n in names)
        if "pairs/tells" in values:
            line += f"; told by the markers: {values['pairs/tells']:.1%}"
            line += f" +- {values['pairs/tells_stderr']:.1%}"
        yield line
    tasks = [n for n in values if n.split("/")[0] not in ("heldout", "pairs")]
    shown = [f"{n} {values[n]:.3f}" for n in tasks if not n.endswith(("_stderr", "/chance"))]
    if shown:
        yield f"step {step:,}: {', '.join(shown)}"


def closing_lines(
    workdir: str, step: int, total_steps: int, best_step: int | None
) -> Iterator[str]:
    """How far the run came, what to look at, and the command that goes on with it."""
    yield f"{'finished' if step == total_steps else 'stopped'} after step {step:,}/{total_steps:,}"
    yield f"checkpoint  {workdir}/checkpoints/{step:08d}"
    if best_step is not None:
        yield f"best        {workdir}/checkpoints/{best_step:08d}"
    try:
        from easylm_jax.report import write_report

        yield f"report      {write_report(workdir)}"
    except ImportError:
        yield "report      not written: it needs `pip install easylm_jax[report]`"
    command = sys.orig_argv
    if step == total_steps:
        command = [arg for arg in command if not arg.startswith("--config.duration=")]
        command.append(f"--config.duration={2 * total_steps} steps")
    yield f"continue    {shlex.join(command)}"
