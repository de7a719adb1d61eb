"""Redacts URLs in messages: users, passwords, queries, fragments and tokens may be secret."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

_SCHEME = r"[a-z][a-z0-9+.-]+:/+"  # `pathlib` collapses two slashes into one; a single letter is a drive
_REST = r"[^\s'\"<>`]*?(?=[;,]?(?:[\s'\"<>`]|$))"  # but for what ends a clause behind it
_SECRET = re.compile(
    rf"{_SCHEME}{_REST}|\bdata:[\w.+-]*[/;,][^\s'\"<>`]*|\b(?-i:hf_)[a-z0-9]{{20,}}|(?<=\bBearer )\S+",
    re.IGNORECASE,
)
# The user and the query of an address without its scheme.
_BARE = re.compile(r"[^\s'\"<>`@:/\\]+:[^\s'\"<>`@:/\\]+@(?=[\w\[])|\?[\w.%~-]+=" + _REST)
_WHOLE = re.compile(rf"\s*({_SCHEME}|data:[\w.+-]*[/;,])", re.IGNORECASE)
_CLIENTS = ("httpx", "httpcore", "huggingface_hub")
_LONGEST = 200  # characters


def redacted(text: Any) -> str:
    """Return `text` without its secrets: a URL keeps scheme, host and path, a `data:` string nothing."""
    text = str(text)
    if _WHOLE.match(text) and "\n" not in text.strip():  # the whole text is one URL, even with blanks in it
        text = _without_secrets(text.strip())
    return _BARE.sub("", _SECRET.sub(lambda found: _without_secrets(found[0]), text))


def shown(source: Any) -> str:
    """Return a path, URL or name for a message: redacted, and at most a line or two."""
    text = redacted(source)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


@contextlib.contextmanager
def redacted_logs() -> Iterator[None]:
    """Within, what the HTTP clients log of a request is redacted: they repeat its address, and those it leads to."""

    def redact(record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        return True

    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith(_CLIENTS)]
    for logger in loggers:
        logger.addFilter(redact)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(redact)


def refuse_address(name: Any, what: str = "The model") -> None:
    """ValueError if a model's name is a URL, which may contain a password and is not a Hub id."""
    if isinstance(name, str) and _WHOLE.match(name) and not os.path.exists(name):
        raise ValueError(
            f"{what} is given as the URL {shown(name)}; expected a folder or a Hub id such as organization/name "
            "(set HF_ENDPOINT for another Hub, `token` or HF_TOKEN to log in)."
        )


def _without_secrets(text: str) -> str:
    if text.lower().startswith("data:"):
        return "data:…"
    parts = re.match(r"([\w+.-]+)(?:(:/+)([^/\\?#]*)([/\\]?)([^?#;&]*))?", text)
    if parts is None or parts[2] is None:  # a token
        return "…"
    scheme, separator, authority, slash, path = parts.groups()
    rest = text[parts.start(3) :]
    host = authority.rpartition("@")[2]
    port = host.rpartition("]")[2].partition(":")[2]
    if "@" not in authority and port and ("@" in rest or not port.isdecimal()):
        return f"{scheme}{separator}…"  # a password that contains a slash: its beginning looks like a port
    return f"{scheme}{separator}{host}{slash}{path}"
