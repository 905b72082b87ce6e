"""Arguments and options that several commands have, and the types of their values."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import click

from kms_jwks import errors, strictjson
from kms_jwks.algorithms import PRIVATE_MEMBERS

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"([0-9]{1,10})([smhdw]?)")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_LARGEST_INPUT = 2 * 1024 * 1024
"""Bytes that are read at most from a file or standard input."""

F = TypeVar("F", bound=Callable[..., Any])


# --- types of values --------------------------------------------------------------------------------------------------


class Duration(click.ParamType[int]):
    """Whole seconds, or a number with s, m, h, d or w."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return seconds."""
        if isinstance(value, int):
            return value
        match = _DURATION.fullmatch(str(value))
        if match is None:
            self.fail(f"{value!r} is not a duration: give seconds, or a number with s, m, h, d or w, like 24h", param)
        return int(match[1]) * _SECONDS[match[2] or "s"]


class Instant(click.ParamType[str]):
    """RFC 3339, a date (its midnight in UTC), or a duration from now."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return RFC 3339 in UTC."""
        text = str(value)
        match = _DURATION.fullmatch(text)
        from_now = match is not None and match[2] != ""
        found = datetime.now(UTC) + timedelta(seconds=DURATION.convert(text, param, ctx)) if from_now else _point(text)
        if found is None:
            self.fail(
                f"{text!r} is not a time: give 2026-12-31T23:00:00Z, 2026-12-31, or 30d (from now)",
                param,
            )
        return found.astimezone(UTC).isoformat().replace("+00:00", "Z")


class KeySpec(click.ParamType[dict[str, Any]]):
    """`NAME:ALG` or `NAME:ALG:BITS`."""

    name = "name:alg[:bits]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """Return the members of a key to create."""
        parts = str(value).split(":")
        if not 2 <= len(parts) <= 3 or not all(parts) or (len(parts) == 3 and not parts[2].isdigit()):
            self.fail(f"{value!r} is not NAME:ALG or NAME:ALG:BITS, such as default:ES256 or rsa:RS256:3072", param)
        spec: dict[str, Any] = {"name": parts[0], "alg": parts[1]}
        return spec if len(parts) == 2 else spec | {"rsa_bits": int(parts[2])}


DURATION = Duration()
INSTANT = Instant()
KEY_SPEC = KeySpec()


def _point(text: str) -> datetime | None:
    """A date or a full RFC 3339 time; None for anything else, such as a time without its offset from UTC."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    if _DATE.fullmatch(text):
        return found.replace(tzinfo=UTC)
    return found if found.tzinfo is not None else None


def content(value: str, what: str) -> str:
    """The value itself, the content of `@FILE`, or for `-` the content of standard input."""
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
    """The options that the command line sets."""
    return {name: value for name, value in options.items() if value is not None}


# --- arguments --------------------------------------------------------------------------------------------------------


def key_set_argument(function: F) -> F:
    """Add the argument KEY_SET."""
    return click.argument("key_set", metavar="KEY_SET")(function)


def key_arguments(function: F) -> F:
    """Add the arguments KEY_SET KEY."""
    return key_set_argument(click.argument("key", metavar="KEY")(function))


def version_arguments(function: F) -> F:
    """Add the arguments KEY_SET KEY VERSION."""
    return key_arguments(click.argument("version", metavar="VERSION")(function))


# --- asking before something is destroyed -----------------------------------------------------------------------------


def yes_option(function: F) -> F:
    """Add the option --yes (`sure`)."""
    return click.option("--yes", "-y", "sure", is_flag=True, help="Do not ask.")(function)


def confirm(question: str, *, sure: bool) -> None:
    """Ask, and abort unless the answer is yes. Raises UsageError without --yes where no terminal can answer."""
    if sure:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Standard input is not a terminal: give --yes.")
    click.confirm(question, abort=True, err=True)


def confirmed(question: str) -> Callable[[F], F]:
    """Add the option --yes, and ask `question`, formatted with the command's arguments, before the command runs."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def run(*args: Any, sure: bool, **options: Any) -> None:
            confirm(question.format(**options), sure=sure)
            function(*args, **options)

        return yes_option(run)  # type: ignore[return-value]

    return decorate


def dry_run_option(function: F) -> F:
    """Add the option --dry-run of revocations."""
    return click.option("--dry-run", is_flag=True, help="Say what would happen, and change nothing.")(function)


def break_glass_options(function: F) -> F:
    """Add --break-glass, --reason and --yes; the command gets `break_glass`, the reason to override an invariant with.

    The command gets None where the options are not used. Raises UsageError when one of the two comes without the other.
    """

    @functools.wraps(function)
    def run(*args: Any, break_glass: bool, reason: str | None, sure: bool, **options: Any) -> None:
        if break_glass != (reason is not None):
            raise click.UsageError("--break-glass and --reason go together.")
        if reason is not None:
            confirm("Override the invariant? Tokens may be rejected, and it stays on the version for ever.", sure=sure)
        function(*args, break_glass=reason, **options)

    because = click.option("--reason", help="Why; stays on the version for ever. Goes with --break-glass.")
    flag = click.option(
        "--break-glass", is_flag=True, help="Override the invariant in the way; needs the role break-glass."
    )
    return flag(because(yes_option(run)))  # type: ignore[return-value]


# --- keys that come from outside --------------------------------------------------------------------------------------


def refuse_private(jwk: Mapping[str, Any], pem: str = "") -> None:
    """Raise UsageError for a private key before it leaves this machine."""
    if "PRIVATE KEY-----" in pem or not {*PRIVATE_MEMBERS}.isdisjoint(jwk):
        raise click.UsageError(
            "That is a private key; nothing was sent. Its public half: openssl pkey -in FILE -pubout -out PUBLIC"
        )


# --- adopting a key pair ----------------------------------------------------------------------------------------------

_WITH_ADOPT = ("kid", "accept", "public_key")


def adopt_options(function: F) -> F:
    """Add the options --adopt, --kid, --accept and --public-key."""
    for option in (
        click.option(
            "--public-key",
            metavar="@FILE|-",
            help="Its public key, PEM or JWK, for a module that holds the private key alone. Needs --accept.",
        ),
        click.option(
            "--accept",
            is_flag=True,
            default=None,
            help="Adopt it although it is extractable, may do more than sign, or was not made in the module.",
        ),
        click.option("--kid", metavar="KID", help="The kid that verifiers know it by. [default: its thumbprint]"),
        click.option(
            "--adopt",
            metavar="LOCATOR",
            help="A key pair in the module: LABEL, id=HEX or pkcs11:…; in AWS KMS a key id, ARN or alias.",
        ),
    ):
        function = option(function)
    return function


def group_adopt(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The options with those of an adoption gathered under `adopt`, as the API has them. Raises UsageError."""
    rest = dict(fields)
    locator = rest.pop("adopt", None)
    details = {name: rest.pop(name) for name in _WITH_ADOPT if name in rest}
    if locator is None:
        if details:
            raise click.UsageError("--kid, --accept and --public-key go with --adopt.")
        return rest
    if "public_key" in details:
        text = content(details["public_key"], "--public-key")
        is_jwk = text.lstrip().startswith("{")
        details["public_key"] = json_object(text, "--public-key") if is_jwk else text
        refuse_private(details["public_key"] if is_jwk else {}, "" if is_jwk else text)
    return {**rest, "adopt": {"locator": locator, **details}}
