"""Keys and values of positions that went through a model, so that going on costs one position, not all.

Shapes: B batch, T new positions, C room for positions, G key/value heads, E width of a head.
"""

import torch
from torch import Tensor


class LayerPast:
    """What the attention of one block keeps. Keys are kept as rotated, so positions never move."""

    def __init__(self, capacity: int) -> None:
        self.length = 0
        self._capacity = capacity
        self._keys_BGCE: Tensor | None = None
        self._values_BGCE: Tensor | None = None

    def extend(self, keys_BGTE: Tensor, values_BGTE: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add T positions; all keys and values so far, and which of them each new position sees.

        The last is (T, length) booleans, or None where every new position sees all, which is so for T = 1.
        """
        new = keys_BGTE.shape[2]
        start, self.length = self.length, self.length + new
        assert self.length <= self._capacity, "the caller knows how long it gets"
        if self._keys_BGCE is None or self._values_BGCE is None:
            batch, heads, _, width = keys_BGTE.shape
            self._keys_BGCE = keys_BGTE.new_empty(batch, heads, self._capacity, width)
            self._values_BGCE = values_BGTE.new_empty(batch, heads, self._capacity, width)
        self._keys_BGCE[:, :, start : self.length] = keys_BGTE
        self._values_BGCE[:, :, start : self.length] = values_BGTE
        seen = torch.ones(new, self.length, dtype=torch.bool, device=keys_BGTE.device).tril(start) if new > 1 else None
        return self._keys_BGCE[:, :, : self.length], self._values_BGCE[:, :, : self.length], seen

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only."""
        if self._keys_BGCE is not None and self._values_BGCE is not None:
            self._keys_BGCE, self._values_BGCE = self._keys_BGCE[rows], self._values_BGCE[rows]
