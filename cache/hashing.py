"""Fingerprints: SHA-256 over bytes on disk and over canonical JSON."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tristill.cache.regular_file import open_regular


def canonical_json(value: Any) -> str:
    """ASCII JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint_of(value: Any) -> str:
    """SHA-256, in hex, of the canonical JSON of a plain value."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256, in hex, of a file's bytes, read in constant memory."""
    with os.fdopen(open_regular(path, follows_links=True), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
