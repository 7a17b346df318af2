"""Stage two: trains a ternary student from a cache, or online."""
