"""Numbers of a forward pass are finite, or the model is refused by name.

Shapes: B windows, T positions, D width.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from tristill.stages.errors import CheckpointError
from tristill.stages.models.language_model import Features, LanguageModel, State


def finite_features(
    model: LanguageModel, ids_BT: Tensor, states: Collection[State] = (), whose: str = "the teacher"
) -> Features:
    """The model's features of these ids. Raises CheckpointError if its final states, or those asked for, overflow."""
    features: Features = model(ids_BT, states)
    for state, values_BTD in features.hidden.items():
        if not bool(torch.isfinite(values_BTD).all()):
            raise CheckpointError(_refusal(model, values_BTD, f"{whose}: states of layer {state.layer}"))
    if not bool(torch.isfinite(features.final_BTD).all()):
        raise CheckpointError(_refusal(model, features.final_BTD, f"{whose}: {_first_layer(model, ids_BT, features)}"))
    return features


def require_finite(model_dtype: torch.dtype, values: Tensor, what: str) -> None:
    """Raises CheckpointError, naming `what`, if any of the values is not finite."""
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{what}: found numbers that are not finite; {_advice(model_dtype)}")


def _refusal(model: LanguageModel, values_BTD: Tensor, what: str) -> str:
    is_odd_BT = ~torch.isfinite(values_BTD).all(dim=-1)
    window, position = is_odd_BT.nonzero()[0].tolist()
    dtype = model.embedding_weight.dtype
    return (
        f"{what} are not finite at {int(is_odd_BT.sum())} of {is_odd_BT.numel()} positions (the first: position "
        f"{position} of window {window} of its batch), computed in {str(dtype)[6:]}; {_advice(dtype)}"
    )


@torch.no_grad()
def _first_layer(model: LanguageModel, ids_BT: Tensor, features: Features) -> str:
    """The first states of the window that overflows, in words."""
    window = int((~torch.isfinite(features.final_BTD).all(dim=-1)).any(dim=-1).nonzero()[0])
    for layer in range(1, model.depth + 1):
        state = State("residual", layer)
        try:
            found = model(ids_BT[window, None], [state]).hidden[state]
        except CheckpointError:  # its blocks do not show them
            break
        if not bool(torch.isfinite(found).all()):
            return f"final states (from layer {layer} of {model.depth} on)"
    return "final states"


def _advice(dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return (
            "float16 ends at 65504: set teacher.dtype to 'bfloat16' or 'float32' (of another model, load it in one of "
            "them)"
        )
    return "its weights are damaged or diverged: train it again with a lower learning rate, or give another model"
