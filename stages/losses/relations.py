"""Attention relations: who resembles whom among queries, keys and values.

Shapes: B batch, T positions, W widths of queries, keys and values in a row, R relation heads, E width of one.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from tristill.stages.losses.hidden_config import RelationsConfig
from tristill.stages.models.language_model import State


class Widths(NamedTuple):
    """Of queries, and of keys and values each."""

    query: int
    key: int

    @classmethod
    def of(cls, total: int, query: int) -> "Widths":
        """From the width of all three in a row."""
        return cls(query, (total - query) // 2)


class RelationLoss(nn.Module):
    """Mean over Q, K, V, layers, heads and positions of KL(r_teacher || r_student), r = softmax(x_i x_j / sqrt(E)).

    Wang et al. 2021, MiniLMv2 (arXiv 2012.15828), equations 6-8: queries, keys or values of all heads are cut anew into
    R relation heads, in teacher and student alike, so that their widths and numbers of heads may differ. Causal: a
    position i relates to j <= i. Before rotation: the relations are of content, not of place.
    """

    name = "relations"

    def __init__(self, config: RelationsConfig, layers: dict[int, int], student: Widths, teacher: Widths) -> None:
        """The widths must be multiples of config.heads."""
        super().__init__()
        self.pairs = {State("qkv", own): State("qkv", theirs) for own, theirs in layers.items()}
        self._heads = config.heads
        self._student, self._teacher = student, teacher

    def forward(
        self,
        student: Mapping[State, Tensor],
        teacher: Mapping[State, Tensor],
        stride: int = 1,
        counts_BT: Tensor | None = None,
    ) -> Tensor:
        """Scalar loss of student[l] (B, T, W) against teacher[m] (B, T', W') for every mapped pair l = m.

        Positions outside `counts_BT`, of which a cache holds no states, are taken as padding.
        """
        is_padding_BT = None if counts_BT is None else ~counts_BT[:, ::stride]
        losses = []
        for own, theirs in self.pairs.items():
            with torch.autocast(student[own].device.type, enabled=False):
                own_parts = split(student[own][:, ::stride].float(), self._student)
                their_parts = split(teacher[theirs].float(), self._teacher)
                losses += [
                    relation_divergence(mine, his, self._heads, is_padding_BT)
                    for mine, his in zip(own_parts, their_parts, strict=True)
                ]
        return torch.stack(losses).mean()


def split(qkv_BTW: Tensor, widths: Widths) -> tuple[Tensor, ...]:
    """Queries, keys and values."""
    return torch.split(qkv_BTW, [widths.query, widths.key, widths.key], dim=-1)


def relation_divergence(
    student_BTD: Tensor, teacher_BTD: Tensor, heads: int, is_padding_BT: Tensor | None = None
) -> Tensor:
    """Mean over heads and positions of KL(r_teacher || r_student), nats; padding neither counts nor is related to."""
    log_r_student, log_r_teacher = (log_relations(x, heads, is_padding_BT) for x in (student_BTD, teacher_BTD))
    each_BRTT = F.kl_div(log_r_student, log_r_teacher, reduction="none", log_target=True)
    is_related = torch.isfinite(log_r_teacher)
    each_BRT = torch.where(is_related, each_BRTT, 0.0).sum(dim=-1)
    if is_padding_BT is None:
        return each_BRT.mean()
    counts_B1T = (~is_padding_BT)[:, None]
    return (each_BRT * counts_B1T).sum() / (counts_B1T.sum() * heads).clamp(min=1)


def log_relations(x_BTD: Tensor, heads: int, is_padding_BT: Tensor | None = None) -> Tensor:
    """log softmax over j <= i of x_i x_j / sqrt(E) in each relation head, (B, R, T, T); the lowest number elsewhere."""
    batch, positions, _ = x_BTD.shape
    x_BRTE = x_BTD.view(batch, positions, heads, -1).transpose(1, 2)
    scores_BRTT = x_BRTE @ x_BRTE.transpose(-1, -2) / x_BRTE.shape[-1] ** 0.5
    is_hidden_TT = torch.ones(positions, positions, dtype=torch.bool, device=x_BTD.device).triu(1)
    scores_BRTT = scores_BRTT.masked_fill(is_hidden_TT, -torch.inf)
    if is_padding_BT is not None:
        is_self_TT = torch.eye(positions, dtype=torch.bool, device=x_BTD.device)
        scores_BRTT = scores_BRTT.masked_fill(is_padding_BT[:, None, None] & ~is_self_TT, -torch.inf)
    return torch.log_softmax(scores_BRTT, dim=-1)
