"""Values that no change of the code may change: losses of every step, SHA-256 of tokens, caches, weights and exports.

    cd tests && ../.venv/bin/python -m golden_values                      compare all cases with golden.json
    cd tests && ../.venv/bin/python -m golden_values --only CASE ..       these and what they are made from
    cd tests && ../.venv/bin/python -m golden_values --write [--only ..]  keep what is found instead: say why in the commit

Each case is a run of the real command line on a small corpus made here, and is read back with h5py, JSON and the
headers of safetensors and GGUF files alone, so that nothing here knows the code's inner names. Losses, gradient norms
and metrics are compared digit for digit as Python prints them, payloads as they lie in the files: headers, manifests
and attributes are left out. `ENVIRONMENT` makes kernels the same on all x86-64 processors with AVX2. Other versions of
torch, NumPy, tokenizers or Zstandard than those in golden.json may give other values.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Self

import h5py
import numpy as np
from chats import make_tokenizer
from forked_commands import Commands, copy_of

ROOT = Path(__file__).resolve().parent.parent
KEPT = Path(__file__).with_name("golden.json")
CASES_FILE = Path(__file__).with_name("golden_cases.txt")
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
}
PACKAGES = ("torch", "numpy", "tokenizers", "zstandard", "transformers", "safetensors", "gguf")
VERSIONS = {name: version(name) for name in PACKAGES if find_spec(name)}
PARTS = {"tokens": "data", "teacher": "teacher", "cache": "cache", "run": ".", "model": "model"}
COMMANDS = {"tokens": "tokenize", "cache": "dump-logits", "student": "distill", "model": "--version"}
Values = dict[str, str]


class Case(NamedTuple):
    """A line of golden_cases.txt."""

    name: str
    of: str | None
    settings: list[str]
    is_ordinary: bool

    @property
    def kind(self) -> str:
        return self.name.split("/")[0]


def read_cases() -> dict[str, Case]:
    cases = {}
    for line in CASES_FILE.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            left, _, right = f"{line} ".partition(" : ")
            name, _, of = left.removeprefix("* ").partition("<")
            settings = [part for part in right.strip().split(" ; ") if part]
            cases[name.strip()] = Case(name.strip(), of.strip() or None, settings, line.startswith("* "))
    return cases


CASES = read_cases()


class Golden:
    """Runs of cases, each once, in folders below one; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.values, self.elapsed_s = folder, dict[str, Values](), dict[str, float]()
        self._commands = Commands(folder, environment=ENVIRONMENT, cwd=ROOT)
        write_corpora(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._commands.__exit__(None, None, None)

    def run_dir(self, case: Case) -> Path:
        if case.kind in {"student", "export"}:
            assert case.of is not None
            return self.run_dir(CASES[case.of])
        return self.folder / case.name

    def settings(self, case: Case) -> list[str]:
        own = [part.replace("@", f"{self.folder}/") for part in case.settings if not part.startswith("-")]
        return [*(self.settings(CASES[case.of]) if case.of else []), *(own if case.kind != "model" else [])]

    def of(self, name: str) -> Values:
        """What this case is found to give."""
        if name in self.values:
            return self.values[name]
        case = CASES[name]
        texts = " ".join(self.settings(case))
        places = {each: f"{self.folder}/{each}/" for each in CASES}
        places |= {each: f'{self.run_dir(CASES[each])}/students/{each[8:]}"' for each in CASES if "student/" in each}
        for other in [case.of, *(each for each, place in places.items() if place in texts)]:
            if other:
                self.of(other)
        started_s = time.monotonic()
        run_dir, student = self.run_dir(case), name.split("/")[1]
        if case.of and case.kind not in {"tokens", "student", "export"}:
            copy_of(self.run_dir(CASES[case.of]), run_dir, "data", "teacher")
        arguments = [COMMANDS.get(case.kind, case.kind), *(part for part in case.settings if part.startswith("-"))]
        setup = ""
        if case.kind == "model":
            setup = f"""from pathlib import Path; from small_models import write_model
write_model(Path({str(run_dir / "model")!r}), {student!r}, Path({str(run_dir / "data/tokenizer.json")!r}), 512)"""
        else:
            for setting in self.settings(case):
                arguments += ["--set", setting]
            arguments += ["--config", "configs/test.toml", "--run-dir", str(run_dir)]
        if case.kind == "student":
            arguments += ["--name", student]
        if case.kind == "export":
            assert case.of is not None
            out = self.folder / name / ("out.gguf" if student.startswith("gguf") else "out")
            arguments += [case.of.split("/")[1], "--out", str(out)]
            (self.folder / name).mkdir(parents=True)
        words = [word for part in arguments for word in (part.split() if part.startswith("--") else [part])]
        ended = self._commands.end(*words, kill_after_s=300, setup=setup)
        assert ended.code == 0, f"{name}: tristill {' '.join(words)}\n{ended.stderr}"
        made = {"student": run_dir / "students" / student, "export": self.folder / name}
        self.values[name] = values_below(
            made.get(case.kind) or run_dir / PARTS[case.kind], in_detail=case.kind == "export"
        )
        self.elapsed_s[name] = time.monotonic() - started_s
        return self.values[name]


def write_corpora(folder: Path) -> None:
    """corpus.txt, chats.jsonl and a folder `tokenizer` with a template for the latter."""
    draw = random.Random(0)
    words = ["".join(draw.choices(["ba", "de", "ki", "lo", "mu", "san", "ter", "vo"], k=1 + n % 3)) for n in range(300)]

    def sentence(count: int) -> str:
        return " ".join(words[min(int(draw.expovariate(0.02)), 299)] for _ in range(count))

    (folder / "corpus.txt").write_text("\n".join(sentence(15) for _ in range(800)))
    turns = [[{"role": role, "content": sentence(4)} for role in ("user", "assistant") * 2] for _ in range(250)]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in turns))
    make_tokenizer(folder / "tokenizer")
    begins = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "add_bos_token": True}
    (make_tokenizer(folder / "tokenizer-bos") / "tokenizer_config.json").write_text(json.dumps(begins))


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def values_below(folder: Path, *, in_detail: bool) -> Values:
    """A value of each token file, dataset, file of weights (each tensor, in detail) and series of numbers."""
    values: Values = {}
    for path in sorted(each for each in folder.rglob("*") if each.suffix in READERS):
        name = path.relative_to(folder).as_posix()
        found = READERS[path.suffix](path)
        if path.suffix == ".safetensors" and not in_detail:
            found = {"": digest(*(f"{key} {found[key]}".encode() for key in sorted(found)))}
        values |= {f"{name} {key}".strip(): value for key, value in found.items()}
    return values


def _tokens(path: Path) -> Values:
    array = np.load(path)
    return {"": digest(array.dtype.str.encode(), array.tobytes())}


def _datasets(path: Path) -> Values:
    """Stored bytes of each dataset: its chunks as they lie, in order, or its values where it has none."""
    values: Values = {}
    with h5py.File(path) as file:
        for name, each in file.items():
            if name.startswith("tristill_"):  # JSON that describes the others
                continue
            places = [
                each.id.get_chunk_info(n).chunk_offset for n in range(each.id.get_num_chunks() if each.chunks else 0)
            ]
            chunks = [each.id.read_direct_chunk(place)[1] for place in sorted(places)]
            values[name] = digest(*(chunks or [np.asarray(each[()]).tobytes()]))
    return values


def _safetensors(path: Path) -> Values:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header.pop("__metadata__", None)
    return {
        name: digest(
            f"{each['dtype']} {each['shape']}".encode(), content[slice(*(end + n for n in each["data_offsets"]))]
        )
        for name, each in header.items()
    }


def _gguf(path: Path) -> Values:
    from gguf import GGUFReader

    return {each.name: digest(each.tensor_type.name.encode(), each.data.tobytes()) for each in GGUFReader(path).tensors}


def _steps(path: Path) -> Values:
    """Loss and gradient norm of every step."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {
        key: " ".join(repr(each[key]) for each in records)
        for key in ("loss", "grad_norm")
        if path.name == "metrics.jsonl"
    }


def _json(path: Path) -> Values:
    """The tokenizer, and the held-out metrics of a model."""
    if path.name == "tokenizer.json" and path.parent.name == "data":
        return {"": digest(path.read_bytes())}
    metrics = json.loads(path.read_bytes())["validation"] or {} if path.name == "summary.json" else {}
    return {key: repr(each) for key, each in metrics.items() if isinstance(each, float)}


READERS: dict[str, Callable[[Path], Values]] = {
    ".npy": _tokens,
    ".h5": _datasets,
    ".safetensors": _safetensors,
    ".gguf": _gguf,
    ".jsonl": _steps,
    ".json": _json,
}


def differences(name: str, found: Values, expected: Values) -> list[str]:
    """A line per value that is not as expected: case, artefact, and of a series the first step that differs."""
    lines = []
    for key in sorted(found | expected):
        ours, theirs = found.get(key, "nothing"), expected.get(key, "nothing")
        steps = list(zip(ours.split(), theirs.split(), strict=False))
        step = next((n for n, (one, other) in enumerate(steps) if one != other), None)
        if step is not None:
            where = f"{key}: step {step + 1}" if " " in theirs else key
            lines.append(f"{name}: {where}: found {steps[step][0]}, expected {steps[step][1]}")
        elif ours != theirs:
            lines.append(f"{name}: {key}: found {len(ours.split())} steps, expected {len(theirs.split())}")
    return lines


def read_kept() -> dict[str, Values]:
    kept: dict[str, Values] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    return kept


def compare(golden: Golden, names: Iterable[str]) -> list[str]:
    """All differences of these cases; before them, a line on the versions of packages that are others."""
    kept = read_kept()
    lines = [line for name in names for line in differences(name, golden.of(name), kept.get(name, {}))]
    return differences("versions", VERSIONS, kept["versions"]) * bool(lines) + lines


def write(golden: Golden, names: Iterable[str]) -> list[str]:
    """Keep what these cases give, and what was kept of others that still exist."""
    kept = read_kept() | {name: golden.of(name) for name in names} | {"versions": VERSIONS}
    KEPT.write_text(json.dumps({name: kept[name] for name in ["versions", *CASES] if name in kept}, indent=0) + "\n")
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep what is found")
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=list(CASES), help="these cases")
    parser.add_argument("--times", action="store_true", help="seconds of each case")
    options = parser.parse_args()
    names = options.only or list(CASES)
    with tempfile.TemporaryDirectory(prefix="golden-") as folder, Golden(Path(folder)) as golden:
        lines = write(golden, names) if options.write else compare(golden, names)
        for name, elapsed_s in golden.elapsed_s.items() if options.times else ():
            print(f"{elapsed_s:6.2f} s {name}", file=sys.stderr)
    print("\n".join(lines or [f"{len(names)} cases {'written' if options.write else 'as expected'}"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
