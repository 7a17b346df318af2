"""A few positions of a cache as a table for people."""

from pathlib import Path

from cache import CacheSpec, SplitName, open_cache
from cache.peek import PeekedPosition, peek
from cache.profiles.sampled import SampledProfile
from pipeline.results import text_table


def peek_text(folder: Path, split: SplitName, window: int, num_positions: int, num_top: int) -> str:
    """The first positions of one window: tokens, what the teacher thought of the label, and what it expected."""
    from stages.data.token_text import token_texts

    cache = open_cache(folder)
    try:
        positions = peek(cache, split, window, num_positions, num_top)
    finally:
        cache.close()
    ids = {token_id for seen in positions for token_id in (seen.input_id, seen.label_id, *(i for i, _ in seen.top))}
    texts = {token_id: _in_a_cell(text) for token_id, text in token_texts(cache.tokenizer_path, ids).items()}
    header = ["position", "input", "label", "entropy, nats", "p(label)", _title(cache.spec)]
    rows = [_row(seen, texts) for seen in positions]
    temperature = cache.spec.profile.temperature
    title = f"{split}, window {window} of {cache.num_windows(split):,}, at temperature {temperature:g}"
    return f"{title}\n\n{text_table([header, *rows])}"


def _title(spec: CacheSpec) -> str:
    if isinstance(spec.profile, SampledProfile):
        return f"share of {spec.profile.draws} draws"
    return "the teacher's largest"


def _row(seen: PeekedPosition, texts: dict[int, str]) -> list[str]:
    entropy = "-" if seen.entropy_nats is None else f"{seen.entropy_nats:.2f}"
    label = "-" if seen.label_probability is None else f"{seen.label_probability:.4f}"
    top = ", ".join(f"{texts[token_id]} {probability:.3f}" for token_id, probability in seen.top)
    return [str(seen.position), texts[seen.input_id], texts[seen.label_id], entropy, label, top]


def _in_a_cell(text: str) -> str:
    return text.replace("|", "\\|")
