"""How many lines a newcomer reads to follow one training step, from the command to the gradient.

Printed at the end of `make test`, as information. The rule is that of the survey which gave the
target: the entry point, the loop, the model, the data, the optimiser and the config.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
PATH = (
    "configs/llama_pretrain.py",
    "easylm_jax/train.py",
    "easylm_jax/data/mixture.py",
    "easylm_jax/data/rows.py",
    "easylm_jax/batch.py",
    "easylm_jax/train_state.py",
    "easylm_jax/step.py",
    "easylm_jax/objectives.py",
    "easylm_jax/models/llama.py",
    "easylm_jax/models/attention.py",
    "easylm_jax/models/linear.py",
    "easylm_jax/optim.py",
)
TARGET = 1800

if __name__ == "__main__":
    counts = {name: len((ROOT / name).read_text().splitlines()) for name in PATH}
    for name, count in counts.items():
        print(f"{count:6d}  {name}")
    print(f"{sum(counts.values()):6d}  from the command to the gradient (target: under {TARGET})")
