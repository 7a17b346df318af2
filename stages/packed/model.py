"""A student with its ternary layers packed."""

from dataclasses import dataclass

from torch import nn

from tristill.stages.models.transformer import Transformer
from tristill.stages.packed.linear import PackedLinear


def pack_model(model: Transformer) -> Transformer:
    """The same model, changed in place: layers of a ternary code packed, their latent weights gone. For inference.

    All else stays as it is: embeddings, norms, an output head in full precision, layers of other codes. Logits of a
    packed output head are those of `lm_head`; there is no `head_weight` any more.
    """
    for name, layer in model.quantized_linears().items():
        if layer.quantize.is_ternary:
            has_int8_activations = layer.quantize.activations == "absmax-int8"
            model.set_submodule(name, PackedLinear(layer.ternary(), has_int8_activations=has_int8_activations))
    return model.eval()


@dataclass(frozen=True)
class MemoryUse:
    """Tensors of a model, each counted once."""

    packed_weights: int
    """Weights that are packed."""
    packed_bytes: int
    """Bytes of these, with their scales."""
    dense_weights: int
    """Numbers in all other tensors."""
    dense_bytes: int
    """Bytes of these."""


def memory_use(model: nn.Module) -> MemoryUse:
    """What the tensors of a model take in memory."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    packed = [tensor for layer in layers for tensor in layer.buffers()]
    addresses = {tensor.data_ptr() for tensor in packed}
    dense = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    others = [tensor for address, tensor in dense.items() if address not in addresses]
    return MemoryUse(
        packed_weights=sum(layer.in_features * layer.out_features for layer in layers),
        packed_bytes=sum(tensor.nbytes for tensor in packed),
        dense_weights=sum(tensor.numel() for tensor in others),
        dense_bytes=sum(tensor.nbytes for tensor in others),
    )


def memory_text(model: nn.Module) -> str:
    """How a model lies in memory, in a line."""
    use = memory_use(model)
    dense = f"{use.dense_weights:,} numbers in FP32, {use.dense_bytes / 2**20:.2f} MiB"
    if not use.packed_weights:
        return f"no ternary weights to pack, runs as it is: {dense}"
    return f"{use.packed_weights:,} weights packed in {use.packed_bytes / 2**20:.2f} MiB; {dense}"
