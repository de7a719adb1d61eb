"""Web addresses in messages, without what may be secret: users, passwords, queries, fragments, tokens."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

_SCHEME = r"[a-z][a-z0-9+.-]+:/+"  # one slash is what `pathlib` leaves of two; one letter is a drive
_SECRET = re.compile(
    rf"{_SCHEME}[^\s'\"<>`]*|\bdata:[\w.+-]*[/;,][^\s'\"<>`]*|\b(?-i:hf_)[a-z0-9]{{20,}}|(?<=\bBearer )\S+",
    re.IGNORECASE,
)
# The user and the query of an address without its scheme.
_BARE = re.compile(r"[^\s'\"<>`@:/\\]+:[^\s'\"<>`@:/\\]+@(?=[\w\[])|\?[\w.%~-]+=[^\s'\"<>`]*")
_WHOLE = re.compile(rf"\s*({_SCHEME}|data:)", re.IGNORECASE)
_CLIENTS = ("httpx", "httpcore", "huggingface_hub")
_LONGEST = 200  # characters


def redacted(text: Any) -> str:
    """Return `text` without its secrets: an address keeps scheme, host and path, a `data:` string nothing."""
    text = str(text)
    if _WHOLE.match(text) and "\n" not in text.strip():  # all of it is one address, whatever blanks are in it
        text = _without_secrets(text.strip())
    return _BARE.sub("", _SECRET.sub(lambda found: _without_secrets(found[0]), text))


def shown(source: Any) -> str:
    """Return a path, an address or a name for a message: redacted, and no longer than a line or two."""
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
    """ValueError if the name of a model is a web address, which may hold a password and is no name on the Hub."""
    if isinstance(name, str) and _WHOLE.match(name) and not os.path.exists(name):
        raise ValueError(
            f"{what} is given as the address {shown(name)}; expected a folder or a Hub id such as organization/name "
            "(HF_ENDPOINT names another Hub, `token` or HF_TOKEN a login)."
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
        return f"{scheme}{separator}…"  # a password with a slash in it: what looks like a port is its beginning
    return f"{scheme}{separator}{host}{slash}{path}"


__all__ = ["redacted", "redacted_logs", "refuse_address", "shown"]
