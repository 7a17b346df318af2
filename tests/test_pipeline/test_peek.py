"""What `tristill cache peek` sends to a terminal and to a pipe, also of a cache that means harm."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pseudo_terminal import tristill_on_a_terminal
from wcwidth import width

from conftest import ENVIRONMENT, Outcome, make_spec, tristill, window_arrays
from tristill.cache import CacheWriter, open_cache
from tristill.cache.parts import SIGNAL_STEP_NATS
from tristill.cache.peek import peek
from tristill.pipeline.cache_peek import SCALE, colour_of, coloured_text, legend
from tristill.pipeline.terminal import Colour, painted, wrapped
from tristill.stages.data.config import TrainedTokenizer
from tristill.stages.data.tokenizer import train_tokenizer

STYLE = re.compile(r"\x1b\[(?:0|[34]8;5;\d+)m")
TOKENIZER = train_tokenizer(
    TrainedTokenizer(vocab_size=300, train_bytes=1000), ["a few words and a few more of these words"] * 3
)
HOSTILE = "a\x1b[2J\u4f60\r\x9b1m\u202e\n\x07 words of more\t\x00 few words\u0301 and\x1b]0;x\x07 some | more"
NATS = 10 * SIGNAL_STEP_NATS  # what the teacher gave every label of the hostile cache


def write_hostile_cache(folder: Path, **changes: object) -> None:
    """Train windows of HOSTILE, tokens of which the teacher gave probability exp(-NATS)."""
    ids = TOKENIZER.encode(HOSTILE).ids
    tokenizer_json = TOKENIZER.to_str().encode()
    settings = {"context_length": len(ids) - 1, "hidden": None, "vocab_size": TOKENIZER.get_vocab_size()}
    spec = make_spec(3, 2, **{**settings, "tokenizer_fingerprint": _sha256(tokenizer_json), **changes})
    writer = CacheWriter(folder, spec, tokenizer_json)
    for shard in writer.missing_shards():
        arrays = window_arrays(spec, shard.split, range(shard.num_windows))
        arrays["input_ids"][:] = ids
        if "label_log_prob" in arrays:
            arrays["label_log_prob"][:] = round(NATS / SIGNAL_STEP_NATS)
        shard_writer = writer.shard(shard)
        shard_writer.append(arrays)
        shard_writer.commit()
    writer.finish()


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "cache"
    write_hostile_cache(folder)
    return folder


def peeked(folder: Path, *arguments: str) -> Outcome:
    return tristill("cache", "peek", str(folder), "--split", "train", *arguments)


# Colours


def luminance(index: int) -> float:
    """Relative luminance (WCAG 2.2) of one of xterm's 256 colours, past the 16 that a theme may change."""
    assert index >= 16
    levels = [0, 95, 135, 175, 215, 255]
    cube = index - 16
    rgb = [levels[cube // 36], levels[cube // 6 % 6], levels[cube % 6]] if index < 232 else [8 + 10 * (index - 232)] * 3
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", [colour for _, _, colour in SCALE])
def test_every_colour_sets_both_sides_and_has_the_contrast_of_small_print(colour: Colour) -> None:
    light, dark = sorted([luminance(colour.foreground), luminance(colour.background)], reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 7  # WCAG 2.2, 1.4.6


def test_the_scale_has_a_colour_for_every_probability_and_a_legend_of_all() -> None:
    assert [float(name) for name, _, _ in SCALE] == [least for _, least, _ in SCALE]
    assert [least for _, least, _ in SCALE] == sorted({least for _, least, _ in SCALE})
    assert len({colour for _, _, colour in SCALE}) == len(SCALE)
    for _, least, colour in SCALE:
        assert colour_of(least) == colour
    assert colour_of(0.0999) == colour_of(0.01) != colour_of(0.1)
    assert colour_of(1.0) == SCALE[-1][2]
    for _, _, colour in SCALE:
        assert f"48;5;{colour.background}m" in legend()
    assert "0.001 to 0.01" in STYLE.sub("", legend())


@given(
    st.lists(st.tuples(st.text("ab \u4f60\u0301\n", max_size=30), st.sampled_from([None, Colour(16, 229)]))),
    st.integers(2, 12),
)
def test_wrapped_lines_hold_all_of_the_text_and_fit(spans: list[tuple[str, Colour | None]], columns: int) -> None:
    lines = list(wrapped(spans, columns))
    assert "".join(text for line in lines for text, _ in line) == "".join(text for text, _ in spans).replace("\n", "")
    assert all(sum(width(text) for text, _ in line) <= columns for line in lines)
    colours = [colour for text, colour in spans for character in text if character != "\n"]
    assert [colour for line in lines for text, colour in line for _ in text] == colours


def test_a_character_has_the_product_of_its_tokens_and_the_first_token_has_none(hostile: Path) -> None:
    cache = open_cache(hostile)
    window = peek(cache, "train", 0, range(2), 1)
    colours = dict(coloured_text(cache.tokenizer_path, window))
    assert colours["a"] is None
    assert colours[" few"] == colour_of(np.exp(-NATS)) == SCALE[3][2]
    assert colours["\u4f60"] == colour_of(np.exp(-3 * NATS)) == SCALE[2][2]
    unknown = type(window)(window.ids, [None] * len(window.label_probabilities), [])
    assert {colour for _, colour in coloured_text(cache.tokenizer_path, unknown)} == {None}
    assert "".join(text for text, _ in coloured_text(cache.tokenizer_path, unknown)).startswith(
        "a\u241b[2J\u4f60\u240d<U+009B>1m"
    )


# The command


def test_a_pipe_gets_text_that_holds_no_control_character(hostile: Path) -> None:
    outcome = peeked(hostile, "--positions", "30")
    assert outcome.code == 0, outcome.stderr
    assert all(character == "\n" or character.isprintable() for character in outcome.stdout)
    assert "a\u241b[2J\u4f60\u240d<U+009B>1m<U+202E>\u21b5\n\u2407 words of more\u2409\u2400 few" in outcome.stdout
    assert "teacher's probability" not in outcome.stdout  # a legend of colours that are not there
    assert outcome.stdout == peeked(hostile, "--positions", "30", "--no-color").stdout


def test_a_coloured_text_is_the_plain_one_between_styles_of_ours(hostile: Path) -> None:
    plain, coloured = peeked(hostile).stdout, peeked(hostile, "--color").stdout
    bare = STYLE.sub("", coloured)
    assert all(character == "\n" or character.isprintable() for character in bare)
    legend_line = bare.split("\n\n")[1]
    assert legend_line.startswith("the teacher's probability of each token: ")
    assert bare.replace(f"{legend_line}\n\n", "") == plain
    assert painted((" few", colour_of(np.exp(-NATS)))) in coloured


def test_colours_are_for_terminals_and_not_for_those_who_want_none(hostile: Path) -> None:
    command = ("cache", "peek", str(hostile), "--split", "train", "--positions", "2")
    code, sent = tristill_on_a_terminal(*command, columns=50)
    assert code == 0, sent
    assert painted((" few", colour_of(np.exp(-NATS)))) in sent
    title, _, text, table = STYLE.sub("", sent).split("\n\n")
    assert title == "train, window 0 of 3, at temperature 2"
    assert max(map(width, text.split("\n"))) in {49, 50}
    assert len(table.rstrip().split("\n")) == 4
    for wish in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in tristill_on_a_terminal(*command, environment=wish)[1]
    assert "\x1b[48" in tristill_on_a_terminal(*command, "--color", environment={"NO_COLOR": "1"})[1]


def test_rows_fit_the_terminal_by_leaving_out_the_smallest_entries(hostile: Path) -> None:
    command = ("cache", "peek", str(hostile), "--positions", "3", "--top", "5", "--no-color")
    tables = {columns: tristill_on_a_terminal(*command, columns=columns)[1].split("\n\n")[-1] for columns in (90, 200)}
    assert max(map(width, tables[90].split("\n"))) <= 90
    short, full = (table.split("\n")[2].rstrip(" |").rpartition("| ")[2] for table in tables.values())
    assert full.startswith(short)
    assert full.count(",") == 4 > short.count(",") > 0


def test_several_windows_and_any_positions_of_them(hostile: Path) -> None:
    found = peeked(hostile, "--window", "1", "--windows", "2", "--first", "4", "--positions", "2").stdout
    assert re.findall(r"^train, window (\d) of 3", found, re.MULTILINE) == ["1", "2"]
    assert re.findall(r"^\| (\d+) ", found, re.MULTILINE) == ["4", "5", "4", "5"]
    assert "|" not in peeked(hostile, "--positions", "0").stdout.replace("some | more", "")
    outcome = peeked(hostile, "--window", "2", "--windows", "2")
    assert (outcome.code, "window 3: the split train has 3 windows" in outcome.stderr) == (1, True)
    assert "train, window 2 of 3" in outcome.stdout


def test_a_cache_that_knows_nothing_of_the_labels_is_shown_without_colours(tmp_path: Path) -> None:
    write_hostile_cache(tmp_path / "old", format_version=1)
    outcome = peeked(tmp_path / "old", "--color", "--positions", "1")
    assert outcome.code == 0, outcome.stderr
    assert "\x1b" not in outcome.stdout
    assert re.search(r"^\| 0 +\| 'a' +\| '\\x1b' +\| - +\| - +\|", outcome.stdout, re.MULTILINE)


def test_a_stdout_that_has_no_such_characters_gets_them_escaped(hostile: Path) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "tristill.pipeline", "cache", "peek", str(hostile)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert rb"a\u241b[2J\u4f60\u240d" in done.stdout
    assert os.linesep.encode() in done.stdout
