"""A corpus that a causal language model writes: parts of JSON lines, resumable, the same whenever they are written."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from tristill.cache.atomic import write_atomically
from tristill.cache.hashing import canonical_json, fingerprint_of, sha256_of_file
from tristill.stages.data.config import SyntheticText
from tristill.stages.data.files import model_files
from tristill.stages.data.tokenizer import load_tokenizer
from tristill.stages.errors import CorpusError
from tristill.stages.models.checkpoint import pick_device
from tristill.stages.models.description import TOKENIZER_NAME
from tristill.stages.models.generate import CausalModel, Sampling, generate, load_causal_model
from tristill.stages.progress import Progress

_RECORD_NAME = "synthetic.json"


def write_synthetic(source: SyntheticText, folder: Path) -> list[Path]:
    """The parts of the corpus, in order, after writing those that are missing or not whole.

    A part is one batch of documents and a function of settings, model, prompts and its own number, so that parts which
    an earlier process left are those that this one would write; each is renamed into place when it is whole. Every
    document has random numbers of its own, from the seed and its number.
    """
    plan = _Plan.of(source, folder)
    _claim(source, folder)
    missing = [part for part in range(plan.num_parts) if not plan.is_whole(part)]
    if missing:
        done = source.documents - sum(len(plan.documents_of(part)) for part in missing)
        author = _Author.of(source)
        num_tokens = 0
        with Progress("synthetic", source.documents, "documents", done) as progress:
            for part in missing:
                texts, num_new = author.write(plan.documents_of(part))
                lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
                write_atomically(plan.path(part), lines.encode("utf-8"))
                num_tokens += num_new
                progress.advance(len(texts), f"{num_tokens / progress.elapsed_s:,.0f} tokens/s")
    return [plan.path(part) for part in range(plan.num_parts)]


def written_documents(parts: Sequence[Path]) -> Iterator[str]:
    """The texts of parts that `write_synthetic` wrote, empty ones left out."""
    for part in parts:
        yield from (text for text in _texts(part) if text)


@dataclass(frozen=True)
class _Plan:
    """Which documents are in which part, and where it is."""

    folder: Path
    num_documents: int
    batch: int

    @classmethod
    def of(cls, source: SyntheticText, folder: Path) -> "_Plan":
        return cls(folder, source.documents, source.batch_documents)

    @property
    def num_parts(self) -> int:
        return -(-self.num_documents // self.batch)

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.jsonl"

    def documents_of(self, part: int) -> range:
        return range(part * self.batch, min((part + 1) * self.batch, self.num_documents))

    def is_whole(self, part: int) -> bool:
        try:
            return sum(1 for _ in _texts(self.path(part))) == len(self.documents_of(part))
        except CorpusError:
            return False


@dataclass(frozen=True)
class _Author:
    """The model with its tokenizer and the prompts, as ids."""

    model: CausalModel
    tokenizer: Tokenizer
    prompts: list[list[int]]
    sampling: Sampling
    seed: int

    @classmethod
    def of(cls, source: SyntheticText) -> "_Author":
        folder = source.model.expanduser()
        model = load_causal_model(folder, pick_device(source.device))
        tokenizer = load_tokenizer(folder / TOKENIZER_NAME)
        prompts = []
        for where, prompt in _prompts(source):
            ids = model.started(tokenizer.encode(prompt, add_special_tokens=False).ids)
            _refuse_unfit(ids, model, tokenizer, source, where)
            prompts.append(ids)
        sampling = Sampling(source.temperature, source.top_p, source.max_tokens)
        return cls(model, tokenizer, prompts, sampling, source.seed)

    def write(self, numbers: range) -> tuple[list[str], int]:
        """The documents of these numbers, and how many ids they have beyond their prompts."""
        prompts = [self.prompts[number % len(self.prompts)] for number in numbers]
        uniform = [np.random.default_rng([self.seed, number]).random(self.sampling.max_tokens) for number in numbers]
        rows = generate(self.model, prompts, self.sampling, torch.from_numpy(np.stack(uniform)))
        num_new = sum(len(row) - len(prompt) for row, prompt in zip(rows, prompts, strict=True))
        return self.tokenizer.decode_batch([row[1:] for row in rows], skip_special_tokens=True), num_new


def _prompts(source: SyntheticText) -> list[tuple[str, str]]:
    """Each prompt, with where it is from."""
    if source.prompts is None:
        return [("from nothing", "")]
    path = source.prompts.expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as exc:
        raise CorpusError(f"{path}: is not UTF-8 text ({exc.reason}); convert it") from exc
    prompts = [(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise CorpusError(
            f"{path}: found no prompt in it; give one per line, or leave data.source.prompts out to write from nothing"
        )
    return prompts


def _refuse_unfit(ids: list[int], model: CausalModel, tokenizer: Tokenizer, source: SyntheticText, where: str) -> None:
    if max(ids) >= model.vocab_size:
        raise CorpusError(
            f"{source.model}: {where}: found id {max(ids)} ({tokenizer.id_to_token(max(ids))!r}), expected less than "
            f"{model.vocab_size}, the model's vocabulary; leave that token out, or give the model's own tokenizer"
        )
    if model.max_positions is not None and len(ids) - 1 + source.max_tokens > model.max_positions:
        found = f"{len(ids) - 1} of prompt and max_tokens = {source.max_tokens}" if len(ids) > 1 else source.max_tokens
        raise CorpusError(
            f"{where}: found {found} tokens, expected at most {model.max_positions} in all, the context length of "
            f"{source.model}; lower data.source.max_tokens" + (" or shorten the prompt" if len(ids) > 1 else "")
        )


def _claim(source: SyntheticText, folder: Path) -> None:
    """Note in the folder what its parts are made from; refuse if there are some, made from something else."""
    files = model_files(source)
    names = [file.name for file in files]
    inputs = fingerprint_of([names, [sha256_of_file(file) for file in files]])
    settings = {**source.numbers(), "model": None, "prompts": None}  # where they lie changes nothing
    record = canonical_json({"settings": settings, "inputs": inputs}).encode("ascii") + b"\n"
    path = folder / _RECORD_NAME
    folder.mkdir(parents=True, exist_ok=True)
    is_same = path.exists() and path.read_bytes() == record
    if not is_same and any(folder.glob("part-*.jsonl")):
        raise CorpusError(
            f"{folder}: holds documents written with other settings, or by another model or from other prompts; use "
            "another --run-dir, or write them anew with `tristill tokenize --force`"
        )
    if not is_same:
        write_atomically(path, record)


def _texts(part: Path) -> Iterator[str]:
    try:
        with part.open(encoding="utf-8") as lines:
            for line in lines:
                yield str(json.loads(line)["text"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise CorpusError(
            f"{part}: cannot be read as JSON lines with a text each ({exc}); run `tristill tokenize` again"
        ) from exc
