"""Settings of the losses on hidden states and on attention relations."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from tristill.stages.settings import Section


def _pairs(layers: dict[int, int] | str) -> dict[int, int] | str:
    if isinstance(layers, dict) and (not layers or min(*layers, *layers.values()) < 0):
        raise ValueError("expected at least one pair of layers, none negative")
    return layers


LayerMap = Annotated[dict[int, int] | Literal["all", "uniform"], AfterValidator(_pairs)]


def resolved_layers(layers: LayerMap, student_depth: int, known: tuple[int, ...]) -> dict[int, int]:
    """Student layer to teacher layer, of a student of so many blocks and the teacher's layers that are known.

    "all" maps each block to the teacher's of the same number; "uniform" spreads the student's blocks evenly over the
    known ones, the last on the last (Jiao et al. 2020, TinyBERT, arXiv 1909.10351, section 3.1).
    """
    if isinstance(layers, dict):
        return dict(layers)
    blocks = range(1, student_depth + 1)
    known = tuple(layer for layer in known if layer > 0)
    if layers == "all" or not known:
        return {layer: layer for layer in blocks}
    return {layer: known[-(-layer * len(known) // student_depth) - 1] for layer in blocks}


class HiddenLossConfig(Section):
    """Loss between hidden states of student and teacher: L = L on distributions + weight * L on states."""

    kind: Annotated[
        Literal["mse", "cosine", "l2"],
        Field(description="mean squared error; one minus cosine; or mean Euclidean distance of a position"),
    ] = "mse"
    weight: Annotated[float, Field(ge=0, description="lambda, beside the loss on distributions; 0 is off")] = 1.0
    layers: Annotated[
        LayerMap,
        Field(
            description="student layer = teacher layer, as numbers of blocks from 1 (0 is the embedding); or all: same "
            "number; or uniform: spread over the teacher's layers that are known. The cache must hold the teacher's "
            "(cache.hidden_layers)",
        ),
    ]
    output: Annotated[
        Literal["residual", "attention", "mlp"],
        Field(description="what is compared: the stream after the block, or what its attention or its MLP adds to it"),
    ] = "residual"
    normalise: Annotated[bool, Field(description="compare states after layer normalisation without gain")] = False
    projection: Annotated[
        Literal["if-needed", "always"],
        Field(description="learned linear map from the student's width to the teacher's: where they differ, or always"),
    ] = "if-needed"
    projection_learning_rate: Annotated[
        float | None, Field(gt=0, description="peak, with the student's schedule; none takes the student's")
    ] = None


class RelationsConfig(Section):
    """Attention relations of one layer: who attends to whom in queries, keys and values (MiniLM)."""

    weight: Annotated[float, Field(ge=0, description="beside the loss on distributions; 0 is off")] = 1.0
    layers: Annotated[
        LayerMap,
        Field(description="student layer = teacher layer, or all, or uniform; the papers take one pair, the last"),
    ]
    heads: Annotated[
        int, Field(ge=1, description="relation heads that every width is cut into, in student and teacher alike")
    ]
