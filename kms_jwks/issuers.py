"""Issuer identifiers: their normal form, which of them clients take for the same, and where clients look for metadata.

Pure. Verifiers compare `iss` octet by octet, so a key set's issuer is never changed: one that is not in normal form is
refused, and the refusal names the normal form.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from encodings import idna
from urllib.parse import quote, unquote

from kms_jwks.model import is_name

SHAPES = "an http or https URL, a host name such as accounts.example.com, spiffe://… or urn:…"
"""The shapes that an issuer may have."""

OPENID_CONFIGURATION = "/.well-known/openid-configuration"
AUTHORIZATION_SERVER = "/.well-known/oauth-authorization-server"

_DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_PORT = 65_535
_MAX_HOST = 253
_ENCODED = re.compile("%([0-9A-Fa-f]{2})")
_STRAY_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
_UNRESERVED = re.compile("[A-Za-z0-9._~-]")
_PATH_CHARACTERS = "/%:@!$&'()*+,;="
"""What `quote` leaves alone beside unreserved characters: the rest of pchar (RFC 3986 §3.3), and what stands for
itself in a path."""
_LABEL = re.compile("[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMERIC = re.compile("[0-9]+|0x[0-9a-f]*")
_DEVIATIONS = frozenset("\u00df\u03c2\u200c\u200d")
"""ß, ς, ZWNJ and ZWJ: IDNA 2003 and IDNA 2008 make different A-labels of them (RFC 5894 §7.2)."""
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Letters and marks to Unicode that are not shown (Default_Ignorable_Code_Point)."""
_LOOKALIKE_SCRIPTS = frozenset({"LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE", "COPTIC", "LISU"})
"""Scripts with letters that look like those of another one; a label mixes none of them (after UTS 39 §5.2)."""
_TRUST_DOMAIN = re.compile("[a-z0-9._-]{1,255}")
_SPIFFE_PATH = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]+)*")
_URN = re.compile(
    r"(?P<nid>[A-Za-z0-9][A-Za-z0-9-]{0,30}[A-Za-z0-9]):(?P<nss>(?!/)(?:[A-Za-z0-9._~:@!$&'()*+,;=/-]|%[0-9A-Fa-f]{2})+)"
)


def normal_form(issuer: str) -> str:
    """The one spelling of an issuer (RFC 3986 §6.2.2 and §6.2.3; host names as A-labels, RFC 5890 §2.3.2.1).

    A slash at the end of a path stays: it is part of some issuers. Raises ValueError, with the reason, for what no
    issuer is.
    """
    if not issuer.isprintable() or " " in issuer:
        raise ValueError("holds a space or a character that cannot be printed")
    scheme, colon, rest = issuer.partition(":")
    if not colon:
        if "." not in issuer.strip("."):
            raise ValueError(f"is none of {SHAPES}")
        return _host(issuer)
    scheme = scheme.lower()
    if scheme in _DEFAULT_PORTS and rest.startswith("//"):
        return _url(scheme, rest[2:])
    if scheme == "spiffe" and rest.startswith("//"):
        return _spiffe(rest[2:])
    if scheme == "urn":
        return _urn(rest)
    raise ValueError(f"is none of {SHAPES}")


def comparable(issuer: str) -> str:
    """Equal for issuers that clients or readers take for the same: other spellings, a slash at the end, no scheme."""
    try:
        normal = normal_form(issuer)
    except ValueError:
        normal = issuer
    return (normal if ":" in normal else f"https://{normal}").rstrip("/")


def default_owner(issuer: str, public_url: str) -> str | None:
    """The name of the key set whose issuer this is by default; None where it is no key set's."""
    start = f"{comparable(public_url)}/"
    found = comparable(issuer)
    name = found.removeprefix(start)
    return name if found.startswith(start) and is_name(name) else None


def metadata_urls(issuer: str) -> tuple[str, ...]:
    """Where clients look for the issuer's metadata: OpenID Connect Discovery §4.1, then RFC 8414 §3.1.

    Both drop a slash at the end of the issuer. Empty where the issuer is not a URL: no client of these specifications
    takes it.
    """
    url = comparable(issuer)
    if ":" not in issuer or not url.startswith(("http://", "https://")):
        return ()
    end = url.find("/", url.index("://") + 3)
    origin, path = (url, "") if end < 0 else (url[:end], url[end:])
    return url + OPENID_CONFIGURATION, origin + AUTHORIZATION_SERVER + path


# --- URLs -------------------------------------------------------------------------------------------------------------


def _url(scheme: str, rest: str) -> str:
    if "?" in rest or "#" in rest:
        raise ValueError("has a query or a fragment")
    if "\\" in rest:
        raise ValueError("holds a backslash")
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        raise ValueError("names a user")
    found = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::([0-9]{0,5}))?", authority, re.ASCII)
    if found is None or not 0 < int(found[2] or "1") <= _MAX_PORT:
        raise ValueError("has no usable host and port")
    port = int(found[2]) if found[2] else _DEFAULT_PORTS[scheme]
    written = "" if port == _DEFAULT_PORTS[scheme] else f":{port}"
    return f"{scheme}://{_host(found[1])}{written}{_path(slash + path)}"


def _path(path: str) -> str:
    """Encoded octets in upper case and only where they are needed, no dot segments, no empty segments."""
    if _STRAY_PERCENT.search(path):
        raise ValueError("holds a percent sign that encodes nothing")
    path = quote(_ENCODED.sub(_decode_unreserved, path), safe=_PATH_CHARACTERS)
    kept: list[str] = []
    *_, last = segments = path.split("/")
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment not in ("", "."):
            kept.append(segment)
    if not path:
        return ""
    end = "/" if last in ("", ".", "..") else ""
    return f"/{'/'.join(kept)}{end if kept else ''}"


def _decode_unreserved(found: re.Match[str]) -> str:
    character = chr(int(found[1], 16))
    return character if _UNRESERVED.fullmatch(character) else found[0].upper()


# --- hosts ------------------------------------------------------------------------------------------------------------


def _host(host: str) -> str:
    if host.startswith("["):
        address = ipaddress.IPv6Address(host[1:-1])
        if address.scope_id is not None or address.ipv4_mapped is not None:
            raise ValueError("has an IPv6 address with a zone, or one that stands for an IPv4 address")
        return f"[{address.compressed}]"
    name = ".".join(_label(label) for label in idna.dots.split(unquote(host, errors="strict").removesuffix(".")))
    if len(name) > _MAX_HOST:
        raise ValueError("has a host name that is too long")
    if _NUMERIC.fullmatch(name.rpartition(".")[2]):
        return str(ipaddress.IPv4Address(name))
    return name


def _label(label: str) -> str:
    """A label of a host name in lower case, one of another script than ASCII as an A-label."""
    if not label.isascii():
        if not _DEVIATIONS.isdisjoint(label):
            raise ValueError("has a host with ß, ς or a joiner: write the host as A-labels (xn--…)")
        label = idna.ToASCII(label).decode("ascii")
    label = label.lower()
    if not _LABEL.fullmatch(label):
        raise ValueError("has no host, or one that no host name is")
    if label.startswith("xn--"):
        _check_a_label(label)
    return label


def _check_a_label(label: str) -> None:
    """Refuse an A-label that decodes to nothing usable, or to letters of scripts that look alike."""
    written = label.removeprefix("xn--").encode("ascii").decode("punycode")
    usable = not written.isascii() and all(c == "-" or unicodedata.category(c)[0] in "LMN" for c in written)
    # RFC 5892 §2.2 and §2.3: no full-width or mathematical letters, nothing that is not shown.
    stable = unicodedata.normalize("NFKC", written.lower()) == written and not _UNSEEN.search(written)
    if not (usable and stable and f"xn--{written.encode('punycode').decode('ascii')}" == label):
        raise ValueError(f"has a host with {label!r}, which is not an A-label")
    scripts = {unicodedata.name(c, "").partition(" ")[0] for c in written if c.isalpha()} & _LOOKALIKE_SCRIPTS
    if len(scripts) > 1:
        mixed = " and ".join(script.capitalize() for script in sorted(scripts))
        raise ValueError(f"has a host that mixes {mixed} letters in {label!r}: they look alike")


# --- other shapes -----------------------------------------------------------------------------------------------------


def _spiffe(rest: str) -> str:
    """SPIFFE-ID §2: a trust domain in lower case, and a path without encoded octets."""
    domain, slash, path = rest.partition("/")
    domain = domain.lower()
    if not _TRUST_DOMAIN.fullmatch(domain) or not _SPIFFE_PATH.fullmatch(slash + path):
        raise ValueError("is no SPIFFE ID")
    return f"spiffe://{domain}{slash}{path}"


def _urn(rest: str) -> str:
    """RFC 8141 §3.1: scheme and namespace in lower case, encoded octets in upper case."""
    found = _URN.fullmatch(rest)
    if found is None:
        raise ValueError("is no URN, or one with components")
    return f"urn:{found['nid'].lower()}:{_ENCODED.sub(lambda octet: octet[0].upper(), found['nss'])}"
