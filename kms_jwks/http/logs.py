"""Logging, set up in one place: structlog for us, the standard library's for the rest, one redaction for both.

Nothing that looks like an API token, a JWT, a signature of that length or a PIN reaches a log, whoever wrote the line.
"""

from __future__ import annotations

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
    """`value` with what looks secret replaced, inside collections too."""
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
    """The structlog processor that masks; the last one before the line is written."""
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


_OURS = frozenset({"timestamp", "level", "logger", "method", "route", "status", "ms"})
"""Members that no caller writes."""


@lru_cache(maxsize=1024)
def _is_secret(name: str) -> bool:
    return _SECRET_NAME.match(name) is not None


def _severity(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    event["level"] = "error" if name == "exception" else name
    return event


def _json(logger: WrappedLogger, name: str, event: EventDict) -> str:
    return msgspec.json.encode(event).decode()


_configured: dict[str, object] = {}


def configure(level: Literal["debug", "info", "warning", "error"], style: Literal["json", "console"]) -> None:
    """Send every log line of this process to standard error, as JSON or for people. Idempotent."""
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
        # The console renderer prints tracebacks itself, after them nothing could be masked; so they are text before.
        renderer = [redact, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
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
    # What others log at level info is of use to their authors.
    for name in ("sqlalchemy", "alembic", "botocore", "urllib3", "werkzeug"):
        logging.getLogger(name).setLevel(max(threshold, logging.WARNING))
    logging.captureWarnings(capture=True)
    _configured.update(level=level, style=style)


def _strip(logger: WrappedLogger, name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """ProcessorFormatter's own members out, the record's exception in."""
    record: logging.LogRecord = event.pop("_record")
    event.pop("_from_structlog", None)
    if record.exc_info:
        event["exc_info"] = record.exc_info
    return event
