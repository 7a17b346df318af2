"""Models of transformers as the stages use them: their logits, hidden states, gradients, weights and refusals."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import KINDS, PADDED, VOCAB, describe, in_hub_cache, write_model, write_tokenizer

from tristill.stages.data.config import ExistingTokenizer
from tristill.stages.data.tokenizer import tokenizer_file
from tristill.stages.data.tokenizer_gate import require_same_tokenizer, tokenizer_difference
from tristill.stages.errors import CheckpointError, TokenizerError
from tristill.stages.export.own_format import compare_own_format, write_own_format
from tristill.stages.losses.target import ComputedTargets
from tristill.stages.models.checkpoint import load_model, load_weights, new_model, save_model, saved_tensors
from tristill.stages.models.description import HuggingFaceShape, is_ours, llama_shape, read_description
from tristill.stages.models.hugging_face import HuggingFaceModel
from tristill.stages.models.hugging_face_folder import hugging_face_shape, load_hugging_face
from tristill.stages.models.language_model import State
from tristill.stages.models.origin import Origin, checked_origin, fetch_model, find_model, model_fingerprint
from tristill.stages.models.trust import trust_code_of
from tristill.stages.quantize.activations import absmax_quantize
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.quantize.ternary import Absmean

pytest.importorskip("transformers")
IDS = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(kind)
    write_model(folder, kind, tokenizer_json, outputs=PADDED)
    return folder


def load(folder: Path, **options: Any) -> HuggingFaceModel:
    return load_hugging_face(Origin(folder=folder, **options), folder / "tokenizer.json")


def reference(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_logits_are_those_of_transformers_without_padding(folder: Path) -> None:
    model = load(folder)
    wanted = reference(folder)(input_ids=IDS).logits
    assert wanted.shape[-1] == PADDED
    assert model.head_weight.shape[0] == VOCAB
    assert model.num_outputs == PADDED
    assert torch.equal(model.logits(IDS), wanted[..., :VOCAB])


@torch.no_grad()
def test_hidden_states_are_the_residual_stream_before_the_last_norm(folder: Path) -> None:
    model = load(folder)
    theirs = reference(folder)(input_ids=IDS, output_hidden_states=True).hidden_states
    states = [State("residual", layer) for layer in range(model.depth + 1)]
    found = model(IDS, states).hidden
    assert list(found) == states
    for layer in range(model.depth):  # transformers has the last norm in its last one
        assert torch.equal(found[State("residual", layer)], theirs[layer])
    norm = model.inner.base_model.ln_f if hasattr(model.inner.base_model, "ln_f") else model.inner.base_model.norm
    assert torch.equal(norm(found[State("residual", model.depth)]), theirs[model.depth])


@torch.no_grad()
def test_every_state_of_a_thread_is_its_own(folder: Path) -> None:
    model = load(folder)
    batches = [torch.randint(0, VOCAB, (1, 8), generator=torch.Generator().manual_seed(i)) for i in range(16)]

    def look(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(ids, [State("attention", 2)]).hidden[State("attention", 2)]

    alone = [look(ids) for ids in batches]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(look, batches))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@torch.no_grad()
def test_queries_keys_and_values_are_there_where_the_blocks_show_them(kind: str, folder: Path) -> None:
    model = load(folder)
    if kind == "gpt2":
        with pytest.raises(CheckpointError, match=r"a gpt2 of transformers does not show them.*q_proj, k_proj, v_proj"):
            model(IDS, [State("qkv", 1)])
        return
    assert model(IDS, [State("qkv", 1)]).hidden[State("qkv", 1)].shape[-1] == model.widths.of("qkv") == 64


def test_a_missing_layer_is_refused_by_number(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"layer 3: .* expected 2 blocks"):
        load(folder)(IDS, [State("residual", 3)])


@torch.no_grad()
def test_a_quantised_layer_is_absmean_of_the_weights_it_came_with(kind: str, folder: Path) -> None:
    teacher, quantize = load(folder), QuantizeConfig(layers=(KINDS[kind][2],))
    student = new_model(hugging_face_shape(folder), VOCAB, quantize, seed=0)
    load_weights(student, saved_tensors(teacher), folder)
    student.fit_steps()
    layers = student.quantized_linears()
    assert {name.split(".")[1] for name in layers} <= {"layers", "h"}
    name, layer = next(iter(layers.items()))
    plain = teacher.inner.get_submodule(name)
    assert torch.equal(layer.quantized_weight(), Absmean().quantize(plain.weight).dequantized())
    x = torch.randn(3, plain.in_features)
    by_hand = absmax_quantize(x) @ layer.quantized_weight().T + (0 if plain.bias is None else plain.bias)
    assert torch.allclose(layer(x), by_hand, atol=1e-5)
    assert torch.equal(student.embedding_weight, teacher.embedding_weight)
    assert torch.equal(student.head_weight, teacher.head_weight)


def test_unquantised_strength_is_the_teacher_itself(kind: str, folder: Path) -> None:
    teacher = load(folder)
    student = new_model(hugging_face_shape(folder), VOCAB, QuantizeConfig(layers=(KINDS[kind][2],)), seed=0)
    load_weights(student, saved_tensors(teacher), folder)
    student.quantize_by(0)
    with torch.no_grad():
        assert torch.allclose(student.logits(IDS), teacher.logits(IDS), atol=1e-5)


def test_training_reaches_every_weight_and_ties_stay_tied(kind: str, folder: Path) -> None:
    student = new_model(hugging_face_shape(folder), VOCAB, QuantizeConfig(layers=(KINDS[kind][2],)), seed=0)
    assert isinstance(student, HuggingFaceModel)
    student.train()
    assert not student.inner.training
    student.logits(IDS).square().mean().backward()
    without = [name for name, parameter in student.named_parameters() if parameter.grad is None]
    assert without == []
    is_tied = student.inner.get_output_embeddings().weight is student.inner.get_input_embeddings().weight
    assert is_tied == (kind in {"qwen3", "gpt2", "gemma"})


@pytest.mark.parametrize("weights", ["absmean", "seq"])
def test_a_saved_student_is_the_student(kind: str, folder: Path, tmp_path: Path, weights: Any) -> None:
    quantize = QuantizeConfig(layers=(KINDS[kind][2],), weights=weights)
    student = new_model(hugging_face_shape(folder), VOCAB, quantize, seed=3).eval()
    save_model(tmp_path, student, folder / "tokenizer.json", 12, 0)
    back = load_model(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(back.logits(IDS), student.logits(IDS))
    assert back.quantize == quantize
    assert isinstance(read_description(tmp_path).shape, HuggingFaceShape)


def test_an_export_in_its_own_format_has_the_weights_that_are_multiplied(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    quantize = QuantizeConfig(layers=(KINDS[kind][2],), activations="none")
    student = new_model(hugging_face_shape(folder), VOCAB, quantize, seed=3).eval()
    assert isinstance(student, HuggingFaceModel)
    write_own_format(student, tmp_path, {"bos_token_id": 0, "eos_token_id": 0})
    compare_own_format(student, tmp_path)
    with torch.no_grad():
        theirs = reference(tmp_path)(input_ids=IDS).logits[..., :VOCAB]
        assert torch.allclose(theirs, student.logits(IDS), atol=1e-5)
    assert type(reference(tmp_path)) is type(reference(folder))


def test_bfloat16_weights_are_another_teacher(folder: Path) -> None:
    plain, half = Origin(folder=folder).with_fingerprint(), Origin(folder=folder, dtype="bfloat16").with_fingerprint()
    assert plain.fingerprint == model_fingerprint(folder) != half.fingerprint
    model = load(folder, dtype="bfloat16")
    assert model.head_weight.dtype == torch.bfloat16
    with torch.no_grad():
        far = (model.logits(IDS).float() - load(folder).logits(IDS)).abs().max()
    assert 0 < far < 1


def test_eager_attention_computes_the_same(folder: Path) -> None:
    with torch.no_grad():
        assert torch.allclose(load(folder, attention="eager").logits(IDS), load(folder).logits(IDS), atol=1e-5)


def test_an_unknown_attention_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot load it as a causal language model"):
        load(folder, attention="telepathy")


def test_a_llama_is_described_as_our_own_transformer(kind: str, folder: Path) -> None:
    shape = read_description(folder).shape
    assert isinstance(shape, HuggingFaceShape) == (kind != "llama")
    assert shape.layers == 2


@pytest.mark.parametrize(
    "other",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"head_dim": 8},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"quantization_config": {"quant_method": "bitnet"}},
        {"model_type": "mistral"},
        {"hidden_act": "relu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        {"sliding_window": 16},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"pretraining_tp": 2},
        {"logits_scaling": 8.0},
        {"final_logit_softcapping": 30.0},
        {"residual_multiplier": 0.2},
        {"use_qk_norm": True},
        {"num_local_experts": 4},
        {"auto_map": {"AutoModelForCausalLM": "own.Model"}},
    ],
    ids=str,
)
def test_a_llama_that_computes_otherwise_is_none_of_ours(tokenizer_json: Path, tmp_path: Path, other: Any) -> None:
    write_model(tmp_path, "llama", tokenizer_json)
    config = json.loads((tmp_path / "config.json").read_text())
    assert llama_shape(config) is not None
    assert llama_shape({**config, **other}) is None
    theta = config.pop("rope_parameters")["rope_theta"]
    del config["transformers_version"]
    unsigned = {**config, "rope_theta": theta}
    assert is_ours(unsigned)
    assert not is_ours({**unsigned, **other})


@torch.no_grad()
def test_an_unsigned_llama_of_another_activation_is_computed_by_transformers(
    tokenizer_json: Path, tmp_path: Path
) -> None:
    write_model(tmp_path, "llama", tokenizer_json, hidden_act="relu")
    config = json.loads((tmp_path / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    del config["transformers_version"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": theta}))
    torch.testing.assert_close(load_model(tmp_path).logits(IDS), reference(tmp_path)(input_ids=IDS).logits)


def test_settings_that_compute_nothing_leave_a_llama_ours(tokenizer_json: Path, tmp_path: Path) -> None:
    write_model(tmp_path, "llama", tokenizer_json)
    config = json.loads((tmp_path / "config.json").read_text())
    smollm2 = {"is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "pretraining_tp": 1}
    assert llama_shape({**config, **smollm2, "_attn_implementation_autoset": True, "unsloth_fixed": True}) is not None


def test_weights_that_lack_a_tensor_are_refused_by_name(tokenizer_json: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_model(tmp_path, "llama", tokenizer_json)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 tensors of a llama.*random: model\.norm\.weight"):
        load(tmp_path)


def test_pickled_weights_are_not_loaded(tokenizer_json: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path, "llama", tokenizer_json)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"found no \*\.safetensors.*pickled ones are not loaded"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"found no \*\.safetensors.*pickled ones are not loaded"):
        model_fingerprint(tmp_path)


def test_code_of_a_folder_runs_only_on_request(tokenizer_json: Path, tmp_path: Path) -> None:
    write_model(tmp_path, "llama", tokenizer_json)
    (tmp_path / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class MyConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n"
    )
    auto = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    describe(tmp_path, model_type="mine", auto_map=auto)
    with pytest.raises(CheckpointError, match="cannot load it"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()
    Origin(folder=tmp_path).with_fingerprint().save(tmp_path)
    origin = json.loads((tmp_path / "origin.json").read_text())
    (tmp_path / "origin.json").write_text(json.dumps({**origin, "trust_remote_code": True}))
    with pytest.raises(CheckpointError, match="cannot load it"):  # what lies beside a model cannot trust itself
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()
    trust_code_of(tmp_path)
    assert load(tmp_path).depth == 2
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("other", ["phi", "granite", "cohere", "opt"])
def test_a_bias_or_a_constant_factor_of_the_head_is_in_features_and_matrix(
    tokenizer_json: Path, tmp_path: Path, other: str
) -> None:
    write_model(tmp_path, other, tokenizer_json, outputs=PADDED)
    model = load(tmp_path)
    with torch.no_grad():
        wanted = reference(tmp_path)(input_ids=IDS).logits[..., :VOCAB]
        assert torch.allclose(model.logits(IDS), wanted, atol=1e-5)
        residual = model(IDS, [State("residual", 1)]).hidden[State("residual", 1)]
    assert residual.shape[-1] == model.widths.residual == 32
    if other == "phi":
        assert model.inner.get_output_embeddings().bias.abs().min() > 0
    assert (model.scale == 1) == (other not in {"granite", "cohere"})


@torch.no_grad()
def test_capped_logits_are_those_of_transformers(tokenizer_json: Path, tmp_path: Path) -> None:
    write_model(tmp_path, "capped", tokenizer_json)
    model, wanted = load(tmp_path), reference(tmp_path)(input_ids=IDS).logits
    assert wanted.abs().max() > 2.5  # where the cap bends
    assert torch.allclose(model.logits(IDS), wanted, atol=1e-5)
    features = model(IDS)
    targets = ComputedTargets(features.final_BTD.flatten(0, 1), model.head_weight, model.softcap)
    assert torch.allclose(targets.chunk(slice(0, 24)).logits_NV, wanted.flatten(0, 1), atol=1e-5)


def test_a_student_with_capped_logits_is_refused(tokenizer_json: Path, tmp_path: Path) -> None:
    write_model(tmp_path, "capped", tokenizer_json)
    with pytest.raises(CheckpointError, match=r"final_logit_softcapping = 3\.0, and the losses of a student know no"):
        new_model(hugging_face_shape(tmp_path), VOCAB, QuantizeConfig(), seed=0)


def test_logits_that_are_no_product_are_refused(tokenizer_json: Path, tmp_path: Path) -> None:
    """An architecture whose head does more than multiply, from a folder's own code."""
    write_model(tmp_path, "llama", tokenizer_json)
    (tmp_path / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MyConfig(LlamaConfig):\n    model_type = 'bent'\n"
        "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n"
        "    def forward(self, *args, **kwargs):\n"
        "        out = super().forward(*args, **kwargs)\n"
        "        out.logits = out.logits.abs().sqrt()\n"
        "        return out\n"
    )
    auto = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    describe(tmp_path, model_type="bent", auto_map=auto, logit_root=2)
    trust_code_of(tmp_path)
    with pytest.raises(CheckpointError, match=r"its logits are no multiple of .* it has logit_root = 2"):
        load(tmp_path)


def test_a_tokenizer_may_know_more_ids_than_the_model_has_rows(tokenizer_json: Path, tmp_path: Path) -> None:
    write_model(tmp_path, "llama", tokenizer_json, outputs=VOCAB - 1)
    assert load(tmp_path).vocab_size == VOCAB - 1


def test_a_tokenizer_is_compared_by_what_it_holds(tokenizer_json: Path, tmp_path: Path) -> None:

    content = json.loads(tokenizer_json.read_text())
    same = tmp_path / "same.json"
    content["truncation"], content["padding"] = (
        {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0},
        None,
    )
    content["model"]["merges"] = [
        " ".join(pair) if isinstance(pair, list) else pair for pair in content["model"]["merges"]
    ]
    same.write_text(json.dumps(content, indent=1))
    assert same.read_bytes() != tokenizer_json.read_bytes()
    assert tokenizer_difference(same, tokenizer_json) is None

    one, two = [text for text, i in content["model"]["vocab"].items() if i in (17, 40)]
    vocab = content["model"]["vocab"]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    with pytest.raises(
        TokenizerError, match=r"the tokenizer of the teacher is not that of .*: 2 of 300 ids differ: id 17 is"
    ):
        require_same_tokenizer(other, tokenizer_json, "the teacher", "give another")


def test_the_same_ids_that_cut_texts_otherwise_are_refused(tokenizer_json: Path, tmp_path: Path) -> None:

    content = json.loads(tokenizer_json.read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(content))
    assert "pre_tokenizer differ" in (tokenizer_difference(other, tokenizer_json) or "")
    content["pre_tokenizer"]["add_prefix_space"] = False
    content["model"]["merges"] = content["model"]["merges"][::-1]
    other.write_text(json.dumps(content))
    assert "model.merges differ" in (tokenizer_difference(other, tokenizer_json) or "")


def test_a_vocabulary_that_ends_earlier_is_named_by_its_first_missing_id(tokenizer_json: Path, tmp_path: Path) -> None:
    shorter = write_tokenizer(tmp_path / "tokenizer.json", vocab_size=VOCAB - 4)
    assert "4 of 300 ids differ: id 296 is none, not" in (tokenizer_difference(shorter, tokenizer_json) or "")


def test_a_model_of_the_hub_is_found_in_its_cache_on_this_machine(
    tokenizer_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of the hub's cache, made by hand: what a download leaves."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snapshot = in_hub_cache(tmp_path, "tiny")
    write_model(snapshot, "llama", tokenizer_json)
    found = find_model(Path("someone/tiny"), None, download=False)
    assert found == snapshot
    assert load(found).depth == 2
    assert find_model(Path("someone/else"), None, download=False) is None
    with pytest.raises(CheckpointError, match="someone/else: found no folder of that name here, and as a name on the"):
        fetch_model(Path("someone/else"), None)
    with pytest.raises(CheckpointError, match="/no/such/folder: found no folder there"):
        fetch_model(Path("/no/such/folder"), None)


def test_a_tokenizer_of_the_hub_is_found_likewise(
    tokenizer_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snapshot = in_hub_cache(tmp_path, "tiny")
    (snapshot / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    assert tokenizer_file(ExistingTokenizer(kind="file", path="someone/tiny")) == snapshot / "tokenizer.json"
    with pytest.raises(CheckpointError, match="nobody/nothing: found no folder of that name here"):
        tokenizer_file(ExistingTokenizer(kind="file", path="nobody/nothing"))


def test_code_that_changed_is_another_model(tokenizer_json: Path, tmp_path: Path) -> None:
    write_model(tmp_path, "llama", tokenizer_json)
    (tmp_path / "mine.py").write_text("one = 1\n")
    plain = model_fingerprint(tmp_path)
    (tmp_path / "mine.py").write_text("one = 2\n")
    assert model_fingerprint(tmp_path) == plain  # nothing names it
    describe(tmp_path, auto_map={"AutoConfig": "mine.MyConfig"})
    named = model_fingerprint(tmp_path)
    (tmp_path / "mine.py").write_text("one = 3\n")
    assert model_fingerprint(tmp_path) != named


def test_files_that_were_only_touched_are_the_same_model(folder: Path, tmp_path: Path, tokenizer_json: Path) -> None:
    there, here = tmp_path / "model", tmp_path / "run"
    write_model(there, "llama", tokenizer_json)
    here.mkdir()
    Origin(folder=there).with_fingerprint().save(here)
    os.utime(there / "model.safetensors", ns=(1, 1))
    origin = checked_origin(here)
    assert origin is not None
    assert not origin.is_unchanged()
    write_model(there, "llama", tokenizer_json, seed=1)
    with pytest.raises(CheckpointError, match=r"is another model than when .* was made of it"):
        checked_origin(here)
    shutil.rmtree(there)
    with pytest.raises(CheckpointError, match=r"was made of it: put it back, or run `tristill teacher --force`"):
        checked_origin(here)


@torch.no_grad()
def test_projections_of_a_quantised_student_are_seen(kind: str, folder: Path) -> None:
    if kind == "gpt2":
        return  # has none of these names
    student = new_model(hugging_face_shape(folder), VOCAB, QuantizeConfig(), seed=0)
    found = student(IDS, [State("qkv", 2)]).hidden[State("qkv", 2)]
    layers = student.quantized_linears()
    inputs: list[torch.Tensor] = []
    layers["model.layers.1.self_attn.k_proj"].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    student(IDS)
    wanted = layers["model.layers.1.self_attn.k_proj"](inputs[0])
    assert torch.equal(found[..., student.widths.query :][..., : student.widths.key], wanted)


@pytest.mark.parametrize("kind_of_tied", ["qwen3", "gpt2"])
def test_a_quantised_head_that_was_the_embedding_goes_out_apart(
    kind_of_tied: str, tokenizer_json: Path, tmp_path: Path
) -> None:
    write_model(tmp_path / "model", kind_of_tied, tokenizer_json, outputs=PADDED)
    quantize = QuantizeConfig(layers=(KINDS[kind_of_tied][2], "lm_head"), activations="none")
    student = new_model(hugging_face_shape(tmp_path / "model"), VOCAB, quantize, seed=3).eval()
    assert isinstance(student, HuggingFaceModel)
    write_own_format(student, tmp_path / "out", {"bos_token_id": 0, "eos_token_id": 0})
    compare_own_format(student, tmp_path / "out")
    with torch.no_grad():
        theirs = reference(tmp_path / "out")(input_ids=IDS).logits
        assert theirs.shape[-1] == VOCAB
        assert torch.allclose(theirs, student.logits(IDS), atol=1e-5)


def test_scores_of_unigram_tokenizers_are_compared(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    for name, score in (("one", -1.0), ("other", -9.0)):
        vocab = [("<unk>", 0.0), ("a", -2.0), ("b", -2.0), ("c", -2.0), ("ab", -2.0), ("abc", score)]
        Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False)).save(str(tmp_path / f"{name}.json"))
    assert "model.vocab differ" in (tokenizer_difference(tmp_path / "one.json", tmp_path / "other.json") or "")


def test_special_ids_beyond_another_vocabulary_are_dropped(tokenizer_json: Path, tmp_path: Path) -> None:
    write_model(tmp_path, "gemma", tokenizer_json)
    describe(tmp_path, vocab_size=5000, pad_token_id=4999, eos_token_id=[4997, 1], bos_token_id=2)
    shape = hugging_face_shape(tmp_path).of_vocabulary(VOCAB)
    assert (shape.config["pad_token_id"], shape.config["eos_token_id"], shape.config["bos_token_id"]) == (None, None, 2)
    student = new_model(shape, VOCAB, QuantizeConfig(), seed=0).eval()
    assert isinstance(student, HuggingFaceModel)
    write_own_format(student, tmp_path / "out", {"bos_token_id": 7, "eos_token_id": 7})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 7
    assert reference(tmp_path / "out").generation_config.eos_token_id == 7


def test_a_llama_with_a_scaled_rotation_is_not_taken_for_ours(tokenizer_json: Path, tmp_path: Path) -> None:
    write_model(tmp_path, "llama", tokenizer_json)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["transformers_version"], config["rope_parameters"]
    scaled = {**config, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert not is_ours(scaled)
    assert is_ours({**config, "rope_theta": 1e4})


def test_a_description_without_a_depth_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "odd", "vocab_size": 9}))
    with pytest.raises(CheckpointError, match=r"config\.json: does not describe .* expected the number of blocks"):
        read_description(tmp_path)


def test_a_model_without_a_tokenizer_is_refused_with_the_way_to_one(tokenizer_json: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"is missing; the ids .*save_pretrained\(FOLDER\)"):
        require_same_tokenizer(tmp_path / "tokenizer.json", tokenizer_json, "the teacher", "give another")
