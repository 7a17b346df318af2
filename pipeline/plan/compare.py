"""What was predicted of a run, beside what happened."""

from dataclasses import dataclass

from pipeline.workspace import Workspace


@dataclass(frozen=True)
class Comparison:
    """One figure. what: the step and the quantity, in words; unit: "positions", "bytes", "bytes/position", "MiB", "s"."""

    what: str
    unit: str
    predicted: float
    happened: float

    @property
    def ratio(self) -> float:
        """What happened over what was predicted; infinite where nothing was."""
        return self.happened / self.predicted if self.predicted else float("inf")


def compare(workspace: Workspace) -> list[Comparison]:
    """Every figure of the run's plan whose step has happened since, in the order of the steps; empty without a plan."""
    raise NotImplementedError
