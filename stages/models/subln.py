"""SubLN: a norm before the output projections of attention and MLP, which full precision does without.

Shapes: N positions, D width.
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
    """Set the weights of every SubNorm so that it changes what reaches it in `forward` as little as it can.

    With u = x / rms(x), sum over positions of (x - w u)^2 is least at w = sum x u / sum u^2, for each of the D weights;
    one where a weight has no input. A norm that was put into a trained model so begins near the identity.
    """
    fitted: dict[SubNorm, Tensor] = {}

    def look(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, SubNorm), "hooks are on these alone"
        x_ND = inputs[0].flatten(0, -2).float()
        u_ND = F.rms_norm(x_ND, norm.normalized_shape, None, norm.eps)
        fitted[norm] = (x_ND * u_ND).sum(dim=0) / u_ND.square().sum(dim=0)

    handles = [norm.register_forward_pre_hook(look) for norm in model.modules() if isinstance(norm, SubNorm)]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    for norm, weight_D in fitted.items():
        norm.weight.copy_(weight_D.nan_to_num(nan=1.0))
