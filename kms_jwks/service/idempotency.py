"""Creations that may be sent again: a call with the Idempotency-Key of an earlier one gets what that one made.

After draft-ietf-httpapi-idempotency-key-header. The record is written in the transaction that creates the object, so
both exist or neither does. Writers queue for the registry: of two calls at the same time the second one finds the
record of the first. A refusal creates nothing and leaves no record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

import msgspec

from kms_jwks import errors, wire
from kms_jwks.model import IDEMPOTENCY_LIFETIME, Client, Grant, Id, IdempotencyRecord, Key, KeySet, new_id
from kms_jwks.service.guard import RequestContext
from kms_jwks.store import ReadTx, WriteTx
from kms_jwks.times import later

T = TypeVar("T")


def find_created(
    tx: ReadTx, context: RequestContext, request: wire.Request, find: Callable[[Id], T | None], *names: str
) -> T | None:
    """What the caller's earlier call with the same Idempotency-Key made; None where this call is the first.

    `find` reads an object by its id, `names` are those in the path. Called once the guard has let the caller in.
    Raises IdempotencyKeyReused where the earlier call was another one, NotFound where the object is gone for good.
    """
    if context.idempotency_key is None:
        return None
    record = tx.idempotency_record(_client(context), context.idempotency_key)
    if record is None:
        return None
    if record.call != _fingerprint(context, request, names):
        raise errors.IdempotencyKeyReused(
            "This Idempotency-Key came with another route, other names or another body before."
        )
    found = find(record.created_id)
    if found is None or (isinstance(found, Client | Grant | Key | KeySet) and found.deleted_at is not None):
        raise errors.NotFound(
            "What the first call with this Idempotency-Key made was deleted.",
            next_step="To make it anew, send the creation with a fresh Idempotency-Key.",
        )
    return found


def record_created(tx: WriteTx, context: RequestContext, request: wire.Request, made: Id, *names: str) -> None:
    """Write down what this call made, for as long as `IDEMPOTENCY_LIFETIME`."""
    if context.idempotency_key is None:
        return
    now = tx.now()
    tx.remove_expired_idempotency_records()
    tx.add(
        IdempotencyRecord(
            id=new_id(),
            client_id=_client(context),
            key=context.idempotency_key,
            call=_fingerprint(context, request, names),
            created_id=made,
            created_at=now,
            expires_at=later(now, IDEMPOTENCY_LIFETIME),
        )
    )


def _client(context: RequestContext) -> Id:
    assert context.caller is not None, "only a caller that was let in creates anything"
    return context.caller.client_id


def _fingerprint(context: RequestContext, request: wire.Request, names: tuple[str, ...]) -> str:
    """The same for bodies that mean the same, however they are written."""
    call = msgspec.json.encode([context.route, names, request], order="sorted")
    return hashlib.sha256(call).hexdigest()
