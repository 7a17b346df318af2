"""What can go wrong while a step computes, by the user's doing.

StageError
    CorpusError         text that cannot be read, is empty or too short
    TokenizerError      a tokenizer that cannot be read or does not fit
    CheckpointError     a model or training state that cannot be read or does not fit
    DivergedError       a training whose loss is no longer finite
    TargetsError        the signals that the losses need are not to be had
    PromptError         a prompt, or a length of text, that a model has no room for
    ExportError         a model that a format cannot hold, or an export that does not compute what its model does
    RanksError          the processes that torchrun announces cannot be joined
    LostRankError       another of them has ended without a word
    OtherRankError      another of them has failed and has said why; carries its exit code
"""


class StageError(Exception):
    """Base of all errors of this package; its text says what was found, expected, where, and what to do."""


class CorpusError(StageError):
    """The corpus cannot be read, is empty, or is too short."""


class TokenizerError(StageError):
    """The tokenizer cannot be read or does not fit."""


class CheckpointError(StageError):
    """A model folder or training checkpoint cannot be read or does not fit."""


class DivergedError(StageError):
    """The loss or its gradient is no longer finite."""


class TargetsError(StageError):
    """The signals that the losses need are not to be had."""


class PromptError(StageError):
    """A prompt, or the text that shall follow it, is longer than the model's context."""


class ExportError(StageError):
    """A format cannot hold the model, or what was written does not compute what the model does."""


class RanksError(StageError):
    """This process cannot join those that work on a step together."""


class LostRankError(StageError):
    """A process that works on the same step has ended in the middle of it."""


class OtherRankError(StageError):
    """A process that works on the same step has failed, and has said why itself."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code
