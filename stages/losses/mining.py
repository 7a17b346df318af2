"""Which positions of a batch are the hardest.

Shapes: N positions, M kept positions, D width, V vocabulary.
"""

import torch
from torch import Tensor

from tristill.stages.collectives import stacked
from tristill.stages.losses.chunked_head import chunk_logits, chunks
from tristill.stages.losses.cross_entropy import CrossEntropy
from tristill.stages.losses.forward_kl import ForwardKL
from tristill.stages.losses.selection_config import MiningConfig
from tristill.stages.losses.student import StudentChunk
from tristill.stages.losses.target import Targets
from tristill.stages.ranks import ALONE, Ranks


@torch.no_grad()
def hardest(
    final_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    targets: Targets | None,
    config: MiningConfig,
    tau: float,
    ranks: Ranks = ALONE,
    num_slots: int | None = None,
) -> Tensor:
    """Numbers of the config.fraction of positions that are the hardest for the student now, ascending, (M,); M >= 1.

    Of many ranks, those of this one among the hardest of all ranks: their scores are exchanged, in rows of `num_slots`,
    the largest number of positions that a rank may have; here M may be 0.

    Shrivastava et al. 2016, Online Hard Example Mining (arXiv 1604.03540), per position. One more pass of the output
    head, without gradient; `tau` is the temperature of the divergence from the teacher.
    """
    scores = [final_ND.new_zeros(0, dtype=torch.float32)]
    for rows in chunks(len(final_ND), len(head_VD)):
        logits_NV, dtype = chunk_logits(final_ND[rows], head_VD)
        student = StudentChunk(logits_NV)
        if config.by == "loss":
            scores.append(CrossEntropy().per_position(student, labels_N[rows], None))
        elif config.by == "entropy":
            log_q_NV = student.log_q(1.0)
            scores.append(-(log_q_NV.exp() * log_q_NV).sum(dim=-1))
        else:
            assert targets is not None, "a source is chosen for the signals that the losses need"
            scores.append(ForwardKL(tau).per_position(student, labels_N[rows], targets.chunk(rows, dtype)))
    scores_N = torch.cat(scores)
    if not ranks.are_many:
        return scores_N.topk(num_hardest(config, len(scores_N)), sorted=False).indices.sort().values
    slots_N = scores_N.new_full((len(scores_N) if num_slots is None else num_slots,), -torch.inf)
    slots_N[: len(scores_N)] = scores_N
    slots_RN = stacked(slots_N, ranks)
    num_kept = num_hardest(config, int((slots_RN != -torch.inf).sum()))
    kept = slots_RN.flatten().topk(num_kept, sorted=False).indices.sort().values
    return kept[kept // len(slots_N) == ranks.rank] % len(slots_N)


def num_hardest(config: MiningConfig, num_positions: int) -> int:
    """How many of so many positions are kept."""
    return max(1, round(config.fraction * num_positions))
