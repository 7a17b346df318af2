"""What goes with a tokenizer goes with a model wherever it goes: chat template, special tokens, how to generate."""

import json
import random
import shutil
import urllib.request
from pathlib import Path

import pytest
import torch
from chats import PLAIN_TEMPLATE, make_tokenizer, sentence

from tristill.cache import open_cache
from tristill.cache.errors import CacheCorruptError
from tristill.cache.layout import COMPANION_NAMES
from tristill.stages.data.config import DataConfig
from tristill.stages.data.tokenize import tokenize_corpus
from tristill.stages.distill.config import DistillConfig, StudentConfig
from tristill.stages.distill.distill import distill
from tristill.stages.dump.config import DumpConfig
from tristill.stages.dump.dump import dump_logits
from tristill.stages.errors import TokenizerError
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.export.bitnet import write_bitnet
from tristill.stages.export.gguf import write_gguf
from tristill.stages.export.gguf_reader import check_gguf
from tristill.stages.export.hugging_face import write_hugging_face
from tristill.stages.export.student import Student, load_student
from tristill.stages.models.checkpoint import save_model
from tristill.stages.models.companions import SpecialIds, companions, generation_config
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.transformer import Transformer
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.targets.cached import CachedSource

CPU = torch.device("cpu")
SHAPE = ModelConfig(width=256, layers=1, heads=4, mlp_width=256)
CHAT = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "Nobody."},
    {"role": "user", "content": "And now?"},
]
CONFIG = {
    "bos_token": "<|im_start|>",
    "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False, "special": True},
    "pad_token": "<|im_end|>",
    "tokenizer_class": "Qwen2Tokenizer",
    "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]},
}


def given_tokenizer(folder: Path) -> Path:
    make_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.6, "top_p": 0.95}))
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    """Distilled from a cache, where nothing else of the tokenizer's folder is left."""
    folder = tmp_path_factory.mktemp("run")
    generator = random.Random(0)
    (folder / "text.txt").write_text("\n".join(sentence(generator, 20) for _ in range(40)))
    data = DataConfig.model_validate(
        {
            "source": {"kind": "text", "paths": [str(folder / "text.txt")], "documents": "line"},
            "tokenizer": {"kind": "file", "path": str(given_tokenizer(folder / "given"))},
            "context_length": 16,
            "validation_fraction": 0.3,
        }
    )
    corpus = tokenize_corpus(data, folder / "data")
    teacher = Transformer(ModelConfig(width=16, layers=1, heads=2, mlp_width=32), corpus.vocab_size)
    teacher.initialize(torch.Generator().manual_seed(0))
    save_model(folder / "teacher", teacher, folder / "data" / "tokenizer.json", 16, corpus.end_of_text_id)
    dump_logits(DumpConfig(calibration_windows=4), folder / "data", folder / "teacher", folder / "cache")
    config = DistillConfig.model_validate({"training": {"steps": 1, "learning_rate": 1e-3, "batch_windows": 2}})
    settings = StudentConfig(model=SHAPE, quantize=QuantizeConfig())
    source = CachedSource(open_cache(folder / "cache"), CPU)
    distill(config, settings, SHAPE, source, CPU, folder / "student", folder / "none", EvaluateConfig(), {})
    return load_student(folder / "student")


def test_a_student_of_a_cache_has_the_template_and_the_tokens_and_stops_at_either_end(student: Student) -> None:
    assert (student.folder / "chat_template.jinja").read_text() == PLAIN_TEMPLATE
    config = json.loads((student.folder / "tokenizer_config.json").read_text())
    assert config == {key: value for key, value in CONFIG.items() if key != "auto_map"}, "code goes nowhere"
    how = json.loads((student.folder / "generation_config.json").read_text())
    assert how["eos_token_id"] == [2, 0], "the end of a turn, and what separates documents"
    assert (how["temperature"], how["top_p"], how["bos_token_id"], how["pad_token_id"]) == (0.6, 0.95, 1, 2)
    described = json.loads((student.folder / "config.json").read_text())
    assert (described["bos_token_id"], described["eos_token_id"], described["pad_token_id"]) == (1, 0, 2)


@pytest.mark.parametrize("kind", ["hf", "bitnet"])
def test_transformers_renders_a_chat_from_an_export_as_from_the_given_folder(
    student: Student, kind: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    (write_hugging_face if kind == "hf" else write_bitnet)(student, tmp_path)
    given, found = (
        transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        for folder in (student.folder.parent / "given", tmp_path)
    )
    for arguments in ({"tokenize": False, "add_generation_prompt": True}, {"return_dict": False}):
        assert found.apply_chat_template(CHAT, **arguments) == given.apply_chat_template(CHAT, **arguments)
    names = ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert (found.bos_token, found.eos_token, found.pad_token) == names
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 0]


def test_llama_cpp_renders_a_chat_from_an_export_as_transformers_does(student: Student, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the extra `gguf` is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    from tristill.stages.export.llama_cpp import LlamaCpp

    path = tmp_path / "student.gguf"
    where = {"context_length": student.context_length, "end_of_text_id": student.end_of_text_id}
    write_gguf(student.model, student.tokenizer_json, path, "TQ2_0", **where)  # type: ignore[arg-type]
    file = check_gguf(path, student.model, student.tokenizer_json, **where)  # type: ignore[arg-type]
    assert file.tokenizer.special == {"bos": 1, "eos": 2, "pad": 2, "eot": 0}
    runtime = LlamaCpp(path, student.context_length)
    request = urllib.request.Request(  # noqa: S310 - its own address on this machine
        f"{runtime._server.listening_address}/apply-template",
        json.dumps({"messages": CHAT}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:  # noqa: S310 - as above
        found = json.load(response)["prompt"]
    given = transformers.AutoTokenizer.from_pretrained(student.folder.parent / "given", local_files_only=True)
    assert found == given.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)


def test_several_templates_are_one_file_that_transformers_and_gguf_read_alike(tmp_path: Path) -> None:
    folder = given_tokenizer(tmp_path)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    found = companions(folder)
    assert "chat_template.jinja" not in found
    assert json.loads(found["tokenizer_config.json"])["chat_template"] == [
        {"name": "default", "template": PLAIN_TEMPLATE},
        {"name": "tool_use", "template": "tools"},
    ]


def test_a_tokenizer_alone_has_no_companions_and_what_we_write_for_it_is_none(tmp_path: Path) -> None:
    folder = given_tokenizer(tmp_path)
    for name in COMPANION_NAMES:
        (folder / name).unlink(missing_ok=True)
    assert companions(folder) == {}
    assert generation_config(folder, 0) is None
    assert SpecialIds.of(folder).described(0) == {"bos_token_id": 0, "eos_token_id": 0}
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "X", "model_max_length": 5}')
    assert companions(folder) == {}
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: cannot be read as a JSON object"):
        companions(folder)


def test_ids_of_a_description_stand_in_for_a_missing_generation_config(tmp_path: Path) -> None:
    described = {"transformers_version": "4.40.0", "eos_token_id": [2, 1], "pad_token_id": None, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert json.loads(companions(tmp_path)["generation_config.json"]) == {"eos_token_id": [2, 1]}


def test_a_flipped_byte_of_a_companion_in_a_cache_is_found(student: Student, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(student.folder.parent / "cache", tmp_path / "cache"))
    cache = open_cache(folder)
    assert cache.verify() == []
    assert sorted(cache.manifest.companions) == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer_config.json",
    ]
    before = cache.manifest.fingerprint
    template = folder / "chat_template.jinja"
    template.write_text(f"{template.read_text()} ")
    (damage,) = cache.verify()
    assert "chat_template.jinja: found SHA-256" in damage
    with pytest.raises(CacheCorruptError, match=r"chat_template\.jinja: found SHA-256"):
        open_cache(folder)
    template.unlink()
    with pytest.raises(CacheCorruptError, match=r"chat_template\.jinja: is missing"):
        open_cache(folder)
    manifest = json.loads((folder / "cache.json").read_text())
    del manifest["companions"]
    (folder / "cache.json").write_text(json.dumps(manifest))
    assert open_cache(folder).manifest.fingerprint == before, "they change no number"


def test_tokenize_says_of_a_tokenizer_that_llama_cpp_would_refuse_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = given_tokenizer(tmp_path / "given") / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    tokenizer.write_text(json.dumps({**content, "normalizer": {"type": "NFC"}}))
    (tmp_path / "text.txt").write_text("\n".join(f"the old fox sang about {number} songs" for number in range(40)))
    data = DataConfig.model_validate(
        {
            "source": {"kind": "text", "paths": [str(tmp_path / "text.txt")], "documents": "line"},
            "tokenizer": {"kind": "file", "path": str(tmp_path / "given")},
            "context_length": 16,
            "validation_fraction": 0.3,
        }
    )
    tokenize_corpus(data, tmp_path / "data")
    said = capsys.readouterr().err
    assert "`tristill export --format gguf` will refuse this tokenizer" in said
    assert "normalizer: found NFC, expected none" in said
