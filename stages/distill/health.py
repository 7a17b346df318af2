"""What becomes of the trits of a ternary student while it trains, layer by layer."""

from itertools import groupby

import torch
from torch import Tensor, nn

from tristill.stages.models.language_model import LanguageModel
from tristill.stages.models.quantized_linear import QuantizedWeight
from tristill.stages.progress import say
from tristill.stages.quantize.quantizer import TernaryWeight, in_groups
from tristill.stages.training.parallel import made_whole

_LOGS_UNTIL_FROZEN = 5


class TernaryHealth(nn.Module):
    """Remembers the trits of the last log; a warning names a layer that is dead or frozen, once.

    Its memory is in buffers, so that a training that is resumed logs what an uninterrupted one does.
    """

    def __init__(self, student: LanguageModel) -> None:
        super().__init__()
        self._layers = {name: layer for name, layer in student.quantized_linears().items() if layer.quantize.is_ternary}
        self._block_of = {id(layer): block for block in student.blocks for layer in block.modules()}
        for number, layer in enumerate(self._layers.values()):
            self.register_buffer(f"trits_{number}", torch.zeros_like(layer.matrices(), dtype=torch.int8))
        self._dead: set[str] = set()
        self._last_step = -1
        self._last: dict[str, dict[str, float]] = {}
        self.register_buffer("num_logs", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_still", torch.zeros(len(self._layers), dtype=torch.int64))

    @torch.no_grad()
    def look(self, step: int) -> dict[str, dict[str, float]]:
        """Per layer, by what it is; empty where nothing is ternary. Once per step, whatever its micro-batches.

        zeros: share of trits that are zero. flips: share that is another than at the last log, 0 at the first.
        to_boundary: mean over weights of | |w| - t | / scale, where t is the magnitude above which a weight is no zero.
        scale: mean over the layer's scales.
        """
        if step == self._last_step:
            return self._last
        num_logs, num_still = self.get_buffer("num_logs"), self.get_buffer("num_still")
        found: dict[str, dict[str, float]] = {"zeros": {}, "flips": {}, "to_boundary": {}, "scale": {}}
        for block, layers in groupby(enumerate(self._layers.items()), self._block):
            with made_whole(*([] if block is None else [block])):
                for number, (name, layer) in layers:
                    ternary, last_OI = layer.ternary(), self.get_buffer(f"trits_{number}")
                    zeros = _share(ternary.trits_OI == 0)
                    flips = _share(ternary.trits_OI != last_OI) if int(num_logs) else 0.0
                    last_OI.copy_(ternary.trits_OI)
                    num_still[number] = num_still[number] + 1 if int(num_logs) and flips == 0 else 0
                    found["zeros"][name] = zeros
                    found["flips"][name] = flips
                    found["to_boundary"][name] = _mean_to_boundary(layer.matrices(), ternary)
                    found["scale"][name] = float(ternary.scale_RG.mean())
                    self._warn(name, zeros, int(num_still[number]))
        num_logs += 1
        self._last_step, self._last = step, found if self._layers else {}
        return self._last

    def _block(self, place: tuple[int, tuple[str, QuantizedWeight]]) -> nn.Module | None:
        _, (_, layer) = place
        return self._block_of.get(id(layer))

    def _warn(self, name: str, zeros: float, num_still: int) -> None:
        if zeros == 1 and name not in self._dead:
            self._dead.add(name)
            say(f"warning: {name} is dead, all its weights are zero; raise the learning rate or change the quantiser")
        if num_still == _LOGS_UNTIL_FROZEN and zeros < 1:
            say(
                f"warning: {name} is frozen, none of its trits changed in {_LOGS_UNTIL_FROZEN} logs; raise the "
                "learning rate, or end the training if it is at its end"
            )


def _mean_to_boundary(weight_OI: Tensor, ternary: TernaryWeight) -> float:
    weight_OGC = in_groups(weight_OI.abs(), ternary.scale_RG.shape[-1])
    return float((weight_OGC - ternary.threshold[..., None]).abs_().div_(ternary.scale_RG[..., None]).mean())


def _share(is_so: Tensor) -> float:
    return float(is_so.float().mean())
