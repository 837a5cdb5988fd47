"""One small tokenizer of each kind, with the tokens of ChatML and Llama 3; and random text.

The SentencePiece one is like LLaMA's: dummy prefix, byte fallback. It is not a test.
"""

import functools
import random
import tempfile
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from easylm_jax.text.tokenizer import Tokenizer, load_tokenizer

CHAT = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
KINDS = ("bytes", "sentencepiece", "byte_level")

HARD = [
    "",
    " ",
    "a",
    "  two  runs   of spaces ",
    "\n\nlines\r\n\tand tabs\n",
    "NUL \0 inside",
    "emoji \U0001f600\u200d\U0001f525, Ti\u1ebfng Vi\u1ec7t, \u4e2d\u6587, e\u0301 and \u00e9",
    "the \u2581 that SentencePiece uses for a space, \u2581\u2581 twice",
    "<s></s><unk><0x0A> <|endoftext|> bos <|im_end|>\n<|im_start|>system",
    "2024-11-21 3.14159",
    "\ufeff byte order mark \u2028 and \x85",
    "do n't , please ! It 's [INST] there .",
]


def random_texts(count: int, *, seed: int = 1, longest: int = 60) -> list[str]:
    rng = random.Random(seed)
    alphabet = [c for text in HARD for c in text] + ["\U0010ffff", "\u0300", "<s>", "  ", *CHAT]
    return ["".join(rng.choices(alphabet, k=rng.randint(1, longest))) for _ in range(count)]


def sentences(count: int) -> list[str]:
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 8))) for _ in range(400)]
    return [" ".join(rng.choices(words, k=40)) + "\n12 x,\n" for _ in range(count)]


@functools.cache
def small_tokenizer(kind: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        if kind == "sentencepiece":
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences(60)),
                model_prefix=f"{folder}/tokenizer",
                model_type="bpe",
                vocab_size=500,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                control_symbols=CHAT[:1] + CHAT[2:],
                user_defined_symbols=CHAT[1:2],
                minloglevel=2,
            )
        elif kind == "byte_level":
            fast_tokenizer().save(f"{folder}/tokenizer.json")
            config = Path(folder, "tokenizer_config.json")
            config.write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
        return load_tokenizer("bytes" if kind == "bytes" else folder)


def fast_tokenizer() -> tokenizers.Tokenizer:
    """GPT-2's kind; puts `<s>` before a text where special tokens are asked for."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<s>", "</s>", "<|endoftext|>", *CHAT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(sentences(60), trainer)
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return model
