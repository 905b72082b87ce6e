"""Finding a key pair that somebody else made: by label, CKA_ID or PKCS#11 URI. Called inside the gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pkcs11 import Attribute

from kms_jwks import strictjson
from kms_jwks.backends.base import GeneratedKey, KeyRef, PublicJwk
from kms_jwks.backends.pkcs11 import keys, objects, uri
from kms_jwks.backends.pkcs11.options import module_problem
from kms_jwks.errors import BackendRefused

if TYPE_CHECKING:
    from pathlib import Path

    from kms_jwks.backends.pkcs11.connection import Seat


@dataclass(frozen=True, slots=True)
class Wanted:
    """A locator, read: the search for the private key, and what the token must be."""

    locator: str
    template: keys.Template
    uri: uri.Uri | None = None


def wanted(locator: str, module: Path) -> Wanted:
    """Read a locator: a bare label, ``id=<hexadecimal CKA_ID>``, or a PKCS#11 URI of one private key in `module`.

    A label that begins like one of the others is written as a URI. Raises BackendRefused.
    """
    if locator[: len(uri.SCHEME)].lower() == uri.SCHEME:
        return _of_uri(locator, module)
    if not locator.startswith("id="):
        return Wanted(locator, {Attribute.LABEL: locator})
    try:
        id_ = bytes.fromhex(locator[3:])
    except ValueError:
        raise BackendRefused(f"The locator {locator!r} is no label and no id=<hexadecimal CKA_ID>.") from None
    if not id_:
        raise BackendRefused("The locator names an empty CKA_ID, which is none.")
    return Wanted(locator, {Attribute.ID: id_})


def _of_uri(locator: str, module: Path) -> Wanted:
    try:
        parsed = uri.parse(locator)
    except ValueError as error:
        # What was sent may hold a PIN, so it is not repeated.
        raise BackendRefused(
            f"The PKCS#11 URI is not accepted: {error}.",
            next_step="Write it as pkcs11:token=…;object=… or with id=%…; without a PIN.",
        ) from None
    if parsed.text.get("type", "private") != "private":
        raise BackendRefused("The PKCS#11 URI names no private key: its type is another.")
    if problem := module_problem(parsed, module):
        raise BackendRefused(f"The PKCS#11 URI is not of this backend: {problem}.")
    template: keys.Template = {}
    if parsed.id is not None:
        template[Attribute.ID] = parsed.id
    if "object" in parsed.text:
        template[Attribute.LABEL] = parsed.text["object"]
    if not any(template.values()):
        raise BackendRefused("The PKCS#11 URI names no key: it has neither an object nor an id.")
    return Wanted(str(parsed), template, parsed)


def adopted(seat: Seat, wanted: Wanted, public_jwk: PublicJwk | None) -> GeneratedKey:
    """The one private key that fits, with its public half or the one that is given for it.

    Raises BackendKeyNotFound, UnsupportedAlgorithm, BackendRefused.
    """
    if wanted.uri is not None:
        wrong = wanted.uri.contradictions(seat.connection.module.shows(seat.connection.token))
        if wrong:
            raise BackendRefused(
                f"The PKCS#11 URI is not of this backend's token: {'; '.join(wrong)}.",
                next_step="Name the backend whose token it is, or leave out what does not fit.",
            )
    ref = objects.the_one(seat, wanted.template, wanted.locator)
    private = objects.private_key(seat, ref)
    half = objects.public_half(seat, ref, private)
    if half is not None:
        if public_jwk is not None and dict(half) != dict(public_jwk):
            raise BackendRefused("The public key that was given is not the one that the token holds.")
        return GeneratedKey(ref, half)
    if public_jwk is None:
        raise objects.lacks_public_half()
    if not objects.may_belong(private, public_jwk):
        raise BackendRefused("The public key that was given cannot be that of the private key.")
    # The token cannot tell it again, so it is kept with the reference.
    text = strictjson.dumps(dict(sorted(public_jwk.items()))).decode("ascii")
    return GeneratedKey(KeyRef.of(**ref.as_dict(), public=text), public_jwk)
