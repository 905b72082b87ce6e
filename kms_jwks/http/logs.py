"""Logging, configured in one place: structlog for this project, the standard library's for the rest.

Both go through the same processors: text that looks like an API token, a JWT, a signature or a PIN is masked, and
control characters reach no terminal raw.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger

MASK = "[redacted]"

_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0, DEL and C1, which steer a terminal; line separators and bidi controls, which change what a reader sees; lone
surrogates, which UTF-8 cannot hold."""
_TEXT_BLOCKS = frozenset({"exception", "stack"})
"""Members of a line that are tracebacks: their line ends and tabs stay."""

_SECRET_TEXT = re.compile(
    r"kj_[A-Za-z0-9_-]+"  # API tokens
    r"|eyJ[A-Za-z0-9_=-]*(?:\.[A-Za-z0-9_=-]*)*"  # JWTs, JWSs and their halves
    r"|(?i:(?<=bearer )[^\s'\",]+)"
    r"|(?i:(?<=pin=)[^\s'\",]+|(?<=pin: )[^\s'\",]+|(?<=pin-value=)[^\s'\",;&]+)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*"
    r"|(?<![A-Za-z0-9_-])[A-Za-z0-9_-]{80,}(?![A-Za-z0-9_-])",  # a signature: 64 bytes or more in base64url
    re.DOTALL,
)
_SECRET_NAME = re.compile(
    r"(?i)^(?:.*[_-])?(?:pin|token|secret|password|passwd|authorization|credentials?|claims|payload|signature|body"
    r"|private_key)$"
)


def mask(value: object) -> object:
    """`value` with everything masked that looks secret, inside collections too."""
    if isinstance(value, str):
        return _SECRET_TEXT.sub(MASK, value)
    if isinstance(value, Mapping):
        return {k: MASK if isinstance(k, str) and v and _is_secret(k) else mask(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [mask(item) for item in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return MASK
    if value is None or isinstance(value, bool | int | float):
        return value
    return _SECRET_TEXT.sub(MASK, str(value))


def redact(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    """The structlog processor that masks; it runs before the renderer."""
    for key, value in event.items():
        if key in _OURS or value is None:
            continue
        kind = type(value)
        if _is_secret(key):
            if value:
                event[key] = MASK
        elif kind is str:
            if _SECRET_TEXT.search(value):
                event[key] = _SECRET_TEXT.sub(MASK, value)
        elif not (kind is int or kind is float or kind is bool or key.startswith("_")):
            event[key] = mask(value)
    return event


_OURS = frozenset(
    {"timestamp", "level", "logger", "method", "route", "status", "ms", "client", "token_id", "code", "backend"}
)
"""Members whose values never come from a request's text."""


@lru_cache(maxsize=1024)
def _is_secret(name: str) -> bool:
    return _SECRET_NAME.match(name) is not None


def _severity(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    event["level"] = "error" if name == "exception" else name
    return event


def _json(logger: WrappedLogger, name: str, event: EventDict) -> str:
    """One JSON object in which every steering character is a `\\u` escape. JSON itself escapes C0 alone."""
    try:
        line = msgspec.json.encode(event).decode()
    except UnicodeEncodeError:  # a lone surrogate
        line = json.dumps(event, default=str)
    if line.isascii() and "\x7f" not in line:
        return line
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def printable(text: str, *, keep: str = "") -> str:
    """`text` with every steering character but those in `keep` as a visible escape such as `\\x1b`."""
    return _STEERING.sub(lambda found: found[0] if found[0] in keep else repr(found[0])[1:-1], text)


def _printable(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    """The processor before the console renderer, which prints strings as they are."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = printable(value, keep="\n\t" if key in _TEXT_BLOCKS else "")
    return event


_configured: dict[str, object] = {}


def configure(level: Literal["debug", "info", "warning", "error"], style: Literal["json", "console"]) -> None:
    """Send every log line of this process to standard error, as JSON or as text for people. Idempotent."""
    if _configured == {"level": level, "style": style}:
        return
    threshold = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _severity,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    tracebacks: list[Processor] = [structlog.processors.format_exc_info]
    renderer: list[Processor]
    if style == "json":
        renderer = [redact, _json]
    else:
        # Tracebacks are formatted before: the console renderer would print them after the masking.
        renderer = [redact, _printable, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    structlog.configure(
        processors=[*shared, *tracebacks, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[_strip, *tracebacks, *renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(threshold)
    # These libraries log much at level info that helps only their own developers.
    for name in ("sqlalchemy", "alembic", "botocore", "urllib3", "werkzeug"):
        logging.getLogger(name).setLevel(max(threshold, logging.WARNING))
    logging.captureWarnings(capture=True)
    _configured.update(level=level, style=style)


def configure_for_command() -> None:
    """Send warnings to standard error, redacted, as text; nothing where the log is configured already.

    For commands on the node, whose answer goes to standard output. A service that they start calls `configure`.
    """
    if structlog.is_configured():
        return
    structlog.configure(
        processors=[
            _severity,
            structlog.processors.format_exc_info,
            redact,
            _printable,
            structlog.dev.ConsoleRenderer(colors=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )


def _strip(logger: WrappedLogger, name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Remove ProcessorFormatter's own members and add the record's exception."""
    record: logging.LogRecord = event.pop("_record")
    event.pop("_from_structlog", None)
    if record.exc_info:
        event["exc_info"] = record.exc_info
    return event
