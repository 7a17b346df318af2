"""Experts whose matrices are stacked in one parameter, quantised where their own module multiplies by them.

transformers keeps the experts of a mixture in parameters of three dimensions (`gate_up_proj`, `down_proj`), or of two
that it cuts (DBRX), and multiplies by them in its own way: one by one, in batches, or grouped. So their module stays as
it is. It is given quantised weights in place of its parameters, and the input of every product inside it is rounded as
that of a linear layer is. Which parameters are such stacks is found by watching the products of one forward pass.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tristill.stages.models.quantized_linear import QuantizedWeight
from tristill.stages.quantize.config import QuantizeConfig

_PRODUCTS = {
    F.linear,
    torch.mm,
    torch.bmm,
    torch.matmul,
    Tensor.mm,
    Tensor.bmm,
    Tensor.matmul,
    Tensor.__matmul__,
    *(getattr(module, name) for module, name in ((F, "grouped_mm"), (torch, "_grouped_mm")) if hasattr(module, name)),
}
"""Functions of an input and a matrix, or a stack of them. F.linear takes it as (out, in), all others as (in, out)."""
_PREFIX = "quantized_"


@dataclass(frozen=True)
class Stack:
    """A parameter that is a stack of matrices. `module` owns it as `name`.

    shape: (matrices, rows, columns), as the parameter has them. is_transposed: rows are inputs.
    """

    module: nn.Module
    name: str
    shape: torch.Size
    is_transposed: bool

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of each of its matrices."""
        _, rows, columns = self.shape
        return (columns, rows) if self.is_transposed else (rows, columns)


class StackedWeight(QuantizedWeight):
    """The matrices of a stack, each quantised by itself; the parameter stays with its module, under its own name."""

    def __init__(self, stack: Stack, quantize: QuantizeConfig) -> None:
        super().__init__()
        object.__setattr__(self, "_stack_module", stack.module)  # no part of this one: it is the other way round
        self._name = stack.name
        self._shape = stack.shape
        self._is_transposed = stack.is_transposed
        self.start_quantizing(quantize)

    @property
    def latent(self) -> Tensor:
        """The parameter."""
        module: nn.Module = self.__dict__["_stack_module"]
        return own_parameter(module, self._name)

    def matrices(self) -> Tensor:
        """The parameter as a stack of (out, in)."""
        stacked = self.latent.view(self._shape)
        return stacked.transpose(-1, -2) if self._is_transposed else stacked

    def as_parameter(self, matrices: Tensor) -> Tensor:
        """Inverse of `matrices`."""
        stacked = matrices.transpose(-1, -2) if self._is_transposed else matrices
        return stacked.reshape(self.latent.shape)


class QuantizedStacks(nn.Module):
    """Put before a module's own class: reading a stacked parameter gives its quantised values."""

    plain_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module itself, with rounded inputs."""
        with _RoundedInputs(self):
            return super().forward(*args, **kwargs)

    def stacked_weights(self) -> dict[str, StackedWeight]:
        """By the name of the parameter."""
        children = self.named_children()
        return {name.removeprefix(_PREFIX): child for name, child in children if isinstance(child, StackedWeight)}

    def make_plain(self) -> None:
        """Make it what it was, with quantised values in its parameters."""
        for name, weight in self.stacked_weights().items():
            values = weight.quantized_weight().detach().clone()
            delattr(self, _PREFIX + name)
            self.register_parameter(name, nn.Parameter(values))
        self.__class__ = self.plain_class  # type: ignore[assignment]


class _RoundedInputs(TorchFunctionMode):
    """While a module with quantised stacks computes, the input of its products is rounded."""

    def __init__(self, module: QuantizedStacks) -> None:
        super().__init__()
        self._weights = module.stacked_weights()
        parameters = module.named_parameters(recurse=False)
        self._others = [parameter for name, parameter in parameters if name not in self._weights]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func in _PRODUCTS and not any(_is_part(args[1], other) for other in self._others):
            some_weight = next(iter(self._weights.values()))  # they differ in nothing that inputs depend on
            args = (some_weight.quantized_input(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


class _Products(TorchFunctionMode):
    """Watches which parameters are multiplied by, in which form, and by whom."""

    def __init__(self, candidates: Mapping[str, tuple[nn.Module, str]]) -> None:
        super().__init__()
        self._candidates = candidates
        self._running: list[nn.Module] = []
        self.found: dict[str, set[Stack]] = {}
        self.refused: set[nn.Module] = set()

    def begin(self, module: nn.Module, *_: Any) -> None:
        """Hook: a module that has candidates begins to compute."""
        self._running.append(module)

    def end(self, *_: Any) -> None:
        """Hook: it ends."""
        self._running.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func in _PRODUCTS:
            self._note(func, args[1] if len(args) > 1 else None)
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any, right: Any) -> None:
        running = self._running[-1] if self._running else None
        for full_name, (module, name) in self._candidates.items():
            parameter = own_parameter(module, name)
            if _is_part(right, parameter):
                stack = _stack_of(module, name, right, is_linear=func is F.linear)
                if stack is None or running is not module:
                    self.refused.add(module)
                else:
                    self.found.setdefault(full_name, set()).add(stack)
                return
        if running is not None:
            self.refused.add(running)


def find_stacks(inner: nn.Module, forward: Callable[[], Any]) -> dict[str, Stack]:
    """Stacks of matrices that the modules of a model multiply by, by full name, as one forward pass shows them.

    Left out are parameters used in any other form, and all of a module that multiplies by something else too.
    """
    usual = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, QuantizedWeight)  # noqa: SLF001 - its only name
    candidates = {
        f"{path}.{name}": (module, name)
        for path, module in inner.named_modules()
        if not isinstance(module, usual)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim in {2, 3}
    }
    watch = _Products(candidates)
    with ExitStack() as hooks:
        for module in {module for module, _ in candidates.values()}:
            hooks.callback(module.register_forward_pre_hook(watch.begin).remove)
            hooks.callback(module.register_forward_hook(watch.end).remove)
        with watch:
            forward()
    forms = {name: stacks for name, stacks in watch.found.items() if len(stacks) == 1}
    found = {name: next(iter(stacks)) for name, stacks in forms.items()}
    return {name: stack for name, stack in found.items() if stack.module not in watch.refused}


def quantize_stacks(stacks: Mapping[str, Stack], quantize: QuantizeConfig) -> None:
    """Quantise those that the config names, in place; their latent weights stay where they are."""
    covered = [stack for name, stack in stacks.items() if quantize.covers(name)]
    for module in {id(stack.module): stack.module for stack in covered}.values():
        own = [stack for stack in covered if stack.module is module]
        for stack in own:
            module.add_module(_PREFIX + stack.name, StackedWeight(stack, quantize))
        kind = type(module)
        names = {stack.name: _quantized(_PREFIX + stack.name) for stack in own}
        module.__class__ = type(f"Quantized{kind.__name__}", (QuantizedStacks, kind), {**names, "plain_class": kind})


def own_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter itself, also where reading it gives quantised values."""
    parameter = module._parameters[name]  # noqa: SLF001 - torch has no other way past a property of the class
    assert parameter is not None, "it was found there"
    return parameter


def _quantized(child: str) -> property:
    def read(module: nn.Module) -> Tensor:
        weight = module.get_submodule(child)
        assert isinstance(weight, StackedWeight), "made with the class"
        return weight.quantized_weight()

    return property(read)


def _is_part(tensor: Any, whole: Tensor) -> bool:
    """Whether a tensor lies in the memory of another."""
    start = whole.data_ptr()
    return isinstance(tensor, Tensor) and 0 < start <= tensor.data_ptr() < start + whole.nbytes


def _stack_of(module: nn.Module, name: str, right: Tensor, *, is_linear: bool) -> Stack | None:
    """The form of a parameter of which a product takes `right`; None if that is no stack of matrices."""
    parameter = own_parameter(module, name)
    as_stored = right if right.stride(-1) == 1 else right.transpose(-1, -2)
    rows, columns = as_stored.shape[-2:]
    num_matrices = parameter.numel() // max(rows * columns, 1)
    is_whole = parameter.ndim == 2 and num_matrices == 1  # a matrix alone, as routers have
    if is_whole or as_stored.stride(-2) != columns or parameter.shape[-1] != columns:
        return None
    if parameter.ndim == 3 and parameter.shape[-2] != rows:
        return None
    return Stack(module, name, torch.Size((num_matrices, rows, columns)), (as_stored is right) != is_linear)
