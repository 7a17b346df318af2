"""Settings of caches beside the run's own, whose targets are mixed as they are read."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from tristill.cache.store import check_url
from tristill.stages.settings import OUTSIDE, Section, neutral


class FurtherCache(Section):
    """A further cache beside the run's own, over the same windows."""

    dir: Annotated[Path, OUTSIDE, neutral("folder of the cache; its content is what counts, not where it is")]
    url: Annotated[
        str | None,
        OUTSIDE,
        neutral("where the cache is, such as s3://bucket/folder, of which `dir` is then the local copy"),
    ] = None
    local_bytes: Annotated[int | None, neutral("bytes of its shards kept in `dir` at most; none keeps all", ge=1)] = (
        None
    )
    weight: Annotated[float, Field(gt=0, description="its weight; weights are divided by the sum of all")] = 1.0

    @field_validator("url")
    @classmethod
    def _url_is_plain(cls, url: str | None) -> str | None:
        return url if url is None else check_url(url)
