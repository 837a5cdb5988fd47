"""The roofline against published runs: fits one efficiency per chip family, predicts the others.

    python experiments/plan_accuracy/published.py

Mesh, rows per chip and remat policy are the source's where it says so ("yes" in the last column),
else assumed: the kept projections of most tuned TPU configs, and FSDP over all chips.
"""

from typing import NamedTuple

from easylm_jax.models.attention import AttentionConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.planner import roofline
from easylm_jax.planner.case import Case
from easylm_jax.planner.topology import parse_topology

PROJECTIONS = "q:keep,k:keep,v:keep,attention_out:keep,attention_lse:keep"
LINEAR = "linear_outputs_and_attention"
EXCEPT_MLPWI = "q:keep,k:keep,v:keep,o:keep"  # MaxText's save_dot_except_mlpwi
# Shapes that are no preset: Llama 3.1's largest; MaxText's own, its ungated MLP counted as a gated
# one of two thirds the width; that of its 16B is not stated, Llama's 13B stands for it.
M22 = dict(num_layers=48, d_model=6144, num_heads=24, num_kv_heads=24, head_dim=256, d_ff=16_384)
M405 = dict(num_layers=126, d_model=16_384, num_heads=128, head_dim=128, d_ff=53_248)


class Run(NamedTuple):
    name: str
    model: str
    topology: str
    seq_len: int
    rows: int  # per chip
    remat: str
    mfu: float  # published, causal
    fit: bool = False  # the family's efficiency is fitted to this run
    known: bool = False  # rows and remat are the source's
    mesh: str = "1,-1,1,1"


RUNS = (
    Run(
        *("MaxText Llama2-70B", "llama2_70b", "v5p:4x8x8", 4096, 4, EXCEPT_MLPWI, 0.646),
        fit=True,
        known=True,
    ),
    Run("AXLearn Llama2-7B", "llama2_7b", "v5p:4x8x8", 4096, 4, PROJECTIONS, 0.612),
    Run("AXLearn Llama2-70B", "llama2_70b", "v5p:8x8x8", 4096, 2, PROJECTIONS, 0.659),
    Run("MaxText Llama3.1-405B", "405b", "v5p:8x8x8", 8192, 1, PROJECTIONS, 0.685),
    Run("MaxText Llama3.1-70B", "llama3_70b", "v6e:16x16", 8192, 2, PROJECTIONS, 0.470, fit=True),
    Run("MaxText Llama3.1-8B", "llama3_8b", "v6e:16x16", 8192, 3, PROJECTIONS, 0.404),
    Run("MaxText Llama2-70B", "llama2_70b", "v6e:16x16", 4096, 4, PROJECTIONS, 0.422),
    Run("MaxText Llama3.1-405B", "405b", "v6e:16x16", 8192, 1, PROJECTIONS, 0.411),
    Run("IBM fms-fsdp 7B", "llama2_7b", "a100:128", 4096, 2, LINEAR, 0.517, fit=True),
    Run(
        *("LLaMA-65B paper", "llama_65b", "a100:2048", 2048, 1, "linear_outputs", 0.485),
        mesh="1,256,1,8",
    ),
    Run(
        *("MaxText Llama2-7B", "llama2_7b", "h100:8", 4096, 2, LINEAR, 0.492),
        fit=True,
        known=True,
    ),
    Run("AXLearn Llama2-7B", "llama2_7b", "h100:256", 4096, 4, LINEAR, 0.507),
    Run("MaxText Llama3-70B", "llama3_70b", "h100:128", 8192, 2, PROJECTIONS, 0.478),
    Run("MaxText Llama3.1-70B", "llama3_70b", "h200:256", 8192, 2, PROJECTIONS, 0.479),
    Run("IBM fms-fsdp 7B", "llama2_7b", "h100:128", 4096, 2, LINEAR, 0.416),
    Run("MaxText synthetic 22B", "22b", "v4:4x4x4", 2048, 16, "full", 0.567, fit=True, known=True),
    Run("MaxText synthetic 16B", "llama_13b", "v5e:16x16", 2048, 6, "full", 0.611, fit=True),
    # EasyLM of 2023: XLA's attention, all but nothing kept
    Run("EasyLM OpenLLaMA-7B", "llama_7b", "v4:4x8x8", 2048, 8, "full", 0.330),
)


def case_of(run: Run) -> Case:
    """The case of a run, with an attention kernel that never forms the score matrix."""
    changes = dict(dtype="bfloat16", remat=run.remat)
    changes["attention"] = AttentionConfig(implementation="splash")
    name, shape = {"22b": ("llama_33b", M22), "405b": ("llama3_70b", M405)}.get(
        run.model, (run.model, {})
    )
    model = preset(name, **changes, **shape)
    rows = run.rows * parse_topology(run.topology).num_chips
    return Case(model, OptimConfig(), rows, run.seq_len, 1, run.mesh)


def fitted_efficiency(run: Run) -> float:
    """The efficiency of the products at which the roofline gives the run's published MFU."""
    topology = parse_topology(run.topology)
    low, high = 0.05, 1.5
    while high - low > 1e-4:
        middle = (low + high) / 2
        roofline.EFFICIENCY[topology.chip.name] = (middle, "")
        low, high = (
            (middle, high)
            if roofline.roofline(case_of(run), topology).mfu < run.mfu
            else (low, middle)
        )
    return low


def main() -> None:
    """Print what fits, then the table of README.md."""
    shipped = dict(roofline.EFFICIENCY)
    for run in RUNS:
        if run.fit:
            chip = parse_topology(run.topology).chip.name
            print(f"{chip}: fitted {fitted_efficiency(run):.3f}, shipped {shipped[chip][0]}")
            roofline.EFFICIENCY[chip] = shipped[chip]
    print("| run | chips | T | rows per chip | published MFU | predicted | error | inputs known |")
    print("|---|---|---|---|---|---|---|---|")
    for run in RUNS:
        topology = parse_topology(run.topology)
        e = roofline.roofline(case_of(run), topology)
        error = "fitted" if run.fit else f"{e.mfu / run.mfu - 1:+.1%}"
        print(
            f"| {run.name} | {topology} | {run.seq_len} | {run.rows} | {run.mfu:.1%} | {e.mfu:.1%}"
            f" ({e.tokens_per_s_per_chip:,.0f} tokens/s) | {error} | "
            f"{'yes' if run.known else 'no'} |"
        )


if __name__ == "__main__":
    main()
