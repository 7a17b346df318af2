"""Which tokens are the assistant's: added tokens, normalizers, marks and ends of turns of every kind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import HELLO, MARKED_TEMPLATE, PLAIN_TEMPLATE, Chat, make_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer

from tristill.stages.data.chat import ChatTemplate, assistant_tokens, special_ids

pytest.importorskip("transformers", reason="the extra `hf` is not installed")


def added(folder: Path, *tokens: AddedToken, normalizer: Normalizer | None = None) -> Path:
    """The tokenizer in a folder with further tokens."""
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.normalizer = normalizer or tokenizer.normalizer
    tokenizer.add_tokens(list(tokens))
    tokenizer.save(str(path))
    return folder


def pieces_of(folder: Path, chat: Chat) -> tuple[list[str], int, list[str]]:
    """(texts of the runs of tokens that count, bytes of text of these, ends of turns) with the tokenizer in a folder."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    document = ChatTemplate(folder).document(chat, "a test")
    encoding = tokenizer.encode(document.text, add_special_tokens=False)
    ids, mask, num_bytes = assistant_tokens(document, encoding, special_ids(tokenizer), 0)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    runs = zip(edges[::2], edges[1::2], strict=True)
    texts = [tokenizer.decode(ids[first:end], skip_special_tokens=False) for first, end in runs]
    return texts, num_bytes, [document.text[first:end] for first, end in document.ends]


PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("strips", [{}, {"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True}])
@pytest.mark.parametrize("template", [PHI, PHI.replace("m.content", "m.content | trim")])
def test_added_tokens_of_every_kind_leave_the_turns_and_their_ends_where_they_are(
    tmp_path: Path, strips: dict[str, bool], special: bool, template: str
) -> None:
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    tokens = [AddedToken(name, special=special, normalized=False, **strips) for name in names]
    folder = added(make_tokenizer(tmp_path, template), *tokens)
    two = [HELLO[0], {"role": "assistant", "content": "yes"}, HELLO[2], {"role": "assistant", "content": "no"}]
    assert pieces_of(folder, two) == (["yes<|end|>", "no<|end|>"], 5, ["<|end|>", "<|end|>"])
    texts, num_bytes, _ = pieces_of(folder, [HELLO[0], {"role": "assistant", "content": "   x"}])
    keeps = "trim" not in template and not strips.get("rstrip")
    assert texts == ["   x<|end|>" if keeps else "x<|end|>"]
    assert num_bytes == (4 if keeps else 1), "white space that a token of the prompt takes is not learnt"


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.NFKD(), normalizers.Lowercase()])
def test_a_normalizer_leaves_the_turns_where_they_are(tmp_path: Path, normalizer: Normalizer) -> None:
    folder = added(make_tokenizer(tmp_path), normalizer=normalizer)
    chat = [{**message, "content": f"Cafe\u0301 {message['content']}\ufb01 E\u0301"} for message in HELLO]
    texts, num_bytes, _ = pieces_of(folder, chat)
    said = [message["content"] for message in chat if message["role"] == "assistant"]
    assert texts == [normalizer.normalize_str(content) + "<|im_end|>" for content in said]
    assert num_bytes == sum(len(content.encode()) for content in said)


def test_a_token_that_begins_the_next_turn_is_not_the_end_of_this_one(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path, PLAIN_TEMPLATE.replace("<|im_end|>", ""))
    assert pieces_of(folder, HELLO)[0] == ["a caf\u00e9 \U0001f98a\n", " river \n<|endoftext|>"]
    marked = make_tokenizer(tmp_path / "marked", MARKED_TEMPLATE.replace("<|im_end|>", ""))
    assert pieces_of(marked, HELLO)[0] == ["a caf\u00e9 \U0001f98a", " river <|endoftext|>"]


def test_marks_in_a_macro_or_a_variable_are_found_where_their_text_is(tmp_path: Path) -> None:
    shown = "{% generation %}{{ message.content }}{% endgeneration %}"
    assert shown in MARKED_TEMPLATE
    moved = {
        "macro": "{% macro said(message) %}"
        + shown
        + "{% endmacro %}"
        + MARKED_TEMPLATE.replace(shown, "{{ said(message) }}"),
        "variable": MARKED_TEMPLATE.replace(shown, "{% set said %}" + shown + "{% endset %}{{ said }}"),
        "controls": MARKED_TEMPLATE.replace(shown, shown.replace("{% ", "\n  {%- ").replace(" %}", " -%}\n ")),
    }
    expected = pieces_of(make_tokenizer(tmp_path / "plain", MARKED_TEMPLATE), HELLO)
    assert expected[0] == ["a caf\u00e9 \U0001f98a<|im_end|>", " river <|im_end|>"]
    for name, template in moved.items():
        assert pieces_of(make_tokenizer(tmp_path / name, template), HELLO) == expected


def test_a_template_that_opens_reasoning_in_its_prompt_shows_turns_without_any(tmp_path: Path) -> None:
    """DeepSeek-R1's: the reasoning of turns is dropped, and the generation prompt opens a new one."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>{{ (m.content or '').split('</think>')[-1] }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}<|call|>{% endfor %}"
        "{% if m.content %}<|im_end|>{% endif %}{% else %}{{ m.role + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
    )
    call = AddedToken("<|call|>", special=False, normalized=False)
    folder = added(make_tokenizer(tmp_path, template), call)
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    chat: Any = [HELLO[0], {"role": "assistant", "content": None, "tool_calls": calls}, HELLO[2], HELLO[3]]
    texts, _, ends = pieces_of(folder, chat)
    assert texts == ['f{"a": 1}<|call|>', " river <|im_end|>"]
    assert ends == ["<|call|>", "<|im_end|>"]


@pytest.mark.parametrize("scheme", ["normalizer", "first", "always"])
def test_signs_for_a_space_before_a_text_count_with_the_turn_that_they_begin(tmp_path: Path, scheme: str) -> None:
    """As Llama 2's: a sign that stands for no character comes after every added token."""
    begins = PLAIN_TEMPLATE.replace("\n{{ message.content", "<|im_start|>{{ message.content")
    folder = make_tokenizer(tmp_path, begins.replace("assistant\n", "assistant<|im_start|>"))
    vocab = {sign: n for n, sign in enumerate(["\u2581", *(f"<0x{byte:02X}>" for byte in range(256)), "yes"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    document = ChatTemplate(folder).document([HELLO[0], {"role": "assistant", "content": "\U0001f98a e"}], "a test")
    encoding = tokenizer.encode(document.text, add_special_tokens=False)
    ids, mask, num_bytes = assistant_tokens(document, encoding, special_ids(tokenizer), 0)
    said = [tokenizer.id_to_token(token_id) for token_id, counts in zip(ids, mask, strict=True) if counts]
    sign = [] if scheme == "first" else ["\u2581"]
    assert said == [*sign, "<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>", "\u2581", "<0x65>", "<|im_end|>"]
    assert num_bytes == 6
