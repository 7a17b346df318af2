"""Chats on disk and a tokenizer with a chat template, made on the spot."""

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PLAIN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FORGETFUL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_IF_LONG = "{{ 'L' if messages[1] and messages[1].content | length > 5 }}"
UNKNOWN_TEMPLATES = {
    "another token ends the last turn": FORGETFUL_TEMPLATE.replace(
        "<|im_end|>", "{{ '<|endoftext|>' if message.role == 'assistant' and loop.last else '<|im_end|>' }}"
    ),
    "what is before depends on the turn": _IF_LONG + FORGETFUL_TEMPLATE,
    "what is after depends on the turn": FORGETFUL_TEMPLATE + _IF_LONG,
    "nothing is said": PLAIN_TEMPLATE.replace("{{ message.content }}", "{{ loop.length }}"),
    "all is said twice": FORGETFUL_TEMPLATE.replace(
        "{{ message.content }}", "{{ message.content }} {{ message.content }}"
    )
    + _IF_LONG,
}
REASONING_TEMPLATE = """
{%- set ns = namespace(last_query=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = message.content.split('</think>')[0].split('<think>')[-1] if '</think>' in message.content %}
        {%- set answer = message.content.split('</think>')[-1].lstrip('\n') %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<think>\n' + (reasoning or '').strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- answer + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""  # Qwen3's form: a block of reasoning, empty or not, in the last turn, none in those before it
TOOL_TEMPLATE = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% endif %}{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{%- for call in message.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_WORDS = [
    "the",
    "moon",
    "met",
    "a",
    "fox",
    "near",
    "every",
    "old",
    "river",
    "and",
    "sang",
    "about",
    "cafés,",
    "🦊",
    "tails;",
    "42",
    "songs",
    "(or",
    "none)",
]

Chat = list[dict[str, str]]
HELLO: Chat = [
    {"role": "user", "content": "the fox"},
    {"role": "assistant", "content": "a caf\u00e9 \U0001f98a"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": " river "},
]


def make_tokenizer(folder: Path, template: str = PLAIN_TEMPLATE, vocab_size: int = 300) -> Path:
    """A folder of Hugging Face's: byte-level BPE with the special tokens of ChatML."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(_WORDS)] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def sentence(generator: random.Random, words: int) -> str:
    return " ".join(generator.choices(_WORDS, k=words))


def some_chats(count: int, user_words: int = 40, seed: int = 0) -> list[Chat]:
    """Of one or two turns; users talk much longer than the assistant."""
    generator = random.Random(seed)
    chats = []
    for number in range(count):
        chat = [{"role": "system", "content": f"Chat {number}."}]
        for _ in range(1 + number % 2):
            chat.append({"role": "user", "content": sentence(generator, generator.randint(1, 2 * user_words))})
            chat.append({"role": "assistant", "content": sentence(generator, generator.randint(1, 12))})
        chats.append(chat)
    return chats


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_settings(path: Path, tokenizer: Path, **changes: object) -> dict[str, object]:
    """What a data section says of chats in a file of records."""
    return {
        "source": {"kind": "records", "paths": [str(path)], "chat_column": "messages"},
        "tokenizer": {"kind": "file", "path": str(tokenizer)},
        "context_length": 16,
        "validation_fraction": 0.2,
        **changes,
    }
