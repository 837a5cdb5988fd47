"""EleutherAI's lm-evaluation-harness on our models: `pip install easylm_jax[lm_eval]`, then

    python -m easylm_jax.lm_eval_adapter run --model easylm_jax \
        --model_args pretrained=PATH,dtype=float32 --tasks piqa,hellaswag

lm-eval 0.4.13 has a fixed table of models and looks for no plugins, so its own command cannot find
ours. This one enters `easylm_jax` in the table and hands over to lm-eval, which reads the whole
command line. From Python: `lm_eval.simple_evaluate(HarnessModel(lm), tasks=["piqa"])`.

What it is not: our own runner (`evaluate.py`), or a port of any task: prompts, metrics and data are
lm-eval's, the ids and log-probabilities are ours.
"""

import logging
from collections.abc import Sequence
from typing import Any

import lm_eval.models  # noqa: F401  # fills the table, which stays as it is once it has an entry
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from easylm_jax.language_model import GenerationRequest, LanguageModel
from easylm_jax.loading import load
from easylm_jax.text.example import encode_segment
from easylm_jax.text.template import end_token, find_template, render

MAX_GEN_TOKS = 256  # where a task does not say, as in lm-eval's `hf`
GENERATION_SETTINGS = {"until", "max_gen_toks", "temperature", "top_p", "do_sample"}


@register_model("easylm_jax")
class HarnessModel(TemplateLM):
    """A `LanguageModel` as lm-eval sees models.

    Texts are encoded as in training: one BOS if the model expects one, and no spelling of a special
    token means it. Prompts that a chat template wrote are the exception, and a model that has
    written one reads all texts so from then on: wrap the LanguageModel anew for plain prompts.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        """`pretrained` is a model, or a path for `load`, whose further `options` are given here.

        lm-eval always gives the other three, which are for PyTorch and change nothing.
        """
        super().__init__()
        if batch_size not in (None, 1, "1", "auto"):
            logging.getLogger(__name__).warning(
                "batch_size %s has no effect: easylm_jax makes its batches itself", batch_size
            )
        self._lm = load(pretrained, **options) if isinstance(pretrained, str) else pretrained
        self._template = self._lm.template
        self._is_chat = False

    # ---- ids ------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self._lm.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text is scored after that has no context."""
        bos = self._lm.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self._lm.config.max_seq_len

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """lm-eval asks for no BOS (False) where it puts `prefix_token_id` before the text itself.

        A chat template has written its own BOS, if it has one.
        """
        del kwargs
        if self._is_chat:
            return self._lm.tokenizer.encode_with_specials(string)
        if add_special_tokens is False:
            return self._lm.tokenizer.encode(string)
        return self._lm.tokenizer.prompt_ids(string)

    # ---- the three verbs ------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Of (texts, context, continuation); contexts that are too long lose their beginning."""
        del kwargs
        pairs = [(context or [self.prefix_token_id], own) for _, context, own in requests]
        with tqdm(total=len(pairs), desc="log-likelihoods", disable=disable_tqdm) as bar:
            found = self._lm.loglikelihood_tokens(pairs, truncate=True, on_done=bar.update)
        return [(one.log_prob, one.is_greedy) for one in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        texts = [request.args[0] for request in requests]
        with tqdm(total=len(texts), desc="rolling", disable=disable_tqdm) as bar:
            found = self._lm.loglikelihood_rolling(texts, on_done=bar.update)
        return [one.log_prob for one in found]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = [self._to_generate(*request.args, seed=i) for i, request in enumerate(requests)]
        with tqdm(total=len(asked), desc="generating", disable=disable_tqdm) as bar:
            made = self._lm.generate_until(asked, truncate=True, on_done=bar.update)
        return [completions[0].text for completions in made]

    def _to_generate(
        self, context: str, settings: dict[str, Any], *, seed: int
    ) -> GenerationRequest:
        settings = normalize_gen_kwargs(settings, MAX_GEN_TOKS)
        if unknown := sorted(settings.keys() - GENERATION_SETTINGS):
            raise ValueError(
                f"the task generates with {', '.join(unknown)}, which easylm_jax does not know: "
                f"expected {', '.join(sorted(GENERATION_SETTINGS))}; change its generation_kwargs"
            )
        ends = [*self._template.stop, end_token(self._template)] if self._is_chat else []
        return GenerationRequest(
            prompt=tuple(self.tok_encode(context)),
            until=(*settings["until"], *filter(None, ends)),
            max_new_tokens=settings["max_gen_toks"],
            temperature=float(settings.get("temperature", settings["do_sample"])),
            top_p=float(settings.get("top_p", 1.0)),
            seed=seed,
        )

    # ---- chat -----------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """With the template: lm-eval keys its cache of requests by it."""
        self._is_chat = True
        return f"{self._lm.tokenizer.fingerprint[:16]}-{self._template.hash}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What lm-eval writes of the template into its results; the name of another chooses it."""
        if isinstance(chat_template, str):
            self._template = find_template(chat_template)
        return f"{self._template.name} {self._template.hash}" if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt, special tokens spelled out. False: the last message is an answer begun."""
        if self._template is None:
            raise ValueError(
                "the model came without a chat template: name one in --model_args, such as "
                "template=vicuna"
            )
        self._is_chat = True
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        asked = chat_history if add_generation_prompt else chat_history[:-1]
        tokenizer = self._lm.tokenizer
        spelled = {i: piece for piece, i in tokenizer.specials().items()}
        texts = []
        for segment in render(self._template, asked, generate=True):
            ids = encode_segment(segment, tokenizer) if segment.special else []
            texts += [spelled[i] for i in ids] if segment.special else [segment.text]
        return "".join(texts) + begun


if __name__ == "__main__":
    cli_evaluate()
