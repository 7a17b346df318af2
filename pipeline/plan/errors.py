"""What can go wrong while a plan is made."""

from tristill.pipeline.errors import PipelineError


class PlanError(PipelineError):
    """A step could not be rehearsed, or the size of the corpus cannot be told beforehand."""
