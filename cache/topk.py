"""Profile `topk`: the K largest logits and the exact mass of the tail at one temperature; docs/format.md, section 4."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from cache.arrays import ArraySpec, ids_dtype
from cache.errors import CacheRequestError


class TopKProfile(BaseModel):
    """How much of the teacher's distribution is kept at each position."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Annotated[Literal["topk"], Field(description="name of the profile")] = "topk"
    top_k: Annotated[int, Field(ge=1, description="K, the number of largest logits kept per position")] = 32
    temperature: Annotated[
        float, Field(gt=0, le=1000, description="tau_dump, by which logits are divided before they are stored")
    ] = 1.0
    logit_dtype: Annotated[
        Literal["float16", "float32"],
        Field(description="type of the stored logits; float32 is for exact comparison with online targets"),
    ] = "float16"

    def arrays(self, vocab_size: int, context_length: int) -> tuple[ArraySpec, ...]:
        """The datasets that this profile stores."""
        if self.top_k > vocab_size:
            raise CacheRequestError(
                f"top_k is {self.top_k}, but the vocabulary has only {vocab_size} entries; "
                f"set cache.profile.top_k to {vocab_size} or less"
            )
        head = (context_length, self.top_k)
        return (
            ArraySpec("head_ids", head, ids_dtype(vocab_size)),
            ArraySpec("head_logits", head, "<f2" if self.logit_dtype == "float16" else "<f4"),
            ArraySpec("tail_logsumexp", (context_length,), "<f4"),
        )

    def unserved(self, temperature: float, vocab_size: int) -> str | None:
        """Why p at `temperature` does not follow exactly from what is stored; None when it does."""
        if temperature == self.temperature or self.top_k == vocab_size:
            return None
        return (
            f"temperature {temperature:g} is asked for, but this topk cache is exact at {self.temperature:g} only: the "
            f"mass outside its {self.top_k} largest of {vocab_size} logits was summed at that temperature"
        )
