"""What a training run will need, worked out before there is a machine for it.

    python -m easylm_jax.plan --config=configs/llama_pod.py:65b_v5p_2048 --topology=v5p:8x16x16
    python -m easylm_jax.plan --config=configs/llama_pretrain.py:7b --topology=v5e:16x16 --search
    python -m easylm_jax.plan --remat --model=7b --policies q:keep,down:keep

The first compiles the training step for that topology, on this CPU, and prints what each chip needs
and sends, and a roofline of the speed. `--search` looks for a better mesh, remat policy and number
of micro-batches. `--remat` compares rematerialisation policies (docs/remat.md). Nothing is trained
and no parameter is allocated. docs/planning.md says how to read the output.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from easylm_jax.config import at_least, from_config_dict, run_main
from easylm_jax.mesh import parse_mesh
from easylm_jax.models.llama import LlamaConfig
from easylm_jax.models.presets import PRESETS, preset
from easylm_jax.models.remat import POLICIES, parse_policy
from easylm_jax.planner import memory, remat, roofline
from easylm_jax.planner.case import Case
from easylm_jax.planner.compiled import Compiled, compile_step
from easylm_jax.planner.search import fits, search, what_would_fit
from easylm_jax.planner.topology import Topology, parse_topology
from easylm_jax.train import TrainConfig

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of one case on one topology; `compiled` is None where nothing was compiled."""

    case: Case
    topology: Topology
    parts: memory.Parts
    estimate: roofline.Estimate | None  # None: `roofline.unknown_speed` says why
    compiled: Compiled | None

    @property
    def peak_bytes(self) -> float:
        return float(self.compiled.peak_bytes) if self.compiled else self.parts.total

    @property
    def fits(self) -> bool:
        if self.compiled:
            return fits(self.compiled, self.topology)
        return self.peak_bytes <= self.topology.chip.hbm_bytes


def make_plan(case: Case, topology: Topology, *, compiles: bool = True) -> Plan:
    """The estimates, and what the compiler says unless it is not asked.

    Raises:
      ValueError: the case cannot run on the topology at all, for another reason than memory.
    """
    sizes = parse_mesh(case.mesh, topology.num_chips)
    case.check_divides(sizes)
    compiled = compile_step(case, topology) if compiles else None
    speed = None if roofline.unknown_speed(topology) else roofline.roofline(case, topology)
    parts = memory.estimate(case, sizes, on_cpu=topology.chip.name == "cpu")
    return Plan(case, topology, parts, speed, compiled)


def find(case: Case, topology: Topology, *, compiles: bool = True, keep: int = 3) -> list[Plan]:
    """The `keep` fastest ways to run the case that fit, compiled or, if not asked, by estimate.

    Raises:
      ValueError: nothing is known of the chip's speed, or nothing fits.
    """
    if roofline.unknown_speed(topology):
        raise ValueError(
            f"--search compares speeds, and nothing is known of that of {topology}; name the chip "
            "that you will use, such as --topology=v5e:4x4 or --topology=h100:8"
        )
    found = search(case, topology, compile=compile_step if compiles else None, keep=keep)
    return [Plan(c.case, topology, c.parts, c.estimate, c.compiled) for c in found]


def case_of(cfg: TrainConfig) -> Case:
    """The part of a run that decides what a step needs.

    Raises:
      ValueError: the run trains adapters.
    """
    if cfg.lora:
        raise ValueError(
            "plan works out the training of all parameters, not of adapters; set "
            "--config.lora=None for the upper bound that it gives"
        )
    return Case(cfg.model, cfg.optim, cfg.batch_size, cfg.seq_len, cfg.micro_batches, cfg.mesh)


# ---- the report ---------------------------------------------------------------------------------


def by_kind(compiled: Compiled) -> list[dict[str, Any]]:
    """Collectives of one kind, type and mesh axes added up, per chip and step."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for c in compiled.collectives:
        row = rows.setdefault(
            (c.kind, c.dtype, c.axes),
            dict(kind=c.kind, dtype=c.dtype, axes="x".join(c.axes), group_size=c.group_size)
            | dict(times=0, bytes=0, sent_bytes=0),
        )
        row["times"] += c.times
        row["bytes"] += c.bytes * c.times
        row["sent_bytes"] += round(c.sent_bytes)
    return sorted(rows.values(), key=lambda row: -row["sent_bytes"])


def as_json(plan: Plan) -> dict[str, Any]:
    """One flat object; sizes in bytes per chip, speeds in tokens, seconds and FLOPs."""
    case, topology, compiled, estimate = plan.case, plan.topology, plan.compiled, plan.estimate
    report = {
        "topology": str(topology),
        "num_chips": topology.num_chips,
        "mesh": parse_mesh(case.mesh, topology.num_chips),
        "remat": case.model.remat,
        "attention": dataclasses.asdict(case.model.attention),
        "parameters": memory.weights(case.model).total,
        "batch_size": case.batch_size,
        "seq_len": case.seq_len,
        "micro_batches": case.micro_batches,
        "fits": plan.fits,
        "peak_bytes_per_chip": round(plan.peak_bytes),
        "hbm_bytes_per_chip": round(topology.chip.hbm_bytes),
        "parts": {name: round(size) for name, size in dataclasses.asdict(plan.parts).items()},
        "flops_per_step": estimate.flops_per_step if estimate else None,
        "est_step_s": estimate.step_s if estimate else None,
        "est_tokens_per_s_per_chip": estimate.tokens_per_s_per_chip if estimate else None,
        "est_mfu": estimate.mfu if estimate else None,
        "est_assumptions": estimate.assumptions if estimate else None,
        "compiled": None,
        "collectives": None,
        "compile_s": None,
    }
    if compiled:
        fields = dataclasses.asdict(dataclasses.replace(compiled, collectives=()))
        report["compiled"] = {
            k: v for k, v in fields.items() if k not in ("collectives", "compile_s")
        }
        report["collectives"] = by_kind(compiled)
        report["compile_s"] = round(compiled.compile_s, 1)
    return report


def as_text(plan: Plan) -> str:
    """The plan for people: memory, collectives, speed."""
    case, topology = plan.case, plan.topology
    mesh = " x ".join(f"{k} {v}" for k, v in parse_mesh(case.mesh, topology.num_chips).items())
    head = (
        f"{memory.weights(case.model).total:,} parameters, {case.batch_size:,} rows of "
        f"{case.seq_len:,} tokens in {case.micro_batches} micro-batches\n"
        f"{topology}: {topology.num_chips:,} chips, mesh {mesh}\n"
        f"remat {case.model.remat}, attention {case.model.attention.implementation}"
    )
    blocks = [head, _memory_text(plan)]
    if plan.compiled and not plan.compiled.ran_out_of_memory:
        blocks.append(_collectives_text(plan.compiled))
    blocks.append(_speed_text(plan) if plan.estimate else roofline.unknown_speed(topology))
    return "\n\n".join(blocks)


def _memory_text(plan: Plan) -> str:
    rows = [["memory per chip, GiB", "estimated", "compiled"]]
    parts = dataclasses.asdict(plan.parts)
    rows += [[name.replace("_", " "), _gib(size), ""] for name, size in parts.items()]
    peak = ["peak", _gib(plan.parts.total), ""]
    if c := plan.compiled:
        rows.append(["arguments (state and batch)", "", _gib(c.arguments)])
        if not c.ran_out_of_memory:
            rows += [
                ["outputs in new memory", "", _gib(c.outputs - c.aliased)],
                ["all temporaries", "", _gib(c.temporaries)],
                ["program", "", _gib(c.program_bytes)],
                ["on the host", "", _gib(c.host_bytes)],
            ]
        peak[2] = _gib(c.peak_bytes)
    limit, by = plan.topology.chip.hbm_bytes, "compiled" if plan.compiled else "estimated"
    need = f"{_gib(plan.peak_bytes)} of {_gib(limit)} GiB ({by})"
    verdict = f"fits: {need}, {1 - plan.peak_bytes / limit:.0%} to spare"
    return "\n".join([*_table([*rows, peak]), verdict if plan.fits else f"does not fit: {need}"])


def _collectives_text(compiled: Compiled) -> str:
    rows = [["sent per chip and step", "type", "over", "chips", "times", "GiB", "GiB sent"]]
    total = sum(row["sent_bytes"] for row in by_kind(compiled))
    for row in by_kind(compiled):
        if row["sent_bytes"] > total / 1000:
            sizes = [f"{row['times']:,}", _gib(row["bytes"]), _gib(row["sent_bytes"])]
            rows.append([row["kind"], row["dtype"], row["axes"], str(row["group_size"]), *sizes])
    return "\n".join(_table(rows))


def _speed_text(plan: Plan) -> str:
    e = plan.estimate
    parts = dict(compute=e.compute_s, memory=e.memory_s, ICI=e.ici_s, DCN=e.dcn_s)
    return "\n".join(
        [
            f"estimated, not measured: {_short(e.step_s)} s per step, "
            f"{e.tokens_per_s_per_chip:,.0f} tokens/s/chip, MFU {e.mfu:.1%}",
            ", ".join(f"{name} {_short(seconds)} s" for name, seconds in parts.items())
            + f"; {e.flops_per_step:.3g} FLOPs of the model per step, {e.hardware_flops:.3g} with "
            "what is computed again",
            *(f"- {assumption}" for assumption in e.assumptions),
        ]
    )


def _candidates_text(plans: Sequence[Plan]) -> str:
    rows = [["the fastest that fit", "s/step", "tokens/s/chip", "MFU", "GiB", "compiled"]]
    for plan in plans:
        case, e = plan.case, plan.estimate
        name = f"mesh {case.mesh} remat {case.model.remat} micro_batches {case.micro_batches}"
        peak = _gib(plan.compiled.peak_bytes) if plan.compiled else ""
        speed = [f"{_short(e.step_s)}", f"{e.tokens_per_s_per_chip:,.0f}", f"{e.mfu:.1%}"]
        rows.append([name, *speed, _gib(plan.parts.total), peak])
    settings = plans[0].case
    best = (
        f"--config.mesh={settings.mesh} --config.model.remat={settings.model.remat} "
        f"--config.micro_batches={settings.micro_batches}"
    )
    notes = [f"- {assumption}" for assumption in plans[0].estimate.assumptions]
    return "\n".join([*_table(rows), "speeds are estimated, not measured:", *notes, best])


def _gib(num_bytes: float) -> str:
    return "<0.001" if 0 < num_bytes < GIB / 1000 else _short(num_bytes / GIB)


def _short(number: float) -> str:
    """Two decimals, or for what is small two digits."""
    return f"{number:,.2f}" if number >= 0.1 or not number else f"{number:.2g}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    return [line.rstrip() for line in remat.table(rows)]


# ---- the commands -------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    """`plan --config --topology`."""
    config, name = flags.FLAGS.config, flags.FLAGS.topology
    if config is None or not name:
        raise ValueError(
            "--config and --topology are needed, such as `python -m easylm_jax.plan "
            "--config=configs/llama_pretrain.py:7b --topology=v5e:16x16`; --help says more"
        )
    if len(argv) > 1:
        raise ValueError(f"arguments {argv[1:]} are not understood; settings are --config.KEY=...")
    case, topology = case_of(from_config_dict(TrainConfig, config)), parse_topology(name)
    jax.config.update("jax_platforms", "cpu")
    if topology.chip.name == "cpu":
        jax.config.update("jax_num_cpu_devices", topology.num_chips)
    show(
        case,
        topology,
        searches=flags.FLAGS.search,
        compiles=not flags.FLAGS.no_compile,
        as_one_line=flags.FLAGS.json,
    )


def show(
    case: Case, topology: Topology, *, searches: bool, compiles: bool, as_one_line: bool
) -> None:
    """Print the plan, or the best that the search finds.

    Raises:
      ValueError: the case does not fit, or nothing does: says what would.
    """
    if compiles and sys.stderr.isatty():
        print(f"compiling for {topology}, which takes a minute or more", file=sys.stderr)
    if searches:
        plans = find(case, topology, compiles=compiles)
        best = as_json(plans[0]) | {"candidates": [as_json(plan) for plan in plans]}
        print(json.dumps(best) if as_one_line else _candidates_text(plans))
        return
    plan = make_plan(case, topology, compiles=compiles)
    print(json.dumps(as_json(plan)) if as_one_line else as_text(plan), flush=True)
    if not plan.fits and plan.estimate:
        raise ValueError(what_would_fit(case, topology, {case: plan.peak_bytes}))


def remat_main(arguments: Sequence[str]) -> None:
    """`plan --remat`: parse the arguments, compare, print."""
    parser = argparse.ArgumentParser(
        prog="python -m easylm_jax.plan", description=remat.__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--remat", action="store_true", required=True, help="compare rematerialisation policies")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="7b", help="name in models/presets.py (default: 7b)")
    which.add_argument("--config", metavar="FILE.py[:ARG]", help="take the model of this config")
    add("--layers", type=at_least(2), default=2, help="layers to compile, 2 or more (default: 2)")
    add("--batch", type=at_least(1), default=1, help="rows on one device (default: 1)")
    add("--seq_len", type=at_least(1), default=2048, help="tokens per row (default: 2048)")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of activations")
    add(
        *("--policies", "-p"),
        nargs="+",
        action="extend",
        default=[],
        metavar="POLICY",
        help="further policies, aliases or maps such as q:keep,gate:offload",
    )
    add("--json", action="store_true", help="one JSON line instead of tables")
    args = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    try:
        config = load_model(args.model, args.config)
        for policy in args.policies:
            parse_policy(policy)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")

    config = dataclasses.replace(
        config, num_layers=args.layers, vocab_size=remat.VOCABULARY, dtype=args.dtype
    )
    policies = dict.fromkeys(["none", *POLICIES, *args.policies])
    size = dict(batch=args.batch, seq_len=args.seq_len)
    rows = remat.compare_policies(config, list(policies), **size)
    head = dict(model=args.config or args.model, layers=args.layers, dtype=args.dtype, **size)
    head |= dict(vocab_size=remat.VOCABULARY, jax=jax.__version__)
    if args.json:
        print(remat.as_json(rows, **head))
    else:
        first = "  ".join(f"{key} {value}" for key, value in head.items())
        print(first, remat.as_text(rows), sep="\n\n")


def load_model(name: str | None, config_file: str | None) -> LlamaConfig:
    """The model of a preset ("7b" is short for "llama_7b") or of a config file `file.py:arg`.

    Raises:
      ValueError: no such preset, or no such file.
    """
    if config_file is None:
        return preset(f"llama_{name}" if f"llama_{name}" in PRESETS else name)
    path, _, argument = config_file.partition(":")
    if not Path(path).is_file():
        raise ValueError(f"--config={config_file}: there is no file {path}; give file.py:argument")
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(argument) if argument else module.get_config()
    return from_config_dict(TrainConfig, config).model


if __name__ == "__main__":
    if "--remat" in sys.argv:
        remat_main(sys.argv[1:])
    else:
        config_flags.DEFINE_config_file(
            "config",
            None,
            "Python file with get_config(), `file.py:arg`. --config.KEY=VALUE changes a setting.",
        )
        flags.DEFINE_string("topology", None, "Such as v5p:8x16x16, v5e:16x16@2, v4:4x4x8, cpu:8.")
        flags.DEFINE_bool("search", False, "Look for a better mesh, remat policy, micro-batches.")
        flags.DEFINE_bool("json", False, "One JSON line instead of text.")
        flags.DEFINE_bool("no_compile", False, "The analytic estimates alone.")
        run_main(main)
