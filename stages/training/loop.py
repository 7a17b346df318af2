"""The one training loop: teacher and student differ in the module, the loss and where batches come from.

Of many ranks each runs it on its share of every batch; what it decides by is the same on all of them.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from tristill.stages.collectives import sum_of, summed
from tristill.stages.errors import DivergedError
from tristill.stages.evaluate.metrics import ValidationMetrics
from tristill.stages.interrupt import deferred_interrupt
from tristill.stages.losses.term import LossValues
from tristill.stages.progress import Progress, say
from tristill.stages.ranks import ALONE, Ranks
from tristill.stages.resources import keep_freed_memory, peak_rss_mib
from tristill.stages.threads import num_threads
from tristill.stages.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from tristill.stages.training.config import TrainingConfig
from tristill.stages.training.means import RunningMeans
from tristill.stages.training.metrics import MetricsLog, read_records
from tristill.stages.training.optimizer import make_optimizer
from tristill.stages.training.parallel import (
    StepLoss,
    made_whole,
    replicated,
    require_alike,
    shard,
    whole,
    without_exchange,
)
from tristill.stages.training.schedule import learning_rate, weight_decay
from tristill.stages.training.watch import HELD_OUT, PartingNote, Watch

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class StepInfo:
    """step: counted from 0. is_logged: whether the loss may take time to say more of itself than its value."""

    step: int
    is_logged: bool = False


def _nothing(values: LossValues) -> None:
    """What is done after a step unless something is asked for."""


class TrainingSummary(BaseModel):
    """What a finished training cost and where its loss ended; speeds count training steps only.

    loss_terms: those of the last record of `metrics.jsonl`.
    Positions are those of all ranks; peak_rss_mib is that of the largest of them; threads are of torch, in each.
    """

    model_config = ConfigDict(frozen=True)

    steps: int
    positions: int
    elapsed_s: float
    positions_per_s: float
    peak_rss_mib: float
    loss_terms: dict[str, float]
    threads: int | None = None


class Training(Generic[Batch]):
    """A training in a folder, which holds its metrics and, while it runs, `checkpoints/`."""

    def __init__(
        self,
        label: str,
        module: nn.Module,
        compute_loss: Callable[[Batch, StepInfo], LossValues],
        batches: Callable[[int], Iterator[Batch]],
        positions_per_batch: int,
        config: TrainingConfig,
        folder: Path,
        learning_rates: Mapping[str, float] = MappingProxyType({}),
        after_step: Callable[[LossValues], None] = _nothing,
        clipped_apart: Sequence[nn.Module] = (),
        measure: Callable[[int], ValidationMetrics] | None = None,
        watch: Watch | None = None,
        ranks: Ranks = ALONE,
        blocks: Sequence[nn.Module] = (),
        may_idle: bool = False,
    ) -> None:
        """`batches(n)` yields the endless sequence of batches from its n-th on, a pure function of n and the config.

        learning_rates: peaks of parameters whose names start so; the others take the config's. after_step: called
        with the mean values of a step once it is done; what it changes must lie in the module. clipped_apart: parts of
        the module whose gradients are clipped by norms of their own; the norm that is logged is that of the first.
        measure: metrics on about so many held-out windows, for `config.eval_every` and `watch`; all ranks call it.

        ranks: those that train the module together; all have it with the same first weights. The loss of each is such
        that the mean over ranks is that of the whole batch, and so are its values; `positions_per_batch` is of all.
        blocks: parts that are whole one at a time where tensors are shared out. may_idle: see `replicated`.
        """
        self._label = label
        self._module = module
        self._batches = batches
        self._positions_per_step = positions_per_batch * config.accumulation
        self._config = config
        self._folder = folder
        self._learning_rates = learning_rates
        self._after_step = after_step
        self._clipped = clipped_apart or [module]
        self._measure = measure
        self._watch = watch
        self._ranks = ranks
        self._may_idle = may_idle
        self._loss = StepLoss(module, compute_loss)
        self._parallel = config.parallel if ranks.are_many else None
        if self._parallel == "fsdp":
            shard(self._loss, blocks, ranks)
        self._device_type = next(module.parameters()).device.type

    def run(self) -> TrainingSummary:
        """Train to the end, from the last checkpoint if there is one: the result is the same bit for bit on a CPU.

        That is of one machine and one number of threads: see threads_of_checkpoint.

        Ctrl-C saves a checkpoint, then raises KeyboardInterrupt. A loss that is not finite raises DivergedError.
        """
        keep_freed_memory()
        config = self._config
        optimizer = make_optimizer(self._module, config, self._learning_rates)
        self._folder.mkdir(parents=True, exist_ok=True)
        checkpoints = self._folder / "checkpoints"
        start = load_checkpoint(checkpoints, self._module, optimizer, self._ranks)
        loss = replicated(self._loss, may_idle=self._may_idle) if self._parallel == "ddp" else self._loss
        batches = self._batches(start.step * config.accumulation)
        total = config.steps * self._positions_per_step
        done = start.step * self._positions_per_step
        terms, means = start.loss_terms, RunningMeans(start.sums)
        seen: dict[str, float] = {}
        self._module.train()
        with (
            self._log(start) as log,
            Progress(self._label, total, "positions", done) as progress,
            deferred_interrupt() as interrupt,
        ):
            note = PartingNote(read_records(self._folder) if log is not None and config.eval_every else ())
            for step in range(start.step, config.steps):
                is_last = step + 1 == config.steps
                is_logged = (step + 1) % config.log_every == 0 or step == 0 or is_last
                values, grad_norm = self._step(loss, optimizer, batches, StepInfo(step, is_logged))
                means.add(values, grad_norm)
                record: dict[str, Any] = {}
                if is_logged:
                    mean_loss, terms, mean_norm = means.take()
                    self._require_finite(step + 1, mean_loss, mean_norm)
                    record = self._record(step, mean_loss, terms, values.telemetry, mean_norm, progress)
                with progress.paused():
                    if held_out := self._look(step + 1):
                        seen = record[HELD_OUT] = held_out
                if record and log is not None:
                    record = {"step": step + 1, "positions": (step + 1) * self._positions_per_step, **record}
                    log.append(record)
                    if parting := note.add(record):
                        say(f"{self._label}: {parting.text}")
                is_stopped = sum_of(interrupt.is_set, self._ranks) > 0  # read once: it may change while we save
                is_saved = is_stopped or ((step + 1) % config.checkpoint_every == 0 and not is_last)
                progress.advance(self._positions_per_step, _note(terms, seen))
                if is_saved or is_last:
                    require_alike(self._module, self._ranks, f"{self._label}: after step {step + 1}")
                if is_saved:
                    self._require_finite(step + 1, float(values.total), float(grad_norm))
                    state = TrainingState(
                        step=step + 1,
                        elapsed_s=start.elapsed_s + progress.elapsed_s,
                        loss_terms=terms,
                        sums=means.sums(),
                        num_records=None if log is None else log.sync(),
                        threads=num_threads(),
                        ranks=self._ranks.world_size,
                    )
                    save_checkpoint(checkpoints, state, self._module, optimizer, self._ranks)
                if is_stopped:
                    raise KeyboardInterrupt
            elapsed_s = start.elapsed_s + progress.elapsed_s
        return TrainingSummary(
            steps=config.steps,
            positions=total,
            elapsed_s=elapsed_s,
            positions_per_s=total / elapsed_s,
            peak_rss_mib=max(self._ranks.gathered(peak_rss_mib())),
            loss_terms=terms,
            threads=num_threads(),
        )

    def weights_outside_blocks(self) -> AbstractContextManager[None]:
        """Within, the module can be forwarded apart from its loss, by all ranks at once, if tensors are shared out."""
        return made_whole(self._loss)

    def _log(self, start: TrainingState) -> AbstractContextManager[MetricsLog | None]:
        if not self._ranks.is_first:
            return nullcontext()
        return MetricsLog(self._folder, start.step, start.num_records, tensorboard=self._config.tensorboard)

    def _step(
        self, loss: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], info: StepInfo
    ) -> tuple[LossValues, torch.Tensor]:
        """One optimizer step; the values are means over its batches, which are all of one size."""
        config = self._config
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, info.step) * group["peak_ratio"]
            group["weight_decay"] = weight_decay(config, info.step) if group["decays"] else 0.0
        parts = []
        for number in range(config.accumulation):
            batch = next(batches)  # outside autocast: an online teacher keeps its own precision
            is_last = number + 1 == config.accumulation
            with nullcontext() if is_last else without_exchange(loss):
                with torch.autocast(self._device_type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                    total, terms, telemetry = loss(batch, info)
                (total / config.accumulation).backward()
            parts.append(LossValues(total.detach(), terms, telemetry))
        limit = math.inf if config.grad_clip is None else config.grad_clip
        grad_norm, *_ = [whole(nn.utils.clip_grad_norm_(part.parameters(), limit)) for part in self._clipped]
        optimizer.step()
        optimizer.zero_grad()
        mean = _over_ranks(_mean(parts), self._ranks)
        self._after_step(mean)
        return mean, grad_norm

    def _require_finite(self, step: int, loss: float, grad_norm: float) -> None:
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise DivergedError(
                f"{self._label}: the loss is {loss} and the gradient norm {grad_norm} at step {step}; lower "
                "learning_rate, lengthen warmup_steps or set precision to float32, and run again with --force"
            )

    def _record(
        self,
        step: int,
        loss: float,
        terms: dict[str, float],
        telemetry: dict[str, dict[str, float]],
        grad_norm: float,
        progress: Progress,
    ) -> dict[str, Any]:
        """What is logged after step number `step`: means since the last record, and telemetry of this step."""
        return {
            "loss": loss,
            "terms": terms,
            **telemetry,
            "learning_rate": learning_rate(self._config, step),
            **({"weight_decay": weight_decay(self._config, step)} if self._config.weight_decay_until < 1 else {}),
            "grad_norm": grad_norm,
            "positions_per_s": progress.units_per_s,
        }

    def _look(self, steps_done: int) -> dict[str, float]:
        """Held-out metrics to record after this step, if it is time; and to tell whoever watches."""
        config, watch = self._config, self._watch
        is_recorded = config.eval_every is not None and steps_done % config.eval_every == 0
        is_watched = watch is not None and steps_done % watch.every == 0 and steps_done < config.steps
        found: dict[str, float] = {}
        if is_recorded:
            found = self._measured(config.eval_windows).numbers()
        if watch is not None and is_watched:
            watch.report(steps_done, self._measured(watch.num_windows).model_dump())
        return found

    def _measured(self, num_windows: int) -> ValidationMetrics:
        """Metrics of the module as it is; it trains on afterwards as if nobody had looked."""
        assert self._measure is not None, "whoever trains with looks says how to measure"
        device = next(self._module.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self.weights_outside_blocks():
            found = self._measure(num_windows)
        self._module.train()
        return found


def _note(terms: Mapping[str, float], held_out: Mapping[str, float]) -> str:
    """On the progress line: the terms as last recorded, and the last look's loss."""
    shown = {**terms, **({"held-out loss": held_out["loss_nats"]} if "loss_nats" in held_out else {})}
    return ", ".join(f"{name} {value:.3f}" for name, value in shown.items())


def _over_ranks(values: LossValues, ranks: Ranks) -> LossValues:
    """Means over ranks; telemetry is of all of them already."""
    if not ranks.are_many:
        return values
    own = torch.stack([values.total.float(), *(value.float() for value in values.terms.values())])
    total, *terms = summed(own, ranks) / ranks.world_size
    return LossValues(total, dict(zip(values.terms, terms, strict=True)), values.telemetry)


def _mean(parts: list[LossValues]) -> LossValues:
    terms = {name: torch.stack([part.terms[name] for part in parts]).mean() for name in parts[0].terms}
    telemetry = {
        what: {name: statistics.fmean(part.telemetry[what][name] for part in parts) for name in values}
        for what, values in parts[0].telemetry.items()
    }
    return LossValues(torch.stack([part.total for part in parts]).mean(), terms, telemetry)
