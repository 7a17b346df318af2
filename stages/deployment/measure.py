"""Sizes and speeds of a teacher and its students in every form that they run in, measured side by side."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tristill.stages.deployment.contenders import Contender, InLlamaCpp, InTorch
from tristill.stages.deployment.report import Deployment, Form, Speed, Spread
from tristill.stages.deployment.sizes import bytes_of, weights_bytes
from tristill.stages.errors import CheckpointError, ExportError
from tristill.stages.export.formats import TernaryType
from tristill.stages.export.gguf import write_gguf
from tristill.stages.export.llama_cpp import Timings
from tristill.stages.export.student import Student, load_student
from tristill.stages.models.checkpoint import load_model
from tristill.stages.models.hugging_face import HuggingFaceModel
from tristill.stages.packed.model import memory_use, pack_model
from tristill.stages.progress import Progress, waiting
from tristill.stages.threads import torch_threads

_LONGEST_PROMPT, _MOST_NEW = 512, 128
_ROUNDS = 7
_FORM_OF_DTYPE = {torch.float16: "fp16", torch.bfloat16: "BF16"}
_TERNARY_TYPES: tuple[TernaryType, ...] = ("TQ2_0", "TQ1_0")


@dataclass
class _Entry:
    """A form on its way into the report."""

    model: str
    form: str
    disk_bytes: int | None
    runtime: str | None = None
    contender: Contender | None = None
    why_not: str | None = None
    context_length: int = _LONGEST_PROMPT + _MOST_NEW
    timings: list[Timings] = field(default_factory=list)


def measure_deployment(
    teacher: Path, students: Mapping[str, Path], threads: int | None, rounds: int = _ROUNDS
) -> Deployment:
    """The teacher in its own format, and each student in FP32, in fp16, packed, and as GGUF files, which are not kept.

    The forms that can run take turns, `rounds` times after one turn that does not count, all on as many threads: as
    torch uses, if no number is given. The prompt is random ids, half as long as the shortest context, 512 at most; it
    is gone on from for a quarter, 128 at most. Loading is not timed.
    """
    threads = threads or torch.get_num_threads()
    with torch_threads(threads), ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        loaded = {name: load_student(path) for name, path in students.items()}
        entries = [*_teacher_entries(teacher)]
        context = min([entries[0].context_length, *(student.context_length for student in loaded.values())])
        vocab_size = min(student.loaded.vocab_size for student in loaded.values())
        prompt_tokens = max(1, min(context // 2, _LONGEST_PROMPT))
        new_tokens = max(1, min(context // 4, _MOST_NEW))
        version = None
        for name, student in loaded.items():
            with waiting(f"forms of {name}"):
                files = list(_gguf_entries(name, student, folder, stack, context, threads))
                entries += [*_packed_entries(name, student), *files]
            found = [entry.contender.version for entry in files if isinstance(entry.contender, InLlamaCpp)]
            version = found[0] if found else version
        generator = torch.Generator().manual_seed(0)
        ids: list[int] = torch.randint(1, vocab_size, (prompt_tokens,), generator=generator).tolist()
        _take_turns([entry for entry in entries if entry.contender], ids, new_tokens, rounds)
    return Deployment(
        threads=threads,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        torch=torch.__version__,
        xllamacpp=version,
        forms=tuple(_forms(entries)),
    )


def _teacher_entries(folder: Path) -> Iterator[_Entry]:
    """The teacher as it is run, of any architecture and in its own format; and its size in fp16."""
    model = load_model(folder)
    own = _FORM_OF_DTYPE.get(model.head_weight.dtype, "FP32")
    entry = _Entry("teacher", own, weights_bytes(folder))
    if isinstance(model, HuggingFaceModel):
        entry.disk_bytes = bytes_of(model)  # its files may have another type than it is run in
        positions = getattr(model.inner.config.get_text_config(), "max_position_embeddings", None)
        entry.context_length = positions if isinstance(positions, int) else entry.context_length
    else:
        entry.context_length = load_student(folder).context_length
    try:
        entry.contender, entry.runtime = InTorch(model, folder), "PyTorch"
    except CheckpointError as exc:
        entry.why_not = str(exc)
    yield entry
    if own != "fp16":
        yield _Entry("teacher", "fp16", bytes_of(model, torch.float16))


def _packed_entries(name: str, student: Student) -> Iterator[_Entry]:
    yield _Entry(name, "FP32", weights_bytes(student.folder))
    yield _Entry(name, "fp16", bytes_of(student.loaded, torch.float16))
    if isinstance(student.loaded, HuggingFaceModel):
        why_not = f"packed weights are for our own transformer, and this is {student.loaded.shape.kind} of transformers"
        yield _Entry(name, "packed", None, why_not=why_not)
        return
    packed = pack_model(student.model)
    if memory_use(packed).packed_weights:
        yield _Entry(name, "packed", bytes_of(packed, torch.float16), "PyTorch", InTorch(packed, student.folder))
    else:
        yield _Entry(name, "packed", None, why_not="found no ternary weights, and others are not packed")


def _gguf_entries(
    name: str, student: Student, folder: Path, stack: ExitStack, context_length: int, threads: int
) -> Iterator[_Entry]:
    """The GGUF files; to be made before the student is packed."""
    for kind in _TERNARY_TYPES:
        path = folder / f"{kind}-{len(list(folder.iterdir()))}.gguf"
        entry = _Entry(name, f"GGUF {kind}", None)
        try:
            write_gguf(
                student.model,
                student.tokenizer_json,
                path,
                kind,
                context_length=student.context_length,
                end_of_text_id=student.end_of_text_id,
            )
            entry.disk_bytes = path.stat().st_size
            entry.contender = InLlamaCpp(stack, path, context_length, threads)
            entry.runtime = "llama.cpp"
        except ExportError as exc:
            entry.why_not = str(exc)
        yield entry


def _take_turns(entries: list[_Entry], ids: list[int], num_tokens: int, rounds: int) -> None:
    with Progress("rounds", rounds, "rounds") as progress:
        for number in range(1 + rounds):
            for entry in entries:
                assert entry.contender is not None, "the caller has seen to it"
                timings = entry.contender.time(ids, num_tokens)
                if number:
                    entry.timings.append(timings)
            progress.advance(1 if number else 0)


def _forms(entries: list[_Entry]) -> Iterator[Form]:
    """The report's rows; the teacher's entry is the first."""
    sizes = {(entry.model, entry.form): entry.disk_bytes for entry in entries}
    prompt_s = [_prompt_speed(timings) for timings in entries[0].timings]
    new_s = [_generation_speed(timings) for timings in entries[0].timings]
    for entry in entries:
        yield Form(
            model=entry.model,
            form=entry.form,
            runtime=entry.runtime,
            disk_bytes=entry.disk_bytes,
            of_fp32=_ratio(entry.disk_bytes, sizes.get((entry.model, "FP32"))),
            of_fp16=_ratio(entry.disk_bytes, sizes.get((entry.model, "fp16"))),
            prompt=_speed([_prompt_speed(timings) for timings in entry.timings], prompt_s),
            generation=_speed([_generation_speed(timings) for timings in entry.timings], new_s),
            why_not=entry.why_not,
        )


def _speed(tokens_per_s: list[float], of_teacher: list[float]) -> Speed | None:
    if not tokens_per_s:
        return None
    ratios = [own / other for own, other in zip(tokens_per_s, of_teacher, strict=False)]
    return Speed(tokens_per_s=Spread.of(tokens_per_s), to_teacher=Spread.of(ratios) if ratios else None)


def _prompt_speed(timings: Timings) -> float:
    return timings.prompt_tokens / timings.prompt_s


def _generation_speed(timings: Timings) -> float:
    return timings.new_tokens / timings.new_s


def _ratio(own: int | None, other: int | None) -> float | None:
    return None if own is None or other is None else own / other
