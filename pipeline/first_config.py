"""A first config, with comments, for `tristill init`."""

import shlex
from pathlib import Path
from typing import Any

import tomli_w

from tristill.cache.atomic import write_atomically
from tristill.pipeline.config import load_config
from tristill.pipeline.errors import ConfigError
from tristill.stages.visible import visible

_TEXT = """# Run it:             tristill run --config {shell_path}
# What it will take:  tristill plan --config {shell_path}
# Every setting:      tristill config show --config {shell_path}
# What one means:     tristill config explain distill.alpha

[data]
source = {source}
tokenizer = {tokenizer}
context_length = 256        # positions per window
validation_fraction = 0.05  # of the documents, held out

{teacher}
[cache]
profile = {{ kind = "transform", step = 0.3 }}  # serves every temperature; sampled and topk are smaller
max_train_windows = 2400    # windows that students see; leave it out for all

[student]
init = "{init}"

[distill]
alpha = 0.2                 # weight of the labels; the rest is the teacher's
temperature = 1.0

[distill.training]
steps = 300
batch_windows = 8
learning_rate = 2e-3
warmup_steps = 30

# A second student of the same cache, from the labels alone, to compare with.
[variants.no-teacher.distill]
alpha = 1.0
"""
_TRAINED = """# The teacher is trained here. Widths that are multiples of 256 export to llama.cpp.
[teacher]
model = { width = 256, layers = 2, heads = 4, mlp_width = 768 }
training = { steps = 600, batch_windows = 8, learning_rate = 3e-3, warmup_steps = 50 }
"""
_GIVEN = """# A finished model: its tokenizer is that of the data, and the student has its shape.
[teacher]
path = {path}
"""


def write_first_config(path: Path, texts: tuple[str, ...], teacher: str | None) -> None:
    """Write the config, which loads. Raises ConfigError if the file is there, or what is given is no such thing."""
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path}: is there already, and is not replaced; give another path")
    text = _TEXT.format(
        shell_path=visible(shlex.quote(str(path))),
        source=f'{{ kind = "text", paths = {_toml(list(texts))} }}' if texts else '{ kind = "python-stdlib" }',
        tokenizer=f'{{ kind = "file", path = {_toml(teacher)} }}' if teacher else '{ kind = "bpe", vocab_size = 2048 }',
        teacher=_GIVEN.format(path=_toml(teacher)) if teacher else _TRAINED,
        init="teacher" if teacher else "random",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode("utf-8"))
    try:
        load_config(path)
    except ConfigError:
        path.unlink()
        raise


def _toml(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").strip()
