"""The client's calls for issuers and verifiers: signatures, the active version, verification, the JWKS."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec import UNSET

from kms_jwks import errors, wire
from kms_jwks.client.problems import from_problem, marked
from kms_jwks.client.transport import Repeat, Reply, Transport, decode, segment

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

A = TypeVar("A", bound=wire.Answer)


class _Items(msgspec.Struct):
    batch: list[dict[str, Any]]


class Signing:
    """Mixed into `Client`. Binary values are bytes here and base64url without padding on the wire."""

    _transport: Transport

    # --- JWTs

    def sign_jwt(
        self,
        key_set: str,
        key: str,
        claims: Mapping[str, Any],
        *,
        expires_in: int | None = None,
        profile: str | None = None,
    ) -> wire.SignedJwt:
        """A JWT over `claims` under the key's signing profile; the service adds iss, iat, exp and jti.

        `expires_in`: seconds; without it, and without `exp` among the claims, the profile's own lifetime counts.
        Raises ClaimsRefused, Conflict (no active version, disabled key), Unavailable, BackendError, Forbidden.
        """
        request = wire.JwtRequest(claims=dict(claims), expires_in=_or_unset(expires_in), profile=_or_unset(profile))
        return self._sign(key_set, key, "jwt", request, wire.SignedJwt)

    def sign_jwt_batch(
        self, key_set: str, key: str, requests: Iterable[wire.JwtRequest]
    ) -> list[wire.SignedJwt | errors.Error]:
        """Up to `wire.MAX_BATCH` JWTs in one call: for each request, in order, its token or its error (not raised)."""
        return self._sign_batch(key_set, key, "jwt", requests, wire.SignedJwt)

    def sign_input(self, key_set: str, key: str, signing_input: str, kid: str) -> wire.Signature:
        """A signature over exactly this JWS signing input (RFC 7515 §5.1), for JWT libraries with a remote key.

        The input's header names `kid`. Raises KidNotActive after a rotation: build the input again with the kid that
        the error names; SigningInputRefused.
        """
        request = wire.SigningInputRequest(signing_input=signing_input, kid=kid)
        return self._sign(key_set, key, "signature", request, wire.Signature)

    def sign_input_batch(
        self, key_set: str, key: str, requests: Iterable[wire.SigningInputRequest]
    ) -> list[wire.Signature | errors.Error]:
        """Up to `wire.MAX_BATCH` signing inputs in one call."""
        return self._sign_batch(key_set, key, "signature", requests, wire.Signature)

    # --- in key sets with purpose raw

    def sign_jws(
        self,
        key_set: str,
        key: str,
        payload: bytes,
        *,
        detached: bool = False,
        typ: str | None = None,
        cty: str | None = None,
    ) -> wire.SignedJws:
        """A compact JWS over any payload (RFC 7515 §7.1); `detached` leaves the payload out (appendix F)."""
        request = wire.JwsRequest(
            payload=_base64url(payload), detached=detached, typ=_or_unset(typ), cty=_or_unset(cty)
        )
        return self._sign(key_set, key, "jws", request, wire.SignedJws)

    def sign_jws_batch(
        self, key_set: str, key: str, requests: Iterable[wire.JwsRequest]
    ) -> list[wire.SignedJws | errors.Error]:
        """Up to `wire.MAX_BATCH` payloads in one call."""
        return self._sign_batch(key_set, key, "jws", requests, wire.SignedJws)

    def sign_raw(
        self, key_set: str, key: str, data: bytes | None = None, *, digest: bytes | None = None, kid: str | None = None
    ) -> wire.Signature:
        """A signature in JOSE form over `data`, or over the `digest` of it that the key's algorithm signs.

        `kid` pins a version. Raises InvalidField unless exactly one of the two is given.
        """
        request = wire.RawSignatureRequest(
            input=UNSET if data is None else _base64url(data),
            digest=UNSET if digest is None else _base64url(digest),
            kid=_or_unset(kid),
        )
        return self._sign(key_set, key, "signature", request, wire.Signature)

    def sign_raw_batch(
        self, key_set: str, key: str, requests: Iterable[wire.RawSignatureRequest]
    ) -> list[wire.Signature | errors.Error]:
        """Up to `wire.MAX_BATCH` inputs or digests in one call."""
        return self._sign_batch(key_set, key, "signature", requests, wire.Signature)

    # --- reading

    def active(self, key_set: str, key: str) -> wire.Active:
        """The version that signs now, the next one, and when to read this again: for callers that pin a kid."""
        reply = self._transport.call("GET", f"{_key_path(key_set, key)}/active", repeat=Repeat.READ)
        return decode(reply, wire.Active)

    def verify(self, key_set: str, token: str, audience: str, typ: str | None = None) -> wire.Verified:
        """The header and claims of a token that is valid for `audience` (`"any"`: the audience is not checked).

        Raises a subclass of TokenRejected for a token that is not.
        """
        request = wire.VerifyRequest(token=token, audience=audience, typ=_or_unset(typ))
        path = f"/v1/key-sets/{segment(key_set, 'key_set')}/verify"
        return decode(self._transport.call("POST", path, repeat=Repeat.READ, body=request), wire.Verified)

    def jwks(self, key_set: str | None = None, *, post_quantum: bool = False) -> dict[str, Any]:
        """The JWKS that verifiers fetch (RFC 7517 §5), or that of ML-DSA keys; the default key set's without a name."""
        prefix = "" if key_set is None else f"/{segment(key_set, 'key_set')}"
        name = "jwks-pq.json" if post_quantum else "jwks.json"
        reply = self._transport.call("GET", f"{prefix}/.well-known/{name}", repeat=Repeat.READ)
        return decode(reply, dict[str, Any])

    # --- inside

    def _sign(self, key_set: str, key: str, route: str, request: wire.Request, into: type[A]) -> A:
        path = f"{_key_path(key_set, key)}/{route}"
        return decode(self._transport.call("POST", path, repeat=Repeat.SIGN, body=request), into)

    def _sign_batch(
        self, key_set: str, key: str, route: str, requests: Iterable[wire.Request], into: type[A]
    ) -> list[A | errors.Error]:
        path, items = f"{_key_path(key_set, key)}/{route}", list(requests)
        reply = self._transport.call("POST", path, repeat=Repeat.SIGN, body={"batch": items})
        answers = decode(reply, _Items).batch
        if len(answers) != len(items):
            raise _unexpected(reply, f"{len(items)} items were sent and {len(answers)} came back")
        return [_item(reply, answer, into) for answer in answers]


def _item(reply: Reply, answer: dict[str, Any], into: type[A]) -> A | errors.Error:
    problem = answer.get("error")
    if isinstance(problem, dict):
        return from_problem(problem, request_id=reply.request_id)
    try:
        return msgspec.convert(answer, into)
    except msgspec.ValidationError as error:
        raise _unexpected(reply, str(error)) from None


def _unexpected(reply: Reply, what: str) -> errors.Error:
    error = errors.UnexpectedAnswer(f"{reply.method} {reply.path}: {what}.")
    return marked(error, reply.status, reply.request_id)


def _key_path(key_set: str, key: str) -> str:
    return f"/v1/key-sets/{segment(key_set, 'key_set')}/keys/{segment(key, 'key')}"


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


V = TypeVar("V")


def _or_unset(value: V | None) -> V | msgspec.UnsetType:
    return UNSET if value is None else value
