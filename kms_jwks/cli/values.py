"""The kinds of values that options take: durations, instants, keys to create, claims."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import click

from kms_jwks import errors, strictjson

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"([0-9]{1,10})([smhdw]?)")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_LARGEST_INPUT = 2 * 1024 * 1024
"""Bytes that are read from a file or standard input."""


class Duration(click.ParamType[int]):
    """Whole seconds, or a number with s, m, h, d or w."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Seconds."""
        if isinstance(value, int):
            return value
        match = _DURATION.fullmatch(str(value))
        if match is None:
            self.fail(f"{value!r} is no duration: whole seconds, or a number with s, m, h, d or w, such as 24h", param)
        return int(match[1]) * _SECONDS[match[2] or "s"]


class Instant(click.ParamType[str]):
    """RFC 3339, a date (its midnight in UTC), or a duration from now."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """RFC 3339 in UTC."""
        text = str(value)
        match = _DURATION.fullmatch(text)
        from_now = match is not None and match[2] != ""
        found = datetime.now(UTC) + timedelta(seconds=DURATION.convert(text, param, ctx)) if from_now else _point(text)
        if found is None:
            self.fail(f"{text!r} is no time: 2026-12-31T23:00:00Z, 2026-12-31, or from now on: 30d", param)
        return found.astimezone(UTC).isoformat().replace("+00:00", "Z")


class KeySpec(click.ParamType[dict[str, Any]]):
    """`NAME:ALG` or `NAME:ALG:BITS`."""

    name = "name:alg[:bits]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """The members of a key to create."""
        parts = str(value).split(":")
        if not 2 <= len(parts) <= 3 or not all(parts) or (len(parts) == 3 and not parts[2].isdigit()):
            self.fail(f"{value!r} is not NAME:ALG or NAME:ALG:BITS, such as default:ES256 or rsa:RS256:3072", param)
        spec: dict[str, Any] = {"name": parts[0], "alg": parts[1]}
        return spec if len(parts) == 2 else spec | {"rsa_bits": int(parts[2])}


DURATION = Duration()
INSTANT = Instant()
KEY_SPEC = KeySpec()


def _point(text: str) -> datetime | None:
    """A date or a full RFC 3339 time; None for anything else, such as a time that does not say where."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    if _DATE.fullmatch(text):
        return found.replace(tzinfo=UTC)
    return found if found.tzinfo is not None else None


def content(value: str, what: str) -> str:
    """A value itself, `@FILE`'s content, or with `-` what comes on standard input."""
    try:
        if value == "-":
            text = _decoded(sys.stdin.buffer)
        elif value.startswith("@"):
            with Path(value[1:]).open("rb") as file:
                text = _decoded(file)
        else:
            text = value
    except UnicodeDecodeError:
        raise click.UsageError(f"{what}: the text is not UTF-8.") from None
    except OSError as error:
        raise click.UsageError(f"{what}: {value[1:]} cannot be read: {error.strerror}.") from None
    if len(text) > _LARGEST_INPUT:
        raise click.UsageError(f"{what}: more than {_LARGEST_INPUT} bytes are not read.")
    return text


def _decoded(file: BinaryIO) -> str:
    return file.read(_LARGEST_INPUT + 1).decode("utf-8")


def json_object(value: str, what: str) -> dict[str, Any]:
    """One JSON object from the value, `@FILE` or `-`."""
    text = content(value, what)
    try:
        return strictjson.loads_object(text.encode("utf-8", "surrogatepass"))
    except errors.MalformedBody as error:
        raise click.UsageError(f"{what}: {error.detail}") from None


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were used."""
    return {name: value for name, value in options.items() if value is not None}
