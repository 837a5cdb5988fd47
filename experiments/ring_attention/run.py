"""Does ring attention on 8 devices equal blockwise attention on one, and what does a device hold?

    python experiments/ring_attention/run.py --tokens=65536

First the compiled memory of one device, forward and backward, and what it sends, for a row split
over 1 (plain blockwise), 2, 4 and 8 CPU devices, in a ring and by gathering the keys; and so for
the training step of a model, with fully recomputed layers. Nothing is run. Then the output and the
gradients of q, k and v are computed on 1 and on 8 devices, for one document and for packed ones.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from easylm_jax.mesh import make_mesh
from easylm_jax.models.attention import AttentionConfig, attention
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.planner.case import Case
from easylm_jax.planner.collectives import collectives
from easylm_jax.planner.compiled import lower_step

WIDTH = 64  # of a head


def compile_on(
    num_devices: int, across: str, *, tokens: int, heads: int, kv_heads: int, dtype: str
):
    """The mesh, the sharding of a row, and the compiled forward and backward pass."""
    mesh = make_mesh(f"sequence:{num_devices}", jax.devices()[:num_devices])
    config = AttentionConfig(across_sequence=across)

    def run(arrays, ids, d_out):
        attend = functools.partial(attention, **ids, config=config)
        out, vjp = jax.vjp(lambda arrays: attend(*arrays), arrays)
        return out, *vjp(d_out)[0]

    split = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    q, k = (
        jax.ShapeDtypeStruct((1, tokens, n, WIDTH), dtype, sharding=split)
        for n in (heads, kv_heads)
    )
    id_names = ("q_segments", "k_segments", "q_positions", "k_positions")
    ids = dict.fromkeys(id_names, jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=split))
    with jax.set_mesh(mesh):
        compiled = jax.jit(run, out_shardings=split).lower((q, k, k), ids, q).compile()
    return mesh, split, compiled


def print_memory(**shape) -> None:
    print(f"\n{shape}, forward and backward, MiB of one device")
    print(
        "| devices | arguments, results | temporaries | sum | of one | permutes | sent | gather |"
    )
    print("|---|---|---|---|---|---|---|---|")
    first = None
    for num_devices in (1, 2, 4, 8):
        mesh, _, compiled = compile_on(num_devices, "ring", **shape)
        held, temporaries = memory_of(compiled)
        first = first or held + temporaries
        found = collectives(compiled.as_text(), mesh.shape)
        assert {c.kind for c in found} <= {"collective-permute"}
        gather = sum(memory_of(compile_on(num_devices, "gather", **shape)[2]))
        sent = sum(c.bytes * c.times for c in found) / 2**20
        print(
            f"| {num_devices} | {held:.1f} | {temporaries:.1f} | {held + temporaries:.1f} "
            f"| 1/{first / (held + temporaries):.2f} | {sum(c.times for c in found)} "
            f"| {sent:.1f} | {gather:.1f} |",
            flush=True,
        )


def memory_of(compiled) -> tuple[float, float]:
    """MiB of arguments and results, and of temporaries."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held / 2**20, memory.temp_size_in_bytes / 2**20


def print_model_memory(*, tokens: int) -> None:
    """Parameters and optimiser are whole on every device; what depends on the tokens is not."""
    print(f"\ntraining step of preset `small`, a row of {tokens} tokens, temporaries of one device")
    for across in ("ring", "gather"):
        attention_config = AttentionConfig(across_sequence=across)
        model = preset("small", remat="full", attention=attention_config)
        row = [across]
        for num_devices in (1, 2, 4, 8):
            mesh = make_mesh(f"sequence:{num_devices}", jax.devices()[:num_devices])
            optim = OptimConfig()
            case = Case(model, optim, 1, tokens, 1, f"sequence:{num_devices}")
            compiled = lower_step(case, mesh).compile()
            row.append(f"{memory_of(compiled)[1]:.0f} MiB")
        print("|", " | ".join(row), "|", flush=True)


def ids_of(lengths: np.ndarray) -> dict[str, np.ndarray]:
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    names = ("q_segments", "k_segments", "q_positions", "k_positions")
    return dict(zip(names, (segments, segments, positions, positions), strict=True))


def print_differences(*, tokens: int, documents: int, rng: np.random.Generator) -> None:
    cuts = np.sort(rng.choice(np.arange(1, tokens), documents - 1, replace=False))
    ids = ids_of(np.diff([0, *cuts, tokens]))
    draw = [rng.normal(size=(1, tokens, 1, WIDTH)).astype(np.float32) for _ in range(4)]
    results = []
    for num_devices in (1, 8):
        shape = dict(tokens=tokens, heads=1, kv_heads=1, dtype="float32")
        _, split, compiled = compile_on(num_devices, "ring", **shape)
        args = jax.device_put((tuple(draw[:3]), ids, draw[3]), split)
        cpu = time.process_time()
        results.append(jax.device_get(compiled(*args)))
        print(f"{num_devices} devices: {time.process_time() - cpu:.0f} CPU seconds", flush=True)
    print(f"{tokens} tokens in {documents} documents; largest difference over largest entry:")
    for name, one, ring in zip(("out", "d_q", "d_k", "d_v"), *results, strict=True):
        print(f"  {name:5} {np.abs(one - ring).max() / np.abs(one).max():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536)
    tokens = parser.parse_args().tokens
    jax.config.update("jax_num_cpu_devices", 8)
    print_memory(tokens=tokens, heads=1, kv_heads=1, dtype="float32")
    print_memory(tokens=tokens, heads=8, kv_heads=2, dtype="bfloat16")
    print_model_memory(tokens=tokens)
    for documents in (20, 1):
        print_differences(tokens=tokens, documents=documents, rng=np.random.default_rng(0))


if __name__ == "__main__":
    main()
