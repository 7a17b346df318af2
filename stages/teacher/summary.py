"""What is known of a finished teacher."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from tristill.cache.atomic import write_atomically
from tristill.stages.evaluate.metrics import ValidationMetrics
from tristill.stages.training.loop import TrainingSummary


class TeacherSummary(BaseModel):
    """`summary.json` of a teacher; train is None for one that was given.

    basis: what its validation follows from; see stages.evaluate.evaluate.
    """

    model_config = ConfigDict(frozen=True)

    validation: ValidationMetrics
    test: ValidationMetrics | None = None
    train: TrainingSummary | None
    parameters: int
    fingerprint: str
    basis: str | None = None

    def save(self, folder: Path) -> None:
        """Write it to the teacher's folder."""
        write_atomically(folder / "summary.json", (self.model_dump_json(indent=2) + "\n").encode())
