"""Shipped configs are right, and wrong ones are refused with every problem at once."""

import tomllib
from pathlib import Path

import pytest

from conftest import ROOT
from tristill.cache.secrets import masked
from tristill.pipeline.config import Config, check_student_name, load_config, save_config
from tristill.pipeline.errors import ConfigError
from tristill.pipeline.provenance import Provenance, new_provenance
from tristill.pipeline.runner import plan
from tristill.pipeline.workspace import Workspace

SHIPPED = sorted((ROOT / "configs").glob("*.toml"))
MINIMAL = """
[teacher]
model = { width = 16, layers = 1, heads = 2, mlp_width = 16 }
training = { steps = 1, learning_rate = 0.1 }
[distill]
training = { steps = 1, learning_rate = 0.1 }
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "some.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_load_and_plan_every_step(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    steps = [step.label for step in plan(Workspace(config, tmp_path), "distill")]
    students = [f"distill --name {name}" for name in config.student_names]
    stages = [label for name in config.stages for label in (f"dump-logits --name {name}", f"distill --name {name}")]
    assert steps == ["tokenize", "teacher", *stages, "dump-logits", *students]
    assert [step.label for step in plan(Workspace(config, tmp_path), "teacher")] == ["tokenize", "teacher"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_saved_config_loads_again_and_is_complete(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config
    assert tomllib.loads((tmp_path / "config.toml").read_text())["teacher"]["training"]["beta1"] == 0.9


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.stem != "test"], ids=lambda path: path.stem)
def test_shipped_students_have_rows_that_llama_cpp_packs(path: Path) -> None:
    shape = load_config(path).student_shape
    assert all(columns % 256 == 0 for _, columns in shape.linear_shapes.values())


def test_hslm_is_the_size_it_says() -> None:
    config = load_config(ROOT / "configs" / "hslm.toml")
    vocab_size = config.data.tokenizer.vocab_size  # type: ignore[union-attr]
    assert round(config.student_shape.parameters(vocab_size), -4) == 1_950_000
    assert (config.distill.training.steps, config.distill.alpha, config.distill.temperature) == (20_000, 0.5, 5.0)


def test_all_problems_are_reported_at_once_with_their_paths(tmp_path: Path) -> None:
    text = MINIMAL.replace("layers = 1", "layer = 1").replace("[distill]", "[distill]\nalpha = 1.5\ntargets = 'cache'")
    text += "[data]\ncontext_length = 0\nsource = { kind = 'txt', paths = ['x'] }\n[evalute]\nx = 1\n"
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    message = str(caught.value)
    for expected in (
        "7 problems",
        "data.source: Input tag 'txt' found using 'kind' does not match any of the expected tags",
        "data.context_length: Input should be greater than or equal to 1; found 0",
        "teacher.model.layers: is missing; it has no default",
        "teacher.model.layer: unknown key; did you mean 'layers'?",
        "distill.alpha: Input should be less than or equal to 1; found 1.5",
        "distill.targets: Input should be 'cached', 'online' or 'auto'; found 'cache'",
        "evalute: unknown key; did you mean 'evaluate'?",
    ):
        assert expected in message, message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("student.model=3", "student.model: Input should be a valid dictionary"),
        ("teacher.model.heads=3", r"teacher.model: width \(16\) must be an even multiple of heads \(3\)"),
        ("teacher.model.subln=true", "teacher.model: a teacher with subln is no Llama"),
        ("teacher.training.warmup_steps=2", r"warmup_steps \(2\) must not exceed steps \(1\)"),
        ("data.tokenizer.vocab_size=9", r"data.tokenizer.kind: is missing; expected one of: bpe, file"),
        ("data.tokenizer={kind='bpe', vocab=9}", r"data.tokenizer.vocab: unknown key; did you mean 'vocab_size'"),
        ("cache.profile.draws=0", r"cache.profile.kind: is missing; expected one of: sampled, topk, transform, dense"),
        (
            "cache.profile={kind='sampled', draws=0}",
            "cache.profile.draws: Input should be greater than or equal to 1; found 0",
        ),
        (
            "cache.profile={kind='topk', temperatures=[2.0, 1.0]}",
            r"cache.profile.temperatures: .*temperatures must ascend and differ, found \[2.0, 1.0\]",
        ),
        ("cache.fidelity={}", "cache.fidelity: .*give one of max_gradient_angle_deg and bytes_per_position"),
        ("cache.hidden_layers=[1, 1]", "cache.hidden_layers: layers must be distinct"),
        ("distill.hidden.layers={}", "distill.hidden.layers: expected at least one pair of layers"),
        ("teacher=3", "teacher: Input should be"),
        ("student.quantize.weights=nbit", "student.quantize: weights = 'nbit' needs bits, and found none; set bits"),
        ("student.quantize.bits=4", "student.quantize: bits = 4 belongs to the nbit codes, and found weights = 'absm"),
        ("student.quantize={weights='nbit', bits=9}", "student.quantize.bits: .*less than or equal to 8; found 9"),
        (
            "student.quantize.warmup={steps=1}",
            r"  student.quantize.warmup.steps: found 1, expected fewer than the 1 steps",
        ),
        ("student.quantize.layers=['x*']", r"quantize.layers: found 'x\*', which names no linear layer; .* lm_head$"),
        (
            "student.quantize.scale_per='group-256'",
            r"found rows of 16 weights in .*, expected a multiple of 256; the next that serve: 256",
        ),
        ("variants.other.student.quantize.layers=['x*']", "variants.other.student.quantize.layers: found 'x"),
        ("zzz.a=3", "zzz: unknown key; expected one of: cache, data, distill"),
        ("a[0]=3", r"a\[0\]: unknown key; expected one of: cache, data, distill"),
        ("cache.profile={kind='sampled', sampled=3}", r"cache.profile.sampled: unknown key; expected one of: "),
        ("nonsense", r"--set nonsense: expected dotted.key=value"),
        ("teacher.model.width.x=3", r"--set teacher.model.width.x: width is a value, not a table"),
        ("variants.student.distill.alpha=1", "variants.student: expected another name"),
        (
            "variants.other.cache.profile.top_k=1",
            r"variants.other: expected tables \['distill', 'evaluate', 'student'\]",
        ),
        ("variants.other.distill.alpha=2", "variants.other.distill.alpha: Input should be less than or equal to 1"),
        ("data.source={kind='hf', path='json', arguments={split='x'}}", r"\['split'\] cannot be given here"),
    ],
)
def test_one_bad_setting_is_refused_by_its_path(tmp_path: Path, assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, MINIMAL), (assignment,))


@pytest.mark.parametrize(
    ("text", "message"),
    [("a = ", "cannot be read as TOML"), (None, "configs that ship with tristill: .*configs/demo.toml")],
)
def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = write(tmp_path, text) if text else tmp_path / "missing.toml"
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_set_takes_toml_values_and_plain_words(tmp_path: Path) -> None:
    assignments = ("distill.alpha=0.25", "distill.targets=online", "cache.hidden_layers=[2, 1]", 'cache.dir="x y"')
    config = load_config(write(tmp_path, MINIMAL), assignments)
    assert (config.distill.alpha, config.distill.targets) == (0.25, "online")
    assert config.cache.hidden_layers == (1, 2)
    assert config.cache.dir == Path("x y")


def test_a_variant_is_the_config_with_its_changes(tmp_path: Path) -> None:
    text = MINIMAL + "[variants.wide.student]\nmodel = { width = 32, layers = 1, heads = 2, mlp_width = 16 }\n"
    config = load_config(write(tmp_path, text), ("variants.wide.distill.training.seed=7",))
    wide = config.for_student("wide")
    assert wide.student_shape.width == 32
    assert (wide.distill.training.seed, wide.distill.training.steps) == (7, 1)
    assert config.for_student("unknown") == config.for_student("student")
    assert config.student_shape == config.teacher.model


def test_names_logs_and_devices_change_no_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    before = load_config(path).numbers()
    neutral = ("teacher.training.log_every=3", "cache.dir=elsewhere", "distill.training.device=cpu")
    assert load_config(path, neutral).numbers() == before
    assert load_config(path, ("distill.training.seed=3",)).numbers() != before


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "-x", "a b"])
def test_student_names_stay_inside_their_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="student name"):
        check_student_name(name)


def test_sections_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(ROOT / "configs" / "test.toml").distill.alpha = 0.1  # type: ignore[misc]
    assert Config.model_config["extra"] == "forbid"


def test_one_way_to_say_the_loss_takes_the_place_of_the_other(tmp_path: Path) -> None:
    variants = (
        "[variants.a.distill]\nlosses = [{ kind = 'total_variation' }]\n"
        "[variants.b.distill]\nhidden.layers = { 1 = 2 }\n"
    )
    text = MINIMAL + "alpha = 0.2\nhidden.layers = { 1 = 1, 2 = 2 }\n"
    path = write(tmp_path, text + variants)
    terms = "distill.losses=[{kind='reverse_kl'}]"
    distill = load_config(path, (terms,)).distill
    assert (distill.alpha, [term.kind for term in distill.terms]) == (None, ["reverse_kl"])
    with pytest.raises(ConfigError, match="give either losses, or alpha and temperature"):
        load_config(path, (terms, "distill.alpha=0.3"))
    config = load_config(path)
    assert [term.kind for term in config.for_student("a").distill.terms] == ["total_variation"]
    hidden = config.for_student("b").distill.hidden
    assert hidden is not None
    assert hidden.layers == {1: 2}, "a map of layers is one setting"


def test_a_given_path_takes_the_place_of_a_shape_and_its_training(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    teacher = load_config(path, ('teacher.path="owner/model"',)).teacher
    assert (str(teacher.path), teacher.model, teacher.training) == ("owner/model", None, None)
    for both in (("teacher.path=a", "teacher.training.steps=1"), ("teacher.training.steps=1", "teacher.path=a")):
        with pytest.raises(ConfigError, match="teacher"):
            load_config(path, both)
    shaped = "student.model={width=16, layers=1, heads=2, mlp_width=16}"
    assert load_config(path, (shaped,)).student.path is None
    other = load_config(write(tmp_path, MINIMAL + "[student]\npath = 'a'\n[variants.b.student]\npath = 'b'\n"))
    assert str(other.for_student("b").student.path) == "b"
    student = load_config(write(tmp_path, MINIMAL + "[student]\npath = 'a'\nrevision = 'x'\n"), (shaped,)).student
    assert (student.path, student.revision, student.model and student.model.width) == (None, None, 16)


def test_a_field_of_an_absent_student_model_changes_the_shape_of_its_teacher(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    config = load_config(path, ("student.model.subln=true", "teacher.model.width=32"))
    assert config.student.model == config.teacher.model.model_copy(update={"subln": True})  # type: ignore[union-attr]
    variant = load_config(path, ("variants.deep.student.model.layers=3",)).for_student("deep").student.model
    assert variant
    assert (variant.width, variant.layers) == (16, 3)
    chain = load_config(ROOT / "configs" / "chain.toml", ("student.model.kv_heads=2",))
    assert chain.student.model
    assert (chain.student.model.layers, chain.student.model.mlp_width) == (1, 512), "that of the stage before it"
    for given in (("student.model.subln=true", "teacher.path=a"), ("teacher.path=a", "student.model.subln=true")):
        with pytest.raises(
            ConfigError, match=r"that of a given teacher \(a\) is not in the config; give student.model"
        ):
            load_config(path, given)


def test_a_student_reads_the_cache_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, MINIMAL)).distill.targets == "cached"


SECRET = "Sup3rS3cret"  # noqa: S105 - of nothing


@pytest.mark.parametrize(
    ("assignment", "key"),
    [
        (f"data.source={{kind='hf', path='json', arguments={{token='{SECRET}'}}}}", "data.source.arguments.token"),
        (f"data.source={{kind='hf', path='json', arguments={{storage_options={{key='{SECRET}'}}}}}}", "options.key"),
        (
            f"data.source={{kind='hf', arguments={{storage_options={{client={{aws_secret_access_key='{SECRET}'}}}}}}}}",
            "",
        ),
        (
            f"data.source={{kind='hf', path='json', arguments={{headers={{Authorization='Bearer {SECRET}'}}}}}}",
            "headers",
        ),
        (
            f"data.source={{kind='hf', path='json', arguments={{data_files=['https://h/x?X-Amz-Signature={SECRET}']}}}}",
            "",
        ),
        (f"data.source={{kind='hf', path='json', arguments=[{{password='{SECRET}'}}]}}", "arguments.0.password"),
        (f"data.source={{kind='text', paths=['s3://b/x?X-Amz-Signature={SECRET}']}}", "data.source.paths.0"),
        (f"cache.url=https://user:{SECRET}@host/cache", "cache.url"),
        (f"teacher.path=https://{SECRET}@host/model", "teacher.path"),
        (f"variants.a.student.path=https://h/x?token={SECRET}", "variants.a.student.path"),
        (f"distill.caches=[{{dir='a', url='https://h/c?sig={SECRET}'}}]", "distill.caches.0.url"),
        (f"https://h/c?sig={SECRET}=1", "https"),
        (f"data.source.arguments.accessKey={SECRET}", "data.source.arguments.accessKey"),
    ],
)
def test_a_config_holds_no_credential_and_its_refusal_shows_none(tmp_path: Path, assignment: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, MINIMAL), (assignment,))
    assert key in str(caught.value)
    assert SECRET not in str(caught.value)
    if key != "https":
        assert "give credentials in the environment, such as HF_TOKEN" in str(caught.value)


def test_a_named_login_profile_or_endpoint_is_no_credential(tmp_path: Path) -> None:
    options = "{profile='work', anon=false, endpoint_url='https://s3.host:9000/a@b', region_name='eu'}"
    source = f"data.source={{kind='hf', path='json', arguments={{token=true, storage_options={options}}}}}"
    config = load_config(write(tmp_path, MINIMAL), (source,))
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at https://u:p@h/x, then", "at https://...@h/x, then"),
        ("postgresql://u:p/w@h/db", "postgresql://...@h/db"),
        ("GET https://cdn/x?X-Amz-Signature=abc&b=c now", "GET https://cdn/x?... now"),
        (
            "exceeded with url: /c/x?b=1&X-Amz-Signature=abc (timeout)",
            "exceeded with url: /c/x?b=1&X-Amz-Signature=... (timeout)",
        ),
        ("(https://h/x?a=b), https://h/y?", "(https://h/x?...), https://h/y?"),
        ("401 for hf_abcdefghijklmnopqrst", "401 for hf_..."),
        ("what? a=b, see https://h:80/a@b.", "what? a=b, see https://h:80/a@b."),
    ],
)
def test_text_is_masked_where_it_may_hold_a_credential(text: str, expected: str) -> None:
    assert masked(text) == expected
    record = new_provenance("tokenize", {}, {}).model_copy(update={"command": text})
    assert Provenance.model_validate_json(record.model_dump_json()).command == expected


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path: Path) -> None:
    shipped = ROOT / "configs" / "test.toml"
    (tmp_path / "marked.toml").write_bytes(b"\xef\xbb\xbf" + shipped.read_bytes())
    assert load_config(tmp_path / "marked.toml") == load_config(shipped)
