"""The report says what is on disk, whatever is there, and nothing of it becomes markup."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from small_sweep import LEDGER, sweep_results, write_sweep

from conftest import TOKENIZER_JSON, make_spec, window_arrays
from tristill.cache import CacheSpec, CacheWriter
from tristill.pipeline.config import load_config
from tristill.pipeline.errors import MissingInputError
from tristill.pipeline.plan.compare import compare
from tristill.pipeline.plan.prediction import CachePrediction, Plan, StagePrediction
from tristill.pipeline.plan.settings import settings_fingerprint
from tristill.pipeline.report.cache import cache_section
from tristill.pipeline.report.costs import costs_section
from tristill.pipeline.report.data import data_section
from tristill.pipeline.report.drawing import COLORS, Line, bars, lines, thinned
from tristill.pipeline.report.evaluation import evaluation_section
from tristill.pipeline.report.page import render, write_report
from tristill.pipeline.report.plan import plan_section
from tristill.pipeline.report.run import Run, read_run
from tristill.pipeline.report.section import (
    Continuation,
    Entry,
    Figure,
    Listing,
    Missing,
    Prompt,
    Section,
    Table,
    Text,
    Tile,
)
from tristill.pipeline.report.students import students_section
from tristill.pipeline.report.summary import provenance, tiles
from tristill.pipeline.report.sweeps import scored_of, sweeps_section
from tristill.pipeline.report.teacher import precision, teacher_section
from tristill.pipeline.units import bytes_text, count_text, seconds_text
from tristill.pipeline.workspace import Workspace
from tristill.stages.visible import visible

HOSTILE = '</style></pre><script>alert(1)</script><img src=x onerror="alert(2)">\'"&amp; \u202e \u00e9 $x$'
ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "nav", "section", "article", "details",
    "summary", "h1", "h2", "h3", "p", "ol", "ul", "li", "a", "dl", "dt", "dd", "div", "figure", "figcaption", "table",
    "thead", "tbody", "tr", "th", "td", "pre", "svg", "g", "path", "defs", "use", "text", "clippath", "rect",
}  # fmt: skip


class Page(HTMLParser):
    """Tags, ids and text of a page, as a browser would take it apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.ids: Counter[str] = Counter()
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids.update(value for name, value in attrs if name == "id" and value)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def figures(self) -> list[str]:
        return [name.removeprefix("figure-") for name in self.ids if name.startswith("figure-")]


def run_at(folder: Path) -> Run:
    return read_run(Workspace(load_config(folder / "config.toml"), folder))


def page_of(*sections: Section | None) -> Page:
    return Page(render("run", [], [section for section in sections if section], []))


def report_of(folder: Path) -> Page:
    path = write_report(Workspace(load_config(folder / "config.toml"), folder))
    return Page(path.read_text(encoding="utf-8"))


def is_harmless(page: Page) -> bool:
    """No script, nothing that runs or is fetched, no id twice."""
    return (
        page.tags <= ALLOWED
        and not [name for name, _ in page.attributes if name.startswith("on") or name in {"src", "srcset", "action"}]
        and all(value.startswith("#") for name, value in page.attributes if name.endswith("href"))
        and max(page.ids.values()) == 1
    )


def test_a_run_that_is_not_there_is_an_error_that_says_so(tmp_path: Path) -> None:
    workspace = Workspace(load_config(Path("configs/test.toml")), tmp_path / "none")
    with pytest.raises(MissingInputError, match=r"found no run there; run `tristill run`"):
        write_report(workspace)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("part", "section", "said", "figure"),
    [
        ("data", data_section, "run tristill tokenize", "token-frequencies"),
        ("teacher", teacher_section, "run tristill teacher", "teacher-loss"),
        ("cache", cache_section, "run tristill dump-logits", "cache-bytes"),
        ("students", students_section, "run tristill distill", "term-1"),
    ],
)
def test_a_part_that_is_missing_is_named(
    copied_run: Path, part: str, section: Callable[[Run], Section], said: str, figure: str
) -> None:
    whole = page_of(section(run_at(copied_run)))
    shutil.rmtree(copied_run / part)
    found = page_of(section(run_at(copied_run)))
    assert figure in whole.figures
    assert said not in whole.text
    assert found.figures == []
    assert said in found.text


def test_an_empty_run_has_a_page(finished_run: Path, tmp_path: Path) -> None:
    shutil.copy(finished_run / "config.toml", tmp_path)
    page = report_of(tmp_path)
    assert is_harmless(page)
    assert page.figures == []
    assert "Nothing of this run is finished yet" in page.text


def test_a_cache_from_elsewhere_is_shown_and_its_windows_are_continued(copied_run: Path) -> None:
    shutil.rmtree(copied_run / "data")
    shutil.rmtree(copied_run / "teacher")
    (copied_run / "cache" / "provenance.json").unlink()
    page = report_of(copied_run)
    assert {"cache-bytes", "log-partition", "term-1"} <= set(page.figures)
    assert "Not there to write: teacher" in page.text
    assert "Held-out text" in page.text


def test_a_cache_whose_first_windows_count_nothing_says_that_it_has_no_curve_for_that(copied_run: Path) -> None:
    shutil.rmtree(copied_run / "cache")
    plain, silent = make_spec(3, 400, hidden=None), 380
    splits = {
        split: plain.splits[split].model_copy(update={"counted_positions": 6 * count})
        for split, count in {"train": 3, "validation": 400 - silent}.items()
    }
    spec = CacheSpec.model_validate(plain.model_dump() | {"format_version": 3, "splits": splits})
    writer = CacheWriter(copied_run / "cache", spec, TOKENIZER_JSON)
    for shard in writer.missing_shards():
        windows = range(shard.first_window, shard.first_window + shard.num_windows)
        counts = np.array(windows) >= (silent if shard.split == "validation" else 0)
        shard_writer = writer.shard(shard)
        shard_writer.append(
            window_arrays(plain, shard.split, windows) | {"mask": np.repeat(counts[:, None], 6, axis=1).astype("u1")}
        )
        shard_writer.commit()
    writer.finish()
    text = page_of(cache_section(run_at(copied_run))).text
    assert "no log-partition curve: the windows that were looked at have no position that counts." in text
    assert "draws" not in text


def test_a_model_is_called_what_its_weights_are(copied_run: Path) -> None:
    run = run_at(copied_run)
    assert (precision(run.teacher), precision(run.students[0])) == ("FP32", "ternary layers")
    assert "parameters (FP32), trained on" in page_of(teacher_section(run)).text
    shutil.copytree(copied_run / "students" / "student", copied_run / "teacher", dirs_exist_ok=True)
    run = run_at(copied_run)
    assert next(tile for tile in tiles(run) if tile.label == "Teacher").note.endswith("ternary layers")
    assert "(ternary layers)" in page_of(teacher_section(run)).text
    (copied_run / "teacher" / "config.json").write_text("{}")
    assert "(precision unknown)" in page_of(teacher_section(run)).text


def test_a_student_in_training_is_drawn_and_a_line_cut_by_a_kill_is_not(copied_run: Path) -> None:
    student = copied_run / "students" / "student"
    (student / "summary.json").unlink()
    log = (student / "metrics.jsonl").read_bytes()
    (student / "metrics.jsonl").write_bytes(log + b'{"step": 9999, "posi')
    page = page_of(students_section(run_at(copied_run)), evaluation_section(run_at(copied_run)))
    assert "student (not finished)" in page.text
    assert "Not finished: student" in page.text
    assert "term-1" in page.figures


@pytest.mark.parametrize(
    "name", ["cache/cache.json", "students/student/summary.json", "data/data.json", "teacher/provenance.json"]
)
def test_a_file_that_is_broken_takes_away_only_what_it_says(copied_run: Path, name: str) -> None:
    (copied_run / name).write_text("{")
    run = run_at(copied_run)
    found = [section(run) for section in (data_section, cache_section, students_section, costs_section)]
    assert is_harmless(Page(render("run", tiles(run), found, provenance(run))))
    broken = [block.text for section in found for block in section.blocks if isinstance(block, Missing)]
    assert len(broken) == (1 if name.startswith(("cache", "data")) else 0)


def without_bins(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["validation"].pop("calibration")) == 15
    (folder / "summary.json").write_text(json.dumps(summary))


def test_summaries_without_calibration_bins_are_read_and_what_evaluate_wrote_is_taken(copied_run: Path) -> None:
    summary = json.loads((copied_run / "students" / "student" / "summary.json").read_text())
    for folder in (copied_run / "teacher", *(copied_run / "students").glob("*")):
        without_bins(folder)
    page = page_of(evaluation_section(run_at(copied_run)))
    assert "calibration" not in page.figures
    assert "these summaries were written before its bins were kept" in page.text
    (copied_run / "evaluation.json").write_text(json.dumps({"student": summary["validation"]}))
    page = page_of(evaluation_section(run_at(copied_run)))
    assert "calibration" in page.figures
    assert "Without bins: teacher, no-teacher" in page.text


def test_a_sweep_is_drawn_with_its_ledger_and_one_that_cannot_be_read_is_named(copied_run: Path) -> None:
    write_sweep(copied_run)
    (copied_run / "sweeps" / "broken").mkdir()
    (copied_run / "sweeps" / "broken" / "results.json").write_text('{"name": 3}')
    page = page_of(sweeps_section(run_at(copied_run)), costs_section(run_at(copied_run)))
    expected = {"sweep-2-parallel", "sweep-2-frontier", "sweep-2-0", "sweep-2-1", "sweep-2-2", "ledger-2"}
    assert {name for name in page.figures if name.startswith(("sweep", "ledger"))} == expected
    assert "Sweep broken: results.json cannot be read" in page.text
    assert (
        "Its choice is student 3, validation.loss_nats 4.094, with alpha 0.5, width 128, weights absmean" in page.text
    )
    assert "no student is both smaller and better: 0 (6.25 KiB, 90), 3 (12.5 KiB, 60)" in page.text
    assert "The cache pays from 2.4 students on." in page.text


def test_a_sweep_without_a_finished_student_or_ledger_is_told(copied_run: Path) -> None:
    write_sweep(copied_run, trials=sweep_results().trials[6:], groups=(), best=None, ledger=None)
    page = page_of(sweeps_section(run_at(copied_run)), costs_section(run_at(copied_run)))
    assert "students by state: 1 pruned" in page.text
    assert not [name for name in page.figures if name.startswith(("sweep", "ledger"))]


def test_the_choice_of_a_sweep_is_its_own_and_the_order_that_of_its_metric() -> None:
    trials = sweep_results().trials[:6]
    values = [0.1, 0.6, 0.3, 0.5, 0.2, 0.4]
    trials = tuple(t.model_copy(update={"value": v}) for t, v in zip(trials, values, strict=True))
    lowest = scored_of(sweep_results(trials=trials, best=None))
    highest = scored_of(sweep_results(trials=trials, best=3, direction="maximize"))
    assert [one.trial.number for one in lowest] == [0, 4, 2, 5, 3, 1]
    assert [one.entry.label for one in lowest] == ["best", "best quarter", "others", "others", "others", "others"]
    assert [one.trial.number for one in highest] == [1, 3, 5, 2, 4, 0]
    assert [one.entry.label for one in highest][:3] == ["best quarter", "best", "others"]


def test_a_sweep_says_why_it_has_no_ledger(copied_run: Path) -> None:
    write_sweep(copied_run, ledger=None, ledger_missing="the teacher is not here")
    text = page_of(costs_section(run_at(copied_run))).text
    assert "Sweep small has no ledger: the teacher is not here." in text


def test_a_cache_that_saves_no_time_says_so(copied_run: Path) -> None:
    ledger = LEDGER.model_copy(update={"break_even_students": None, "online_step_s": 0.3})
    write_sweep(copied_run, ledger=ledger)
    assert "An online step is no dearer than a cached one here" in page_of(costs_section(run_at(copied_run))).text


def test_nothing_on_disk_becomes_markup(copied_run: Path) -> None:
    hostile = HOSTILE.replace("/", "|")
    students = copied_run / "students"
    (students / "no-teacher").rename(students / hostile)
    log = [json.loads(line) for line in (students / "student" / "metrics.jsonl").read_text().splitlines()]
    for record in log:
        record["terms"] = {HOSTILE: 1.0, **record["terms"]}
        record["gradient_share"] = {HOSTILE: 0.5, **record["gradient_share"]}
        record["zeros"] = {f"a.0.{HOSTILE}": 0.5, **record["zeros"]}
    (students / "student" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    record = json.loads((copied_run / "teacher" / "provenance.json").read_text())
    (copied_run / "teacher" / "provenance.json").write_text(json.dumps({**record, "command": HOSTILE}))
    write_sweep(
        copied_run,
        folder=hostile,
        name=HOSTILE,
        text=HOSTILE,
        metric=HOSTILE,
        varied=("student.quantize.weights", HOSTILE),
    )
    page = report_of(copied_run)
    assert is_harmless(page)
    assert page.text.count("alert(1)") > 5
    assert f"Loss term {visible(HOSTILE)}" in page.text


def test_every_kind_of_block_is_escaped() -> None:
    drawing = lines([Line(Entry("a", "s1"), [0.0, 1.0], [0.0, 1.0])], "one", HOSTILE, HOSTILE)
    blocks = [
        Text(HOSTILE),
        Missing(HOSTILE),
        Listing(HOSTILE),
        Table((HOSTILE, "b"), [(HOSTILE, HOSTILE)], HOSTILE, title=HOSTILE),
        Figure("one", HOSTILE, drawing, HOSTILE, [Entry(HOSTILE, "s1")]),
        Prompt(HOSTILE, [Continuation(HOSTILE, "s1", HOSTILE)]),
    ]
    page = Page(render(HOSTILE, [Tile(HOSTILE, HOSTILE, HOSTILE)], [Section("here", HOSTILE, blocks)], blocks[:3]))
    assert is_harmless(page)
    shown = " ".join(HOSTILE.split())
    counts = {"page": 2, "tile": 3, "section": 2, "text": 2, "missing": 2, "listing": 2}
    counts |= {"table": 5, "figure": 3, "prompt": 3}
    assert page.text.count(shown) == sum(counts.values())
    assert page.text.count(visible(shown).encode("ascii", "backslashreplace").decode()) == 2  # both axes


def test_a_drawing_uses_only_the_colours_and_ids_of_its_page() -> None:
    entry = Entry("a", "s3", is_dashed=True)
    line = Line(entry, [1.0, 2.0, 30.0], [10.0, 2000.0, 3.0], ([9.0, 1900.0, 2.0], [11.0, 2100.0, 4.0]))
    first, second = (
        Page(f"<main>{drawing}</main>")
        for drawing in (
            lines([line], "first", "x", "y", log_x=True, log_y=True),
            bars(["one", "two"], [1.0, 2.0], ["1", "2"], "second", "x"),
        )
    )
    for page, key in ((first, "first"), (second, "second")):
        assert page.ids
        assert all(name.startswith(f"{key}-") for name in page.ids)
        targets = [value.removeprefix("#") for name, value in page.attributes if name.endswith("href")]
        assert set(targets) <= page.ids.keys()
        styles = [value for name, value in page.attributes if name == "style"]
        assert not [style for style in styles if "#" in style or "font" in style]
        used = {word.split(")")[0] for style in styles for word in style.split("var(--")[1:]}
        assert used <= COLORS.keys()
    assert "var(--s3)" in " ".join(value for _, value in first.attributes)


@pytest.mark.parametrize("count", [0, 1, 2, 299, 300, 301, 12_345])
def test_a_long_curve_is_thinned_and_keeps_its_ends(count: int) -> None:
    found = thinned(count)
    assert len(found) <= 301
    assert found == list(range(count)) if count <= 300 else found[0] == 0
    assert not count or found[-1] == count - 1


def test_numbers_are_readable() -> None:
    assert [bytes_text(n) for n in (0, 1023, 1024, 1_477_148, 3 * 2**40)] == [
        "0 bytes", "1,023 bytes", "1 KiB", "1.41 MiB", "3 TiB",
    ]  # fmt: skip
    assert [seconds_text(s) for s in (0.5, 119, 120, 7200)] == ["0.5 s", "119 s", "2.0 min", "2.0 h"]
    assert [count_text(n) for n in (999, 1000, 3_813_178)] == ["999", "1,000", "3.81 million"]


def test_a_plan_stands_beside_what_happened_and_one_of_other_settings_is_named(copied_run: Path) -> None:
    run = run_at(copied_run)
    assert "Nothing was predicted of this run" in page_of(plan_section(run)).text
    bytes_of_cache = sum(path.stat().st_size for path in (copied_run / "cache").glob("*.h5"))
    cache = CachePrediction(positions={}, dataset_bytes={}, total_bytes=bytes_of_cache / 2, basis="given")
    steps = (
        StagePrediction(step="tokenize", positions=1000, elapsed_s=1e6, peak_rss_mib=1.0, basis="given"),
        StagePrediction(step="dump-logits", positions=1000, elapsed_s=1e6, peak_rss_mib=1.0, basis="given"),
    )
    settings = settings_fingerprint(run.workspace.config)
    Plan(settings=settings, threads=1, stages=steps, cache=cache).save(copied_run)
    page = page_of(plan_section(run))
    assert page.figures == ["plan-ratios"]
    last = compare(run.workspace)[-1]
    row = f"dump-logits: all files {bytes_text(bytes_of_cache / 2)} {bytes_text(last.happened)} {last.ratio:.2f}"
    assert last.happened > bytes_of_cache
    assert row in page.text
    assert "Of 3 predictions of bytes and times 0 came within 10% and 25%" in page.text
    Plan(settings="others", threads=1, stages=steps, cache=cache).save(copied_run)
    assert "was made for other settings" in page_of(plan_section(run)).text
