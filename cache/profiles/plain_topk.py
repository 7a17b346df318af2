"""Profile `plain_topk`: K logits as they are and the mass of the tail at one temperature; docs/format.md, section 4.

What format version 1 called `topk`. Larger than `topk`, and readable with any HDF5 library that has the Zstandard
filter.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tristill.cache.arrays import ArraySpec, ids_dtype
from tristill.cache.profiles.head_needs import unserved_by_head
from tristill.cache.profiles.profile import Need, Profile


class PlainTopKProfile(Profile):
    """A fixed number of logits, each in 16 or 32 bits."""

    since_version: ClassVar[int] = 1

    kind: Annotated[Literal["plain_topk"], Field(description="name of the profile")] = "plain_topk"
    top_k: Annotated[int, Field(ge=1, description="K, the number of largest logits kept per position")] = 32
    temperature: Annotated[
        float,
        Field(
            gt=0,
            le=1000,
            description="tau_dump, by which logits are divided before they are stored",
        ),
    ] = 1.0
    logit_dtype: Annotated[
        Literal["float16", "float32"],
        Field(description="type of the stored logits; float32 is for exact comparison with online targets"),
    ] = "float16"

    def arrays(self, vocab_size: int, context_length: int) -> tuple[ArraySpec, ...]:
        """The datasets that this profile stores."""
        if self.top_k > vocab_size:
            raise ValueError(
                f"top_k is {self.top_k}, but the vocabulary has only {vocab_size} entries; "
                f"set cache.profile.top_k to {vocab_size} or less"
            )
        head = (context_length, self.top_k)
        return (
            ArraySpec("head_ids", head, ids_dtype(vocab_size)),
            ArraySpec("head_logits", head, "<f2" if self.logit_dtype == "float16" else "<f4"),
            ArraySpec("tail_logsumexp", (context_length,), "<f4"),
        )

    def unserved(self, need: Need, vocab_size: int) -> str | None:
        """tau_dump only, unless the head is the whole vocabulary."""
        if self.top_k == vocab_size:
            return None
        about = f"its {self.top_k} largest of {vocab_size} logits"
        return unserved_by_head(need, "plain_topk", (self.temperature,), "bucket", about)
