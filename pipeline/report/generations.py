"""What teacher and students write after the same words."""

from collections.abc import Sequence
from pathlib import Path

from tristill.cache import CacheError, open_cache
from tristill.cache.layout import TOKENIZER_NAME
from tristill.cache.manifest import cache_fingerprint
from tristill.pipeline.report.run import Model, Run
from tristill.pipeline.report.section import Block, Continuation, Missing, Prompt, Section, Text
from tristill.stages.errors import StageError
from tristill.stages.progress import waiting

NUM_PROMPTS = 3
_PROMPT_TOKENS = 40
_NEW_TOKENS = 48
_TEMPERATURE, _TOP_P, _SEED = 0.8, 0.95, 0
_MOST_STUDENTS = 3


def generations_section(run: Run) -> Section:
    """The same prompts of the validation split for every model, one beside the other."""
    title = "What they write"
    models = [run.teacher, *run.shown[:_MOST_STUDENTS]]
    here = [model for model in models if model.has_weights]
    blocks: list[Block] = []
    try:
        windows, tokenizer = _held_out(run)
    except (StageError, CacheError) as exc:
        return Section("generations", title, [Missing(str(exc))])
    if not here or not windows:
        return Section("generations", title, [Missing("No model is there to write; run tristill run.")])
    length = min(_PROMPT_TOKENS, len(windows[0]) // 2)
    prompts = [window[:length] for window in windows]
    written: dict[str, list[str]] = {}
    for model in here:
        try:
            with waiting(f"report: {model.name} writes"):
                written[model.name] = _continued(model, prompts, min(_NEW_TOKENS, len(windows[0]) - length - 2))
        except (StageError, OSError) as exc:
            blocks.append(Missing(f"{model.name} wrote nothing: {exc}"))
    blocks.insert(
        0,
        Text(
            f"{length} held-out tokens, then what each model adds, drawn at temperature {_TEMPERATURE:g} from the top "
            f"{_TOP_P:.0%} of its probability with the same random numbers for all."
        ),
    )
    absent = [model.name for model in models if not model.has_weights]
    if absent:
        blocks.append(Missing(f"Not there to write: {', '.join(absent)}; run tristill run --until distill."))
    texts = _texts(tokenizer, prompts)
    for place, text in enumerate(texts):
        found = [
            Continuation(model.name, model.entry.color, written[model.name][place])
            for model in here
            if model.name in written
        ]
        if found:
            blocks.append(Prompt(text, found))
    if others := [model.name for model in run.students if model not in models]:
        blocks.append(Text(f"Left out: {', '.join(others)}; tristill generate asks any of them."))
    return Section("generations", title, blocks)


def _continued(model: Model, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[str]:
    from tristill.stages.generate.text import continuations

    return continuations(
        model.folder, prompts, max_tokens=max_tokens, temperature=_TEMPERATURE, top_p=_TOP_P, seed=_SEED
    )


def _texts(tokenizer: Path, prompts: Sequence[Sequence[int]]) -> list[str]:
    from tristill.stages.data.tokenizer import load_tokenizer

    found = load_tokenizer(tokenizer)
    return [found.decode(list(prompt)) for prompt in prompts]


def _held_out(run: Run) -> tuple[list[list[int]], Path]:
    """Windows of the validation split, of the tokens or of the cache, and their tokenizer; none if neither is there."""
    if (run.workspace.data / "validation.npy").is_file():
        from tristill.stages.data.tokenized import load_corpus, split_windows

        windows = split_windows(run.workspace.data, "validation")
        end_of_text_id = load_corpus(run.workspace.data).end_of_text_id
        found = [windows.read([place])[0].tolist() for place in _places(windows.num_windows)]
        return _without_ends(found, end_of_text_id), run.workspace.data / TOKENIZER_NAME
    if cache_fingerprint(run.workspace.cache) is None:
        return [], run.workspace.cache
    cache = open_cache(run.workspace.cache)
    try:
        if "validation" not in cache.spec.splits:
            return [], cache.tokenizer_path
        places = _places(cache.num_windows("validation"))
        found = [cache.window("validation", place).input_ids[0].tolist() for place in places]
        return _without_ends(found, cache.spec.end_of_text_id), cache.tokenizer_path
    finally:
        cache.close()


def _places(num_windows: int) -> list[int]:
    """A few more than are shown, spread evenly."""
    wanted = 3 * NUM_PROMPTS
    return sorted({place * num_windows // wanted for place in range(wanted)})


def _without_ends(windows: Sequence[list[int]], end_of_text_id: int) -> list[list[int]]:
    """Spread windows whose beginning lies within one document, as far as there are."""
    whole = [window for window in windows if end_of_text_id not in window[:_PROMPT_TOKENS]] or list(windows)
    stride = max(1, len(whole) // NUM_PROMPTS)
    return whole[::stride][:NUM_PROMPTS]
