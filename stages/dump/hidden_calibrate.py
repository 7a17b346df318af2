"""Before the first shard: how hidden states are kept, fitted and measured on the windows of a calibration."""

from tristill.cache.calibration import HiddenPoint
from tristill.stages.data.tokens import TokenWindows
from tristill.stages.dump.calibrate import Sample
from tristill.stages.dump.config import DumpConfig
from tristill.stages.dump.forward import sample_hidden
from tristill.stages.dump.hidden_fit import FittedHidden, HiddenSample, HiddenWindows, fit_hidden, measure_hidden
from tristill.stages.fidelity.measure import near_student
from tristill.stages.models.language_model import LanguageModel, State
from tristill.stages.progress import Progress, say, waiting


def calibrate_hidden(
    config: DumpConfig, teacher: LanguageModel, windows: TokenWindows, sample: Sample
) -> tuple[FittedHidden, tuple[HiddenPoint, ...]]:
    """The hidden states of config.hidden_layers as config.hidden keeps them, and what that costs, layer by layer."""
    found = hidden_sample(config, teacher, windows, sample)
    with waiting("calibration: transforms of hidden states"):
        fitted = fit_hidden(config.hidden, found)
        points = measure_hidden(fitted, found)
    for point in points:
        say(
            f"calibration: hidden states of layer {point.layer}: {point.bytes_per_position:.1f} bytes/position, "
            f"relative error {point.relative_error:.3g}, gradient off by {point.angle_deg:.1f} degrees"
        )
    return fitted, points


def hidden_sample(config: DumpConfig, teacher: LanguageModel, windows: TokenWindows, sample: Sample) -> HiddenSample:
    """Hidden states in the windows of the sample, which are forwarded again: only some dumps keep them."""
    wanted = [State(config.hidden.output, layer) for layer in config.hidden_layers]
    num_positions = (len(sample.fit.windows) + 2 * len(sample.measure.windows)) * windows.context_length
    with Progress("calibration: hidden states", num_positions, "positions") as progress:

        def states_of(model: LanguageModel, rows: list[int]) -> HiddenWindows:
            size, precision = config.batch_windows, config.precision
            return sample_hidden(model, windows, "train", rows, size, precision, wanted, progress.advance)

        fit, measure = states_of(teacher, sample.fit.windows), states_of(teacher, sample.measure.windows)
        student = states_of(near_student(teacher), sample.measure.windows)
    return HiddenSample(
        fit=fit,
        measure=measure,
        student=student,
        embedding_VD=teacher.embedding_weight.detach(),
        total_positions=sample.total_positions,
        query_width=teacher.widths.query,
    )
