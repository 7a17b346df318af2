"""What is predicted of a run: `plan.json` in its folder."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tristill.cache.atomic import write_atomically
from tristill.cache.regular_file import read_file
from tristill.pipeline.errors import StaleError

PLAN_NAME = "plan.json"


class StagePrediction(BaseModel):
    """One step, by its label. basis: in words, what the prediction was made from.

    disk_bytes: of all files that it leaves; scratch_bytes: of those beside them that are there while it runs.
    is_done: whether it was finished when the plan was made; what was predicted of it, if anything, is of a plan before.
    """

    model_config = ConfigDict(frozen=True)

    step: str
    positions: int
    elapsed_s: float
    peak_rss_mib: float
    basis: str
    disk_bytes: float = 0.0
    scratch_bytes: float = 0.0
    is_done: bool = False
    refused_exports: str | None = None
    """Formats that will refuse to hold the student, and why."""


class CachePrediction(BaseModel):
    """The cache on disk: bytes of every dataset by name (compressed), and of all files.

    positions: of all windows of each split, whether they count or not.
    """

    model_config = ConfigDict(frozen=True)

    positions: dict[str, int]
    dataset_bytes: dict[str, float]
    total_bytes: float
    basis: str

    @property
    def bytes_per_position(self) -> float:
        """All files over all positions."""
        return self.total_bytes / max(1, sum(self.positions.values()))


class Plan(BaseModel):
    """What a config will take on this machine. settings: a fingerprint of the config that it was made for.

    cache: of the last link; stage_caches: of the links before it, by stage. planned_s: what making the plan took.
    """

    model_config = ConfigDict(frozen=True)

    settings: str
    threads: int
    stages: tuple[StagePrediction, ...]
    cache: CachePrediction
    stage_caches: dict[str, CachePrediction] = {}
    planned_s: float = 0.0
    measured: str = ""
    """A fingerprint of what was measured, and how: with the same a plan need not be made again."""

    def save(self, run_dir: Path) -> None:
        """Replace the plan of a run."""
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / PLAN_NAME, (self.model_dump_json(indent=2) + "\n").encode())


def load_plan(run_dir: Path) -> Plan | None:
    """The plan of a run, None if there is none."""
    path = run_dir / PLAN_NAME
    try:
        return Plan.model_validate_json(read_file(path))
    except FileNotFoundError:
        return None
    except ValidationError as exc:
        raise StaleError(f"{path}: cannot be read as a plan; delete it and run `tristill plan` again") from exc
