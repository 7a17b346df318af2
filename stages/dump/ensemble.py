"""Several teachers as one: the mixture of their distributions at temperature 1.

Shapes: N positions, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from tristill.stages.data.tokenized import TokenizedCorpus
from tristill.stages.data.tokenizer_gate import require_same_tokenizer
from tristill.stages.dump.config import DumpConfig
from tristill.stages.errors import CheckpointError
from tristill.stages.losses.mixed import log_mixture
from tristill.stages.losses.target import ComputedTargets, LogitsTarget, Rows
from tristill.stages.models.checkpoint import load_model
from tristill.stages.models.description import TOKENIZER_NAME
from tristill.stages.models.language_model import LanguageModel


@dataclass(frozen=True)
class Ensemble:
    """The teachers beside the run's own. shares: of all of them, the run's own first, summing to one."""

    others: tuple[LanguageModel, ...]
    shares: tuple[float, ...]


ALONE = Ensemble((), (1.0,))
"""The run's own teacher and no other."""


def load_ensemble(config: DumpConfig, data_folder: Path, corpus: TokenizedCorpus, device: torch.device) -> Ensemble:
    """The teachers that the config names; refuses one whose ids are not those of the corpus."""
    others = []
    for member in config.ensemble:
        model = load_model(member.path)
        require_same_tokenizer(
            member.path / TOKENIZER_NAME,
            data_folder / TOKENIZER_NAME,
            "cache.ensemble",
            "distributions are mixed id by id: give a teacher of this tokenizer",
        )
        if model.vocab_size != corpus.vocab_size:
            raise CheckpointError(
                f"cache.ensemble: {member.path}: found {model.vocab_size} output entries, expected "
                f"{corpus.vocab_size}, one for each id of {data_folder / TOKENIZER_NAME}; give a teacher whose "
                "vocabulary is not padded"
            )
        others.append(model.to(device).eval())
    return Ensemble(tuple(others), config.shares)


@dataclass(frozen=True)
class TeacherMixture:
    """Targets of several teachers at the same positions: log sum_k share_k softmax(z_k) takes the place of logits."""

    parts: tuple[ComputedTargets, ...]
    shares: tuple[float, ...]

    def chunk(self, rows: Rows, dtype: torch.dtype = torch.float32) -> LogitsTarget:
        """At temperature 1, so that p_tau is proportional to the mixture to the power 1 / tau."""
        return LogitsTarget(log_mixture((part.chunk(rows, dtype).log_probs(1.0) for part in self.parts), self.shares))
