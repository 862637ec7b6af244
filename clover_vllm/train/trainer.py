"""`clover-vllm train`: a head for a frozen target, with Hugging Face's Trainer."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy

from clover_vllm.base.errors import UserError
from clover_vllm.base.files import (
    check_same_settings,
    files_key,
    make_folder,
    peak_memory_gib,
    write_json,
)
from clover_vllm.base.paths import home
from clover_vllm.base.provenance import provenance
from clover_vllm.heads.base import Head, NewHead
from clover_vllm.heads.registry import head_kind, kind_of, shaped_heads
from clover_vllm.heads.weights import check_target
from clover_vllm.target.frozen import FrozenTarget
from clover_vllm.train.answers import AnswerSet, read_answers
from clover_vllm.train.batches import Batch, collate, plan_batches, plan_validation
from clover_vllm.train.card import write_card
from clover_vllm.train.hidden import HiddenStates
from clover_vllm.train.objective import DraftObjective, LossWeights, Teacher
from clover_vllm.train.optimizers import OPTIMIZERS, make_optimizer
from clover_vllm.train.settings import SHAPES_HEADS, TrainSettings

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
_STAMP = "settings.json"
_COMPLETE = "complete"  # written into a checkpoint folder when all of it is on disk


class PlannedBatches(Dataset[list[int]]):
    """The run's micro-batches in order; item k is its k-th, so that resuming is skipping."""

    def __init__(self, plan: list[list[int]]) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> list[int]:
        return self.plan[index]


class HeadTrainer(Trainer):
    """Trainer whose inputs are planned batches and whose hidden states come from `HiddenStates`."""

    def __init__(
        self,
        *args: Any,
        hidden_states: HiddenStates,
        teacher: Teacher,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._hidden_states = hidden_states
        self._teacher = teacher
        self._window: list[dict[str, torch.Tensor]] = []  # of the batches since the last log entry
        self._validated: dict[str, list[torch.Tensor]] = {}  # of the validation's, of all ranks
        # The objective already averages over rows; Trainer then divides by the accumulation steps.
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        batch: Batch = inputs["batch"]
        hidden = self._hidden_states(batch)
        with torch.no_grad():
            target = self._hidden_states.target
            post_norm = target.norm(hidden[..., -target.config.hidden_size :])
        loss, metrics = model(batch, hidden, post_norm, self._teacher)
        if model.training:
            self._window.append(metrics)
        else:
            # Some batches are repeated where they do not suffice for all ranks: `gather_function` leaves those out.
            for name, values in metrics.items():
                self._validated.setdefault(name, []).append(self.gather_function(values[None]))
        return (loss, metrics) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The loss of a validation batch."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: torch.Tensor = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's means per depth. Checkpoints and validation fall on log steps, so none is ever split."""
        if not math.isfinite(logs.get("loss", 0.0)):
            raise UserError(
                f"The loss is {logs['loss']} at step {self.state.global_step}: training has diverged; "
                "start again in another --output with a lower --learning-rate."
            )
        means: dict[str, torch.Tensor] = {}
        if self._window and "loss" in logs:
            for name in self._window[0]:
                mean = torch.stack([m[name] for m in self._window]).mean(dim=0)
                if self.args.world_size > 1:
                    mean = self.accelerator.reduce(mean, reduction="mean")
                means[name] = mean
            self._window = []
        if "eval_loss" in logs:
            logs = {"eval_loss": logs["eval_loss"]}  # how long it took differs from start to start
            means = {f"eval_{name}": torch.cat(own).mean(dim=0) for name, own in self._validated.items()}
            self._validated = {}
        by_depth = {name: [round(x, 5) for x in mean.tolist()] for name, mean in means.items()}
        # Trackers take numbers only.
        numbers = {f"{name}_{i + 1}": x for name, own in by_depth.items() for i, x in enumerate(own)}
        super().log(logs | numbers, start_time)
        kept = {name: value for name, value in self.state.log_history[-1].items() if name not in numbers}
        # Trainer counts passes over the plan, which holds all epochs: a misleading number.
        kept.pop("epoch", None)
        self.state.log_history[-1] = kept | by_depth


class _Checkpoints(TrainerCallback):
    """Clips gradients by value (as published), marks whole checkpoints, writes log and head so far."""

    def __init__(self, settings: TrainSettings, head: Head) -> None:
        self.settings = settings
        self.head = head

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.settings.clip_value > 0:
            nn.utils.clip_grad_value_(kwargs["model"].parameters(), self.settings.clip_value)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # every rank writes a part of the checkpoint
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / _COMPLETE).touch()
            write_json(self.settings.output / "log.json", state.log_history)
            self.head.save(self.settings.output / "head", self.settings.target)


def whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; all others are removed.

    Older ones too: a kill while one was being deleted leaves it marked as whole, and newer than it is.
    """
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if not step.isdigit() or not path.is_dir():
            continue
        if (path / _COMPLETE).exists():
            found[int(step)] = path
        else:
            shutil.rmtree(path)
    newest = found.pop(max(found)) if found else None
    for path in found.values():
        shutil.rmtree(path)
    return newest


def agreed_checkpoint(folder: Path) -> Path | None:
    """`whole_checkpoint` as rank 0 finds it, on all ranks: those of other hosts may see another state.

    Raises:
        UserError: rank 0's checkpoint is not there on this host.
    """
    state = PartialState()
    found = [whole_checkpoint(folder) if state.is_main_process else None]
    (checkpoint,) = broadcast_object_list(found)
    if checkpoint is not None and not all(gather_object([checkpoint.is_dir()])):  # none goes on alone
        raise UserError(
            f"{checkpoint} is on the first host but not on all; give them the same --output on a shared disk."
        )
    return checkpoint


def choose_draft_vocab(counts: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` most frequent token ids, increasing (int64)."""
    return torch.sort(torch.argsort(counts, descending=True, stable=True)[:size]).values


def train(settings: TrainSettings, made: dict[str, str] | None = None) -> dict[str, Any]:
    """Train a head; resumes by itself when `output` holds checkpoints of the same settings.

    Args:
        settings: of the run.
        made: its provenance; by default this process's.

    Returns:
        the run's summary, also written to `output/summary.json`.

    Raises:
        UserError: anything that the user can mend, before training starts where possible.
    """
    started = time.monotonic()
    made = made or provenance()
    check_settings(settings)
    dtype = getattr(torch, settings.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = _arguments(settings, device)  # sets up torch.distributed under torchrun
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs are torchrun's; DataParallel splits batches
    if device == "cuda":
        device = str(arguments.device)
    before = None
    if settings.init_from is not None:  # what cannot be read is refused before the target is loaded
        before = kind_of(settings.init_from).head_class().load(settings.init_from)
    target = FrozenTarget(settings.target, dtype, device)
    vocab_size = int(target.config.vocab_size)
    context = int(getattr(target.config, "max_position_embeddings", settings.max_length))
    with arguments.main_process_first():
        answers = read_answers(
            settings.data,
            vocab_size,
            min(settings.max_length, context),
            settings.limit_tokens,
            settings.leave_out,
        )
    sizes = answers.lengths, answers.answer_lengths, settings.batch_tokens
    validation = plan_validation(*sizes, settings.validation, settings.seed)
    plan = plan_batches(*sizes, settings.epochs, settings.seed, [*chain.from_iterable(validation)])
    torch.manual_seed(settings.seed)
    draft_vocab = None
    if settings.draft_vocab is not None:
        if settings.draft_vocab > vocab_size:
            raise UserError(
                f"--draft-vocab {settings.draft_vocab} is more than the target's {vocab_size} tokens."
            )
        draft_vocab = choose_draft_vocab(answers.token_counts(vocab_size), settings.draft_vocab)
    if before is None:
        head = _new_head(settings, target, answers, draft_vocab)
    else:
        check_target(before.config, target.config, target.lm_head)
        head = before
    head.to(target.device)
    per_step = settings.accumulate * arguments.world_size
    arguments.max_steps = max(1, len(plan) // per_step)
    plan = plan[: arguments.max_steps * per_step]
    arguments.warmup_steps = round(settings.warmup * arguments.max_steps)
    arguments.eval_strategy = IntervalStrategy.STEPS if validation else IntervalStrategy.NO
    with arguments.main_process_first():
        if arguments.process_index == 0:
            _same_run(settings, target, len(plan), arguments.world_size)
        hidden_states = HiddenStates(
            target,
            answers.lengths,
            settings.cache or home() / "hidden" / files_key(settings.data),
            int(settings.cache_gib * 2**30),
            key=f"{target.fingerprint()} {files_key(settings.data)} {answers.max_length} {len(answers)}",
            layers=head.target_layers,
        )
    objective = DraftObjective(head, loss_weights(settings))
    optimizer = make_optimizer(objective, settings.optimizer, settings.learning_rate, settings.weight_decay)
    trainer = HeadTrainer(
        model=objective,
        args=arguments,
        optimizers=(optimizer, None),
        train_dataset=PlannedBatches(plan),
        eval_dataset=PlannedBatches(validation) if validation else None,
        data_collator=_Collate(answers, head.num_heads),
        callbacks=[_Checkpoints(settings, head)],
        hidden_states=hidden_states,
        teacher=_teacher(head, target),
    )
    checkpoint = agreed_checkpoint(settings.output)
    if checkpoint is not None and trainer.is_world_process_zero():
        print(f"Resuming from {checkpoint}", file=sys.stderr)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not trainer.is_world_process_zero():
        return {}
    return _finish(settings, trainer, head, answers, plan, validation, made, time.monotonic() - started)


def loss_weights(settings: TrainSettings) -> LossWeights:
    """Those that were asked for, else the method's published ones."""
    kind = head_kind(settings.method)
    return LossWeights(
        regression=kind.regression if settings.regression_weight is None else settings.regression_weight,
        vocabulary=kind.vocabulary if settings.vocabulary_weight is None else settings.vocabulary_weight,
        decay=kind.decay if settings.depth_decay is None else settings.depth_decay,
        of_tokens=kind.of_tokens,
        temperature=settings.target_temperature,
        acceptance=settings.acceptance,
    )


def _plain(settings: TrainSettings) -> dict[str, Any]:
    """Settings as they are recorded: with the loss weights that hold."""
    fields = asdict(settings)
    for name in ("regression_weight", "vocabulary_weight", "depth_decay"):
        del fields[name]
    return fields | {"weights": asdict(loss_weights(settings))}


def check_settings(settings: TrainSettings) -> None:
    """
    Raises:
        UserError: settings that cannot be trained with, whatever target and data are.
    """
    if settings.save_every % settings.log_every:
        raise UserError(
            f"--save-every {settings.save_every} must be a multiple of --log-every {settings.log_every}, "
            "so that a resumed run logs what an unbroken one does."
        )
    if not settings.epochs > 0 or settings.batch_tokens < 1 or settings.accumulate < 1:
        raise UserError("--epochs, --batch-tokens and --accumulate must be positive.")
    if not 0 < settings.learning_rate < 1:
        raise UserError(f"--learning-rate {settings.learning_rate} must lie between 0 and 1.")
    if settings.schedule not in SCHEDULES:
        raise UserError(f"--schedule {settings.schedule} is not known; use {', '.join(SCHEDULES)}.")
    here = get_available_reporting_integrations()
    for tracker in settings.trackers:
        if tracker not in here:
            raise UserError(
                f"--trackers {tracker} is not installed here (there are: {', '.join(here) or 'none'}); install its "
                "package or leave it out."
            )
    if settings.optimizer not in OPTIMIZERS:
        raise UserError(f"--optimizer {settings.optimizer} is not known; use {' or '.join(OPTIMIZERS)}.")
    if settings.draft_vocab is not None and settings.draft_vocab < 1:
        raise UserError(f"--draft-vocab {settings.draft_vocab} must be 1 or more.")
    kind = head_kind(settings.method)
    if kind.of_tokens and settings.target_temperature != 1:
        raise UserError(
            f"--target-temperature changes nothing for {kind.title} heads, which learn the tokens of the text; "
            "leave it out."
        )
    if settings.init_from is not None and kind_of(settings.init_from) != kind:
        raise UserError(f"--init-from {settings.init_from} is no {kind.title} head, which --method asks for.")
    if settings.init_from is not None and not kind.head_class().saves_draft_vocab:
        raise UserError(
            f"--init-from cannot continue {kind.title} heads: their draft vocabulary is not saved."
        )
    for field in _asked_fields(settings):
        option = f"--{SHAPES_HEADS[field].replace('_', '-')}"
        if field not in kind.shaped_by:
            raise UserError(
                f"{option} shapes {shaped_heads(field)} heads, not {kind.title} heads; leave it out."
            )
        if settings.init_from is not None:
            raise UserError(f"{option} shapes a new head, and --init-from continues another; leave it out.")
    if settings.init_from is not None and settings.draft_vocab is not None:
        raise UserError("--init-from brings its own draft vocabulary; leave --draft-vocab out.")
    if not math.isfinite(settings.cache_gib) or settings.cache_gib < 0:
        raise UserError(f"--cache-gib {settings.cache_gib} must be 0 or more.")
    make_folder(settings.output)
    if not (settings.output / _STAMP).exists() and any(settings.output.glob("checkpoint-*")):
        raise UserError(f"{settings.output} holds checkpoints of another program; name another --output.")
    if settings.dtype not in ("bfloat16", "float32"):
        raise UserError(f"--dtype {settings.dtype} is not supported; use bfloat16 or float32.")


def _arguments(settings: TrainSettings, device: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(settings.output),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        max_grad_norm=0.0,
        max_steps=1,
        bf16=settings.dtype == "bfloat16",
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and int(os.environ.get("WORLD_SIZE", 1)) > 1 else None,
        logging_steps=settings.log_every,
        save_steps=settings.save_every,
        save_total_limit=2,
        eval_steps=settings.save_every,
        per_device_eval_batch_size=1,
        prediction_loss_only=True,
        logging_nan_inf_filter=False,
        report_to=settings.trackers,
        remove_unused_columns=False,
        seed=settings.seed,
        # A GPU waits for nothing that others can prepare; a CPU has no others.
        dataloader_num_workers=2 if device == "cuda" else 0,
        dataloader_pin_memory=device == "cuda",
    )


class _Collate:
    def __init__(self, answers: AnswerSet, num_heads: int) -> None:
        self.answers = answers
        self.num_heads = num_heads

    def __call__(self, items: list[list[int]]) -> dict[str, Batch]:
        (indices,) = items
        return {"batch": collate(indices, [self.answers.sequence(i) for i in indices], self.num_heads)}


def _new_head(
    settings: TrainSettings,
    target: FrozenTarget,
    answers: AnswerSet,
    draft_vocab: torch.Tensor | None,
) -> Head:
    sample = collate(
        list(range(min(16, len(answers)))), [answers.sequence(i) for i in range(min(16, len(answers)))]
    )
    real = torch.arange(sample.token_ids.shape[1])[None] < sample.lengths[:, None]
    hidden = target.hidden_states(sample.token_ids).cpu()[real]
    target.check_finite(hidden)
    wanted = NewHead(
        num_heads=settings.num_heads,
        draft_vocab=draft_vocab,
        hidden=hidden,
        token_ids=sample.token_ids[real],
        scale_inputs=settings.scale_inputs,
        seed=settings.seed,
        fields=_asked_fields(settings),
    )
    return head_kind(settings.method).head_class().new(target, wanted)


def _asked_fields(settings: TrainSettings) -> dict[str, Any]:
    """Fields of the configuration that only some heads have, where they were asked for."""
    asked = {field: getattr(settings, option) for field, option in SHAPES_HEADS.items()}
    return {field: value for field, value in asked.items() if value}


def _teacher(head: Head, target: FrozenTarget) -> Teacher:
    drafted = torch.ones(target.lm_head.shape[0], dtype=torch.bool, device=target.device)
    rows = target.lm_head
    if head.draft_vocab is not None:
        drafted.zero_()[head.draft_vocab] = True
        rows = target.lm_head[head.draft_vocab].contiguous()
    return Teacher(head.embeddings_of(target), rows, drafted)


def _same_run(settings: TrainSettings, target: FrozenTarget, batches: int, processes: int) -> None:
    """Refuse to resume a folder that other settings began."""
    fields = _plain(settings)
    # These may change, since no result shows them.
    for name in ("output", "cache", "cache_gib", "trackers", "ray_workers"):
        del fields[name]
    fields |= {
        "target": target.fingerprint(),
        "data": files_key(settings.data),
        "batches": batches,
        "processes": processes,
    }
    stamp = settings.output / _STAMP
    if whole_checkpoint(settings.output) is None:
        stamp.unlink(missing_ok=True)
    check_same_settings(stamp, fields)


def _peak_gpu_memory_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def _finish(
    settings: TrainSettings,
    trainer: HeadTrainer,
    head: Head,
    answers: AnswerSet,
    plan: list[list[int]],
    validation: list[list[int]],
    made: dict[str, str],
    seconds: float,
) -> dict[str, Any]:
    from clover_vllm.train.plots import plot_training

    head.save(settings.output / "head", settings.target)
    history = trainer.state.log_history
    validated = [entry for entry in history if "eval_loss" in entry]
    write_json(settings.output / "log.json", history)
    plot_training(history, settings.output / "head" / "training.png")
    steps = trainer.state.global_step * settings.accumulate * trainer.args.world_size
    aside = [*chain.from_iterable(validation)]
    visits = sum(answers.answer_lengths[i] for batch in plan[:steps] for i in batch)
    summary = {
        "method": settings.method,
        "answers": len(answers) - len(aside),
        "answers_dropped": answers.dropped,
        "answer_tokens": sum(answers.answer_lengths) - sum(answers.answer_lengths[i] for i in aside),
        "answers_set_aside": len(aside),
        "answer_token_visits": visits,
        "steps": trainer.state.global_step,
        "validation_loss": round(validated[-1]["eval_loss"], 5) if validated else None,
        "sources": dict(answers.source_counts(without=aside)),
        "seconds_of_last_start": round(seconds, 1),
        "peak_memory_gib": round(peak_memory_gib(), 2),
        "peak_gpu_memory_gib": round(_peak_gpu_memory_gib(), 2),
        "provenance": made,
        "settings": json.loads(json.dumps(_plain(settings), default=str)),
    }
    write_json(settings.output / "summary.json", summary)
    write_card(settings.output / "head", summary)
    return summary
