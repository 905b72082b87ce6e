"""`verify`: a token held against what a key set publishes at this moment."""

from __future__ import annotations

from msgspec import UNSET

from kms_jwks import errors, verification, wire
from kms_jwks.access import Permission
from kms_jwks.model import SECOND, Purpose
from kms_jwks.service.context import RequestContext
from kms_jwks.service.guard import Guard
from kms_jwks.worker.sync import RegistrySync


class TokenVerification:
    """The data plane's use case that checks tokens."""

    def __init__(self, watcher: RegistrySync, guard: Guard) -> None:
        self._sync = watcher
        self._guard = guard

    def verify(self, context: RequestContext, key_set: str, request: wire.VerifyRequest) -> wire.Verified:
        """The token's header and claims. Raises TokenRejected, and RegistryStale when revocations may be unknown."""
        snapshot = self._sync.snapshot()
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
