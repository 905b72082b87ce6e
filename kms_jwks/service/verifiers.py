"""Use cases for verifiers, answered from the snapshot: JWKS, issuer metadata, and the check of a token."""

from __future__ import annotations

import hashlib

import msgspec
from msgspec import UNSET

from kms_jwks import errors, issuers, verification, wire
from kms_jwks.access import Permission
from kms_jwks.model import SECOND, Purpose
from kms_jwks.service.guard import Guard, RequestContext
from kms_jwks.worker.snapshot import Document, PublishedSet
from kms_jwks.worker.sync import RegistrySync


class Verifiers:
    """The data plane's use cases besides signing. Documents are served without a signing lease too."""

    def __init__(self, sync: RegistrySync, guard: Guard, *, public_url: str, default_key_set: str) -> None:
        self._sync = sync
        self._guard = guard
        self._public_url = public_url
        self.default_key_set = default_key_set

    def jwks(self, context: RequestContext, key_set: str, *, post_quantum: bool = False) -> Document:
        """The set's JWKS, or the one of its ML-DSA keys. A restricted set needs `jwks:read`.

        Raises KeySetNotFound, NotPublished.
        """
        found = self._admit_reader(context, key_set)
        document, other = (found.jwks_pq, found.jwks) if post_quantum else (found.jwks, found.jwks_pq)
        if document is None:
            raise self._not_published(found, "jwks.json" if post_quantum else "jwks-pq.json", other)
        return document

    def discovery(self, context: RequestContext, key_set: str | None) -> Document:
        """Issuer metadata (OpenID Connect Discovery §4, RFC 8414), None for the paths without a key set's name.

        Clients look for it at this very URL where the issuer is this URL, or this URL and a slash, and they reject the
        metadata of another issuer. Raises KeySetNotFound, RouteNotFound where the issuer is another one or signs no
        JWTs, and NotPublished.
        """
        name = self.default_key_set if key_set is None else key_set
        found = self._admit_reader(context, name)
        if found.purpose is not Purpose.JWT:
            raise errors.RouteNotFound(f"Key set {name!r} signs no JWTs, so it has no issuer metadata.")
        url = self._public_url if key_set is None else f"{self._public_url}/{key_set}"
        if url + issuers.OPENID_CONFIGURATION not in issuers.metadata_urls(found.issuer):
            raise errors.RouteNotFound(
                f"The issuer of key set {name!r} is {found.issuer}, and this is the place for the metadata of {url}.",
                next_step="Serve the issuer's metadata where the issuer is, with this key set's jwks_uri.",
            )
        if found.jwks is None:
            raise self._not_published(found, "jwks-pq.json", found.jwks_pq)
        body = msgspec.json.encode(
            {
                "issuer": found.issuer,
                "jwks_uri": f"{self._public_url}/{name}/.well-known/jwks.json",
                "response_types_supported": ["id_token"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": list(found.algorithms),
            }
        )
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        return Document(body, etag, found.jwks.cache_control, found.public)

    def verify_token(self, context: RequestContext, key_set: str, request: wire.VerifyRequest) -> wire.Verified:
        """The header and claims of a token that holds against what the key set publishes at this moment.

        Raises TokenRejected, PurposeMismatch, and RegistryStale where this worker may not know of a revocation.
        """
        snapshot = self._sync.complete_snapshot()
        now = self._sync.clock.now()
        found = self._guard.admit_set(snapshot, context, Permission.TOKEN_VERIFY, key_set, now)
        self._sync.leased()
        if found.purpose is not Purpose.JWT:
            raise errors.PurposeMismatch("Only key sets with purpose jwt issue tokens.")
        verified = verification.verify(
            request.token,
            keys=found.verify_keys,
            issuer=found.issuer,
            audience=request.audience,
            typ=None if request.typ is UNSET else request.typ,
            now=now // SECOND,
            clock_skew=found.clock_skew,
        )
        return wire.Verified(header=dict(verified.header), claims=dict(verified.claims), kid=verified.kid)

    def _admit_reader(self, context: RequestContext, name: str) -> PublishedSet:
        """The key set, for any caller where it is public, for a caller with the permission where it is restricted.

        A caller without credentials gets the same answer for a restricted set and for one that does not exist.
        """
        snapshot = self._sync.snapshot()
        found = snapshot.key_sets.get(name)
        if found is not None and found.public:
            return found
        complete = self._sync.complete_snapshot()
        try:
            return self._guard.admit_set(complete, context, Permission.JWKS_READ, name, self._sync.clock.now())
        except errors.CredentialsMissing:
            raise errors.CredentialsMissing(
                f"There is no public key set {name!r}, and a restricted one asks for credentials.",
                next_step="Check the key set's name, or send an API token with jwks:read as Authorization: Bearer.",
            ) from None

    def _not_published(self, key_set: PublishedSet, other_name: str, other: Document | None) -> errors.NotPublished:
        """Why one of the key set's two documents is not there; `other` is the other one."""
        if other is None:
            return errors.NotPublished(f"Key set {key_set.name!r} has published nothing yet.")
        kinds = ("ML-DSA keys", "keys of other algorithms")
        has, lacks = kinds if other is key_set.jwks_pq else kinds[::-1]
        return errors.NotPublished(
            f"Key set {key_set.name!r} has published {has} alone.",
            next_step=f"Fetch {self._public_url}/{key_set.name}/.well-known/{other_name}, or create {lacks}.",
        )
