"""Experts of mixtures, whose matrices are stacked in one parameter, as ternary students multiply by them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from small_models import VOCAB, write_model, write_tokenizer
from torch import Tensor, nn

from tristill.stages.distill.distill import model_size
from tristill.stages.distill.health import TernaryHealth
from tristill.stages.errors import StageError
from tristill.stages.export.own_format import compare_own_format, write_own_format
from tristill.stages.models.checkpoint import load_model, load_weights, new_model, save_model, saved_tensors
from tristill.stages.models.description import HuggingFaceShape
from tristill.stages.models.experts import StackedWeight
from tristill.stages.models.hugging_face import HuggingFaceModel
from tristill.stages.models.hugging_face_folder import load_hugging_face, load_inner
from tristill.stages.models.origin import Origin
from tristill.stages.models.quantized_linear import QuantizedLinear
from tristill.stages.quantize.activations import absmax_quantize
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.quantize.learned import NbitLearned
from tristill.stages.quantize.ternary import Absmean

pytest.importorskip("transformers")
IDS = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
_DBRX = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
MIXTURES: dict[str, tuple[dict[str, Any], str]] = {
    "mixtral": (_SHAPE, "mlp.experts."),
    "gpt_oss": ({**_SHAPE, "sliding_window": 8}, "mlp.experts."),
    "llama4_text": ({**_SHAPE, "intermediate_size_mlp": 64, "moe_layers": [0, 1]}, "feed_forward.experts."),
    "nemotron_h": ({**_SHAPE, "layers_block_type": ["moe", "attention"], "n_routed_experts": 4, "n_group": 1,
                    "topk_group": 1, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
                   "mixer.experts."),
    "jetmoe": ({**_SHAPE, "kv_channels": 8, "num_key_value_heads": 4}, "mlp.input_linear.weight"),
    "dbrx": ({"d_model": 32, "n_heads": 4, "n_layers": 2, "ffn_config": _DBRX,
              "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}}, "ffn.experts.mlp."),
}  # fmt: skip
"""By architecture: settings, and what the names of its stacks hold."""


def shape_of(kind: str) -> HuggingFaceShape:
    from transformers import AutoConfig

    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **MIXTURES[kind][0], **ids, vocab_size=VOCAB, max_position_embeddings=64)
    return HuggingFaceShape.of(config.to_dict())


def student_of(kind: str, seed: int = 0, **quantize: Any) -> HuggingFaceModel:
    layers = ("transformer.blocks.*" if kind == "dbrx" else "model.layers.*",)
    student = new_model(shape_of(kind), VOCAB, QuantizeConfig(**{"layers": layers, **quantize}), seed)
    assert isinstance(student, HuggingFaceModel)
    return student


def stacks_of(student: HuggingFaceModel) -> dict[str, StackedWeight]:
    return {name: layer for name, layer in student.quantized_linears().items() if isinstance(layer, StackedWeight)}


@pytest.mark.parametrize("kind", MIXTURES)
def test_nine_tenths_of_a_mixture_are_ternary_and_every_expert_has_its_own_scale(kind: str) -> None:
    student = student_of(kind)
    stacks = stacks_of(student)
    assert any(MIXTURES[kind][1] in name for name in stacks), list(student.quantized_linears())
    for stack in stacks.values():
        ternary, matrices_EOI = stack.ternary(), stack.matrices().detach()
        assert len(matrices_EOI) == 4
        for expert, matrix_OI in enumerate(matrices_EOI):
            alone = Absmean().quantize(matrix_OI)
            assert torch.equal(ternary.trits_OI[expert], alone.trits_OI)
            assert torch.equal(ternary.scale_RG[expert], alone.scale_RG)
        assert stack.num_scales == 4
    assert model_size(student).quantized_share > 0.9


@pytest.mark.parametrize("kind", MIXTURES)
def test_what_goes_out_of_a_mixture_computes_what_the_student_computes(kind: str) -> None:
    student = student_of(kind, activations="none")
    plain = student.plain_inner()
    assert not any(isinstance(module, StackedWeight) for module in plain.modules())
    torch.testing.assert_close(plain(input_ids=IDS, use_cache=False).logits, student.logits(IDS), atol=1e-5, rtol=1e-4)
    for name, stack in stacks_of(student).items():
        assert torch.equal(plain.get_parameter(name), stack.quantized_weight())


@torch.no_grad()
def test_an_expert_is_multiplied_as_a_linear_layer_is() -> None:
    student = student_of("mixtral")
    experts = student.inner.get_submodule("model.layers.0.mlp.experts")
    x_ND = torch.randn(10, 32, generator=torch.Generator().manual_seed(2))
    chosen_NK = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(n))[:2] for n in range(10)])
    share_NK = torch.rand(10, 2, generator=torch.Generator().manual_seed(3))

    def product(x: Tensor, matrix_OI: Tensor) -> Tensor:
        return F.linear(absmax_quantize(x), Absmean().quantize(matrix_OI).dequantized())

    wanted = torch.zeros(10, 32)
    latent = dict(experts.named_parameters(recurse=False))
    for position in range(10):
        for expert, share in zip(chosen_NK[position].tolist(), share_NK[position], strict=True):
            gate, up = product(x_ND[position], latent["gate_up_proj"][expert]).chunk(2)
            wanted[position] += share * product(F.silu(gate) * up, latent["down_proj"][expert])
    torch.testing.assert_close(experts(x_ND, chosen_NK, share_NK), wanted)


@pytest.mark.parametrize("kind", MIXTURES)
def test_training_reaches_every_matrix_of_a_mixture(kind: str) -> None:
    student = student_of(kind, weights="learned", scale_per="row").requires_grad_()
    student.logits(IDS).logsumexp(-1).mean().backward()
    for name, stack in stacks_of(student).items():
        assert stack.latent.grad is not None, name
        assert stack.latent.grad.abs().sum() > 0, name
        assert stack.log_step is not None, name
        assert stack.log_step.grad is not None, name
        assert stack.log_step.shape == stack.matrices().shape[:2]


def test_half_turned_on_a_mixture_is_between_full_precision_and_its_code() -> None:
    student = student_of("mixtral", activations="none")
    stack = next(iter(stacks_of(student).values()))
    student.quantize_by(0.5)
    halfway = (stack.latent + stack.ternary().dequantized()) / 2
    torch.testing.assert_close(stack.quantized_weight(), halfway)
    student.quantize_by(0.0)
    assert torch.equal(stack.quantized_weight(), stack.latent)


def test_a_learned_step_of_a_stack_is_that_of_each_matrix_alone() -> None:
    stack = next(iter(stacks_of(student_of("mixtral", weights="nbit-learned", bits=4)).values()))
    assert stack.log_step is not None
    for step, matrix_OI in zip(stack.log_step.exp(), stack.matrices(), strict=True):
        torch.testing.assert_close(step, NbitLearned(bits=4).initial_step(matrix_OI).squeeze())
    out = stack.quantized_weight()
    out.backward(torch.ones_like(out))
    assert stack.log_step.grad is not None
    alone = QuantizedLinear(32, 128, stack.quantize, nn.Parameter(stack.matrices()[0].detach().clone()))
    out = alone.quantized_weight()
    out.backward(torch.ones_like(out))
    assert alone.log_step is not None
    assert alone.log_step.grad is not None
    torch.testing.assert_close(stack.log_step.grad[0], alone.log_step.grad)


@pytest.mark.parametrize("weights", ["absmean", "learned"])
def test_a_saved_mixture_is_the_student_under_the_names_of_transformers(tmp_path: Path, weights: str) -> None:
    student = student_of("gpt_oss", weights=weights)
    names = {name for name in saved_tensors(student) if not name.endswith(".log_step")}
    assert names == set(load_names(student))
    save_model(tmp_path / "s", student, write_tokenizer(tmp_path / "tokenizer.json"), 32, 0)
    again = load_model(tmp_path / "s")
    assert torch.equal(again(IDS).final_BTD, student(IDS).final_BTD)
    other = student_of("gpt_oss", seed=1, weights=weights)
    load_weights(other, saved_tensors(student), tmp_path)
    assert torch.equal(other(IDS).final_BTD, student(IDS).final_BTD)


def load_names(student: HuggingFaceModel) -> dict[str, Tensor]:
    """The tensors of a model of this shape as transformers makes it."""
    return dict(new_model(student.shape, VOCAB, None, 0).inner.state_dict())  # type: ignore[union-attr, operator]


def test_an_exported_mixture_has_the_values_that_are_multiplied(tmp_path: Path) -> None:
    student = student_of("mixtral", activations="none")
    write_own_format(student, tmp_path / "hf", {"bos_token_id": 0, "eos_token_id": 0})
    compare_own_format(student, tmp_path / "hf")
    back = load_inner(Origin(folder=tmp_path / "hf"))
    torch.testing.assert_close(back(input_ids=IDS).logits, student.logits(IDS), atol=1e-5, rtol=1e-4)


def test_patterns_choose_among_stacks_and_the_others_stay_as_they_are() -> None:
    student = student_of("mixtral", layers=("*.experts.down_proj",))
    assert [name.rsplit(".", 1)[-1] for name in student.quantized_linears()] == ["down_proj", "down_proj"]
    plain = student_of("mixtral", weights="none", activations="none", layers=("*.q_proj",))
    with torch.no_grad():
        experts, theirs = (m.inner.get_submodule("model.layers.0.mlp.experts") for m in (student, plain))
        x_ND = torch.randn(6, 32)
        routed = torch.zeros(6, 1, dtype=torch.long), torch.ones(6, 1)
        inner_NF = experts._apply_gate(F.linear(x_ND, theirs.gate_up_proj[0]))
        wanted = F.linear(absmax_quantize(inner_NF), Absmean().quantize(theirs.down_proj[0]).dequantized())
        torch.testing.assert_close(experts(x_ND, *routed), wanted)
    with pytest.raises(StageError, match=r"found '\*.w9', which names no linear layer"):
        student_of("mixtral", layers=("*.w9",))
    with pytest.raises(StageError, match=r"found rows of 32 weights in .*experts.gate_up_proj, expected a multiple of"):
        student_of("mixtral", layers=("*.experts.*",), scale_per="group-128")


def test_health_of_a_mixture_is_told_by_the_name_of_its_stack() -> None:
    found = TernaryHealth(student_of("llama4_text")).look(1)
    stack = "model.layers.0.feed_forward.experts.gate_up_proj"
    ternary = stacks_of(student_of("llama4_text"))[stack].ternary()
    assert found["zeros"][stack] == pytest.approx(float((ternary.trits_OI == 0).float().mean()))
    assert found["scale"][stack] == pytest.approx(float(ternary.scale_RG.mean()))


def test_layers_that_are_no_product_are_left_and_named(tmp_path: Path) -> None:
    write_model(tmp_path, "phimoe", write_tokenizer(tmp_path / "tokenizer.json"))
    teacher = load_hugging_face(Origin(folder=tmp_path), tmp_path / "tokenizer.json")
    student = new_model(teacher.shape, VOCAB, QuantizeConfig(), 0)
    student.logits(IDS).sum().backward()
    assert isinstance(student, HuggingFaceModel)
    assert isinstance(student.inner.get_submodule("model.layers.0.mlp.router"), nn.Linear)
    assert "model.layers.0.mlp.router" not in student.quantized_linears()
