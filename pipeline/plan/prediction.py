"""What is predicted of a run: `plan.json` in its folder."""

from pydantic import BaseModel, ConfigDict


class StagePrediction(BaseModel):
    """One step, by its label. basis: in words, what the prediction was made from."""

    model_config = ConfigDict(frozen=True)

    step: str
    positions: int
    elapsed_s: float
    peak_rss_mib: float
    basis: str


class CachePrediction(BaseModel):
    """The cache on disk: bytes of every dataset by name (compressed), and of all files."""

    model_config = ConfigDict(frozen=True)

    positions: dict[str, int]
    dataset_bytes: dict[str, float]
    total_bytes: float
    basis: str


class Plan(BaseModel):
    """What a config will take on this machine. settings: a fingerprint of the config that it was made for."""

    model_config = ConfigDict(frozen=True)

    settings: str
    threads: int
    stages: tuple[StagePrediction, ...]
    cache: CachePrediction
