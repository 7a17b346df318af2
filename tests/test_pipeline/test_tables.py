"""Tables fit the terminal; what is piped is Markdown of full width."""

import re

import pytest
from pseudo_terminal import tristill_on_a_terminal

from conftest import tristill
from tristill.cache import Cache
from tristill.pipeline.results import metrics_table, text_table
from tristill.pipeline.tables import fitted
from tristill.pipeline.terminal import cells

METRICS = {
    "loss_nats": 3.73, "perplexity": 41.8312, "bits_per_byte": 1.84991, "kl_to_teacher_nats": 0.79441,
    "top1_agreement": 0.57, "acceptance_rate": 0.638, "expected_calibration_error": 0.0201,
}  # fmt: skip
REASON = "not run: needs rows of 256 values, [b]found[/b] 576; choose another :warning: shape"


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 130])
def test_no_line_is_wider_than_the_terminal_and_no_cell_is_lost(columns: int) -> None:
    text = f"before\n{metrics_table({'teacher': METRICS, 'from-teacher': METRICS})}\nafter | all"
    shown = fitted(text, columns).split("\n")
    assert (shown[0], shown[-1]) == ("before", "after | all")
    assert max(cells(line) for line in shown) <= columns
    body = "\n".join(shown)
    for cell in ("41.83", "1.8499", "0.7944", "57.0%", "63.8%", "0.0201"):
        assert len(re.findall(rf"\| {re.escape(cell)} +\|", body)) == 2, "numbers are never cut"
    num_tables = sum(line.startswith("|-") for line in shown)
    assert sum(line.startswith("| from-teacher ") for line in shown) == num_tables, "each says whose numbers it shows"
    assert (num_tables == 1) == (columns >= 100)


def test_long_cells_are_wrapped_at_words_and_taken_as_they_are() -> None:
    rows = [["model", "form", "why"], ["student", "gguf", REASON], ["a \\| b", "hf", "-"]]
    shown = fitted(text_table(rows), 60)
    whys = [re.split(r" (?<!\\)\| ", line[2:-2])[-1].strip() for line in shown.split("\n") if line[:2] == "| "]
    assert " ".join(whys[1:-1]) == REASON
    assert "| a \\| b " in shown
    assert fitted(text_table(rows), 200) == text_table(rows), "what fits is left alone"


def test_a_terminal_gets_what_fits_and_a_pipe_gets_all(small_cache: Cache) -> None:
    piped = tristill("cache", "info", str(small_cache.folder)).stdout
    assert "\x1b" not in piped
    widest = max(len(line) for line in piped.split("\n") if line.startswith("|"))
    code, shown = tristill_on_a_terminal("cache", "info", str(small_cache.folder), columns=widest - 4)
    assert code == 0
    assert "| bytes/position |" in piped
    assert max(len(line) for line in shown.split("\n") if line.startswith("|")) <= widest - 4
