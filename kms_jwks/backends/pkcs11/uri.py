"""PKCS#11 URIs (RFC 7512): parsing, writing, and their comparison with a token, a module and a backend's options.

No module is called here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_to_bytes

if TYPE_CHECKING:
    from kms_jwks.config import Pkcs11Options

SCHEME: Final = "pkcs11:"

_TEXT: Final = (
    "token",
    "manufacturer",
    "serial",
    "model",
    "library-manufacturer",
    "library-description",
    "object",
    "slot-description",
    "slot-manufacturer",
)
_PATH: Final = frozenset({*_TEXT, "id", "type", "slot-id", "library-version"})
_TYPES: Final = ("public", "private", "cert", "secret-key", "data")
_OBJECT_ATTRIBUTES: Final = frozenset({"object", "id", "type"})

# RFC 7512 §2.3: unreserved characters, percent-encodings, and what a path or a query may hold as it is.
_UNRESERVED: Final = r"A-Za-z0-9._~\-"
_PATH_VALUE: Final = re.compile(rf"(?:[{_UNRESERVED}:\[\]@!$'()*+,=&]|%[0-9A-Fa-f]{{2}})*")
_QUERY_VALUE: Final = re.compile(rf"(?:[{_UNRESERVED}:\[\]@!$'()*+,=/?|]|%[0-9A-Fa-f]{{2}})*")
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_VERSION: Final = re.compile(r"(\d{1,3})(?:\.(\d{1,3}))?", re.ASCII)
_NUMBER: Final = re.compile(r"\d{1,20}", re.ASCII)
_BARE: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~:[]@!$'()*+,=")


@dataclass(frozen=True, slots=True)
class Uri:
    """A PKCS#11 URI's attributes, decoded. Two spellings of the same attributes are equal.

    `text` holds the attributes of the path that are text, `type` among them, `slot-id` in decimal and
    `library-version` as ``major.minor``. An attribute that is present and empty matches an empty value alone.
    """

    text: Mapping[str, str] = field(default_factory=dict)
    id: bytes | None = None
    """CKA_ID."""
    module_path: str | None = None
    module_name: str | None = None
    """The module's file name without its path and, by the platform's convention, without ``lib`` and ``.so``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", MappingProxyType(dict(self.text)))

    @property
    def names_an_object(self) -> bool:
        """Whether it has attributes of an object, beside those of token, slot and module."""
        return self.id is not None or any(name in _OBJECT_ATTRIBUTES for name in self.text)

    @property
    def token_attributes(self) -> Mapping[str, str]:
        """The attributes that choose a token, its slot and its library."""
        return {name: value for name, value in self.text.items() if name not in _OBJECT_ATTRIBUTES}

    def contradictions(self, shown: Mapping[str, str]) -> list[str]:
        """The differences from a token, its slot and library (`Module.uri_attributes`), in words, for messages.

        An attribute that the URI does not have matches any value.
        """
        return [
            f"{name} is {shown.get(name, '')!r}, not {wanted!r}"
            for name, wanted in self.token_attributes.items()
            if shown.get(name, "") != wanted
        ]

    def __str__(self) -> str:
        parts = [f"{name}={_encoded(value.encode())}" for name, value in sorted(self.text.items())]
        if self.id is not None:
            # As §2.3 has it: every byte of an identifier is encoded.
            parts.append("id=" + "".join(f"%{byte:02X}" for byte in self.id))
        query = {"module-path": self.module_path, "module-name": self.module_name}
        asked = "&".join(f"{name}={_encoded(value.encode())}" for name, value in query.items() if value is not None)
        return f"{SCHEME}{';'.join(parts)}{'?' + asked if asked else ''}"


def parse(uri: str) -> Uri:
    """Parse a URI. Raises ValueError, whose text repeats no value.

    It raises for what the grammar does not allow; for an attribute that stands twice; for an attribute of the path that
    RFC 7512 does not have, because no token can be known to fit it (such an attribute of the query is ignored); and for
    a PIN and its source, which are settings of the backend.
    """
    if uri[: len(SCHEME)].lower() != SCHEME:
        raise ValueError(f"a PKCS#11 URI begins with {SCHEME}")
    path, _, query = uri[len(SCHEME) :].partition("?")
    text: dict[str, str] = {}
    id_: bytes | None = None
    for name, value in _attributes(path, ";", _PATH_VALUE):
        if name not in _PATH:
            raise ValueError(f"the attribute {_shown(name)} is none of RFC 7512's, so nothing could be known to fit it")
        if name in text or (name == "id" and id_ is not None):
            raise ValueError(f"the attribute {name} stands twice")
        if name == "id":
            id_ = unquote_to_bytes(value)
        else:
            text[name] = _checked(name, _decoded(name, value))
    asked: dict[str, str] = {}
    for name, value in _attributes(query, "&", _QUERY_VALUE):
        if name in ("pin-value", "pin-source"):
            raise ValueError(f"{name} has no place here: where the PIN comes from is a setting of the backend")
        if name not in ("module-path", "module-name"):
            continue
        if name in asked:
            raise ValueError(f"the attribute {name} stands twice")
        asked[name] = _decoded(name, value)
    return Uri(text, id_, asked.get("module-path"), asked.get("module-name"))


def parse_for_token(text: str, options: Pkcs11Options) -> Uri:
    """Parse the URI that chooses a backend's token. Raises ValueError, also where the other options contradict it."""
    uri = parse(text)
    if uri.names_an_object:
        raise ValueError("uri names a token here, so it has no object, id or type")
    if not uri.token_attributes:
        raise ValueError("uri says nothing of the token")
    if problem := module_mismatch(uri, options.module):
        raise ValueError(f"uri: {problem}")
    settings = {
        "token_label": (options.token_label, "token"),
        "token_serial": (options.token_serial, "serial"),
        "expected_serial": (options.expected_serial, "serial"),
        "slot": (None if options.slot is None else str(options.slot), "slot-id"),
    }
    for setting, (value, attribute) in settings.items():
        if value is not None and uri.token_attributes.get(attribute, value) != value:
            raise ValueError(f"uri and {setting} name different tokens")
    return uri


def module_mismatch(uri: Uri, module: Path) -> str | None:
    """Why a URI's module-path or module-name does not name `module`, or None. A path may be that of its folder."""
    if uri.module_path is not None:
        named = Path(uri.module_path)
        try:
            is_same = module.resolve() in (named.resolve(), (named / module.name).resolve())
        except (OSError, ValueError, RuntimeError):  # no path at all, or a circle of symbolic links
            is_same = False
        if not is_same:
            return f"its module-path is not the backend's module {module}"
    stem = module.name.split(".", 1)[0]
    if uri.module_name is not None and uri.module_name not in (stem, stem.removeprefix("lib")):
        return f"its module-name is not that of the backend's module {module}"
    return None


def _attributes(part: str, separator: str, grammar: re.Pattern[str]) -> list[tuple[str, str]]:
    found = []
    for attribute in part.split(separator) if part else []:
        name, equals, value = attribute.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise ValueError("an attribute is written name=value, the name of letters, digits, '-' and '_'")
        if not grammar.fullmatch(value):
            raise ValueError(f"the value of {_shown(name)} holds characters that have to be percent-encoded")
        found.append((name, value))
    return found


def _decoded(name: str, value: str) -> str:
    try:
        return unquote_to_bytes(value).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"the value of {name} is no UTF-8") from None


def _checked(name: str, value: str) -> str:
    """The value in its canonical form."""
    if name == "type" and value not in _TYPES:
        raise ValueError(f"type is one of {', '.join(_TYPES)}")
    if name == "slot-id":
        if not _NUMBER.fullmatch(value):
            raise ValueError("slot-id is a decimal number")
        return str(int(value))
    if name == "library-version":
        version = _VERSION.fullmatch(value)
        if version is None:
            raise ValueError("library-version is written major or major.minor")
        return f"{int(version[1])}.{int(version[2] or 0)}"
    return value


def _encoded(value: bytes) -> str:
    return "".join(chr(byte) if byte in _BARE else f"%{byte:02X}" for byte in value)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 32 else name[:32] + "…")
