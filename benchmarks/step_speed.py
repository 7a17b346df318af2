"""What a ternary step costs beside a step of the same model in full precision: one process, in turn, on labels alone.

    python -m benchmarks.step_speed [--shapes demo 30M] [--rounds 12] [--compile]

A step is forward, loss, backward, clipping and AdamW, on random ids. "simulated" is BitLinear as it is usually written:
weights and activations rounded to the values of their codes at every use, and multiplied in float32; what the other
ternary rows compute is compared with it. They agree layer by layer (tests), and whole models differ as any two orders
of summation do: a last bit now and then tips an activation to its next code; see the row of sums in float64.
`--compile` adds compiled rows.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.environment import environment
from tristill.pipeline.config import load_config
from tristill.pipeline.results import text_table
from tristill.stages.losses.chunked_head import chunked_head_loss
from tristill.stages.losses.cross_entropy import CrossEntropy
from tristill.stages.losses.term import WeightedTerm
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.quantized_linear import QuantizedLinear
from tristill.stages.models.transformer import Transformer, compile_model
from tristill.stages.quantize.activations import absmax_quantize
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.quantize.gradients import straight_through
from tristill.stages.quantize.ternary import Absmean
from tristill.stages.resources import keep_freed_memory
from tristill.stages.training.config import TrainingConfig
from tristill.stages.training.optimizer import make_optimizer

RESULTS = Path(__file__).parent / "results" / "step_speed.json"
POSITIONS = 256
TWIN = "FP32"
SIMULATED = "ternary, simulated"
SHAPES = {
    "demo": (load_config(Path("configs/demo.toml")).student_shape, 2048, 8),
    "30M": (ModelConfig(width=512, layers=8, heads=8, mlp_width=1536), 8192, 4),
}


class SimulatedLinear(nn.Module):
    """BitLinear with fake quantisation at every use, its sums in `dtype`."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self._dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        with torch.no_grad():
            values = Absmean().quantize(self.weight).dequantized()
        factors = straight_through(x, absmax_quantize(x)), straight_through(self.weight, values)
        return nn.functional.linear(*(factor.to(self._dtype) for factor in factors)).float()


class Runner:
    """A model that trains a step at a time, always on the same ids."""

    def __init__(self, model: Transformer, batch: int, precision: str) -> None:
        self.model = model
        self._bfloat16 = precision == "bfloat16"
        self._optimizer = make_optimizer(model, TrainingConfig(steps=1, learning_rate=1e-4))
        self._terms = [WeightedTerm(1.0, CrossEntropy())]
        generator = torch.Generator().manual_seed(0)
        self._ids_BT = torch.randint(0, model.vocab_size, (batch, POSITIONS + 1), generator=generator)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Final states, and gradients of all parameters in a row, which are left in place."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            final_ND = self.model(self._ids_BT[:, :-1]).final_BTD.flatten(0, 1)
            labels_N = self._ids_BT[:, 1:].flatten()
            values = chunked_head_loss(final_ND, self.model.head_weight, labels_N, None, self._terms)
        values.total.backward()
        return final_ND.detach(), torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])

    def step(self) -> None:
        """One step of training."""
        self.gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="compiled rows too: minutes more")
    arguments = parser.parse_args()
    keep_freed_memory()
    measured = {name: measure(name, arguments.rounds, with_compiled=arguments.compile) for name in arguments.shapes}
    lines = [
        [shape, name, *(row[key] for key in ("ms", "over FP32", "states", "gradients"))]
        for shape, rows in measured.items()
        for name, row in rows.items()
    ]
    titles = ["shape", "model", "ms a step", "over FP32: median, min to max", "states off by", "gradients off by"]
    markdown = text_table([titles, *lines])
    result = {
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "measured": measured,
        "environment": environment(),
        "markdown": markdown,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(markdown)


def measure(shape_name: str, rounds: int, *, with_compiled: bool) -> dict[str, dict[str, str]]:
    """Rows of one shape: times, their ratio to the twin's round by round, and relative errors to the simulation."""
    shape, vocab_size, batch = SHAPES[shape_name]

    def model_of(quantize: QuantizeConfig | None) -> Transformer:
        model = Transformer(shape, vocab_size, quantize)
        model.initialize(torch.Generator().manual_seed(0))
        return model

    def simulated(dtype: torch.dtype = torch.float32) -> Transformer:
        model = model_of(None)
        for name in model_of(QuantizeConfig()).quantized_linears():
            model.set_submodule(name, SimulatedLinear(model.get_parameter(f"{name}.weight"), dtype))
        return model

    makers: dict[str, Callable[[], tuple[Transformer, str]]] = {
        TWIN: lambda: (model_of(None), "float32"),
        "FP32, bfloat16 products": lambda: (model_of(None), "bfloat16"),
        SIMULATED: lambda: (simulated(), "float32"),
        "the same, sums in float64": lambda: (simulated(torch.float64), "float32"),
        "ternary, float32": lambda: (model_of(QuantizeConfig()), "float32"),
        "ternary, bfloat16": lambda: (model_of(QuantizeConfig()), "bfloat16"),
    }
    runners = {}
    for name, make in makers.items():
        model, precision = make()
        runners[name] = Runner(model, batch, precision)
        if with_compiled and name != SIMULATED:
            model, precision = make()
            compile_model(model)
            runners[f"{name}, compiled"] = Runner(model, batch, precision)
    states, gradients = runners[SIMULATED].gradients()
    errors = {}
    for name, runner in runners.items():
        is_ternary = any(isinstance(module, QuantizedLinear | SimulatedLinear) for module in runner.model.modules())
        if is_ternary and name != SIMULATED:
            own_states, own_gradients = runner.gradients()
            pairs = ((own_states, states), (own_gradients, gradients))
            errors[name] = [f"{float((own.float() - other).norm() / other.norm()):.1e}" for own, other in pairs]
        runner.step()
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            started = time.perf_counter()
            runner.step()
            seconds[name].append(time.perf_counter() - started)
    found = {}
    for name, values in seconds.items():
        ratios = sorted(own / twin for own, twin in zip(values, seconds[TWIN], strict=True))
        off_by = errors.get(name, ["-", "-"])
        found[name] = {
            "ms": f"{1000 * statistics.median(values):,.0f}",
            "over FP32": f"{statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}",
            "states": off_by[0],
            "gradients": off_by[1],
        }
    return found


if __name__ == "__main__":
    main()
