"""The model that students learn from."""

from tristill.pipeline.report.drawing import Line, lines, over_positions, positions_label
from tristill.pipeline.report.run import Model, Run
from tristill.pipeline.report.section import Block, Entry, Figure, Missing, Section, Text
from tristill.pipeline.units import cell, count_text, number, seconds_text, tick_text
from tristill.stages.errors import CheckpointError
from tristill.stages.models.description import read_description
from tristill.stages.models.origin import load_origin

_LOGGED = (
    (
        "learning_rate",
        "Learning rate",
        "learning rate",
        "As scheduled: it rises, then falls to the end of the training.",
    ),
    (
        "grad_norm",
        "Gradient",
        "norm of the gradient",
        "Its length before it is clipped, as means. One that climbs says that the learning rate is too high.",
    ),
    (
        "positions_per_s",
        "Speed",
        "positions/s",
        "Positions trained on per second, since the start or the last resumption.",
    ),
)


def teacher_section(run: Run) -> Section:
    """How it was trained, and what it reached."""
    teacher = run.teacher
    if not teacher.is_finished and not teacher.log:
        text = "The teacher is not there; run tristill teacher. Students of a cache from elsewhere need none."
        return Section("teacher", "Teacher", [Missing(text)])
    blocks: list[Block] = [Text(_story(run))]
    if teacher.curve("loss")[0]:
        blocks.append(_loss(teacher))
        blocks += [_logged(teacher, *one) for one in _LOGGED if any(teacher.curve(one[0])[1])]
    chain = run.workspace.config.stages
    if chain:
        blocks.append(
            Text(
                f"It is the first of a chain: {' teaches '.join(['the teacher', *chain])}, which teaches the students "
                "of this config."
            )
        )
    return Section("teacher", "Teacher", blocks)


def precision(teacher: Model) -> str:
    """What its weights are: FP32, bfloat16 or float16, or what its quantised layers hold."""
    try:
        origin = load_origin(teacher.folder)
        quantize = read_description(teacher.folder).quantize if teacher.has_weights else None
    except CheckpointError:
        return "precision unknown"
    if origin is not None:
        return "FP32" if origin.dtype == "float32" else origin.dtype
    if quantize is None or quantize.weights == "none":
        return "FP32"
    return f"{quantize.bits}-bit layers" if quantize.bits else "ternary layers"


def _story(run: Run) -> str:
    teacher = run.teacher
    parameters = number(teacher.summary.get("parameters"))
    size = f" of {count_text(parameters)} parameters" if parameters else ""
    what = f"A transformer{size} ({precision(teacher)})"
    if not teacher.is_finished:
        return f"{what}; its training is not finished: run tristill teacher to go on."
    reached = (
        f"On held-out text it reaches a perplexity of {cell(teacher.perplexity, '{:.2f}')}, "
        f"{cell(teacher.validation.get('bits_per_byte'), '{:.3f}')} bits per byte."
    )
    elapsed_s, positions = (number(teacher.train.get(key)) for key in ("elapsed_s", "positions"))
    if elapsed_s is None or positions is None:
        return f"{what}, given as a finished checkpoint and not trained here. {reached}"
    return (
        f"{what}, trained on {count_text(positions)} positions in {seconds_text(elapsed_s)}, "
        f"{cell(teacher.train.get('positions_per_s'), '{:,.0f}')} positions/s. {reached}"
    )


def _loss(teacher: Model) -> Figure:
    positions, losses = teacher.curve("loss")
    largest = max(positions)
    found = [Line(Entry("training loss", "s1"), over_positions(positions, largest), losses)]
    held_out = number(teacher.validation.get("loss_nats"))
    caption = f"Cross-entropy, means over the steps since the last record; the last is {losses[-1]:.3f} nats."
    at, sampled = teacher.held_out
    if at:
        found.append(Line(Entry("held-out sample", "s2"), over_positions(at, largest), sampled, has_markers=True))
        caption += f" The sample of held-out text is the same at every point.{teacher.parting}"
    if held_out is not None:
        entry = Entry("held-out loss at the end", "ink", is_dashed=True)
        found.append(Line(entry, over_positions([positions[0], largest], largest), [held_out, held_out]))
        caption += f" The dashed line is all held-out text at the end, {held_out:.3f} nats."
    return Figure(
        "teacher-loss",
        "The teacher's loss",
        lines(found, "teacher-loss", positions_label(largest), "loss, nats per position"),
        caption,
        [line.entry for line in found],
    )


def _logged(teacher: Model, name: str, title: str, y_label: str, caption: str) -> Figure:
    known = [(at, value) for at, value in zip(*teacher.curve(name), strict=True) if value]  # no speed at first
    positions, values = [at for at, _ in known], [value for _, value in known]
    largest = max(positions)
    entry = Entry(y_label, "s3")
    key = f"teacher-{name.replace('_', '-')}"
    drawing = lines([Line(entry, over_positions(positions, largest), values)], key, positions_label(largest), y_label)
    return Figure(key, title, drawing, f"{caption} The largest is {tick_text(max(values))}.")
