"""Settings of teachers beside the run's own, whose distributions are mixed before anything is kept."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from tristill.stages.models.origin import known_fingerprint
from tristill.stages.settings import OUTSIDE, Section, neutral


class EnsembleMember(Section):
    """A further teacher beside the run's own, with the same tokenizer; all of them are in memory at the dump."""

    path: Annotated[
        Path,
        OUTSIDE,
        neutral(
            "folder of a finished model, a teacher, a student or a causal language model of transformers; its content "
            "is what counts, not where it is"
        ),
    ]
    weight: Annotated[float, Field(gt=0, description="its weight; weights are divided by the sum of all")] = 1.0

    @property
    def fingerprint(self) -> str | None:
        """That of the model, None if it is not here."""
        return known_fingerprint(self.path)
