"""Strict JSON: RFC 8259 in UTF-8 within I-JSON (RFC 7493); other input is refused with the reason.

msgspec reads it in one pass of C. Where that does not show that the text complies, the standard library reads it again,
with hooks that see every member and number, and decides. The number of structural characters is bounded, so a mebibyte
takes at most 15 ms whatever is in it. This module does not know what the values mean.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable
from typing import NoReturn

import msgspec

from kms_jwks.errors import MalformedBody

MAX_DEPTH = 32
"""The default of `max_depth`: nested arrays and objects that `loads` reads."""
MAX_STRUCTURE = 20_000
"""Structural characters, the six of RFC 8259 §2, in one text; those within strings count too."""
MAX_INTEGER_DIGITS = 308
"""No double holds an integer of more digits. Beyond Python's own limit (4300) int() would raise a bare ValueError."""

_WHITESPACE = " \t\n\r"
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise MalformedBody(f"The name {_short(name)} appears twice in one object.")
            seen.add(name)
    return members


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise MalformedBody(f"An integer has {len(digits)} characters; {MAX_INTEGER_DIGITS} are read at most.")
    return int(digits)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise MalformedBody("A number is too large for a double (RFC 7493 §2.2).")
    return value


def _constant(name: str) -> NoReturn:
    raise MalformedBody(f"{name} is not JSON.")


_raw_decode = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
).raw_decode
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode
_encode_slowly = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode

_STRUCTURE = b"[]{}:,"
_TO_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_MANY_DIGITS = b"0" * 20
"""msgspec takes integers of any length, and is slow with such fractions."""


def loads(data: bytes, *, max_depth: int = MAX_DEPTH) -> object:
    """Read one JSON value from UTF-8 bytes.

    Raises `MalformedBody` for bytes that are not UTF-8 or begin with a byte order mark, malformed or truncated JSON,
    anything after the value, a name twice in one object, NaN and infinities (written out or by overflow), integers of
    more than `MAX_INTEGER_DIGITS` digits, lone surrogates, more than `max_depth` arrays and objects within each other,
    and more than `MAX_STRUCTURE` structural characters. The detail never repeats more than 40 characters of the input.
    """
    if len(data) - len(data.translate(None, _STRUCTURE)) > MAX_STRUCTURE:
        raise MalformedBody(
            f"The JSON has more than {MAX_STRUCTURE} structural characters (brackets, braces, colons and commas).",
            next_step="Send less in one request.",
        )
    # Of members of one name msgspec keeps the last alone. Each member has one colon, so a value that has as many colons
    # as its text lost none. An escaped colon (\u003a) would make up for a lost one.
    value, certain = None, b"\\u003" not in data and _MANY_DIGITS not in data.translate(_TO_ZEROS)
    if certain:
        try:
            value = _decode(data)
            certain = _encode(value).count(b":") == data.count(b":")
        except (msgspec.MsgspecError, ValueError, RecursionError):
            certain = False
    if not certain:
        value = _read_again(data, max_depth)
    if data.count(b"[") + data.count(b"{") > max_depth and _deeper_than(value, max_depth):
        raise _too_deep(max_depth)
    return value


def _read_again(data: bytes, max_depth: int) -> object:
    """What `loads` reads, by the standard library: its hooks see each member and number, and it says what is wrong."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedBody(f"The JSON is not UTF-8: byte {error.start} does not begin a character.") from None
    start = _skip(text) if text[:1] in _BEFORE_VALUE else 0
    try:
        value, end = _raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise MalformedBody(_syntax(error, text)) from None
    except RecursionError:
        raise _too_deep(max_depth) from None
    if end != len(text) and text[end:].strip(_WHITESPACE):
        raise MalformedBody(f"Something follows the JSON value at character {end}.")
    if b"\\u" in data and _SURROGATE_ESCAPE.search(data):
        _refuse_lone_surrogates(value)
    return value


def loads_object(data: bytes, *, max_depth: int = MAX_DEPTH) -> dict[str, object]:
    """`loads`, and the value must be an object."""
    value = loads(data, max_depth=max_depth)
    if type(value) is not dict:
        raise MalformedBody(f"The JSON is {_kind(value)} where an object is expected.")
    return value


def dumps(value: object) -> bytes:
    """Write a value of JSON's types as compact UTF-8; only what must be escaped is. Members keep their order.

    Raises ValueError for NaN, infinities and lone surrogates, TypeError or ValueError for what JSON cannot hold.
    """
    data = _encode(value)
    if b"null" in data:
        # msgspec writes NaN and infinities as null; the standard encoder refuses them.
        return _encode_slowly(value).encode("utf-8")
    return data


_BEFORE_VALUE = frozenset(["", "\ufeff", *_WHITESPACE])


def _skip(text: str) -> int:
    if text.startswith("\ufeff"):
        raise MalformedBody("The JSON begins with a byte order mark (RFC 8259 §8.1).")
    start = len(text) - len(text.lstrip(_WHITESPACE))
    if start == len(text):
        raise MalformedBody("There is no JSON: the input is empty." if not text else "There is no JSON: only spaces.")
    return start


def _syntax(error: json.JSONDecodeError, text: str) -> str:
    if error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip(_WHITESPACE)):
        return f"The JSON is truncated: it ends at character {len(text)}."
    reason = error.msg.removesuffix(" at").removesuffix(":")
    return f"The JSON is malformed at line {error.lineno}, column {error.colno}: {reason[:1].lower()}{reason[1:]}."


def _too_deep(max_depth: int) -> MalformedBody:
    return MalformedBody(f"Arrays and objects are nested more than {max_depth} deep.")


def _deeper_than(value: object, max_depth: int) -> bool:
    """Walk level by level, not recursively: the value may be nested deeper than this thread's stack allows."""
    level: list[object] = [value]
    for _ in range(max_depth + 1):
        below: list[Iterable[object]] = []
        for node in level:
            if isinstance(node, list):
                below.append(node)
            elif isinstance(node, dict):
                below.append(node.values())
        if not below:
            return False
        level = list(itertools.chain.from_iterable(below))
    return True


def _refuse_lone_surrogates(value: object) -> None:
    try:
        _encode(value)
    except UnicodeEncodeError:
        raise MalformedBody("A string holds a lone surrogate (RFC 7493 §2.1).") from None


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "a boolean"
    if isinstance(value, list):
        return "an array"
    return "a string" if isinstance(value, str) else "a number"
