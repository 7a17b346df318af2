"""Entropy coding of integers with static models, vectorised over many lanes (docs/format.md, section 5)."""
