"""Settings of a training run, teacher's or student's."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tristill.stages.settings import Section, neutral


class SecondPhase(Section):
    """A learning rate that falls at once, at a step of the training, and follows the schedule from there on.

    The defaults are of BitNet b1.58 (Ma et al. 2024, The Era of 1-bit LLMs: Training Tips, Code and FAQ, table 2).
    """

    start: Annotated[float, Field(gt=0, lt=1, description="share of the steps before it")] = 0.5
    lr_fraction: Annotated[float, Field(gt=0, lt=1, description="its learning rate over the schedule's")] = 2 / 3


class TrainingConfig(Section):
    """AdamW with a schedule. A position is one prediction; a step sees batch_windows * accumulation windows."""

    newer = ("second_phase", "weight_decay_until", "compile")

    steps: Annotated[int, Field(ge=1, description="optimizer steps")]
    batch_windows: Annotated[int, Field(ge=1, description="windows per forward pass, of all ranks together")] = 32
    accumulation: Annotated[int, Field(ge=1, description="forward passes per step")] = 1
    learning_rate: Annotated[float, Field(gt=0, description="peak")]
    schedule: Annotated[
        Literal["cosine", "linear", "trapezoid"],
        Field(description="after warm-up: cosine or linear to the end, or constant with a linear decay at the end"),
    ] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0, description="linear warm-up")] = 0
    decay_fraction: Annotated[float, Field(gt=0, le=1, description="share of the steps that a trapezoid decays in")] = (
        0.2
    )
    final_lr_fraction: Annotated[
        float, Field(ge=0, le=1, description="last learning rate of the schedule over the peak")
    ] = 0.1
    second_phase: Annotated[
        SecondPhase | None,
        Field(description="lowers the learning rate of whatever schedule at once; none: there is one phase"),
    ] = None
    weight_decay: Annotated[float, Field(ge=0, description="decoupled, on matrices only")] = 0.1
    weight_decay_until: Annotated[
        float, Field(gt=0, le=1, description="share of the steps after which weight decay is zero; 1 keeps it")
    ] = 1.0
    beta1: Annotated[float, Field(ge=0, lt=1, description="AdamW's decay of the first moment")] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, description="AdamW's decay of the second moment")] = 0.95
    grad_clip: Annotated[float | None, Field(gt=0, description="largest gradient norm; none does not clip")] = 1.0
    precision: Annotated[
        Literal["float32", "bfloat16"], Field(description="bfloat16: matrix products under autocast; weights stay FP32")
    ] = "float32"
    compile: Annotated[
        bool,
        Field(description="torch.compile of all but the head: slow at first, then fused; a CPU needs a C++ compiler"),
    ] = False
    parallel: Annotated[
        Literal["ddp", "fsdp"],
        neutral(
            "how many ranks train one model: ddp, each with a copy; fsdp, each with its share of every tensor, its "
            "gradient and its moments. All give the same to rounding, and one goes on where another was stopped"
        ),
    ] = "ddp"
    seed: Annotated[int, Field(ge=0, lt=2**63, description="of the initial weights and the order of windows")] = 0
    device: Annotated[str | None, neutral("cpu, cuda, cuda:1 ..; none takes CUDA if there is one")] = None
    log_every: Annotated[
        int, neutral("steps between records of metrics.jsonl, whose losses are means since the last one", ge=1)
    ] = 10
    eval_every: Annotated[
        int | None,
        neutral("steps between records of held-out metrics; none evaluates at the end only", ge=1),
    ] = None
    eval_windows: Annotated[
        int, neutral("windows of such a held-out record: the first of the split, in whole batches", ge=1)
    ] = 64
    tensorboard: Annotated[
        bool,
        neutral("whether what metrics.jsonl gets also goes to `tensorboard/` beside it (extra `tensorboard`)"),
    ] = False
    checkpoint_every: Annotated[int, neutral("steps between checkpoints to resume from", ge=1)] = 100

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must not exceed steps ({self.steps})")
        return self

    @model_validator(mode="after")
    def _second_phase_comes(self) -> Self:
        if self.second_phase is not None and not self.warmup_steps <= self.second_phase_step < self.steps:
            raise ValueError(
                f"second_phase: start = {self.second_phase.start} is step {self.second_phase_step} of {self.steps}; "
                f"expected one after the warm-up ({self.warmup_steps} steps) and before the end"
            )
        return self

    @model_validator(mode="after")
    def _graphs_are_of_whole_tensors(self) -> Self:
        if self.compile and self.parallel == "fsdp":
            raise ValueError("compile: is for whole tensors, and parallel = 'fsdp' shares them out; set one of both")
        return self

    @property
    def second_phase_step(self) -> int:
        """First step of the second phase, counted from 0; the number of steps where there is none."""
        return self.steps if self.second_phase is None else round(self.second_phase.start * self.steps)

    @property
    def decayed_steps(self) -> int:
        """Steps that weight decay is on for."""
        return round(self.weight_decay_until * self.steps)
