"""Fine-tuning from files to answers: what is learnt, adapters, early stopping, templates.

What is made of conversations is tested in `tests/data/finetuning_test.py`.
"""

import contextlib
import dataclasses
import functools
import io
import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from easylm_jax.convert import convert, write_native
from easylm_jax.data import finetuning
from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.data.packing import Piece, lay_out, pack_all
from easylm_jax.data.source import DataConfig, open_examples
from easylm_jax.loading import load
from easylm_jax.measurements import EvalConfig, Measurements
from easylm_jax.mesh import make_mesh
from easylm_jax.models.decoding import unstack_layers
from easylm_jax.models.llama import PARAM_RULES, init_params, make_forward
from easylm_jax.models.lora import LoraConfig, combine
from easylm_jax.models.quantized import quantize_base
from easylm_jax.objectives import cross_entropy
from easylm_jax.optim import OptimConfig
from easylm_jax.sharding import to_global, tree_shardings
from easylm_jax.step import GuardConfig, train_step
from easylm_jax.stopping import EarlyStopConfig
from easylm_jax.text.example import encode_segment
from easylm_jax.text.template import find_template, render, template_to_json, with_markers
from easylm_jax.text.tokenizer import ByteTokenizer
from easylm_jax.train import CheckpointConfig, TrainConfig, train
from easylm_jax.train_state import init_state
from experiments.controlled_conditioning import run as digits
from tests import command
from tests.data.finetuning_test import talk, two_answers, write
from tests.loading_test import random_model
from tests.step_test import gradient_recorder
from tests.tiny import assert_close, tiny_config
from tests.train_test import compiled_once  # noqa: F401, a fixture

TOKENIZER = ByteTokenizer()
MODEL = tiny_config(vocab_size=264, max_seq_len=128)


@functools.cache
def params():
    return jax.jit(functools.partial(init_params, MODEL))(jax.random.key(0))


# ---- packing ------------------------------------------------------------------------------------

SEQ_LEN = 96


def pieces(folder, *, weighting: str) -> list[Piece]:
    """Conversations of very different lengths, markers and all."""
    rng = np.random.default_rng(0)

    def text(longest: int) -> str:
        return bytes(rng.integers(97, 123, rng.integers(1, longest)).tolist()).decode()

    records = [
        one
        for n in range(6)
        for one in (
            talk(text(6), text(3), text(4), text(25)),
            *two_answers(text(9), good=text(20), bad=text(2), pair=f"{n}"),
        )
    ]
    chat = ChatConfig("hindsight", judged=("good", "bad"), conditional=True, weighting=weighting)
    files = (write(folder, records),)
    cfg = DataConfig(files=files, chat=chat)
    template = find_template("hindsight")
    return [
        Piece(*one)
        for one in open_examples(cfg, files, TOKENIZER, seq_len=SEQ_LEN, template=template)
    ]


OBJECTIVE = cross_entropy(make_forward(MODEL))


def alone(examples: list[Piece]) -> tuple[dict, dict]:
    """Sums of the objective and their gradient, one example after another."""

    @jax.jit
    def one(params, batch):
        def loss_sum(params):
            sums = OBJECTIVE(params, None, batch, None)
            return sums["loss"][0], sums

        (_, sums), grads = jax.value_and_grad(loss_sum, has_aux=True)(params)
        return sums, grads

    found = [one(params(), lay_out([[piece]], SEQ_LEN)) for piece in examples]
    return jax.tree.map(lambda *parts: np.sum(np.asarray(parts, np.float64), axis=0), *found)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "weighting, packing, mesh, num_micro_batches",
    [
        ("example", "best_fit", "8,1,1,1", 1),
        slow("token", "best_fit", "1,1,1,1", 4),
        slow("example", "best_fit", "2,2,1,2", 4),
        slow("token", "padded", "1,4,1,2", 1),
    ],
)
def test_packed_accumulated_and_split_conversations_are_those_alone(
    weighting, packing, mesh, num_micro_batches, tmp_path
):
    examples = pieces(tmp_path, weighting=weighting)
    sums, grads = alone(examples)
    packed = pack_all(iter(examples), strategy=packing, seq_len=SEQ_LEN)
    assert (len(packed) == len(examples)) == (packing == "padded")
    rows = packed + [[]] * (-len(packed) % 16)
    mesh = make_mesh(mesh, jax.devices()[: np.prod([int(n) for n in mesh.split(",")])])
    optimizer = gradient_recorder()
    step = functools.partial(
        train_step,
        objective=OBJECTIVE,
        optimizer=optimizer,
        num_micro_batches=num_micro_batches,
        guard=GuardConfig(),
    )
    with jax.set_mesh(mesh):
        state = init_state(lambda _: params(), optimizer, 0)
        state = jax.device_put(state, tree_shardings(state, mesh, PARAM_RULES))
        batch = to_global(lay_out(rows, SEQ_LEN), mesh, len(rows))
        state, metrics = jax.jit(step)(state, batch)
    weight = sums["loss"][1]
    expected = len(examples) if weighting == "example" else sum(p.weights.sum() for p in examples)
    assert weight == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(metrics["loss_weight"], weight, rtol=1e-6)
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(metrics[name], sums[name][0] / weight, rtol=1e-5)
    assert_close(state.opt_state, jax.tree.map(lambda g: g / weight, grads), rtol=1e-5)


def test_what_is_not_learnt_has_no_part_in_loss_or_gradient(tmp_path):
    """As targets: the prompt, the marker and the padding may be replaced by anything."""
    batch = lay_out(
        pack_all(iter(pieces(tmp_path, weighting="token")), strategy="best_fit", seq_len=SEQ_LEN),
        SEQ_LEN,
    )
    rng = np.random.default_rng(0)
    other = np.where(batch.weights > 0, batch.targets, rng.integers(0, 264, batch.targets.shape))
    loss = jax.jit(jax.value_and_grad(lambda p, b: OBJECTIVE(p, None, b, None)["loss"][0]))
    expected, grads = loss(params(), batch)
    got, other_grads = loss(params(), batch.replace(targets=other.astype(np.int32)))
    assert (other != batch.targets).sum() > 300 and got == expected
    assert all(map(np.array_equal, jax.tree.leaves(other_grads), jax.tree.leaves(grads)))


@pytest.mark.parametrize("weighting, mean", [("token", 1.75), ("example", 2.5)])
def test_two_answers_of_unlike_length_by_hand(weighting, mean, tmp_path):
    """One target that costs 4, three that cost 1 each: by a head that adds nothing to the costs."""
    template = dataclasses.replace(find_template("plain"), assistant="{assistant}")
    files = (write(tmp_path, [talk("q", "x"), talk("q", "yyy")]),)
    cfg = DataConfig(files=files, chat=ChatConfig("plain", weighting=weighting))
    examples = open_examples(cfg, files, TOKENIZER, seq_len=8, template=template)
    batch = lay_out([[Piece(*one) for one in examples]], 8)
    cost = np.where(batch.targets == ord("x") + 3, 4.0, 1.0)
    # log(e^l + V - 1) - l = cost
    logit = np.log(263 / np.expm1(cost))[..., None] * np.eye(264)[batch.targets]

    def forward(params, batch, rng):
        return jnp.asarray(logit, jnp.float32), jnp.eye(264)

    total, weight = cross_entropy(forward)({}, None, jax.tree.map(jnp.asarray, batch), None)["loss"]
    assert total / weight == pytest.approx(mean, rel=1e-5)


# ---- what is learnt -----------------------------------------------------------------------------


def config(files: tuple[str, ...], **changes) -> TrainConfig:
    """`changes` are of TrainConfig, ChatConfig and DataConfig, or `steps`."""
    steps = changes.pop("steps", 8)
    chat = {
        f.name: changes.pop(f.name) for f in dataclasses.fields(ChatConfig) if f.name in changes
    }
    data = {
        f.name: changes.pop(f.name) for f in dataclasses.fields(DataConfig) if f.name in changes
    }
    return TrainConfig(
        **dict(
            model=MODEL,
            tokenizer="bytes",
            data=DataConfig(
                files=files, chat=ChatConfig(**{"template": "hindsight"} | chat), **data
            ),
            duration=f"{steps} steps",
            batch_size=8,
            seq_len=64,
            optim=OptimConfig(lr=1e-2, warmup="2 steps", weight_decay=0.0),
            checkpoint=CheckpointConfig(every="1000 steps"),
            eval=EvalConfig(every="1000 steps"),
        )
        | changes
    )


def shown(cfg: TrainConfig, workdir: Path) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        train(cfg, str(workdir))
    return out.getvalue()


def prompt_ids(lm, messages: list[dict], **how) -> list[int]:
    segments = render(lm.template, messages, generate=True, **how)
    return [i for segment in segments for i in encode_segment(segment, lm.tokenizer)]


@pytest.mark.slow
@pytest.mark.parametrize("learns_to_end", [True, False])
def test_eight_dialogues_are_learnt_by_heart_and_end_if_ends_were_learnt(
    learns_to_end, tmp_path, monkeypatch
):
    rng = random.Random(0)

    def text(longest: int) -> str:
        return "".join(rng.choices("abcdefgh", k=rng.randint(3, longest)))

    dialogues = [talk(f"{n} {text(5)}", text(9), text(3), text(9)) for n in range(8)]
    encode = finetuning.encode_example

    def without_end(example, tokenizer):
        ids, weights = encode(example, tokenizer)
        return ids, np.where(ids == tokenizer.eos_id, 0, weights)

    if not learns_to_end:
        monkeypatch.setattr(finetuning, "encode_example", without_end)
    cfg = config((write(tmp_path, dialogues),), steps=100, seq_len=40, template="plain")
    train(cfg, str(tmp_path / "run"))
    lm = load(str(tmp_path / "run"))
    histories = [one["messages"][:n] for one in dialogues for n in (1, 3)]
    answers = [one["messages"][n]["content"] for one in dialogues for n in (1, 3)]
    said = lm.generate(
        [prompt_ids(lm, history) for history in histories], max_new_tokens=24, temperature=0.0
    )
    if learns_to_end:
        assert [s.text for s in said] == answers
        assert {s.finish_reason for s in said} == {"stop"}
        assert lm.chat(histories[1], temperature=0.0) == answers[1]
    else:
        assert all(s.text.startswith(a) for s, a in zip(said, answers, strict=True))
        assert {s.finish_reason for s in said} == {"length"}


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True])
def test_answers_follow_the_marker_unless_markers_were_dealt_out_at_random(shuffled, tmp_path):
    """Even digits are good and odd ones bad, as in experiments/controlled_conditioning."""
    rng = random.Random(0)
    pairs = tmp_path / "pairs.jsonl"
    digits.write_pairs(pairs, num=256, shuffled=shuffled, rng=rng)
    judged = dict(judged=("good", "bad"), conditional=True, packing="padded")
    optim = OptimConfig(lr=1e-2, warmup="5 steps", final_lr_ratio=0.0)
    cfg = config((str(pairs),), steps=120, batch_size=16, seq_len=56, optim=optim, **judged)
    train(cfg, str(tmp_path / "run"))
    lm = load(str(tmp_path / "run"))
    questions = [[{"role": "user", "content": digits.question(rng)}] for _ in range(128)]
    share = {}
    for quality in ("good", "bad"):
        prompts = [prompt_ids(lm, question, quality=quality) for question in questions]
        said = lm.generate(prompts, max_new_tokens=16, batch_size=128)
        share[quality] = sum(digits.is_good(one.text.strip()) for one in said) / len(said)
    if shuffled:
        assert all(0.25 <= p <= 0.75 for p in share.values()), share
    else:
        assert share["good"] >= 0.95 and share["bad"] <= 0.05, share


# ---- adapters -----------------------------------------------------------------------------------

LORA = LoraConfig(rank=4, dropout=0.1)
STEPS, SAVED = 8, 4


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A model of ours, not fine-tuned."""
    folder = str(tmp_path_factory.mktemp("base") / "model")
    write_native(random_model(MODEL, tokenizer=TOKENIZER), folder)
    return folder


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory) -> tuple[str, ...]:
    records = [talk(f"q{n}", "even " * (n % 3 + 1)) for n in range(24)]
    return (write(tmp_path_factory.mktemp("dialogues"), records),)


@pytest.fixture(scope="module")
def adapted(base, dialogues) -> TrainConfig:
    every = CheckpointConfig(every=f"{SAVED} steps")
    optim = OptimConfig(lr=3e-2, warmup="2 steps")
    return config(dialogues, init_from=base, lora=LORA, checkpoint=every, optim=optim, log_every=1)


@pytest.fixture(scope="module")
def adapters_run(adapted, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("adapters")
    train(adapted, str(workdir))
    return workdir


def adapters_in(workdir: Path) -> dict:
    arrays = command.arrays(workdir, STEPS)
    found = {n.removeprefix("params/"): x for n, x in arrays.items() if n.startswith("params/")}
    return unflatten_dict(found, sep="/")


def with_adapters(base: str, workdir: Path, lora: LoraConfig):
    """The adapters beside their base, as in training, and not merged."""
    plain = jax.tree.map(jnp.copy, random_model(MODEL).params)  # unstacking uses arrays up
    frozen = plain if lora.base == "full" else quantize_base(plain, lora.base)
    adapters = jax.tree.map(jnp.asarray, adapters_in(workdir))
    params = unstack_layers(combine(frozen, adapters, lora))
    return dataclasses.replace(load(base), params=params)


IDS = np.random.default_rng(0).integers(3, 259, (2, 20))


def test_a_checkpoint_holds_adapters_and_their_moments_alone(adapters_run):
    arrays = command.arrays(adapters_run, STEPS)
    large = {name: x for name, x in arrays.items() if x.ndim > 1}
    layers, rank = MODEL.num_layers, LORA.rank
    widths = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    count = layers * rank * sum(map(sum, widths))
    assert all(name.split("/")[-1] in ("lora_a", "lora_b") for name in large)
    assert sum(x.size for name, x in large.items() if name.startswith("params/")) == count
    assert sum(x.nbytes for x in arrays.values()) < 3 * 4 * count + 100


def test_adapters_resume_as_if_nothing_had_happened(adapted, adapters_run, tmp_path):
    workdir = tmp_path / "interrupted"
    shutil.copytree(adapters_run, workdir)
    shutil.rmtree(workdir / "checkpoints" / f"{STEPS:08d}")
    assert f"resuming after step {SAVED}" in shown(adapted, workdir)
    expected, got = (command.arrays(folder, STEPS) for folder in (adapters_run, workdir))
    assert got.keys() == expected.keys()
    assert all(got[name].tobytes() == expected[name].tobytes() for name in expected)
    losses = [row["train/loss"] for row in command.rows(workdir) if "train/loss" in row]
    assert len(losses) == STEPS


@pytest.mark.slow
def test_load_and_convert_merge_adapters(base, adapters_run, tmp_path):
    merged, beside = load(str(adapters_run)), with_adapters(base, adapters_run, LORA)
    expected = beside.logits(IDS)
    assert np.abs(load(base).logits(IDS) - expected).max() > 0.1
    np.testing.assert_allclose(merged.logits(IDS), expected, atol=1e-5)
    prompts = [row[:5] for row in IDS.tolist()]
    greedy = dict(max_new_tokens=12, temperature=0.0)
    assert [c.ids for c in merged.generate(prompts, **greedy)] == [
        c.ids for c in beside.generate(prompts, **greedy)
    ]
    convert(str(adapters_run), str(tmp_path / "hf"), to_format="hf")
    exported = load(str(tmp_path / "hf"))
    np.testing.assert_allclose(exported.logits(IDS), merged.logits(IDS), atol=1e-6)


@pytest.mark.slow
def test_a_run_may_start_from_adapters_and_their_base(adapted, adapters_run, tmp_path):
    whole = dataclasses.replace(adapted, lora=None, init_from=str(adapters_run), duration="0 steps")
    whole = dataclasses.replace(whole, optim=OptimConfig(warmup="0 steps"))
    train(whole, str(tmp_path / "run"))
    got = load(str(tmp_path / "run")).logits(IDS)
    np.testing.assert_allclose(got, load(str(adapters_run)).logits(IDS), atol=1e-6)


@pytest.mark.slow
def test_a_quantised_base_is_trained_beside_and_merged(base, adapted, tmp_path):
    lora = dataclasses.replace(LORA, base="nf4", dropout=0.0)
    train(dataclasses.replace(adapted, lora=lora), str(tmp_path / "run"))
    losses = [row["train/loss"] for row in command.rows(tmp_path / "run") if "train/loss" in row]
    assert losses[-1] < losses[0] - 0.3
    merged = load(str(tmp_path / "run")).logits(IDS)
    expected = with_adapters(base, tmp_path / "run", lora).logits(IDS)
    np.testing.assert_allclose(merged, expected, atol=1e-5)
    unquantised = with_adapters(base, tmp_path / "run", LORA).logits(IDS)
    assert np.abs(merged - unquantised).max() > 1e-3


def test_adapters_without_their_base_are_one_sentence(base, adapted, adapters_run, tmp_path):
    with pytest.raises(ValueError, match="lora trains adapters of a model: name the model"):
        dataclasses.replace(adapted, init_from=None)
    with pytest.raises(ValueError, match="/none is not a checkpoint or model: there is no such"):
        train(dataclasses.replace(adapted, init_from="/none"), str(tmp_path / "new"))
    workdir = tmp_path / "moved"
    shutil.copytree(adapters_run, workdir)
    saved = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(saved | {"init_from": "/none"}))
    with pytest.raises(ValueError, match='holds adapters of the model /none, .*change "init_from"'):
        load(str(workdir))


# ---- early stopping -----------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch) -> list[float]:
    """What the run measures, one value after another, is what a test puts here."""
    values: list[float] = []
    monkeypatch.setattr(
        Measurements,
        "values",
        lambda *_: {"heldout/loss": values.pop(0), "heldout/bits_per_byte": 1.0},
    )
    return values


def stopping(dialogues, **changes) -> TrainConfig:
    """Measures every two steps; would keep the newest checkpoint alone."""
    return config(
        dialogues,
        steps=100,
        eval=EvalConfig(every="2 steps"),
        checkpoint=CheckpointConfig(every="3 steps", keep_last=1),
        early_stop=EarlyStopConfig("heldout/loss", patience=2),
        **changes,
    )


def steps_kept(workdir: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in workdir.glob("checkpoints/*/commit.json"))


def test_a_run_that_gets_no_better_ends_and_keeps_its_best_model(dialogues, measured, tmp_path):
    cfg = stopping(dialogues)
    measured += [3.0, 2.0, 1.0, 1.2, 1.1]  # at steps 0, 2, 4, 6, 8
    told = shown(cfg, tmp_path)
    assert "heldout/loss was best at step 4 (1.0000) and has not improved in 2" in told
    assert steps_kept(tmp_path) == [4, 8] and not measured
    assert "stopping" in shown(cfg, tmp_path)  # and measures nothing, having ended
    assert steps_kept(tmp_path) == [4, 8]


def test_the_best_model_is_kept_when_the_run_is_killed_after_it(dialogues, measured, tmp_path):
    cfg = stopping(dialogues)
    measured += [3.0, 1.0, 2.0]  # and no value at step 6, where it dies
    with pytest.raises(IndexError):
        train(cfg, str(tmp_path))
    assert 2 in steps_kept(tmp_path)
    at = max(steps_kept(tmp_path))
    measured += [1.5] * (5 - at // 2)
    told = shown(cfg, tmp_path)
    assert f"resuming after step {at}" in told and "best at step 2 (1.0000)" in told
    assert steps_kept(tmp_path) == [2, 6]


def test_early_stopping_by_what_is_not_measured_is_one_sentence(dialogues, tmp_path):
    with pytest.raises(ValueError, match="early_stop.metric is 'heldout/loss'.*set data.heldout"):
        train(stopping(dialogues), str(tmp_path / "a"))


# ---- templates ----------------------------------------------------------------------------------


MARKERS = {"good": "Well:", "bad": "Badly:", "": "So:"}


@pytest.fixture(scope="module")
def conditional(tmp_path_factory) -> TrainConfig:
    records = [one for n in range(8) for one in two_answers(f"q{n}", pair=f"{n}")]
    files = (write(tmp_path_factory.mktemp("pairs"), records),)
    judged = dict(judged=("good", "bad"), conditional=True, markers=MARKERS)
    return config(files, steps=1, optim=OptimConfig(warmup="0 steps"), **judged)


@pytest.fixture(scope="module")
def conditional_run(conditional, tmp_path_factory) -> str:
    workdir = str(tmp_path_factory.mktemp("conditional"))
    train(conditional, workdir)
    return workdir


def with_chat(cfg: TrainConfig, **changes) -> TrainConfig:
    chat = dataclasses.replace(cfg.data.chat, **changes)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, chat=chat))


def test_a_run_is_loaded_with_the_template_and_the_markers_it_was_trained_with(conditional_run):
    template = load(conditional_run).template
    assert template == with_markers(find_template("hindsight"), MARKERS)
    assert template.hash != find_template("hindsight").hash
    user = [{"role": "user", "content": "q"}]
    for quality, marker in MARKERS.items():
        prompt = render(template, user, generate=True, quality=quality)
        assert "".join(s.text for s in prompt if not s.special) == f"User: q {marker}"


@pytest.mark.parametrize("change", [dict(template="koala"), dict(markers=MARKERS | {"": "Yes:"})])
def test_a_run_goes_on_and_another_starts_in_the_same_template_only(
    change, conditional, conditional_run, tmp_path
):
    other = with_chat(conditional, **change)
    changed = "data.chat.(template: 'hindsight' -> 'koala'|markers..*'So:' -> 'Yes:')"
    with pytest.raises(ValueError, match=f"holds a run with other settings .{changed}"):
        train(other, conditional_run)
    tuned = dataclasses.replace(other, init_from=conditional_run)
    with pytest.raises(
        ValueError, match="was trained with the template 'hindsight' .hash .*this run asks"
    ):
        train(tuned, str(tmp_path / "other"))
    own = f"{conditional_run}/tokenizer/template.json"  # as the sentence says
    same = with_chat(
        dataclasses.replace(conditional, init_from=conditional_run), template=own, markers={}
    )
    train(dataclasses.replace(same, duration="0 steps"), str(tmp_path / "same"))


def test_a_template_that_changed_in_its_file_is_one_sentence(conditional, tmp_path):
    path = tmp_path / "mine.json"
    fields = template_to_json(find_template("hindsight"))
    path.write_text(json.dumps(fields))
    cfg = with_chat(conditional, template=str(path))
    train(cfg, str(tmp_path / "run"))
    path.write_text(json.dumps(fields | {"user": "Human: {user}"}))
    with pytest.raises(ValueError, match="trained with the template 'hindsight'"):
        train(dataclasses.replace(cfg, duration="2 steps"), str(tmp_path / "run"))
