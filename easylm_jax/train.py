"""Train a model: `python -m easylm_jax.train --config=configs/... --workdir=...`

Started again in the same workdir, a run goes on where it was; killed at any moment, it ends with
the same parameters as if it had not been. `train` reads from top to bottom; the gradient is in
`step.py`, the loss in `objectives.py`, the model in `models/llama.py`.
"""

import contextlib
import dataclasses
import functools
import signal
import sys

import jax
from absl import flags
from ml_collections import config_flags

from easylm_jax import loading
from easylm_jax import workdir as run_files
from easylm_jax.banner import closing_lines, measured_lines, opening_lines
from easylm_jax.batch import check_batch
from easylm_jax.checkpoint import CheckpointConfig, Checkpointer, CheckpointError
from easylm_jax.config import from_config_dict, run_main
from easylm_jax.data.prefetch import Prefetch
from easylm_jax.data.source import DataConfig, make_source
from easylm_jax.measurements import EvalConfig, Measurements
from easylm_jax.mesh import check_divides, make_mesh
from easylm_jax.metrics import MetricLog
from easylm_jax.models.attention_choice import check_attention
from easylm_jax.models.llama import PARAM_RULES, LlamaConfig, make_forward
from easylm_jax.models.lora import LoraConfig, trainable, with_adapter_dropout
from easylm_jax.models.quantized import num_parameters
from easylm_jax.monitor import Monitor, make_throughput, parse_window, profiler
from easylm_jax.objectives import cross_entropy
from easylm_jax.optim import OptimConfig, make_optimizer, make_schedule, parse_duration
from easylm_jax.preflight import (
    check_same_run,
    check_same_template,
    check_same_tokenizer,
    check_vocabulary,
)
from easylm_jax.processes import DistributedConfig, joined_processes
from easylm_jax.progress import Progress
from easylm_jax.sharding import local_rows, to_global
from easylm_jax.step import GuardConfig, jit_train_step
from easylm_jax.stopping import EarlyStop, EarlyStopConfig, stop_signals
from easylm_jax.train_state import abstract_state, init_state
from easylm_jax.tree import num_elements


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run."""

    model: LlamaConfig
    data: DataConfig
    tokenizer: str  # "bytes", a *.model, a tokenizer.json, a folder with one, or a model
    duration: str  # such as "250000 steps", "1T tokens", "2 epochs"
    batch_size: int  # rows per step, over all devices
    seq_len: int  # tokens per row
    micro_batches: int = 1  # a step adds up the gradients of this many equal parts of its batch
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig | None = None  # train adapters beside the parameters in init_from, not these
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    early_stop: EarlyStopConfig = EarlyStopConfig()
    mesh: str = "1,-1,1,1"  # replica,fsdp,sequence,tensor; after an @ across slices or hosts
    distributed: DistributedConfig = DistributedConfig()
    seed: int = 0
    init_from: str | None = None  # a new run takes its parameters from this model, of any format
    log_every: int = 10  # steps
    peak_flops: float | None = None  # per device, for MFU; None: by the device's name, if known
    profile: str = ""  # "100:105" traces these steps

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "micro_batches", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        parse_window(self.profile)
        if self.lora and not self.init_from:
            raise ValueError("lora trains adapters of a model: name the model in init_from")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size = {self.batch_size} rows cannot be cut into micro_batches = "
                f"{self.micro_batches} equal parts; change one of them"
            )


def train(cfg: TrainConfig, workdir: str) -> None:
    """The whole run. Every process of it calls this."""
    with contextlib.ExitStack() as stack:
        at_step = stack.enter_context(joined_processes(cfg.distributed))
        is_first = jax.process_index() == 0
        if is_first:
            stack.enter_context(run_files.lock(workdir))
        stop_asked = stack.enter_context(stop_signals(cfg.log_every))

        # ---- mesh and data ----
        mesh = make_mesh(cfg.mesh)
        stack.enter_context(jax.set_mesh(mesh))
        micro_rows = cfg.batch_size // cfg.micro_batches
        sizes = dict(seq_len=cfg.seq_len, num_kv_heads=cfg.model.num_kv_heads)
        check_divides(mesh.shape, rows=micro_rows, **sizes)
        check_attention(cfg.model.attention, **sizes)
        tokenizer = loading.find_tokenizer(cfg.tokenizer)
        check_vocabulary(tokenizer, cfg.model.vocab_size)
        template = loading.training_template(cfg.data.chat, cfg.tokenizer, tokenizer)
        if cfg.init_from:
            check_same_template(loading.trained_template(cfg.init_from), template, cfg.init_from)
        shape = dict(
            batch_size=cfg.batch_size,
            seq_len=cfg.seq_len,
            tokenizer=tokenizer,
            template=template,
            rows=local_rows(mesh, cfg.batch_size),
        )
        source = make_source(cfg.data, **shape)
        place = functools.partial(to_global, mesh=mesh, batch_size=cfg.batch_size)
        model = with_adapter_dropout(cfg.model, cfg.lora)
        measurements = Measurements(
            cfg.eval, data=cfg.data, model=model, **shape, place=place, seed=cfg.seed
        )
        early_stop = EarlyStop(cfg.early_stop)

        # ---- durations, optimiser ----
        tokens_per_step = cfg.batch_size * cfg.seq_len
        units = dict(tokens_per_step=tokens_per_step, tokens_per_epoch=source.tokens_per_epoch)
        total_steps = parse_duration(cfg.duration, **units)
        units["total_steps"] = total_steps
        eval_every = parse_duration(cfg.eval.every, **units)
        save_every = parse_duration(cfg.checkpoint.every, **units)
        if min(eval_every, save_every) < 1:
            raise ValueError("eval.every and checkpoint.every must be at least 1 step")
        schedule = make_schedule(
            cfg.optim, total_steps=total_steps, tokens_per_step=tokens_per_step
        )
        optimizer = make_optimizer(cfg.optim, schedule)

        # ---- state: the workdir's newest whole checkpoint, else init_from, else scratch ----
        init, whole = trainable(cfg.model, cfg.lora)
        make_state = functools.partial(init_state, init, optimizer, cfg.seed)
        abstract = abstract_state(make_state, mesh, PARAM_RULES)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        checkpoints = Checkpointer(
            f"{workdir}/checkpoints",
            keep_last=cfg.checkpoint.keep_last,
            milestone_every=cfg.checkpoint.milestone_every,
        )
        stack.callback(checkpoints.close)
        if checkpoints.latest_step() is not None:
            check_same_run(dataclasses.asdict(cfg), workdir)
        if restored := checkpoints.restore_latest(abstract):
            check_same_tokenizer(restored.side["tokenizer"], tokenizer, workdir)
            check_same_template(restored.side["template"], template, workdir)
            state, step = restored.state, restored.step
            source.restore(restored.side["data"])
            early_stop.restore(restored.side["early_stop"])
            checkpoints.best_step = early_stop.best_step
        else:
            state, step = jax.jit(make_state, out_shardings=shardings)(), 0
            if cfg.init_from and not cfg.lora:
                params = loading.params_for_training(cfg.init_from, abstract.params, cfg.model)
                state = state.replace(params=params)
        frozen = None
        if cfg.lora:
            frozen = loading.frozen_base(cfg.init_from, cfg.model, cfg.lora, mesh)

        # ---- the compiled step ----
        step_fn = jit_train_step(
            shardings=shardings,
            objective=cross_entropy(make_forward(model), whole),
            optimizer=optimizer,
            num_micro_batches=cfg.micro_batches,
            guard=cfg.guard,
            has_dropout=model.has_dropout,
        )

        # ---- what is written and shown ----
        log = MetricLog(workdir, enabled=is_first, resume_step=step if restored else -1)
        stack.callback(log.close)
        progress = None
        if is_first:
            progress = stack.enter_context(contextlib.closing(Progress(total_steps, step)))
        monitor = Monitor(
            log,
            progress,
            make_throughput(cfg.model, cfg.batch_size, cfg.seq_len, peak=cfg.peak_flops),
            tokens_per_step=tokens_per_step,
            schedule=schedule,
            log_every=cfg.log_every,
            on_bad_loss=cfg.guard.on_bad_loss,
        )
        if is_first:
            config = dataclasses.asdict(cfg)
            beside = loading.find_chat_template(cfg.tokenizer)
            save_text = functools.partial(
                loading.save_tokenizer, tokenizer, beside, template=template
            )
            run_files.record_start(workdir, config, argv=sys.orig_argv, save_tokenizer=save_text)
        for line in opening_lines(
            workdir,
            mesh_shape=mesh.shape,
            num_params=num_parameters(abstract.params) + num_parameters(frozen or {}),
            num_trained=num_elements(abstract.params),
            data=source.describe(),
            total_steps=total_steps,
            rows=cfg.batch_size,
            seq_len=cfg.seq_len,
            restored=restored,
            init_from=cfg.init_from,
        ):
            monitor.note(line)

        def measure() -> None:
            params = whole(state.params, frozen)
            values = measurements.values(params)
            row = {f"eval/{name}": value for name, value in values.items()}
            log.write(step, row | {"model/parameters": num_parameters(params)})
            for line in measured_lines(step, values):
                monitor.note(line)
            if texts := measurements.samples(params):
                log.write_text(step, texts)
            if early_stop.push(step, values):
                checkpoints.best_step = step
                save()

        def save() -> None:
            side = {
                "data": source.state(),
                "tokenizer": tokenizer.fingerprint,
                "template": [template.name, template.hash] if template else None,
                "early_stop": early_stop.state(),
            }
            try:
                checkpoints.save(step, state, side)
            except CheckpointError as error:
                if cfg.checkpoint.on_failure == "stop":
                    raise
                monitor.note(f"step {step:,}: {error}; training goes on")

        # ---- the loop ----
        source = stack.enter_context(contextlib.closing(Prefetch(source, depth=2)))
        profile_at = stack.enter_context(profiler(cfg.profile, workdir, flush=monitor.flush))
        first_step = step
        if restored is None:
            measure()
        while step < total_steps and not (
            monitor.must_stop or early_stop.reason or stop_asked(step)
        ):
            at_step(step)
            profile_at(step)
            batch, data_metrics = source.next()
            if step == first_step:
                check_batch(batch, vocab_size=cfg.model.vocab_size)
            state, metrics = step_fn(state, place(batch), frozen=frozen)
            step += 1
            monitor.push(step, metrics, data_metrics)
            if step % eval_every == 0 or step == total_steps:
                monitor.flush()
                measure()
            if step % save_every == 0 and step != total_steps:
                monitor.flush()
                save()
        monitor.flush()
        profile_at(step)

        # ---- the end ----
        if early_stop.reason:
            monitor.note(early_stop.reason)
        save()
        log.flush()
        checkpoints.wait()
        if checkpoints.latest_step() != step:
            raise CheckpointError(f"the last checkpoint, of step {step}, was not written")
        if progress:
            progress.close()
            for line in closing_lines(workdir, step, total_steps, early_stop.best_step):
                progress.note(line)
        if monitor.must_stop:  # the state is good: it does not have the bad update
            raise ValueError(monitor.must_stop)


def main(argv: list[str]) -> None:
    """The command line."""
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    if config is None or not workdir:
        raise ValueError(
            "--config and --workdir are needed, such as `python -m easylm_jax.train "
            "--config=configs/debug.py --workdir=runs/debug`; --help says more"
        )
    if len(argv) > 1:
        raise ValueError(f"arguments {argv[1:]} are not understood; settings are --config.KEY=...")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C that is not for the loop ends at once
    train(from_config_dict(TrainConfig, config), workdir)


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Python file with get_config(), `file.py:arg`. --config.KEY=VALUE changes a setting of it.",
    )
    flags.DEFINE_string("workdir", None, "Folder or gs:// path of the run; resumes what is there.")
    run_main(main)
