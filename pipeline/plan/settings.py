"""Which config a plan belongs to."""

from tristill.cache.hashing import fingerprint_of
from tristill.pipeline.config import Config


def settings_fingerprint(config: Config) -> str:
    """Of all that affects numbers, and so bytes; what affects none may change without making a plan stale."""
    return fingerprint_of(config.numbers())
