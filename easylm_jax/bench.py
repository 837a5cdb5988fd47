"""Time training steps, or reading and writing with a model, on a fixed piece of work.

    python -m easylm_jax.bench --work=small --dtype=bfloat16 --json
    python -m easylm_jax.bench --work=7b --profile=/tmp/profile
    python -m easylm_jax.bench --work=decode --model=PATH --batch=8 --json

The work itself is in `bench_train.py` and `bench_decode.py`, of which only one is imported, so that
the peak of memory is that of the work. A measurement, never a test.
"""

import argparse
import dataclasses
import json
import os
import resource

import jax

from easylm_jax.config import at_least, is_for_user

WORKS = ("small", "long", "1b", "7b", "decode")
CHANGES = ("dtype", "remat", "batch", "micro_batches", "seq_len", "layers", "state_dtype")


def main() -> None:
    """Parse the arguments, run, print."""
    count = at_least(1)
    parser = argparse.ArgumentParser(
        prog="python -m easylm_jax.bench",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--work", choices=WORKS, default="small", help="training, or `decode`")
    add("--mesh", default="1,-1,1,1", help="replica,fsdp,sequence,tensor")
    add("--steps", type=count, default=5, help="timed steps")
    add("--json", action="store_true", help="one JSON line instead of a table")
    own = parser.add_argument_group("instead of what the work has by itself")
    own.add_argument("--dtype", choices=("float32", "bfloat16"), help="of matrix products")
    own.add_argument("--batch", type=count, help="rows")
    own.add_argument("--seq_len", type=count, help="tokens per row")
    own.add_argument("--layers", type=count, help="for a quick look")
    own.add_argument("--remat", help="policy of models/remat.py")
    own.add_argument("--micro_batches", type=count, help="parts whose gradients a step adds up")
    types = ("float32", "bfloat16", "int8")
    own.add_argument("--state_dtype", choices=types, help="of AdamW's moments")
    own.add_argument(
        "--attention", help="tokamax on GPU, splash on TPU, blockwise on CPU, or other"
    )
    add("--profile", help="training: folder for a profile of one step, and a table of its parts")
    add("--model", help="decode: path of a model, of any format")
    add("--prompt", type=count, default=512, help="decode: tokens to read, per row")
    add("--new", type=at_least(2), default=128, help="decode: tokens to write, per row")
    add("--chunk", type=count, default=8, help="decode: tokens per dispatch")
    options = parser.parse_args()
    try:
        result = _decode(options) if options.work == "decode" else _train(options)
    except (ValueError, OSError) as error:
        if not is_for_user(error):
            raise
        parser.exit(2, f"error: {error}\n")
    result |= {
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "device": jax.devices()[0].device_kind,
        "load1": round(os.getloadavg()[0], 1),
        "jax": jax.__version__,
    }
    if options.json:
        print(json.dumps(result))
        return
    parts = result.pop("breakdown", {})
    print("\n".join(f"{name:24s} {value}" for name, value in result.items()))
    if parts:
        print("\nshare of the time of one profiled step")
        print("\n".join(f"{share:8.1%}  {kind}" for kind, share in parts.items()))


def _decode(options: argparse.Namespace) -> dict[str, str | int | float]:
    if not options.model:
        raise ValueError("--work=decode needs --model=PATH")
    from easylm_jax import bench_decode

    return bench_decode.run(
        model=options.model,
        dtype=options.dtype or "float32",
        mesh=options.mesh,
        rows=options.batch or 1,
        prompt_tokens=options.prompt,
        new_tokens=options.new,
        chunk=options.chunk,
        steps=options.steps,
    )


def _train(options: argparse.Namespace) -> dict[str, str | int | float | dict[str, float]]:
    from easylm_jax import bench_train

    given = {name: getattr(options, name) for name in CHANGES}
    changes = {name: value for name, value in given.items() if value is not None}
    work = dataclasses.replace(bench_train.WORKS[options.work], **changes)
    if work.batch % work.micro_batches:
        raise ValueError(
            f"{work.batch} rows do not split into {work.micro_batches} micro-batches; "
            "change --batch or --micro_batches"
        )
    settings = {name: getattr(options, name) for name in ("mesh", "steps", "attention", "profile")}
    return {"work": options.work} | bench_train.run(work, **settings)


if __name__ == "__main__":
    main()
