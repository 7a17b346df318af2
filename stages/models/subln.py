"""SubLN: a norm before the output projections of attention and MLP, which full precision does without.

Shapes: D width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn


class SubNorm(nn.RMSNorm):
    """x + strength * (RMSNorm(x) - x), computed in float32: the norm itself, unless quantisation is being turned on.

    Wang et al. 2022, Foundation Transformers (arXiv 2210.06423), section 2, as BitNet has it (arXiv 2310.11453). With
    `strength` 0 it is not there: a student that starts from a teacher without it computes the teacher's logits.
    """

    strength = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape and dtype of x."""
        normed = F.rms_norm(x.float(), self.normalized_shape, self.weight, self.eps).to(x.dtype)
        return normed if self.strength == 1 else torch.lerp(x, normed, self.strength)


@torch.no_grad()
def fit_to_inputs(model: nn.Module, forward: Callable[[], object]) -> None:
    """Set the weights of every SubNorm to the root mean square of what reaches it in `forward`, a number each.

    So a norm that was put into a trained model changes the size of what passes as little as it can.
    """
    mean_squares: dict[SubNorm, float] = {}

    def look(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, SubNorm), "hooks are on these alone"
        mean_squares[norm] = float(inputs[0].float().square().mean())

    handles = [norm.register_forward_pre_hook(look) for norm in model.modules() if isinstance(norm, SubNorm)]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    for norm, mean_square in mean_squares.items():
        norm.weight.fill_(mean_square**0.5)
