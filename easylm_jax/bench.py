"""Time training steps, or reading and writing with a model, on a fixed piece of work.

    python -m easylm_jax.bench --work=small --dtype=float32 --json
    python -m easylm_jax.bench --work=decode --model=PATH --batch=8 --json

The work itself is in `bench_train.py` and `bench_decode.py`, of which only one is imported, so that
the peak of memory is that of the work. A measurement, never a test.
"""

import argparse
import json
import os
import resource

import jax

WORKS = ("small", "long", "1b", "decode")


def main() -> None:
    """Parse the arguments, run, print."""
    parser = argparse.ArgumentParser(
        prog="python -m easylm_jax.bench",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--work", choices=WORKS, default="small", help="training, or `decode`")
    parser.add_argument("--model", help="decode: path of a model, of any format")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--remat", default="none", help="policy of models/remat.py")
    parser.add_argument("--mesh", default="1,-1,1,1", help="replica,fsdp,sequence,tensor")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--batch", type=int, help="rows, instead of the work's own; decode: 1")
    parser.add_argument("--prompt", type=int, default=512, help="decode: tokens to read, per row")
    parser.add_argument("--new", type=int, default=128, help="decode: tokens to write, per row")
    parser.add_argument("--chunk", type=int, default=8, help="decode: tokens per dispatch")
    parser.add_argument(
        "--micro_batches", type=int, default=1, help="parts whose gradients a step adds up"
    )
    parser.add_argument("--json", action="store_true", help="one JSON line instead of a table")
    options = parser.parse_args()
    result = _decode(options) if options.work == "decode" else _train(options)
    result |= {
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "device": jax.devices()[0].device_kind,
        "load1": round(os.getloadavg()[0], 1),
        "jax": jax.__version__,
    }
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:20s} {value}" for name, value in result.items()))


def _decode(options: argparse.Namespace) -> dict[str, str | int | float]:
    from easylm_jax import bench_decode

    if not options.model:
        raise SystemExit("error: --work=decode needs --model=PATH")
    return bench_decode.run(
        model=options.model,
        dtype=options.dtype,
        mesh=options.mesh,
        rows=options.batch or 1,
        prompt_tokens=options.prompt,
        new_tokens=options.new,
        chunk=options.chunk,
        steps=options.steps,
    )


def _train(options: argparse.Namespace) -> dict[str, str | int | float]:
    from easylm_jax import bench_train

    names = ("work", "dtype", "remat", "mesh", "steps", "batch", "micro_batches")
    return bench_train.run(**{name: getattr(options, name) for name in names})


if __name__ == "__main__":
    main()
