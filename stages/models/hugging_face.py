"""Any causal language model of transformers as a LanguageModel: its body forwarded, its output matrix in chunks.

Shapes: B batch, T positions, D width, V vocabulary, F features of the output head: D, and one more if it has a bias.
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tristill.cache.hidden import HiddenOutput
from tristill.stages.errors import CheckpointError
from tristill.stages.models.description import HuggingFaceShape
from tristill.stages.models.experts import QuantizedStacks, find_stacks, quantize_stacks
from tristill.stages.models.language_model import (
    Features,
    LanguageModel,
    State,
    StateWidths,
    positions_in_tables,
    require_finite,
)
from tristill.stages.models.quantized_linear import (
    QuantizedLinear,
    QuantizedWeight,
    linears_of,
    replace_linears,
    require_fit,
)
from tristill.stages.quantize.config import QuantizeConfig

_ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
_MODULES: dict[HiddenOutput, tuple[str, ...]] = {
    "attention": _ATTENTIONS,
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
}
"""Names of the modules of a block whose outputs are hidden states."""
_AXES = 3
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_NAMES: dict[HiddenOutput, str] = {
    "residual": "one output each",
    "attention": "an attention module",
    "mlp": "an MLP module",
    "qkv": "projections " + ", ".join(_PROJECTIONS),
}

_Part = tuple[State, str]
"""A state, and which of its projections; "" is all of it."""

_wanted: ContextVar[dict[_Part, Tensor | None]] = ContextVar("wanted")
"""What the forward pass of this thread wants, None until a hook has seen it."""


class HuggingFaceModel(LanguageModel):
    """`inner` is the model as transformers made it; its parameters, and the names of its layers, are its own.

    logits = scale * (final @ W^T + b) for the last states of its body, which was tried when it was made; the bias is
    one more column of the output matrix, the scale is taken into the features. There is no dropout: the model is in
    evaluation mode, whatever happens to what holds it.
    """

    def __init__(self, inner: Any, shape: HuggingFaceShape, vocab_size: int, quantize: QuantizeConfig | None) -> None:
        """Only the first `vocab_size` rows of the output matrix count. `inner` becomes part of it, changed in place.

        Raises CheckpointError for a model whose logits are something else.
        """
        super().__init__()
        self.shape = shape
        self.vocab_size = vocab_size
        self.inner = inner
        self.transposed = _plain_linears(inner)
        self._blocks = _blocks(inner, shape.layers)
        self.max_positions = positions_in_tables(_decoder(inner), inner.get_input_embeddings())
        self.softcap = shape.text.get("final_logit_softcapping") or None
        self.scale = 1.0
        self.scale = self._probed_scale()
        self.quantize = quantize
        if quantize is not None:
            self._quantize(quantize)
        self._watch()
        self.eval()

    def train(self, mode: bool = True) -> "HuggingFaceModel":
        """As of every module; the model inside stays in evaluation mode, without dropout."""
        super().train(mode)
        self.inner.eval()
        return self

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.shape.layers

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Its blocks, in order; none if its modules do not show them."""
        return self._blocks

    @property
    def widths(self) -> StateWidths:
        """Of its hidden states."""
        linears = {name.rsplit(".", 1)[-1]: module for name, module in self._first_block_linears()}
        query, key = (getattr(linears.get(name), "out_features", 0) for name in _PROJECTIONS[:2])
        residual = self.shape.text.get("hidden_size") or self.embedding_weight.shape[1]  # embeddings may be narrower
        return StateWidths(residual, query, key)

    @property
    def head_weight(self) -> Tensor:
        """(V, F): rows beyond the vocabulary, which some models are padded with, are left out."""
        head = self._head
        weight = head.quantized_weight() if isinstance(head, QuantizedLinear) else head.weight
        weight_VD = weight[: self.vocab_size]
        if getattr(head, "bias", None) is None:
            return weight_VD
        return torch.cat([weight_VD, head.bias[: self.vocab_size, None].to(weight_VD.dtype)], dim=1)

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """Those of its output embeddings, as transformers calls them."""
        head: nn.Module = self._head
        return head.parameters()

    @property
    def num_outputs(self) -> int:
        """Rows of its output matrix, padding counted."""
        return len(self._head.weight)

    @property
    def embedding_weight(self) -> Tensor:
        """The embedding, (V, D)."""
        weight: Tensor = self.inner.get_input_embeddings().weight
        return weight[: self.vocab_size]

    def quantized_linears(self) -> dict[str, QuantizedWeight]:
        """The quantised layers by the names that transformers gives them, stacks by those of parameters, in order."""
        found: dict[str, QuantizedWeight] = {}
        for name, module in self.inner.named_modules():
            if isinstance(module, QuantizedLinear):
                found[name] = module
            elif isinstance(module, QuantizedStacks):
                found |= {f"{name}.{own}": weight for own, weight in module.stacked_weights().items()}
        return found

    def forward(self, input_ids_BT: Tensor, states: Collection[State] = ()) -> Features:
        """Features of every position. Raises CheckpointError for a state that its blocks do not show."""
        with _collecting(states) as found:
            out = self._body(input_ids=input_ids_BT, use_cache=False)
        final_BTD = out.last_hidden_state
        if isinstance(self._head, QuantizedLinear):
            final_BTD = self._head.quantized_input(final_BTD)
        if self.scale != 1:
            final_BTD = final_BTD * self.scale
        if getattr(self._head, "bias", None) is not None:
            final_BTD = torch.cat([final_BTD, torch.full_like(final_BTD[..., :1], self.scale)], dim=-1)
        return Features(final_BTD, {state: self._state(found, state) for state in states})

    def plain_inner(self) -> Any:
        """The model of transformers with its quantised weights in place of latent ones, as it came: a copy.

        Rows of padding are cut off: nothing has taught them to keep quiet. A quantised head is no longer the embedding.
        """
        from transformers.pytorch_utils import Conv1D

        inner = copy.deepcopy(self.inner)
        if isinstance(self._head, QuantizedLinear):
            inner.config.tie_word_embeddings = False
        for name, layer in list(inner.named_modules()):
            if isinstance(layer, QuantizedLinear):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
                plain.weight = nn.Parameter(layer.quantized_weight().detach().clone())
                plain.bias = layer.bias
                inner.set_submodule(name, plain)
            elif isinstance(layer, QuantizedStacks):
                layer.make_plain()
        for name in self.transposed:
            linear = inner.get_submodule(name)
            conv = Conv1D(linear.out_features, linear.in_features)
            conv.weight = nn.Parameter(linear.weight.detach().T.contiguous())
            conv.bias = linear.bias
            inner.set_submodule(name, conv)
        if self.num_outputs > self.vocab_size:
            inner.resize_token_embeddings(self.vocab_size)
        inner.tie_weights()
        return inner

    @property
    def _body(self) -> Any:
        """All but the output head."""
        body = self.inner.base_model  # itself where its class names a body that it does not have (Llama 4)
        return body if body is not self.inner else self.inner.model

    @property
    def _head(self) -> Any:
        return self.inner.get_output_embeddings()

    def _first_block_linears(self) -> Iterator[tuple[str, nn.Module]]:
        blocks = self._blocks
        for name, module in blocks[0].named_modules() if blocks else ():
            if isinstance(module, nn.Linear):
                yield name, module

    def _state(self, found: Mapping[_Part, Tensor | None], state: State) -> Tensor:
        parts = [part for name in _parts_of(state) if (part := found[state, name]) is not None]
        if odd := [part for part in parts if not isinstance(part, Tensor) or part.ndim != _AXES]:
            found_shape = tuple(odd[0].shape) if isinstance(odd[0], Tensor) else type(odd[0]).__name__
            raise CheckpointError(
                f"hidden states {state.output!r} of layer {state.layer}: a {self.shape.kind} of transformers has "
                f"{found_shape} there, expected (batch, positions, width): it keeps more than one residual stream; "
                "keep no hidden states of it"
            )
        if len(parts) == len(_parts_of(state)):
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        raise CheckpointError(
            f"hidden states {state.output!r} of layer {state.layer}: a {self.shape.kind} of transformers does not show "
            f"them: expected {self.depth} blocks in a row with {_NAMES[state.output]}; keep states of output 'residual'"
        )

    def _watch(self) -> None:
        """Hooks on everything that can be asked for; they keep nothing unless somebody collects."""
        for number, block in enumerate(self._blocks, start=1):
            if number == 1:
                block.register_forward_pre_hook(_keep_input, with_kwargs=True)
            block.register_forward_hook(partial(_keep, (State("residual", number), "")))
            named = dict(block.named_children())
            for output, names in _MODULES.items():
                found = [named[name] for name in names if name in named]
                if found:
                    found[0].register_forward_hook(partial(_keep, (State(output, number), "")))
            attention = [named[name] for name in _ATTENTIONS if name in named]
            for name, module in attention[0].named_children() if attention else ():
                if name in _PROJECTIONS:
                    module.register_forward_hook(partial(_keep, (State("qkv", number), name)))

    def require_gradients(self) -> None:
        """Raises CheckpointError if it does not train as it is trained here: in evaluation mode, without dropout."""
        try:
            self.logits_of(self(self._probe_ids).final_BTD).logsumexp(-1).mean().backward()  # type: ignore[no-untyped-call]
        except Exception as exc:  # of any code
            first_line = (str(exc).splitlines() or [""])[0]
            raise CheckpointError(
                f"a {self.shape.kind} of transformers trains in no evaluation mode, which has no dropout "
                f"({type(exc).__name__}: {first_line}); give a student of another architecture"
            ) from exc
        self.zero_grad(set_to_none=True)

    def _quantize(self, quantize: QuantizeConfig) -> None:
        with torch.no_grad():
            linears = linears_of(self.inner, self._probe)
            stacks = find_stacks(self.inner, self._probe)
        shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
        require_fit(quantize, shapes | {name: stack.matrix_shape for name, stack in stacks.items()})
        replace_linears(self.inner, linears, quantize)
        quantize_stacks(stacks, quantize)

    def _probe(self) -> Tensor:
        """Its own logits of some ids."""
        logits: Tensor = self.inner(input_ids=self._probe_ids, use_cache=False).logits[0, :, : self.vocab_size].float()
        return logits

    def _require_causal(self, logits_TV: Tensor) -> None:
        """Refuses models that look ahead: `logits_TV` are those of the probe, whose last id is exchanged here."""
        ids = self._probe_ids
        ids[0, -1] = ids[0, 0]
        others_TV = self.inner(input_ids=ids, use_cache=False).logits[0, :, : self.vocab_size].float()
        off = float((others_TV - logits_TV)[:-1].abs().max() / logits_TV.abs().max().clamp(min=1e-30))
        bound = 1e-3 if self._head.weight.dtype == torch.float32 else 0.2  # a rounding may choose another expert
        if len(logits_TV) > 1 and off > bound:
            raise CheckpointError(
                f"a {self.shape.kind} of transformers: its logits change with ids that come later (by {off:.1%} of the "
                "largest), expected a causal model, which sees only what comes before; set is_decoder in its "
                "config.json if it was trained as one, or give another model"
            )

    @property
    def _probe_ids(self) -> Tensor:
        return torch.arange(min(8, self.vocab_size), device=self._head.weight.device)[None]

    @torch.no_grad()
    def _probed_scale(self) -> float:
        """What the logits are of the product of last states and output matrix, in float32 a number to 1e-3."""
        if self._head is None:
            raise CheckpointError(f"a {self.shape.kind} of transformers has no output matrix; give a causal model")
        if (rows := len(self._head.weight)) < self.vocab_size:
            raise CheckpointError(
                f"found {rows} outputs, expected at least {self.vocab_size}, one for each id of its tokenizer; the "
                "tokenizer is another model's"
            )
        self.inner.eval()
        wanted = self._probe()
        require_finite(self._head.weight.dtype, wanted, f"a {self.shape.kind} of transformers: its logits")
        self._require_causal(wanted)
        final_TD = self(self._probe_ids).final_BTD[0]
        is_narrower = final_TD.shape[-1] != self.head_weight.shape[1]  # something is between the two
        found = torch.zeros_like(wanted) if is_narrower else self.logits_of(final_TD)
        scale = float((wanted * found).sum() / found.square().sum().clamp(min=1e-30))
        scale = 1.0 if abs(scale - 1) < 1e-2 else scale
        off = float((wanted - scale * found).abs().max() / wanted.abs().max().clamp(min=1e-30))
        if not off <= (1e-3 if self._head.weight.dtype == torch.float32 else 5e-2):
            config = self.shape.config
            suspects = [f"{key} = {value}" for key, value in config.items() if "logit" in key and value]
            raise CheckpointError(
                f"a {self.shape.kind} of transformers: its logits are no multiple of its last hidden states times its "
                f"output matrix (off by {off:.1%} of the largest"
                + (f"; it has {', '.join(suspects)}" if suspects else "")
                + "), as every loss here takes them to be; give another model"
            )
        return scale


def _plain_linears(inner: Any) -> tuple[str, ...]:
    """Turn GPT-2's transposed linear layers into usual ones, in place; their names."""
    from transformers.pytorch_utils import Conv1D

    names = tuple(name for name, module in inner.named_modules() if isinstance(module, Conv1D))
    for name in names:
        conv = inner.get_submodule(name)
        linear = nn.Linear(conv.nx, conv.nf, device="meta")
        linear.weight = nn.Parameter(conv.weight.detach().T.contiguous())
        linear.bias = conv.bias
        inner.set_submodule(name, linear)
    return names


def _decoder(inner: Any) -> Any:
    """The part that text passes."""
    return inner.get_decoder() if hasattr(inner, "get_decoder") else inner.base_model


def _blocks(inner: Any, depth: int) -> list[nn.Module]:
    """The blocks of the decoder; none if its modules do not show them."""
    lists = [module for module in _decoder(inner).modules() if isinstance(module, nn.ModuleList)]
    return next((list(found) for found in lists if len(found) == depth), [])


def _parts_of(state: State) -> tuple[str, ...]:
    return _PROJECTIONS if state.output == "qkv" else ("",)


@contextmanager
def _collecting(states: Collection[State]) -> Iterator[dict[_Part, Tensor | None]]:
    wanted: dict[_Part, Tensor | None] = {(state, part): None for state in states for part in _parts_of(state)}
    token = _wanted.set(wanted)
    try:
        yield wanted
    finally:
        _wanted.reset(token)


def _keep(part: _Part, module: nn.Module, args: Any, output: Any) -> None:
    del module, args
    wanted = _wanted.get({})
    if part in wanted:
        wanted[part] = output[0] if isinstance(output, tuple | list) else output


def _keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    del module
    part, wanted = (State("residual", 0), ""), _wanted.get({})
    if part in wanted:
        wanted[part] = args[0] if args else kwargs["hidden_states"]
