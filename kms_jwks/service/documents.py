"""What verifiers fetch: the JWKS of a key set and its issuer's metadata, from the snapshot, lease or no lease."""

from __future__ import annotations

import hashlib

import msgspec

from kms_jwks import errors
from kms_jwks.access import Permission
from kms_jwks.model import Purpose
from kms_jwks.service.context import RequestContext
from kms_jwks.service.guard import Guard
from kms_jwks.worker.snapshot import Document, PublishedSet
from kms_jwks.worker.sync import RegistrySync


class Documents:
    """The data plane's use cases that publish."""

    def __init__(self, watcher: RegistrySync, guard: Guard, *, public_url: str, default_key_set: str) -> None:
        self._sync = watcher
        self._guard = guard
        self._public_url = public_url
        self.default_key_set = default_key_set

    def jwks(self, context: RequestContext, key_set: str, *, post_quantum: bool = False) -> Document:
        """The set's JWKS, or the one of its ML-DSA keys. A restricted set needs `jwks:read`.

        Raises KeySetNotFound, NotPublished.
        """
        found = self._find(context, key_set)
        document = found.jwks_pq if post_quantum else found.jwks
        if document is None:
            what = "no ML-DSA key" if post_quantum else "nothing"
            raise errors.NotPublished(f"Key set {key_set!r} has published {what} yet.")
        return document

    def discovery(self, context: RequestContext, key_set: str | None) -> Document:
        """Issuer metadata (OpenID Connect Discovery §4, RFC 8414), None for the paths without a key set's name.

        Only where the issuer is this very URL and signs JWTs, else RouteNotFound: metadata elsewhere would be
        rejected anyway.
        """
        name = self.default_key_set if key_set is None else key_set
        found = self._find(context, name)
        here = self._public_url if key_set is None else f"{self._public_url}/{key_set}"
        if found.issuer != here or found.jwks is None or found.purpose is not Purpose.JWT:
            raise errors.RouteNotFound("This URL is not the key set's issuer.")
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

    def _find(self, context: RequestContext, name: str) -> PublishedSet:
        snapshot = self._sync.snapshot()
        found = snapshot.key_sets.get(name)
        if found is not None and found.public:
            return found
        if found is None and context.authorization is None:
            raise errors.KeySetNotFound(f"There is no key set {name!r} that everybody may read.")
        return self._guard.admit_set(snapshot, context, Permission.JWKS_READ, name, self._sync.clock.now())
