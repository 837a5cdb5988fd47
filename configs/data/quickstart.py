"""Training data of the quickstart: 10.6 MB of public-domain English, shipped with the repository.

Purpose:   the smallest real corpus: books, government web posts, Python enhancement proposals
Hardware:  any; under a minute on two cores
Result:    3.08 M tokens in three sources (books 1.68, gov 0.71, peps 0.69), 3.46 bytes per token

    python -m easylm_jax.prepare --config=configs/data/quickstart.py --out=runs/quickstart_data
"""

from pathlib import Path

from easylm_jax.config import as_config_dict
from easylm_jax.prepare import PrepareConfig

CORPUS = Path(__file__).parents[2] / "experiments" / "quickstart" / "corpus"


def get_config():
    return as_config_dict(
        PrepareConfig(
            sources={
                name: (str(CORPUS / f"{name}.jsonl.zst"),) for name in ("books", "gov", "peps")
            },
            vocab_size=4096,  # pieces; a larger vocabulary would outweigh a model this small
            validation_fraction=0.02,  # of the documents: enough for a held-out loss
        )
    )
