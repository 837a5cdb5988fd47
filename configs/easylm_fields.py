"""Fine-tuning on records in EasyLM's `fields` language, as EasyLM's `json_dataset` read them.

Purpose:   data that were made for EasyLM: JSONL whose fields, or an example's own spec, say what is
           read and what carries loss
Source:    young-geng/EasyLM, EasyLM/data.py (TextProcessor); the language is in text/fields.py
Hardware:  16 bytes per parameter over fsdp x tensor
Data:      JSONL of your own. `--config.data.fields.fields_from_example=fields` takes the spec of
           each record from its key "fields", as in Koala's data (then with add_eos_token=False)
Result:    none published; it is a way to read data

    python -m easylm_jax.train --config=configs/easylm_fields.py:llama_7b --workdir=runs/fields \\
        --config.init_from=PATH --config.data.files="('PATH/train.jsonl',)" \\
        --config.data.fields.fields='[instruction+input],output'
"""

from easylm_jax.config import as_config_dict
from easylm_jax.data.source import DataConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.text.fields import FieldsConfig
from easylm_jax.train import CheckpointConfig, EvalConfig, TrainConfig


def get_config(model: str = "llama_7b"):
    config = as_config_dict(
        TrainConfig(
            model=preset(model, dtype="bfloat16", remat="linear_outputs_and_attention"),
            init_from="PATH",
            tokenizer="PATH",
            data=DataConfig(
                files=("PATH/train.jsonl",),
                fields=FieldsConfig(fields="[instruction+input],output"),
                packing="best_fit",  # "stream" is EasyLM's, which cuts examples at the ends of rows
            ),
            duration="2 epochs",
            batch_size=64,
            seq_len=2048,
            optim=OptimConfig(lr=2e-5, warmup="3%", weight_decay=0.0),
            checkpoint=CheckpointConfig(every="500 steps"),
            eval=EvalConfig(every="500 steps"),
        )
    )
    config.tokenizer = config.get_oneway_ref("init_from")  # the model's own, unless one is named
    return config
