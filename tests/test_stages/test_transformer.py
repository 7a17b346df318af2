"""The transformer is a Llama, and its folder is one that transformers loads."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tristill.stages.errors import CheckpointError, StageError
from tristill.stages.models.checkpoint import load_model, pick_device, save_model
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.language_model import State
from tristill.stages.models.origin import model_fingerprint
from tristill.stages.models.transformer import Transformer
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.quantize.ternary import Absmean

SHAPES = {
    "plain": {"width": 32, "layers": 2, "heads": 4, "mlp_width": 48},
    "grouped, untied": {
        "width": 48, "layers": 3, "heads": 6, "kv_heads": 2, "mlp_width": 40, "tied_embeddings": False,
        "rope_theta": 5000.0, "norm_eps": 1e-6,
    },
}  # fmt: skip


def make_model(shape: dict[str, object], quantize: QuantizeConfig | None = None, vocab: int = 97) -> Transformer:
    model = Transformer(ModelConfig.model_validate(shape), vocab, quantize)
    model.initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far enough from uniform that a wrong layer shows
    return model


def saved(model: Transformer, folder: Path) -> Path:
    (folder / "source.json").write_text("{}")
    save_model(folder / "model", model, folder / "source.json", context_length=16, end_of_text_id=0)
    return folder / "model"


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_loads_the_folder_and_gives_the_same_logits(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    model = make_model(SHAPES[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True)
        torch.testing.assert_close(model.logits(ids), expected.logits, rtol=1e-4, atol=1e-5)
        states = [State("residual", layer) for layer in range(len(model.model.layers) + 1)]
        hidden = model(ids, states).hidden
    for layer in range(len(model.model.layers)):  # theirs gives the last one after the final norm
        torch.testing.assert_close(
            hidden[State("residual", layer)], expected.hidden_states[layer], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", SHAPES)
def test_parameter_counts_are_those_of_the_config(name: str) -> None:
    model = make_model(SHAPES[name])
    assert sum(p.numel() for p in model.parameters()) == model.config.parameters(97)
    assert sum(p.numel() for n, p in model.named_parameters() if "proj" in n) == sum(
        rows * columns for name, (rows, columns) in model.config.all_linear_shapes(50).items() if name != "lm_head"
    )


CODES = [
    None,
    QuantizeConfig(),
    QuantizeConfig(activations="none"),
    QuantizeConfig(weights="nbit", bits=4),
    QuantizeConfig(weights="nbit-diffused", bits=2),
    QuantizeConfig(weights="nbit-learned", bits=3),
]


@pytest.mark.parametrize("quantize", CODES)
@pytest.mark.parametrize("subln", [False, True])
def test_a_saved_model_is_the_model_bit_for_bit(tmp_path: Path, quantize: QuantizeConfig | None, subln: bool) -> None:
    model = make_model({**SHAPES["grouped, untied"], "subln": subln}, quantize)
    folder = saved(model, tmp_path)
    again = load_model(folder) if quantize or not subln else None
    if again is None:  # full precision with SubLN is a student's twin; its folder says so too
        again = load_model(folder)
    ids = torch.arange(16)[None]
    assert torch.equal(model.logits(ids), again.logits(ids))
    assert again.quantize == quantize


def test_students_of_one_seed_start_from_the_same_weights_and_learned_steps_fit_them() -> None:
    ternary = Transformer(ModelConfig.model_validate(SHAPES["plain"]), 97, QuantizeConfig())
    learned = Transformer(ternary.config, 97, QuantizeConfig(weights="nbit-learned", bits=4))
    for model in (ternary, learned):
        model.initialize(torch.Generator().manual_seed(5))
    weights = dict(ternary.named_parameters())
    for name, parameter in learned.named_parameters():
        if name.endswith("log_step"):
            weight = weights[name.replace("log_step", "weight")]
            torch.testing.assert_close(parameter.exp(), 2 * weight.abs().mean() / 7**0.5)
        else:
            assert torch.equal(parameter, weights[name])


def test_a_students_linear_weights_are_ternary_and_nothing_else_is() -> None:
    student = make_model(SHAPES["plain"], QuantizeConfig(activations="none"))
    plain = make_model(SHAPES["plain"])
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            source = student.get_parameter(name)
            parameter.copy_(Absmean().quantize(source).dequantized() if "proj" in name else source)
    ids = torch.arange(16)[None]
    torch.testing.assert_close(student.logits(ids), plain.logits(ids))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 14), st.integers(0, 2**31))
def test_no_position_sees_the_future(position: int, seed: int) -> None:
    model = make_model(SHAPES["grouped, untied"], QuantizeConfig())
    ids = torch.randint(0, 97, (1, 16), generator=torch.Generator().manual_seed(seed))
    changed = ids.clone()
    changed[0, position + 1 :] = (changed[0, position + 1 :] + 1) % 97
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids)[:, : position + 1], model.logits(changed)[:, : position + 1])


def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved(make_model(SHAPES["plain"]), tmp_path)
    before = model_fingerprint(folder)
    config = folder / "config.json"
    good = config.read_text()
    config.write_text(good.replace('"intermediate_size": 48', '"intermediate_size": 24'))
    assert model_fingerprint(folder) != before
    with pytest.raises(CheckpointError, match=r"tensors do not fit the model: .*found \(48, 32\), expected \(24, 32\)"):
        load_model(folder)
    config.write_text(good.replace('"hidden_size"', '"hiden_size"'))
    with pytest.raises(CheckpointError, match=r"found \d+ bytes of weights, but .* describes \d+"):
        load_model(folder)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        load_model(folder)
    config.write_text(good)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"found 5 bytes of weights, but .* parameters"):
        load_model(folder)
    with pytest.raises(CheckpointError, match="found no model there"):
        load_model(tmp_path / "nowhere")


def test_a_device_that_this_machine_lacks_is_refused_with_what_it_has() -> None:
    has = "set cpu or cuda" if torch.cuda.is_available() else "set cpu: this machine has no CUDA that torch can use"
    with pytest.raises(StageError, match=rf"device 'cuda:99': cannot be used here \(.*\); {has}"):
        pick_device("cuda:99")
