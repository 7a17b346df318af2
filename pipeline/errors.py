"""What can go wrong between the user and a step.

PipelineError
    ConfigError         a config that does not parse or breaks its bounds   (exit code 2, as all usage errors)
    MissingInputError   a step's input is not there; says which command makes it
    StaleError          an artefact was made with other settings or inputs; names them
    OutsideError        the config of a run folder names what lies outside of it, and nobody has said yes to that
    BusyError           another process works on the same folder
    MovedError          an input changed while it was read
    ChildError          a step that `run` started has failed; it has said why itself
    MissingPackageError an extra of this project is not installed
    StudyError          the Optuna study of a sweep cannot be read or written
    RepairError         what of a cache could not be repaired, and what that takes
"""


class PipelineError(Exception):
    """Base of all errors of this package; its text says what was found, expected, where, and what to do."""

    exit_code = 1


class ConfigError(PipelineError):
    """The config does not parse or breaks its bounds."""

    exit_code = 2


class MissingInputError(PipelineError):
    """The input of a step is not there."""


class StaleError(PipelineError):
    """An artefact on disk was made with other settings or inputs."""


class OutsideError(PipelineError):
    """A run folder's own config, or a link in the folder, leads out of it."""


class BusyError(PipelineError):
    """Another process works on the same artefact."""


class MovedError(PipelineError):
    """An input is not what it was when it was read."""


class MissingPackageError(PipelineError):
    """What a command needs is not installed."""


class StudyError(PipelineError):
    """The study of a sweep cannot be read or written."""


class RepairError(PipelineError):
    """Some files of a cache could not be repaired; says what that takes."""


class ChildError(PipelineError):
    """A step failed in a process of its own; carries its exit code."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code
