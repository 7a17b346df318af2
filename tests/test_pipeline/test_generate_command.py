"""`tristill generate`: text on stdout alone, the same every time, and clear words where it cannot be."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ENVIRONMENT, ROOT, Outcome, tristill
from tristill.stages.data.tokenizer import load_tokenizer
from tristill.stages.generate.text import generate_text
from tristill.stages.models.generate import Sampling, generate, load_causal_model

PROMPT = "def f("


def run(finished_run: Path, *arguments: str) -> Outcome:
    return tristill("generate", *arguments, "--config", "configs/test.toml", "--run-dir", str(finished_run))


@pytest.mark.parametrize("name", ["student", "teacher"])
@pytest.mark.parametrize(("temperature", "seed"), [(0.0, 0), (0.9, 0), (0.9, 7)])
def test_streamed_text_is_that_of_the_trained_model_in_one_batch(
    finished_run: Path, name: str, temperature: float, seed: int
) -> None:
    folder = finished_run / ("teacher" if name == "teacher" else "students/student")
    pieces = generate_text(folder, PROMPT, temperature=temperature, top_p=0.9, seed=seed, max_tokens=12)
    tokenizer, model = load_tokenizer(folder / "tokenizer.json"), load_causal_model(folder, torch.device("cpu"))
    ids = [model.start_id, *tokenizer.encode(PROMPT).ids]
    uniform = torch.from_numpy(np.random.default_rng([seed, 0]).random((1, 12)))
    expected = generate(model, [ids], Sampling(temperature, 0.9, 12), uniform)[0]
    assert "".join(pieces) == tokenizer.decode(expected[1:])


def test_the_command_writes_text_to_stdout_and_says_what_ran_on_stderr(finished_run: Path) -> None:
    outcome = run(finished_run, "--prompt", PROMPT, "--max-tokens", "5", "--seed", "3")
    assert outcome.code == 0
    assert outcome.stdout.startswith(PROMPT)
    assert "5 tokens after" in outcome.stderr
    assert run(finished_run, "--prompt", PROMPT, "--max-tokens", "5", "--seed", "3").stdout == outcome.stdout


def from_stdin(finished_run: Path, prompt: bytes) -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, "-m", "tristill.pipeline", "generate", "--prompt", "-", "--config", "configs/test.toml"]
    return subprocess.run(
        [*command, "--run-dir", str(finished_run), "--temperature", "0", "--max-tokens", "3"],
        cwd=ROOT,
        input=prompt,
        capture_output=True,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "latin-1"},
        timeout=120,
        check=False,
    )


def test_a_prompt_from_stdin_is_taken_to_the_byte_and_text_is_utf8_whatever_the_terminal(finished_run: Path) -> None:
    prompt = "x = '\u20ac'\r\n".encode()
    done = from_stdin(finished_run, prompt)
    assert done.returncode == 0
    assert done.stdout.startswith(prompt)
    assert done.stdout.decode("utf-8")
    refused = from_stdin(finished_run, prompt[:6])
    assert refused.returncode == 2
    assert b"'--prompt': found bytes that are not UTF-8 text" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nobody"], 1, "nobody: found no model in"),
        (["nobody"], 1, "there are no-teacher, student, teacher"),
        (["--temperature", "-1"], 2, "'--temperature': found -1, expected 0, which takes the most likely token, or a"),
        (["--temperature", "nan"], 2, "'--temperature': found nan"),
        (["--temperature", "1e-9"], 2, "'--temperature': found 1e-09"),
        (["--top-p", "0"], 2, "'--top-p': found 0, expected more than 0 and at most 1"),
        (["--prompt", "word " * 99], 1, "tokens, expected at most 31, as"),
        (["--prompt", "a b", "--max-tokens", "40"], 1, "--max-tokens: found 40 after"),
    ],
)
def test_what_cannot_be_is_refused_in_one_message(
    finished_run: Path, arguments: list[str], code: int, message: str
) -> None:
    outcome = run(finished_run, *arguments)
    assert outcome.code == code
    assert message in outcome.stderr
    assert outcome.stdout == ""


def test_without_a_limit_text_ends_where_the_context_does(finished_run: Path) -> None:
    prompt_ids = load_tokenizer(finished_run / "teacher/tokenizer.json").encode(PROMPT).ids
    outcome = run(finished_run, "--prompt", PROMPT)
    assert f"{32 - len(prompt_ids)} tokens after {len(prompt_ids)} of prompt" in outcome.stderr
