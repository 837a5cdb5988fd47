"""Preference data of the quickstart: 1,014 pairs of Anthropic's HH, shipped with the repository.

Purpose:   the smallest real preference data: people chose the less harmful of two answers
Hardware:  any; seconds
Result:    of 2,028 answers about four fifths to train on, the rest held out by their question

    python -m easylm_jax.prepare --config=configs/data/quickstart_chat.py \\
        --out=runs/quickstart_chat_data
"""

from pathlib import Path

from easylm_jax.config import as_config_dict
from easylm_jax.prepare_chat import ChatPrepareConfig, DatasetConfig

CORPUS = Path(__file__).parents[2] / "experiments" / "quickstart" / "corpus"


def get_config():
    return as_config_dict(
        ChatPrepareConfig(
            datasets={
                "hh": DatasetConfig(reader="hh", files=(str(CORPUS / "hh_harmless.jsonl.zst"),))
            },
            validation_fraction=0.2,  # of the questions: enough pairs to measure on
        )
    )
