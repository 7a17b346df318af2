"""Credentials in text: masked in what is written or printed, refused in what is kept."""

import re
from typing import Any

NO_CREDENTIALS = (
    "a URL with a user, password or signature, a token or a key would be written into records; give credentials in the "
    "environment, such as HF_TOKEN, AWS_ACCESS_KEY_ID or FSSPEC_S3_KEY, or name a profile of them (docs/remote.md)"
)
_USER = re.compile(r"(\w://)(?:[^\s'\"/?#@]*|[^\s'\"/?#:@]*:(?!\d+/)[^\s'\"]*)@")
_QUERY = re.compile(r"(\w://[^\s'\"<>?]*\?)[^\s'\"<>]*[^\s'\"<>.,:;)\]]")
_PARAMETER = re.compile(
    r"([?&](?:x-(?:amz|goog|ms)-[\w-]+|signature|sig|awsaccesskeyid|googleaccessid|key|api_?key|\w*token|\w*secret\w*"
    r"|\w*passw(?:or)?d|credential\w*)=)[^\s&'\"<>]+",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"\b(hf_|gh[a-z]_|github_pat_|AKIA|ASIA|sk-)[A-Za-z0-9_-]{12,}")
_KEY = re.compile(
    r"(^|_)(token|secret|pass(wd|word|phrase)?|pwd|credentials?|authorization|auth|cookies?|bearer|sas|headers?"
    r"|connection_string|(api|access|account|private|secret|shared|storage|encryption)_?key(_id)?)$|^key$|_secret_",
)
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")
_PASSWORD = re.compile(r"://[^/?#\s@]*:[^\s@]+@")
_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def masked(text: str) -> str:
    """The text without users, passwords and queries of URLs, and without what looks like a token."""
    text = _USER.sub(r"\1...@", text)
    text = _QUERY.sub(r"\1...", text)
    text = _PARAMETER.sub(r"\1...", text)
    return _TOKEN.sub(r"\1...", text)


def credentials_in(value: Any, path: str = "") -> list[str]:
    """Dotted keys below which a credential stands: by their own names, or by what is in a URL there.

    True, False and None are none: `token = true` names the login of this machine.
    """
    if isinstance(value, dict):
        return [found for key, part in value.items() for found in _below(str(key), part, f"{path}.{key}".lstrip("."))]
    if isinstance(value, list | tuple):
        return [found for place, part in enumerate(value) for found in credentials_in(part, f"{path}.{place}")]
    is_secret = isinstance(value, str) and masked(value) != value
    return [path] if is_secret else []


def holds_password(url: str) -> bool:
    """Whether a URL has a password, or a parameter that is a credential; one from the environment, $NAME, is none."""
    url = _VARIABLE.sub("", url)
    return bool(_PASSWORD.search(url) or _PARAMETER.search(url))


def _below(key: str, value: Any, path: str) -> list[str]:
    name = _CAPITAL.sub("_", key).lower().replace("-", "_")
    holds_text = isinstance(value, str | int | float | dict | list | tuple) and not isinstance(value, bool) and value
    if _KEY.search(name) and holds_text:
        return [path]
    return credentials_in(value, path)
