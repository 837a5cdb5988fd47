"""Which sums of gradients the TPU compiler scatters, and which it makes whole on every chip.

    python experiments/reduce_scatter/run.py        # a minute of CPU, no TPU needed (extra `plan`)

Compiles one explicit `psum_scatter` of a float32 matrix per case, rows over the mesh axis `fsdp`,
and reads from the compiled program what became of it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from easylm_jax.mesh import BATCH_AXES, make_mesh
from easylm_jax.planner.collectives import collectives
from easylm_jax.planner.topology import devices, parse_topology

TORUS_3D = ("v5p:8x8x8", "8,64,1,1")
CASES = [
    *((*TORUS_3D, 8192, 128 * n) for n in (8, 11, 13, 17, 19, 22, 23, 29, 31, 37, 41, 43, 92)),
    *((*TORUS_3D, d_model, d_ff) for d_model, d_ff in ((4096, 11008), (5120, 13824))),
    *((*TORUS_3D, 8192, d_ff) for d_ff in (17920, 22016, 22528, 28672, 32000)),
    *(("v5p:8x16x16", "8,256,1,1", 8192, d_ff) for d_ff in (8192, 10240, 13824, 22016, 28672)),
    *(("v5p:8x16x16", "8,256,1,1", rows, 13824) for rows in (4096, 5120)),
    ("v4:8x8x8", "8,64,1,1", 8192, 22016),
    ("v4:8x8x8", "8,64,1,1", 8192, 8192),
    *(("v5e:16x16", "1,256,1,1", rows, 4096) for rows in (4096, 8192)),
    ("v6e:16x16", "1,256,1,1", 4096, 8192),
    ("v5e:16x16", "16,16,1,1", 4096, 4096),
    ("v5e:8x16", "1,128,1,1", 4096, 4096),
    ("v5p:4x4x8", "8,16,1,1", 8192, 22016),
]


def becomes(topology: str, mesh_axes: str, rows: int, columns: int) -> str:
    """The kind of the collective along `fsdp` in the compiled program."""
    mesh = make_mesh(mesh_axes, devices(parse_topology(topology)))
    shape = (mesh.size, rows, columns)
    split = NamedSharding(mesh, P(BATCH_AXES))
    scatter = jax.shard_map(
        lambda x: lax.psum_scatter(x[0], "fsdp", scatter_dimension=0, tiled=True),
        mesh=mesh,
        in_specs=P(BATCH_AXES),
        out_specs=P("fsdp"),
        check_vma=False,
    )
    program = jax.jit(scatter).lower(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split))
    found = collectives(program.compile().as_text(), mesh.shape)
    return max((c for c in found if "fsdp" in c.axes), key=lambda c: c.sent_bytes).kind


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    print("| slice | mesh | rows | columns, in tiles of 128 | becomes |\n|---|---|---|---|---|")
    for topology, mesh_axes, rows, columns in CASES:
        kind = becomes(topology, mesh_axes, rows, columns)
        tiles = f"{columns:,} = {columns // 128} x 128"
        print(f"| {topology} | {mesh_axes} | {rows:,} | {tiles} | {kind} |", flush=True)


if __name__ == "__main__":
    main()
