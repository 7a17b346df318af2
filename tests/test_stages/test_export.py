"""What exports hold, what they refuse and why: layouts, tokenizers, rounding in blocks. No other program is run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tristill.stages.data.config import TrainedTokenizer
from tristill.stages.data.tokenizer import train_tokenizer
from tristill.stages.errors import ExportError, TokenizerError
from tristill.stages.export.bitnet import pack_trits, refuse_bitnet, unpack_trits
from tristill.stages.export.check import Verdict, llama_cpp_positions
from tristill.stages.export.gguf import refuse_gguf
from tristill.stages.export.gguf_layout import gguf_name, halves, interleave, our_name
from tristill.stages.export.gguf_tokenizer import TokenType, gguf_tokenizer
from tristill.stages.export.parity import FLOAT_BOUNDS, INT8_BOUNDS, HeldOut, measure_parity, spread_positions
from tristill.stages.export.refusal import early_refusals, refuse
from tristill.stages.export.rounding import int8_blocks
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.transformer import Transformer
from tristill.stages.quantize.config import QuantizeConfig

WIDE = {"width": 256, "layers": 1, "heads": 4, "mlp_width": 256}
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def make_model(shape: dict[str, Any] | None = None, vocab_size: int = 64, **quantize: Any) -> Transformer:
    config = ModelConfig.model_validate(WIDE | (shape or {}))
    model = Transformer(config, vocab_size, QuantizeConfig.model_validate(quantize))
    model.initialize(torch.Generator().manual_seed(0))
    return model.eval()


# Layouts


@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**31))
def test_packed_trits_are_the_trits(rows_4: int, columns: int, seed: int) -> None:
    trits = torch.randint(-1, 2, (4 * rows_4, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_trits(trits)
    assert packed.shape == (rows_4, columns)
    assert torch.equal(unpack_trits(packed), trits)


def test_packed_trits_are_as_transformers_packs_them() -> None:
    integration = pytest.importorskip("transformers.integrations.bitnet", reason="the extra `hf` is not installed")
    trits = torch.randint(-1, 2, (24, 10), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    assert torch.equal(pack_trits(trits), integration.pack_weights(trits.clone()))


def test_rows_of_a_head_go_in_pairs_and_back() -> None:
    rows = torch.arange(12)[:, None]
    assert interleave(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(halves(interleave(rows, 2), 2), rows)


def test_names_in_a_file_lead_back_to_ours() -> None:
    names = [name for name, _ in make_model({"subln": True, "tied_embeddings": False}).named_parameters()]
    assert [our_name(gguf_name(name)) for name in names] == names
    assert our_name("blk.0.attn_q.bias") is None
    assert our_name("blk.0.attn_q_norm.weight") is None


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 1e3]))
def test_blocks_are_rounded_each_by_its_own_largest(seed: int, scale: float) -> None:
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float() * scale
    found = int8_blocks(x)
    for row in range(3):
        for block in range(2):
            cut = slice(256 * block, 256 * (block + 1))
            step = x[row, cut].abs().max().double() / 127
            expected = (x[row, cut].double() / step).round() * step
            close = (found[row, cut].double() - expected).abs() < 1e-4 * step
            assert float(close.double().mean()) > 0.98  # the others are halves that float32 rounds the other way
            assert float((found[row, cut].double() - x[row, cut].double()).abs().max()) <= float(step) * 0.501


# Parity


class Constant:
    """The same logits at every position."""

    def __init__(self, logits: list[float]) -> None:
        self.name = "constant"
        self.log_probs_V = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)

    def log_probs(self, ids_T: torch.Tensor, positions_P: torch.Tensor) -> torch.Tensor:
        return self.log_probs_V.expand(len(positions_P), -1)


def test_parity_is_by_its_definitions() -> None:
    text = HeldOut((torch.zeros(9, dtype=torch.long),) * 2, (torch.ones(9, dtype=torch.long),) * 2)
    p, q = Constant([2.0, 1.0, 0.0]), Constant([0.5, 1.5, -200.0])
    same, other = measure_parity(p, [p, q], text, 4)
    assert (same.positions, same.max_logit_error, same.kl_nats, same.top1_agreement) == (8, 0, 0, 1)
    assert other.max_logit_error == pytest.approx(60 + float(p.log_probs_V[2]))  # log-probabilities end at -60
    expected_kl = (q.log_probs_V.exp() * (q.log_probs_V - p.log_probs_V)).nan_to_num(0).sum()
    assert other.kl_nats == pytest.approx(float(expected_kl))
    assert other.top1_agreement == 0
    assert other.perplexity == pytest.approx(float((-p.log_probs_V[1]).exp()))
    assert other.reference_perplexity == pytest.approx(float((-q.log_probs_V[1]).exp()))
    assert FLOAT_BOUNDS.broken_by(same) == []
    assert INT8_BOUNDS.broken_by(other) == [
        f"KL of {other.kl_nats:.2g} nats, expected at most 0.001",
        "top-1 agreement of 0.00%, expected at least 96.0%",
    ]
    assert FLOAT_BOUNDS.broken_by(other)[-1].startswith("logit error of up to ")


def test_positions_reach_from_the_first_to_the_last_that_has_room_for_a_next_one() -> None:
    assert spread_positions(9, 4).tolist() == [0, 2, 5, 7]
    assert spread_positions(9, 100).tolist() == list(range(8))
    assert spread_positions(1, 4).tolist() == [0]


def test_what_the_student_was_trained_as_has_bounds_of_its_own() -> None:
    text = HeldOut((torch.zeros(4, dtype=torch.long),), (torch.zeros(4, dtype=torch.long),))
    exported, near, far = Constant([2.0, 1.0]), Constant([2.05, 1.0]), Constant([2.5, 1.0])
    to_itself, to_near, to_far = measure_parity(exported, [exported, near, far], text, 4)
    close, apart = (
        Verdict("runtime", None, "twin", to_itself, to_trained, INT8_BOUNDS) for to_trained in (to_near, to_far)
    )
    assert close.broken == []
    assert apart.broken == [f"against the student as trained: KL of {to_far.kl_nats:.2g} nats, expected at most 0.01"]
    assert apart.is_well_computed
    wrong = Verdict("runtime", None, "twin", to_far, to_far, INT8_BOUNDS)
    assert wrong.broken[0].startswith("against its own weights (twin): KL of ")
    assert not wrong.is_well_computed


def test_not_a_number_breaks_every_bound() -> None:
    text = HeldOut((torch.zeros(4, dtype=torch.long),), (torch.zeros(4, dtype=torch.long),))
    (found,) = measure_parity(Constant([float("nan"), 0.0]), [Constant([1.0, 0.0])], text, 4)
    assert len(FLOAT_BOUNDS.broken_by(found)) >= 2


def test_two_ties_refuse_no_export_however_large_its_vocabulary() -> None:
    for vocab_size in (257, 2048, 16_384, 32_000, 262_144):
        positions = llama_cpp_positions(vocab_size)
        assert 128 <= positions <= 256
        assert 1 - 2 / positions > INT8_BOUNDS.top1_agreement
        assert positions * min(vocab_size, 4096) <= 2**19


# Refusals


@pytest.mark.parametrize(
    ("shape", "quantize", "message"),
    [
        ({}, {"scale_per": "group-128"}, "found 'group-128', but a block has one scale for 256 columns"),
        (
            {"mlp_width": 320},
            {},
            "mlp.down_proj: found rows of 320 weights, expected a multiple of 256; the next that ",
        ),
        ({"mlp_width": 320}, {}, "that serve are 256 and 512: set student.model.mlp_width to one of them"),
        ({"width": 128}, {}, "self_attn.q_proj (and 5 more): found rows of 128 weights"),
        (
            {"width": 128, "mlp_width": 320},
            {},
            "serve are 256: set student.model.width to one of them; model.layers.0.mlp.down_proj: found rows of 320 we",
        ),
        ({"subln": True, "tied_embeddings": False}, {}, "tied_embeddings: found false, but llama.cpp's bitnet"),
        ({"subln": True}, {"layers": ["model.layers.*", "lm_head"]}, "lm_head: found it quantised, but llama.cpp's"),
        ({}, {"weights": "nbit", "bits": 4}, "found weights of the code 'nbit', but a GGUF file of ternary blocks"),
        ({}, {"weights": "none"}, "found weights of the code 'none', but a GGUF file of ternary blocks holds ternary"),
    ],
)
def test_a_gguf_file_refuses_what_it_cannot_hold(shape: dict[str, Any], quantize: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError) as found:
        refuse_gguf(make_model(shape, **quantize))
    assert message in str(found.value)


def test_a_gguf_file_refuses_scales_that_float16_cannot_hold_and_names_all_problems_at_once() -> None:
    model = make_model({"mlp_width": 320})
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.v_proj.weight").zero_()[0, 0] = 8e-6
        model.get_parameter("model.layers.0.self_attn.o_proj.weight").mul_(1e9)
    with pytest.raises(ExportError) as found:
        refuse_gguf(model)
    assert "v_proj: found scales from 1e-05 to 1e-05, which float16 cannot hold to its precision" in str(found.value)
    assert "o_proj: found scales from" in str(found.value)
    assert "mlp.down_proj: found rows of 320 weights" in str(found.value)


@pytest.mark.parametrize("scale_per", ["tensor", "row", "group-256"])
def test_a_gguf_file_holds_weights_that_are_all_zero_whatever_their_scale(scale_per: str) -> None:
    model = make_model({"mlp_width": 512}, scale_per=scale_per)
    weight = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    dead = slice(None) if scale_per == "tensor" else 3
    with torch.no_grad():
        weight[dead] = 0
        refuse_gguf(model)
        weight[dead, 5] = 8e-6  # rounds to the scale, which is 1e-5
    with pytest.raises(ExportError, match="down_proj: found scales from 1e-05 to"):
        refuse_gguf(model)


@pytest.mark.parametrize(
    ("shape", "quantize", "message"),
    [
        (
            {},
            {"scale_per": "row"},
            "found 'row', but the layout has one scale per matrix; train with scale_per = 'tens",
        ),
        ({}, {"scale_per": "group-256"}, "or use `--format gguf` (row, group-256) or `--format hf` (any)"),
        ({"mlp_width": 258}, {}, "mlp.gate_proj (and 1 more): found 258 rows, expected a multiple of 4"),
        ({}, {"weights": "nbit", "bits": 2}, "found weights of the code 'nbit', but the packed layout"),
    ],
)
def test_the_packed_layout_refuses_what_it_cannot_hold(
    shape: dict[str, Any], quantize: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError) as found:
        refuse_bitnet(make_model(shape, **quantize))
    assert message in str(found.value)


def test_what_will_refuse_a_student_is_known_before_its_training(tmp_path: Path) -> None:
    tokenizer = tokenizer_file(tmp_path)
    student = make_model({"mlp_width": 320}, 300, scale_per="row")
    with torch.no_grad():
        student.get_parameter("model.layers.0.self_attn.o_proj.weight").mul_(1e9)  # training may change it
    found = early_refusals(student, tokenizer)
    assert found is not None
    assert "`tristill export --format bitnet` will refuse it: the packed layout of transformers cannot hold" in found
    assert (
        "`tristill export --format gguf` will refuse it: a GGUF file of ternary blocks cannot hold this student: mod"
        in found
    )
    assert "o_proj" not in found
    for export_format in ("bitnet", "gguf"):
        with pytest.raises(ExportError):
            refuse(student, tokenizer, export_format)  # type: ignore[arg-type]
    assert early_refusals(make_model({}, 300), tokenizer) is None
    other = tokenizer_file(tmp_path, normalizer={"type": "NFC"})
    both = early_refusals(make_model({"mlp_width": 320}, 300), other)
    assert both is not None
    assert re.search(r"found rows of 320 .*; tokenizer\.json: .*normalizer: found NFC", both)


# Tokenizers


def tokenizer_file(folder: Path, vocab_size: int = 300, **changes: Any) -> Path:
    """One that we train, with changes to its top level or, by a dot, to its model."""
    text = ["the quick brown fox jumps over the lazy dog " * 20]
    tokenizer = train_tokenizer(TrainedTokenizer(vocab_size=vocab_size), text)
    content = json.loads(tokenizer.to_str())
    for key, value in changes.items():
        place = content["model"] if key.startswith("model_") else content
        place[key.removeprefix("model_")] = value
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


def test_a_tokenizer_of_bytes_alone_gets_a_merge_that_never_happens(tmp_path: Path) -> None:
    found = gguf_tokenizer(tokenizer_file(tmp_path, 257), 259, 0)
    assert found.merges == ("<|endoftext|> <|endoftext|>",)
    assert found.types[0] == TokenType.CONTROL
    assert found.tokens[257:] == ("[PAD257]", "[PAD258]")
    assert found.types[257:] == (TokenType.UNUSED,) * 2
    assert set(found.types[1:257]) == {TokenType.NORMAL}


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "name"),
    [
        (GPT2, False, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2]}, False, "smollm"),
    ],
)
def test_pre_tokenizers_are_known_by_what_they_do(
    tmp_path: Path, pre_tokenizer: dict[str, Any], ignore_merges: bool, name: str
) -> None:
    path = tokenizer_file(tmp_path, pre_tokenizer=pre_tokenizer, model_ignore_merges=ignore_merges)
    assert gguf_tokenizer(path, 300, 0).pre == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": {**GPT2, "use_regex": False}}, "pre_tokenizer: found one that is not known here"),
        ({"pre_tokenizer": None}, "pre_tokenizer: found one that is not known here"),
        ({"normalizer": {"type": "NFC"}}, "normalizer: found NFC, expected none"),
        ({"model_unk_token": "?"}, "model.unk_token: found '?', expected none"),
        ({"model_ignore_merges": True}, "model.ignore_merges: found True, expected the other"),
    ],
)
def test_tokenizers_that_llama_cpp_would_take_for_others_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError) as found:
        gguf_tokenizer(tokenizer_file(tmp_path, **changes), 300, 0)
    assert message in str(found.value)
    assert "llama.cpp would not make the same ids" in str(found.value)


def test_a_tokenizer_larger_than_the_model_and_one_that_is_none_are_refused(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path)
    with pytest.raises(ExportError, match=r"found id \d+, but the model knows 50 tokens"):
        gguf_tokenizer(path, 50, 0)
    path.write_text("{}")
    with pytest.raises(TokenizerError, match=r"cannot be read as a tokenizer\.json of a BPE"):
        gguf_tokenizer(path, 50, 0)
