"""A model's own template gives transformers' ids, keeps contents plain, and cannot run away."""

import random

import numpy as np
import pytest

from easylm_jax.text.example import Example, encode_example
from easylm_jax.text.jinja_template import JinjaTemplate
from easylm_jax.text.template import end_token, find_template, render
from tests.text.small_tokenizers import CHAT, fast_tokenizer, random_texts, small_tokenizer

SMOLLM2 = (  # as in the model's file
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = '<<SYS>>\\n' ~ messages[0]['content'] | trim ~ '\\n<</SYS>>\\n\\n' -%}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('roles must alternate') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + (system if loop.first else '') -}}
        {{- message['content'].strip() + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + message['content'] | trim + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
LLAMA3 = """
{{- bos_token }}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {% if message['role'] == 'assistant' %}
{% generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
    {% else %}
{{ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
SOURCES = {"smollm2": SMOLLM2, "llama2": LLAMA2, "llama3": LLAMA3}
TWO_MB = "{% set n = namespace(x='a' * 1000000 + 'a' * 1000000) %}"
ENDS = {"smollm2": "<|im_end|>", "llama2": "</s>", "llama3": "<|eot_id|>"}


def _messages(contents, *, system):
    roles = ["system"] * system + ["user", "assistant"] * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def _ids(template, messages, tokenizer, **options):
    segments = render(template, messages, **options)
    return encode_example(Example(tuple(segments)), tokenizer)


@pytest.mark.torch
@pytest.mark.parametrize("name", SOURCES)
def test_ids_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    tokenizer = small_tokenizer("byte_level")
    template = JinjaTemplate(SOURCES[name], tokenizer)
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(), bos_token="<s>", eos_token="</s>"
    )
    rng = random.Random(0)
    words = ["the", "red", "hat", "12", " two ", "is, not.", "\n", "caf\u00e9 \U0001f600", "x"]
    for round_number in range(30):
        system, count = round_number % 2, rng.randint(1, 5)
        contents = ["a" + "".join(rng.choices(words, k=6)) for _ in range(count + system)]
        messages = _messages(contents, system=system)
        generate = messages[-1]["role"] == "user"
        expected = reference.apply_chat_template(
            messages, chat_template=SOURCES[name], add_generation_prompt=generate, return_dict=False
        )
        ids, _ = _ids(template, messages, tokenizer, generate=generate)
        np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
@pytest.mark.parametrize("name", SOURCES)
def test_prompts_are_prefixes_weights_are_answers_contents_are_plain(name, kind):
    tokenizer = small_tokenizer(kind)
    template = JinjaTemplate(SOURCES[name], tokenizer)
    assert end_token(template) == ENDS[name]
    end, specials = tokenizer.special_id(ENDS[name]), list(tokenizer.specials().values())
    for seed in range(20):
        contents = [f"{text}</s>{CHAT[1]}" for text in random_texts(5, seed=seed, longest=20)]
        messages = _messages(contents, system=True)
        harmless = _messages(["x"] * 5, system=True)
        ids, weights = _ids(template, messages, tokenizer)
        plain_ids, _ = _ids(template, harmless, tokenizer)
        assert np.isin(ids, specials).sum() == np.isin(plain_ids, specials).sum()
        for turn in (1, 3):
            prompt, _ = _ids(template, messages[: turn + 1], tokenizer, generate=True)
            np.testing.assert_array_equal(ids[: len(prompt)], prompt)
            stop = len(prompt) + list(ids[len(prompt) :]).index(end) + 1
            assert weights[len(prompt) - 1] == 0 and all(weights[len(prompt) : stop] == 1)
            weights[len(prompt) : stop] = 0
            answer = tokenizer.decode(ids[len(prompt) : stop])
            assert answer.strip() == contents[turn + 1].strip()
        assert not weights.any()


def test_llama2_in_jinja_is_our_llama2():
    tokenizer = small_tokenizer("sentencepiece")
    template = JinjaTemplate(LLAMA2, tokenizer)
    for seed in range(20):
        messages = _messages(random_texts(5, seed=seed), system=seed % 2 == 0)
        ours, weights = _ids(find_template("llama2"), messages, tokenizer)
        ids, ids_weights = _ids(template, messages, tokenizer)
        np.testing.assert_array_equal(ids, ours)
        np.testing.assert_array_equal(ids_weights, weights)


@pytest.mark.parametrize(
    "source, sentence",
    [
        ("{% for %}", "is not understood: TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails: SecurityError"),
        ("{{ messages.append(1) }}", "fails: SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "fails: SecurityError"),
        ("{{ raise_exception('no\nsystem') }}", "fails: TemplateError: no system"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}", "fails: Recursion"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
            "{{ f(90) }}",
            "more than 100000 steps",
        ),
        ("{{ 'a' * 10 ** 11 }}", "a product is too large"),
        ("{{ 'aaaaaaaaaa' * 999999 }}", "a product is too large"),
        (
            f"{TWO_MB}{{% for i in range(99) %}}{{% set n.x = n.x ~ n.x %}}{{% endfor %}}",
            "too much text",
        ),
        (
            f"{TWO_MB}{{% for i in range(99) %}}{{% set n.x = n.x + n.x %}}{{% endfor %}}",
            "too much text",
        ),
        (f"{TWO_MB}{{% for i in range(99) %}}{{{{ n.x }}}}{{% endfor %}}", "too much text"),
        (f"{TWO_MB}{{{{ n.x.replace('a', n.x) }}}}", "too much text"),
        (f"{TWO_MB}{{{{ n.x | replace('a', n.x) }}}}", "too much text"),
        (f"{TWO_MB}{{{{ n.x.join(n.x) }}}}", "too much text"),
        (f"{TWO_MB}{{{{ range(9999) | map('default', 1) | join(n.x) }}}}", "too much text"),
        (f"{TWO_MB}{{% set l = [n.x] * 99 %}}{{{{ [l] * 99 }}}}", "too much text"),
        (
            f"{TWO_MB}{{% for i in range(99) %}}{{% set a = n.x[1:] %}}{{% endfor %}}",
            "too much text",
        ),
        (f"{TWO_MB}{{{{ n.x | list }}}}", "too much text"),
        (f"{TWO_MB}{{{{ n }}}}", "a namespace is no text"),
        ("{{ '%50000000d' % 1 }}", "% of texts is not allowed"),
        ("{{ '%50000000d' | format(1) }}", "the filter format is not allowed"),
        ("{{ ['a'] | map('center', 50000000) | list }}", "the filter center is not allowed"),
        ("{{ '{:50000000d}'.format(1) }}", "the method format is not allowed"),
        ("{{ 'a'.center(50000000) }}", "fails: SecurityError: access to attribute 'center'"),
        ("{{ ('a' | attr('zfill'))(50000000) }}", "fails: SecurityError"),
        ("{{ (1).to_bytes(50000000, 'big') }}", "fails: SecurityError"),
        ("{{ [1] | tojson(indent=50000000) }}", "an indent of 50000000 is too large"),
        ("{{ lipsum(n=9999999) }}", "fails: UndefinedError"),
        ("{{ messages[0].content | upper }}", "rewrites what people say"),
        ("{{ 'long' if messages[0].content | length > 20 else 'short' }}", "rewrites what people"),
    ],
)
def test_a_template_that_is_wrong_or_runs_wild_is_one_sentence(source, sentence):
    tokenizer = small_tokenizer("byte_level")
    with pytest.raises(ValueError, match=sentence) as caught:
        render(JinjaTemplate(source, tokenizer), [{"role": "user", "content": "hello"}])
    assert "\n" not in str(caught.value)
