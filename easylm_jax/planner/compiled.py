"""The training step of a case, compiled for a topology: what the compiler says that it needs.

The same `jit_train_step` that the trainer runs, from shapes alone; nothing is allocated. That a
program does not fit is a result here, not an error.
"""

import dataclasses
import functools
import re
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from easylm_jax.batch import Batch
from easylm_jax.mesh import make_mesh
from easylm_jax.models.llama import PARAM_RULES, init_params, make_forward
from easylm_jax.objectives import cross_entropy
from easylm_jax.optim import make_optimizer
from easylm_jax.planner.case import Case
from easylm_jax.planner.collectives import Collective, collectives
from easylm_jax.planner.topology import Topology, devices
from easylm_jax.sharding import BATCH_SPEC
from easylm_jax.step import GuardConfig, jit_train_step
from easylm_jax.train_state import abstract_state, init_state


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one chip needs, in bytes.

    `peak_bytes` is what the compiler holds against its limit: arguments, outputs that are not
    written over them, temporaries and the program itself. (A program whose sum is 2 MiB below the
    limit compiles, and one 1 MiB above does not.) Where it ran out of memory, only this sum, the
    arguments and the program are known, as far as its message names them.
    """

    peak_bytes: int
    arguments: int
    program_bytes: int
    compile_s: float
    ran_out_of_memory: bool = False
    outputs: int = 0
    aliased: int = 0  # of the outputs, written where arguments were
    temporaries: int = 0
    host_bytes: int = 0
    collectives: tuple[Collective, ...] = ()


def compile_step(case: Case, topology: Topology) -> Compiled:
    """Compile one step of `case` for `topology`.

    Raises:
      ValueError: the mesh does not fit the topology, the rows, the heads or the parameters.
    """
    mesh = make_mesh(case.mesh, devices(topology))
    started = time.perf_counter()
    try:
        program = lower_step(case, mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return out_of_memory(str(error), compile_s=time.perf_counter() - started)
    compile_s = time.perf_counter() - started
    stats = program.memory_analysis()
    outputs, aliased = stats.output_size_in_bytes, stats.alias_size_in_bytes
    arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    program_bytes = stats.generated_code_size_in_bytes
    return Compiled(
        peak_bytes=arguments + outputs - aliased + temporaries + program_bytes,
        arguments=arguments,
        program_bytes=program_bytes,
        compile_s=compile_s,
        outputs=outputs,
        aliased=aliased,
        temporaries=temporaries,
        host_bytes=stats.host_temp_size_in_bytes,
        collectives=collectives(program.as_text(), mesh.shape),
    )


def lower_step(case: Case, mesh: Mesh) -> jax.stages.Lowered:
    """The step of `case` over `mesh`, lowered from shapes with shardings."""
    model = case.model
    case.check_divides(mesh.shape)
    optimizer = make_optimizer(case.optim, lambda step: case.optim.lr)
    make = functools.partial(init_state, functools.partial(init_params, model), optimizer, 0)
    with jax.set_mesh(mesh):
        state = abstract_state(make, mesh, PARAM_RULES)
        split = NamedSharding(mesh, BATCH_SPEC)
        shape = (case.batch_size, case.seq_len)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split)
        weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)
        step = jit_train_step(
            shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
            objective=cross_entropy(make_forward(model)),
            optimizer=optimizer,
            num_micro_batches=case.micro_batches,
            has_dropout=case.model.has_dropout,
            guard=GuardConfig(),
        )
        return step.lower(state, Batch(ids, ids, weights, ids, ids))


def out_of_memory(message: str, *, compile_s: float) -> Compiled:
    """What the compiler's refusal says, such as "Used 20.1G of 15.75G hbm. ..."."""
    sizes = {
        name: _bytes(found[1])
        for name, pattern in (
            ("peak_bytes", r"(?:Used |temporaries \()([\d.]+[KMGT]?)\)? (?:of|exceeds)"),
            ("program_bytes", r"program +([\d.]+[KMGT]?)"),
            ("arguments", r"arguments +([\d.]+[KMGT]?)"),
        )
        if (found := re.search(pattern, message))
    }
    unknown = dict.fromkeys(("peak_bytes", "program_bytes", "arguments"), 0)
    return Compiled(**unknown | sizes, compile_s=compile_s, ran_out_of_memory=True)


def _bytes(text: str) -> int:
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(text[-1])
    return round(float(text[:-1]) * unit) if unit else round(float(text))
