"""Whole runs with teachers and students of transformers: any architecture, from tokens to an export."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import KINDS, PADDED, VOCAB, in_hub_cache, write_corpus, write_model, write_tokenizer

from conftest import tristill
from tristill.cache import Cache, open_cache
from tristill.pipeline.config import load_config
from tristill.pipeline.errors import PipelineError
from tristill.pipeline.evaluation import evaluate_models
from tristill.pipeline.exporting import export_model
from tristill.pipeline.runner import execute
from tristill.pipeline.steps import all_steps
from tristill.pipeline.workspace import Workspace
from tristill.stages.errors import StageError
from tristill.stages.generate.text import generate_text
from tristill.stages.models.checkpoint import load_model, save_model
from tristill.stages.models.description import ModelConfig, read_description
from tristill.stages.models.hugging_face_folder import load_hugging_face
from tristill.stages.models.origin import Origin
from tristill.stages.models.transformer import Transformer
from tristill.stages.targets.cached import CachedSource
from tristill.stages.targets.source import Epoch, Signals

pytest.importorskip("transformers")

CONFIG = """
[data]
source = { kind = "text", paths = ["FOLDER/corpus.txt"], documents = "line" }
tokenizer = { kind = "file", path = "TEACHER" }
context_length = 24
validation_fraction = 0.2
max_train_tokens = 6_000
max_validation_tokens = 1_000

[teacher]
path = "TEACHER"

[cache]
profile = { kind = "dense" }
hidden_layers = [1, 2]
hidden.coding = { kind = "float16" }
max_train_windows = 128
batch_windows = 16

[student]
init = "teacher"
quantize.layers = ["PATTERN"]

[distill]
alpha = 0.3
hidden = { weight = 0.1, layers = { 1 = 1, 2 = 2 } }
training = { steps = 6, batch_windows = 4, learning_rate = 1e-3, checkpoint_every = 3 }
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_corpus(folder / "corpus.txt")
    tokenizer_json = write_tokenizer(folder / "tokenizer.json")
    for kind in KINDS:
        write_model(folder / kind, kind, tokenizer_json, outputs=PADDED)
    return folder


def config_file(place: Path, kind: str, to: Path, teacher: Path | None = None, more: str = "") -> Path:
    text = CONFIG.replace("FOLDER", str(place)).replace("TEACHER", str(teacher or place / kind))
    to.write_text(text.replace("PATTERN", KINDS[kind][2]) + more)
    return to


def run(config: Path, run_dir: Path, *assignments: str, until: int | None = None) -> Workspace:
    """Every step in this process, in order; the first `until` only."""
    workspace = Workspace(load_config(config, assignments), run_dir)
    for step in all_steps(workspace)[:until]:
        execute(step)
    return workspace


@pytest.fixture(scope="module")
def qwen3(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A whole run, which tests read and copy."""
    folder = tmp_path_factory.mktemp("qwen3")
    return run(config_file(place, "qwen3", folder / "config.toml"), folder / "run")


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_run_of_an_architecture(place: Path, tmp_path: Path, request: pytest.FixtureRequest, kind: str) -> None:
    if kind == "qwen3":
        workspace = request.getfixturevalue("qwen3")
    else:
        workspace = run(config_file(place, kind, tmp_path / "config.toml"), tmp_path / "run")
    run_dir = workspace.run_dir
    origin = json.loads((run_dir / "teacher" / "origin.json").read_text())
    assert origin["folder"] == str(place / kind)
    assert not list((run_dir / "teacher").glob("*.safetensors"))
    cache = open_cache(workspace.cache)
    teaches_like(cache, place / kind)
    cache.close()
    summary = json.loads((run_dir / "students" / "student" / "summary.json").read_text())
    assert summary["targets"] == "cached"
    assert summary["model"]["ternary_parameters"] > 0
    assert summary["validation"]["kl_to_teacher_nats"] > 0
    student = load_model(workspace.student("student"))
    assert isinstance(student, Transformer) == (kind == "llama")

    said: list[str] = []
    export_model(workspace, "student", "hf", (), None, said.append)
    assert "computed by transformers" in said[0]
    exported = json.loads((run_dir / "exports" / "student" / "hf" / "config.json").read_text())
    theirs = json.loads((place / kind / "config.json").read_text())
    assert exported["architectures"] == theirs["architectures"]
    assert exported["vocab_size"] == VOCAB  # the padding is cut off


def teaches_like(cache: Cache, teacher: Path) -> None:
    """The dense profile holds the final state at 8 bits: logits from the cache are the teacher's to that."""
    assert cache.spec.vocab_size == VOCAB
    source = CachedSource(cache, torch.device("cpu"))
    batch = next(iter(source.batches("train", 4, Signals(targets=True), Epoch())))
    model = load_hugging_face(Origin(folder=teacher), teacher / "tokenizer.json")
    with torch.no_grad():
        wanted = torch.softmax(model.logits(batch.input_ids_BT).flatten(0, 1), dim=-1)
    assert batch.targets is not None
    found = batch.targets.chunk(slice(0, len(wanted))).log_probs(1.0).exp()
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().sum(dim=-1).mean()) < 0.05


def test_a_llama_of_transformers_gives_the_cache_of_our_own_transformer(place: Path, tmp_path: Path) -> None:
    """The same weights, forwarded by transformers and by us, without rounding that hides a difference."""
    shape = read_description(place / "llama").shape
    assert isinstance(shape, ModelConfig)
    model = Transformer(shape, VOCAB)
    theirs = load_hugging_face(Origin(folder=place / "llama"), place / "llama" / "tokenizer.json")
    tensors = {name: tensor.clone() for name, tensor in theirs.inner.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:VOCAB]
    model.load_state_dict(tensors)
    save_model(tmp_path / "weights", model, place / "tokenizer.json", 24, 0)

    caches = {}
    for name, teacher in (("theirs", place / "llama"), ("ours", tmp_path / "weights")):
        config = config_file(place, "llama", tmp_path / f"{name}.toml", teacher)
        workspace = run(config, tmp_path / name, 'data.tokenizer.path="' + str(place / "llama") + '"', until=3)
        caches[name] = open_cache(workspace.cache)
    theirs_cache, ours_cache = caches["theirs"], caches["ours"]
    unlike = {"teacher_fingerprint", "tables_fingerprint"}
    assert theirs_cache.spec.model_dump(exclude=unlike) == ours_cache.spec.model_dump(exclude=unlike)
    streams = [
        cache.stream("train", 8, seed=None, epoch=0, hidden_layers=(1, 2)) for cache in (theirs_cache, ours_cache)
    ]
    num_codes = num_other = 0
    for one, other in zip(*streams, strict=True):
        assert np.array_equal(one.input_ids, other.input_ids)
        assert one.target.keys() == other.target.keys()
        for layer in (1, 2):  # float16 of sums in another order
            assert np.allclose(one.hidden[layer], other.hidden[layer], rtol=2e-3, atol=2e-3)
        difference = one.target["final"].astype(int) - other.target["final"].astype(int)
        assert abs(difference).max() <= 1
        num_codes, num_other = num_codes + difference.size, num_other + int((difference != 0).sum())
        assert np.allclose(one.target["final_scale"], other.target["final_scale"], rtol=2e-3)
    assert num_other < num_codes / 1000
    for cache in caches.values():
        cache.close()


def test_online_targets_of_a_given_teacher_are_those_of_its_dense_cache(
    qwen3: Workspace, place: Path, tmp_path: Path
) -> None:
    shutil.copytree(qwen3.run_dir, tmp_path / "run")
    for made in ("cache", "students"):
        shutil.rmtree(tmp_path / "run" / made)
    config = config_file(place, "qwen3", tmp_path / "config.toml")
    online = Workspace(load_config(config, ('distill.targets="online"',)), tmp_path / "run")
    execute(all_steps(online)[-1])
    found, cached = (json.loads((each.student("student") / "summary.json").read_text()) for each in (online, qwen3))
    assert found["targets"] == "online"
    assert found["validation"]["loss_nats"] == pytest.approx(cached["validation"]["loss_nats"], rel=2e-3)


def test_models_of_a_run_generate_and_are_evaluated_and_an_unknown_shape_is_no_gguf(qwen3: Workspace) -> None:
    for name in ("teacher", "student"):
        text = "".join(generate_text(qwen3.model_folder(name), "def a", temperature=0, top_p=1, seed=0, max_tokens=4))
        assert text.startswith("def a")
    assert all(step.is_complete() for step in all_steps(qwen3))
    assert evaluate_models(qwen3, ()).keys() == {"teacher", "student"}
    with pytest.raises(StageError, match=r"found an architecture of transformers \(qwen3\), which goes out in its own"):
        export_model(qwen3, "student", "gguf", ("TQ2_0",), None, print)


def test_a_student_of_another_architecture_learns_from_the_same_cache(place: Path, tmp_path: Path) -> None:
    """A variant given as a path takes architecture and weights; one with random weights takes no padding."""
    more = f"""
[variants.gpt.student]
path = "{place / "gpt2"}"
init = "given"
quantize.layers = ["transformer.h.*"]
[variants.gpt.distill]
hidden = {{ weight = 0.0 }}
[variants.fresh.student]
path = "{place / "gemma"}"
init = "random"
[variants.fresh.distill]
hidden = {{ weight = 0.0 }}
"""
    config = config_file(place, "llama", tmp_path / "config.toml", more=more)
    workspace = run(config, tmp_path / "run")
    gpt = load_model(workspace.student("gpt"))
    assert gpt.head_weight.shape[0] == VOCAB
    assert len(gpt.quantized_linears()) == 8
    fresh = json.loads((workspace.student("fresh") / "config.json").read_text())
    assert fresh["hugging_face"]["model_type"] == "gemma3_text"
    assert fresh["hugging_face"]["vocab_size"] == VOCAB


def test_a_teacher_that_caps_its_logits_is_dumped_where_the_profile_keeps_logits(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "capped"
    write_model(folder, "capped", place / "tokenizer.json")
    config = config_file(place, "gemma", tmp_path / "config.toml", folder)
    with pytest.raises(StageError, match=r"found dense, .* the teacher caps them at 3; set kind to topk or sampled"):
        run(config, tmp_path / "run", until=3)
    profile = 'cache.profile={kind="plain_topk", top_k=300, temperature=1.0}'
    workspace = run(config, tmp_path / "run", profile, until=3)
    cache = open_cache(workspace.cache)
    source = CachedSource(cache, torch.device("cpu"))
    batch = next(iter(source.batches("train", 4, Signals(targets=True), Epoch())))
    model = load_hugging_face(Origin(folder=folder), folder / "tokenizer.json")
    with torch.no_grad():
        wanted = torch.softmax(model.inner(batch.input_ids_BT).logits.flatten(0, 1), dim=-1)
    assert batch.targets is not None
    target = batch.targets.chunk(slice(0, len(wanted)))
    found = target.log_probs(1.0)[0].exp()
    assert torch.allclose(found, wanted.gather(-1, target.head_ids_NK), atol=1e-3)
    cache.close()


def test_a_model_that_changed_since_or_is_gone_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "qwen3", tmp_path / "model")
    config = config_file(place, "qwen3", tmp_path / "config.toml", tmp_path / "model")
    run(config, tmp_path / "run", until=2)
    assert "teacher: 320 outputs for 300 ids: the last 20 are padding of the output matrix" in capsys.readouterr().err
    write_model(tmp_path / "model", "qwen3", place / "tokenizer.json", outputs=PADDED, seed=1)
    with pytest.raises((StageError, PipelineError), match=r"input checkpoint: was|is another model than when"):
        run(config, tmp_path / "run", until=3)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(StageError, match=r"is another model than when|found no"):
        run(config, tmp_path / "run", until=3)


def test_a_teacher_of_another_tokenizer_is_refused_with_the_first_ids(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "qwen3", tmp_path / "model")
    content = json.loads((place / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    first, second = (text for text, i in vocab.items() if i in (258, 259))
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(content))
    config = config_file(place, "qwen3", tmp_path / "config.toml", tmp_path / "model")
    with pytest.raises(StageError, match=r"the tokenizer of the teacher .* 2 of 300 ids differ: id 258 is"):
        run(config, tmp_path / "run", 'data.tokenizer.path="' + str(place / "qwen3") + '"', until=2)


def test_loading_options_without_a_given_model_are_refused() -> None:
    done = tristill("teacher", "--config", "configs/test.toml", "--set", "teacher.dtype=bfloat16")
    assert done.code == 2
    assert "teacher: dtype: how a given model is loaded, and no path gives one" in done.stderr


def test_another_name_on_the_hub_is_another_teacher(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache on this machine, as downloads leave it; there is no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, kind in (("one", "qwen3"), ("two", "llama")):
        shutil.copytree(place / kind, in_hub_cache(tmp_path / "hub", name), dirs_exist_ok=True)
    config = config_file(place, "qwen3", tmp_path / "config.toml", Path("someone/one"))
    tokenizer = 'data.tokenizer.path="' + str(place / "tokenizer.json") + '"'
    run_dir = tmp_path / "run"
    run(config, run_dir, tokenizer, until=3)
    execute(all_steps(Workspace(load_config(config, (tokenizer,)), run_dir))[1])
    for other in ("someone/two", "someone/absent"):
        with pytest.raises(PipelineError, match=r"input checkpoint: was"):
            run(config, run_dir, tokenizer, f'teacher.path="{other}"', until=2)
    shutil.rmtree(tmp_path / "hub")
    done = Workspace(load_config(config, (tokenizer,)), run_dir)
    assert all_steps(done)[1].is_complete()
    execute(all_steps(done)[1])  # named as before: what was used is not asked for again


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_entropies_of_a_teacher_in_low_precision(place: Path, tmp_path: Path, dtype: str) -> None:
    config = config_file(place, "qwen3", tmp_path / "config.toml")
    online = ('distill.targets="online"', "distill.entropy_weights={power=-1.0}", "distill.hidden.weight=0.0")
    workspace = Workspace(load_config(config, (f'teacher.dtype="{dtype}"', *online)), tmp_path / "run")
    for step in all_steps(workspace):
        if step.command != "dump-logits":
            execute(step)
    assert (workspace.student("student") / "summary.json").is_file()


def test_a_given_student_without_a_tokenizer_is_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "gpt2", tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    config = config_file(place, "gpt2", tmp_path / "config.toml")
    given = (f'student.path="{tmp_path / "bare"}"', 'student.init="given"')
    with pytest.raises(StageError, match=r"bare/tokenizer\.json: is missing; the ids that a model knows"):
        run(config, tmp_path / "run", *given)
