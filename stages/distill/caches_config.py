"""Settings of caches beside the run's own, whose targets are mixed as they are read."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from stages.settings import Section, neutral


class FurtherCache(Section):
    """A further cache beside the run's own, over the same windows."""

    dir: Annotated[Path, neutral("folder of the cache; its content is what counts, not where it is")]
    weight: Annotated[float, Field(gt=0, description="its weight; weights are divided by the sum of all")] = 1.0
