"""The student and its loss as one trainable module.

Shapes: B batch, T positions, N = B T, D width.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tristill.cache.hidden import HiddenOutput
from tristill.stages.collectives import means_of, summed
from tristill.stages.distill.balance import Balance, FaintTerms
from tristill.stages.distill.config import DistillConfig
from tristill.stages.distill.health import TernaryHealth
from tristill.stages.distill.scheduled_terms import ScheduledTerms
from tristill.stages.errors import TargetsError
from tristill.stages.losses.chunked_head import chunked_head_loss
from tristill.stages.losses.hidden import HiddenLoss
from tristill.stages.losses.hidden_config import LayerMap, resolved_layers
from tristill.stages.losses.mining import hardest, num_hardest
from tristill.stages.losses.relations import RelationLoss, Widths
from tristill.stages.losses.schedule import values_of
from tristill.stages.losses.target import SelectedTargets, Targets
from tristill.stages.losses.term import LossValues, WeightedTerm
from tristill.stages.models.language_model import LanguageModel, State
from tristill.stages.models.transformer import Transformer
from tristill.stages.quantize.config import quantization_strength
from tristill.stages.ranks import ALONE, Ranks
from tristill.stages.targets.source import Signals, TargetBatch, TargetSource, counted_by_all
from tristill.stages.training.loop import StepInfo


@dataclass(frozen=True)
class Positions:
    """The positions of a batch that count, and by how much in terms that need the teacher (None: all alike).

    divisor: of sums over them, for means: their number, or, of many ranks, the mean of the numbers of all, so that the
    mean over ranks is that of all positions.
    """

    final_ND: Tensor
    head_VD: Tensor
    labels_N: Tensor
    targets: Targets | None
    weights_N: Tensor | None
    divisor: float

    def kept(self, kept_M: Tensor, divisor: float) -> "Positions":
        """Some of them."""
        return Positions(
            self.final_ND[kept_M],
            self.head_VD,
            self.labels_N[kept_M],
            None if self.targets is None else SelectedTargets(self.targets, kept_M),
            None if self.weights_N is None else self.weights_N[kept_M],
            divisor,
        )


class Objective(nn.Module):
    """Holds the student and what is trained or remembered beside it: projections, adaptive temperatures, balance.

    Of many ranks each has one, whose total and terms are such that their means over ranks are those of the whole batch.
    What is remembered follows from numbers of all ranks, and is the same on each.
    """

    def __init__(
        self, student: LanguageModel, config: DistillConfig, source: TargetSource, ranks: Ranks = ALONE
    ) -> None:
        super().__init__()
        self.student = student
        self._ranks = ranks
        self._config = config
        self._mining_temperature = source.temperature
        self.terms = ScheduledTerms(config, config.training.steps, source.temperature)
        state_losses: list[tuple[HiddenLoss | RelationLoss, float]] = []
        if config.hidden is not None and config.hidden.weight > 0:
            layers = _layers("hidden", config.hidden.layers, student, source, config.hidden.output)
            width = source.state_width(config.hidden.output)
            hidden = HiddenLoss(config.hidden, layers, student.widths.residual, width)
            state_losses.append((hidden, config.hidden.weight))
        if config.relations is not None and config.relations.weight > 0:
            layers = _layers("relations", config.relations.layers, student, source, "qkv")
            own = Widths(student.widths.query, student.widths.key)
            theirs = Widths.of(source.state_width("qkv"), source.query_width)
            if odd := [width for width in (*own, *theirs) if width % config.relations.heads]:
                raise TargetsError(
                    f"distill.relations.heads: found {config.relations.heads}, expected a divisor of every width of "
                    f"queries, keys and values, of which {odd[0]} is none"
                )
            relations = RelationLoss(config.relations, layers, own, theirs)
            state_losses.append((relations, config.relations.weight))
        self._state_losses = tuple(state_losses)
        self.state_losses = nn.ModuleList(loss for loss, _ in state_losses)  # so that projections are trained
        labels = [*self.terms.labels, *(loss.name for loss, _ in state_losses)]
        self.balance = Balance(config.balance, labels) if config.balance else None
        self._faint = FaintTerms()
        self.health = TernaryHealth(student)
        self._due: list[tuple[dict[str, float], dict[str, float]]] = []  # weights and norms of each micro-batch

    @property
    def signals(self) -> Signals:
        """What is wanted of the teacher."""
        return Signals(
            targets=self._config.needs_targets,
            tail=self._config.tail,
            entropy=self._config.needs_entropy,
            states=tuple(sorted({state for loss, _ in self._state_losses for state in loss.pairs.values()})),
        )

    @property
    def learning_rates(self) -> dict[str, float]:
        """Peaks of parameters that have one of their own, by the start of their names."""
        own = self._config.hidden.projection_learning_rate if self._config.hidden else None
        return {} if own is None else {"state_losses.": own}

    @property
    def clipped_apart(self) -> list[nn.Module]:
        """What has a gradient norm of its own: all in one."""
        return [self]

    @property
    def may_idle(self) -> bool:
        """Whether a step may leave parameters without gradient: all terms may end before the losses on states do.

        Models of transformers may have such parameters at any time.
        """
        terms = self._config.losses
        may_end = terms is not None and all(min(values_of(term.weight)) == 0 for term in terms)
        return may_end or not isinstance(self.student, Transformer)

    def forward(self, batch: TargetBatch, info: StepInfo) -> LossValues:
        """The weighted total and every term of a batch."""
        warmup = self.student.quantize.warmup if self.student.quantize else None
        if warmup is not None:
            self.student.quantize_by(quantization_strength(warmup, info.step))
        states = [state for loss, _ in self._state_losses for state in loss.pairs]
        features = self.student(batch.input_ids_BT, states)
        positions = self._positions(batch.counted(features.final_BTD), batch)
        plain = self.terms.at(info.step)
        weighted = [WeightedTerm(term.weight * self._factor(term.name), term.term, term.name) for term in plain]
        values = _head_loss(positions, weighted)
        total, found = values.total, dict(values.terms)
        for loss, weight in self._state_losses:
            value = self._state_loss(loss, features.hidden, batch)
            total = total + weight * self._factor(loss.name) * value
            found[loss.name] = value.detach()
        is_due = self.balance is not None and self.training and self.balance.is_due(info.step)
        if not (info.is_logged or is_due):
            return LossValues(total, found)
        weights = {term.name: term.weight for term in plain}
        weights |= {loss.name: weight for loss, weight in self._state_losses}
        norms = self._gradient_norms(positions, plain, features.hidden, batch)
        telemetry = self._telemetry(info, found, weights, norms)
        if info.is_logged:
            telemetry |= self.health.look(info.step)
        if is_due:
            shares = self.terms.shares(info.step)
            scaled = {label: norm * weights[label] / shares.get(label, weights[label]) for label, norm in norms.items()}
            self._due.append((shares | {loss.name: weight for loss, weight in self._state_losses}, scaled))
        return LossValues(total, found, telemetry if info.is_logged else {})

    def after_step(self, values: LossValues) -> None:
        """Let adaptive temperatures and the balance see the step that is done."""
        self.terms.observe(values.terms)
        if self.balance is not None and self._due:
            weights, first = self._due[0]
            means = {label: statistics.fmean(norms[label] for _, norms in self._due) for label in first}
            self.balance.observe(weights, means)
        self._due.clear()

    def _factor(self, label: str) -> float:
        return 1.0 if self.balance is None else self.balance.factor(label)

    def _positions(self, final_ND: Tensor, batch: TargetBatch) -> Positions:
        labels_N, weights_N = batch.counted(batch.labels_BT), None
        if self._config.entropy_weights is not None and batch.entropy_BT is not None:
            weights_N = (1 + batch.counted(batch.entropy_BT)) ** self._config.entropy_weights.power
        num_positions = counted_by_all(batch, self._ranks)
        divisor = num_positions / self._ranks.world_size
        positions = Positions(final_ND, self.student.head_weight, labels_N, batch.targets, weights_N, divisor)
        mining = self._config.mining
        if mining is not None and num_positions:
            tau, slots = self._mining_temperature, batch.labels_BT.numel()
            head_VD = self.student.head_weight
            kept_M = hardest(final_ND, head_VD, labels_N, batch.targets, mining, tau, self._ranks, slots)
            positions = positions.kept(kept_M, num_hardest(mining, num_positions) / self._ranks.world_size)
        weights_N = positions.weights_N
        if weights_N is None:
            return positions
        mean = summed(weights_N.sum(), self._ranks) / (positions.divisor * self._ranks.world_size)
        return replace(positions, weights_N=weights_N / mean)

    def _state_loss(
        self, loss: HiddenLoss | RelationLoss, hidden: Mapping[State, Tensor], batch: TargetBatch
    ) -> Tensor:
        """A mean over positions that count, times what makes its mean over ranks that of the whole batch."""
        value: Tensor = loss(hidden, batch.hidden, batch.hidden_stride, batch.counts_BT)
        if not self._ranks.are_many or batch.counts_BT is None:
            return value
        own = batch.counts_BT[:, :: batch.hidden_stride].sum().float()
        return value * (own * self._ranks.world_size / summed(own, self._ranks).clamp(min=1))

    def _gradient_norms(
        self, positions: Positions, terms: list[WeightedTerm], hidden: dict[State, Tensor], batch: TargetBatch
    ) -> dict[str, float]:
        """Norm of every term's gradient at weight one: at the output head's input, or in the states it compares."""
        norms: dict[str, Tensor] = {}
        with torch.enable_grad():
            for term in terms:
                final_ND = positions.final_ND.detach().requires_grad_()
                apart = replace(positions, final_ND=final_ND, head_VD=positions.head_VD.detach())
                alone = _head_loss(apart, [WeightedTerm(1.0, term.term)])
                norms[term.name] = torch.autograd.grad(alone.total, final_ND)[0].norm()
            for loss, _ in self._state_losses:
                states = {state: hidden[state].detach().requires_grad_() for state in loss.pairs}
                value = self._state_loss(loss, states, batch)
                gradients = torch.autograd.grad(value, list(states.values()))
                norms[loss.name] = torch.stack([gradient.norm() for gradient in gradients]).norm()
        if not self._ranks.are_many or not norms:
            return {label: float(norm) for label, norm in norms.items()}
        squares = summed(torch.stack(list(norms.values())).float().square(), self._ranks)
        found = squares.sqrt() / self._ranks.world_size  # of the mean over ranks, in which each has its own positions
        return dict(zip(norms, found.tolist(), strict=True))

    def _telemetry(
        self, info: StepInfo, values: dict[str, Tensor], weights: dict[str, float], norms: dict[str, float]
    ) -> dict[str, dict[str, float]]:
        """What is logged of every term beside its value. Weights have tau^2 and balance in them."""
        weights = {label: weight * self._factor(label) for label, weight in weights.items()}
        weighted_norms = {label: weights[label] * norm for label, norm in norms.items()}
        self._faint.look(weighted_norms)
        total = sum(weighted_norms.values())
        shown = means_of({label: values[label] for label in weights}, self._ranks)
        return {
            "weights": weights,
            "weighted": {label: weights[label] * value for label, value in shown.items()},
            "gradient_share": {label: norm / total if total else 0.0 for label, norm in weighted_norms.items()},
            "temperatures": self.terms.temperatures(info.step),
        }


def _layers(
    where: str, layers: LayerMap, student: LanguageModel, source: TargetSource, output: HiddenOutput
) -> dict[int, int]:
    found = resolved_layers(layers, student.depth, source.known_layers(output))
    first = 0 if output == "residual" else 1
    if beyond := [layer for layer in found if not first <= layer <= student.depth]:
        raise TargetsError(
            f"distill.{where}.layers: found student layers {beyond}, but the student has {student.depth} blocks"
        )
    known = source.known_layers(output) + ((0,) if output == "residual" else ())
    if beyond := sorted(set(found.values()) - set(known)):
        raise TargetsError(
            f"distill.{where}.layers: found teacher layers {beyond}, but of the teacher there are "
            f"{sorted(source.known_layers(output))}"
        )
    return found


def _head_loss(positions: Positions, terms: list[WeightedTerm]) -> LossValues:
    return chunked_head_loss(
        positions.final_ND,
        positions.head_VD,
        positions.labels_N,
        positions.targets,
        terms,
        positions.weights_N,
        positions.divisor,
    )
