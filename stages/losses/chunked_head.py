"""The output head and all terms on distributions in one pass, a chunk of positions at a time.

Logits of [positions, V] are the largest tensor of a small model's step. Here they exist for one chunk only: its terms
and their gradient are computed at once, in the forward pass, and only the gradients of features and output matrix
are kept (as Liger-Kernel's fused linear losses do, Hsu et al. 2024, arXiv 2410.10989).

Shapes: N positions, D width, V vocabulary, J terms.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tristill.stages.losses.student import StudentChunk
from tristill.stages.losses.target import Targets
from tristill.stages.losses.term import LossValues, WeightedTerm

_CHUNK_ELEMENTS = 2**19
_SMALLEST_CHUNK_ROWS = 256

ChunkTerms = Callable[[StudentChunk, slice, torch.dtype], Tensor]


def chunked_head_loss(
    final_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    targets: Targets | None,
    terms: Sequence[WeightedTerm],
    position_weights_N: Tensor | None = None,
    num_positions: float | None = None,
) -> LossValues:
    """Sum of weight_j * mean over positions of term_j, zero without terms; and each mean.

    Differentiable in `final_ND` and `head_VD`.

    position_weights_N: by which positions count in the terms that need the teacher; None if all count alike.
    num_positions: what sums over positions are divided by; None for N, which makes them means. Logits are
    final @ head^T in the autocast type if autocast is on, else in their own; so are the products that rebuild the
    teacher's. Terms are computed in float32.
    """
    if not terms:  # schedules may bring all weights to zero
        return LossValues(final_ND.sum() * 0.0, {})
    needs_teacher = any(weighted.term.needs_teacher for weighted in terms)
    divisor = len(labels_N) if num_positions is None else num_positions

    def means_of_chunk(student: StudentChunk, rows: slice, dtype: torch.dtype) -> Tensor:
        target = targets.chunk(rows, dtype) if targets is not None and needs_teacher else None
        weights_N1 = None if position_weights_N is None else position_weights_N[rows, None]
        sums = []
        for weighted in terms:
            each = weighted.weight / divisor
            if weights_N1 is None or not weighted.term.needs_teacher:
                sums.append(weighted.term.per_position(student, labels_N[rows], target, each).sum())
            else:
                value_N = weighted.term.per_position(student, labels_N[rows], target, each * weights_N1)
                sums.append((value_N * weights_N1[:, 0]).sum())
        return torch.stack(sums) / divisor

    weights_J = torch.tensor([weighted.weight for weighted in terms], device=final_ND.device)
    total, means_J = _ChunkedHead.apply(final_ND, head_VD, weights_J, means_of_chunk)  # type: ignore[no-untyped-call]
    return LossValues(total, {weighted.name: mean for weighted, mean in zip(terms, means_J, strict=True)})


def chunk_logits(final_ND: Tensor, head_VD: Tensor) -> tuple[Tensor, torch.dtype]:
    """(logits_NV, the type they were computed in): the autocast type if autocast is on; given in float32 at least."""
    kind = final_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else final_ND.dtype
    with torch.autocast(kind, enabled=False):
        logits_NV = final_ND.to(dtype) @ head_VD.to(dtype).T
    return logits_NV if dtype == torch.float64 else logits_NV.float(), dtype


def chunks(num_rows: int, vocab_size: int) -> list[slice]:
    """Slices of rows whose logits have about half a million elements each, to stay in a processor's cache.

    At least 256 rows, since every chunk reads the whole output matrix.
    """
    size = max(_SMALLEST_CHUNK_ROWS, _CHUNK_ELEMENTS // vocab_size)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, final_ND: Tensor, head_VD: Tensor, weights_J: Tensor, terms: ChunkTerms
    ) -> tuple[Tensor, Tensor]:
        kind = final_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else final_ND.dtype
        head_cast_VD = head_VD.to(dtype)
        needs_final, needs_head = ctx.needs_input_grad[:2]
        d_final_ND = torch.empty_like(final_ND) if needs_final else None
        d_head_VD = torch.zeros_like(head_VD) if needs_head else None
        means_J = torch.zeros_like(weights_J)
        with torch.autocast(kind, enabled=False):
            for rows in chunks(len(final_ND), len(head_VD)):
                part_ND = final_ND[rows].to(dtype)
                logits_NV = (part_ND @ head_cast_VD.T).float() if dtype != torch.float64 else part_ND @ head_cast_VD.T
                wants_gradient = d_final_ND is not None or d_head_VD is not None
                student = StudentChunk(logits_NV, wants_gradient=wants_gradient)
                means_J += terms(student, rows, dtype)
                if not wants_gradient:
                    continue
                d_logits_NV = student.gradient()
                d_logits_NV = d_logits_NV.to(dtype)
                if d_final_ND is not None:
                    d_final_ND[rows] = (d_logits_NV @ head_cast_VD).to(final_ND.dtype)
                if d_head_VD is not None:
                    d_head_VD += d_logits_NV.T @ part_ND
        ctx.mark_non_differentiable(means_J)
        ctx.save_for_backward(d_final_ND, d_head_VD)
        return (weights_J * means_J).sum(), means_J

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_final_ND, d_head_VD = ctx.saved_tensors
        scale = gradients[0]
        # In place, so that memory does not grow; a second backward pass is refused by autograd.
        return (
            None if d_final_ND is None else d_final_ND.mul_(scale),
            None if d_head_VD is None else d_head_VD.mul_(scale),
            None,
            None,
        )
