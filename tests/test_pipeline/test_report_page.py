"""The page in a real browser, opened from disk: light and dark, wide and on a phone."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright
from small_sweep import write_sweep

from conftest import ROOT, tristill
from tristill.pipeline.config import load_config
from tristill.pipeline.report.page import write_report
from tristill.pipeline.workspace import Workspace

ARTIFACTS = ROOT / "artifacts"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
FIGURES = {
    "token-frequencies", "teacher-loss", "teacher-learning-rate", "teacher-grad-norm", "teacher-positions-per-s",
    "cache-bytes", "head-mass", "entropy-nats", "log-partition", "head-mass-by-temperature",
    "term-1", "term-2", "term-3", "gradient-1", "trits-zeros", "trits-flips", "trits-to-boundary", "trits-scale",
    "depth-zeros", "depth-flips", "perplexity", "calibration",
    "sweep-1-parallel", "sweep-1-frontier", "sweep-1-0", "sweep-1-1", "sweep-1-2", "step-times", "ledger-1",
}  # fmt: skip
SECTIONS = (
    "data", "teacher", "cache", "students", "quantizer", "evaluation", "generations", "sweeps", "ledger", "plan",
)  # fmt: skip

LOOK = """() => [...document.querySelectorAll('figure')].map(figure => {
    const svg = figure.querySelector('.plot svg'), box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')];
    const size = texts.map(text => parseFloat(getComputedStyle(text).fontSize) * box.width / svg.viewBox.baseVal.width);
    return {
        key: figure.id.replace('figure-', ''),
        width: box.width, height: box.height,
        words: texts.map(text => text.textContent.trim()).filter(text => text),
        smallest: Math.min(...size),
        drawn: svg.querySelectorAll('path, use').length,
        label: document.getElementById(figure.querySelector('[role=img]').getAttribute('aria-labelledby')).textContent,
        caption: figure.querySelector('figcaption').textContent,
        beyond: texts.filter(text => {
            const place = text.getBoundingClientRect();
            return place.left < box.left - 2 || place.right > box.right + 2 || place.bottom > box.bottom + 2;
        }).map(text => text.textContent),
    };
})"""
CONTRAST = """() => {
    const of = color => {
        const probe = document.body.appendChild(document.createElement('i'));
        probe.style.color = color;
        const rgb = getComputedStyle(probe).color.match(/[0-9.]+/g).slice(0, 3).map(part => part / 255);
        probe.remove();
        const [r, g, b] = rgb.map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const surface = of('var(--surface)'), found = {};
    for (const role of ['ink', 'muted', 'accent', 's1', 's2', 's3', 's4', 's5', 's6', 's7', 's8']) {
        const [high, low] = [surface, of(`var(--${role})`)].sort((a, b) => b - a);
        found[role] = (high + 0.05) / (low + 0.05);
    }
    return found;
}"""


@pytest.fixture(scope="module")
def reported_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a sweep and the page that the command makes of it."""
    run = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(finished_run, run)
    write_sweep(run)
    outcome = tristill("report", "--run-dir", str(run))
    assert (outcome.code, outcome.stdout) == (0, f"{run / 'report.html'}\n"), outcome.stderr
    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium of this machine. Skips where there is none, unless TRISTILL_NEEDS_BROWSER says that there must be."""
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        reason = f"found none of {', '.join(PROGRAMS)} on this machine"
        assert "TRISTILL_NEEDS_BROWSER" not in os.environ, reason
        pytest.skip(reason)
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield found
        found.close()


def test_the_page_holds_the_numbers_of_the_run(reported_run: Path) -> None:
    html = (reported_run / "report.html").read_text(encoding="utf-8")
    summary = json.loads((reported_run / "students" / "student" / "summary.json").read_text())
    assert f"{summary['validation']['perplexity']:.2f}" in html
    assert summary["fingerprints"]["cache"] in html
    assert html.count("Held-out text") == 3


def test_the_same_run_gives_the_same_bytes_wherever_it_lies(reported_run: Path, tmp_path: Path) -> None:
    moved = tmp_path / reported_run.name
    shutil.copytree(reported_run, moved, ignore=shutil.ignore_patterns("report.html"))
    path = write_report(Workspace(load_config(moved / "config.toml"), moved))
    assert path.read_bytes() == (reported_run / "report.html").read_bytes()


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_whole_in_a_browser(
    reported_run: Path, browser: Browser, scheme: str, width: int, tmp_path: Path
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 800},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(_words(message)))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    address = (reported_run / "report.html").as_uri()
    page.goto(address)
    _check(page, width)
    picture = tmp_path / f"report-{scheme}-{width}.png"
    page.screenshot(path=picture, full_page=True)
    context.close()
    assert complaints == []
    assert requests == [address]
    ARTIFACTS.mkdir(exist_ok=True)
    shutil.copy(picture, ARTIFACTS)


def _words(message: ConsoleMessage) -> str:
    return f"{message.type}: {message.text}"


def _check(page: Page, width: int) -> None:
    assert [section.get_attribute("id") for section in page.query_selector_all("main > section")] == [
        *SECTIONS,
        "provenance",
    ]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    figures = page.evaluate(LOOK)
    assert {figure["key"] for figure in figures} == FIGURES
    for figure in figures:
        assert figure["width"] > 250, figure
        assert figure["height"] > 100, figure
        assert figure["drawn"] > 5, figure
        assert len(figure["words"]) > 3, figure
        assert figure["smallest"] > 9.5, figure
        assert figure["beyond"] == [], figure
        assert figure["label"], figure
        assert len(figure["caption"]) > 40, figure
    contrast = page.evaluate(CONTRAST)
    assert all(contrast[role] > 4.5 for role in ("ink", "muted", "accent")), contrast
    assert all(ratio > 3 for ratio in contrast.values()), contrast
