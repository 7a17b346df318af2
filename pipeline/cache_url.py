"""A cache as an argument: its folder, or its URL, of which a folder for the time of the command is the copy."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from tristill.cache.remote import keep_copy
from tristill.cache.store import check_url
from tristill.stages.progress import say

_LOCAL_BYTES = 2**32
"""Of shards kept at once: a command reads a cache once, or a few of its chunks."""


class CacheFolder(click.ParamType[Path]):
    """A folder as it is given; for a URL a temporary one, removed at the end."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """See click."""
        text = str(value)
        if "://" not in text:
            return Path(text)
        try:
            url = check_url(text)
        except ValueError as exc:
            self.fail(f"{text.rsplit('@', maxsplit=1)[-1].split('?', maxsplit=1)[0]}: {exc}", param, ctx)
        context = ctx or click.get_current_context()
        folder = Path(context.with_resource(TemporaryDirectory(prefix="tristill-")))
        keep_copy(folder, url, _LOCAL_BYTES, say)
        return folder
