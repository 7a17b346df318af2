"""Which positions of a batch are the hardest.

Shapes: N positions, M kept positions, D width, V vocabulary.
"""

import torch
from torch import Tensor

from stages.losses.chunked_head import chunk_logits, chunks
from stages.losses.cross_entropy import CrossEntropy
from stages.losses.forward_kl import ForwardKL
from stages.losses.selection_config import MiningConfig
from stages.losses.student import StudentChunk
from stages.losses.target import Targets


@torch.no_grad()
def hardest(
    final_ND: Tensor, head_VD: Tensor, labels_N: Tensor, targets: Targets | None, config: MiningConfig, tau: float
) -> Tensor:
    """Numbers of the config.fraction of positions that are the hardest for the student now, ascending, (M,); M >= 1.

    Shrivastava et al. 2016, Online Hard Example Mining (arXiv 1604.03540), per position. One more pass of the output
    head, without gradient; `tau` is the temperature of the divergence from the teacher.
    """
    scores = []
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
    num_kept = max(1, round(config.fraction * len(final_ND)))
    return torch.cat(scores).topk(num_kept, sorted=False).indices.sort().values
