"""The API tokens and external keys that end soon: the acting custodian logs them once a day, doctor shows them."""

from __future__ import annotations

from dataclasses import dataclass

from kms_jwks.model import Instant, ends_soon
from kms_jwks.store import ReadTx


@dataclass(frozen=True, slots=True)
class Ending:
    """A token of a client, or an external key of a key set, that ends soon. `words` say what and whose it is."""

    words: str
    subject: str
    """The token's id or the key's kid."""
    end: Instant
    next_step: str


def list_ending(tx: ReadTx) -> list[Ending]:
    """The tokens and external keys that end within `model.EXPIRY_NOTICE`, the first to end first.

    Not those that were revoked, rotated or removed already, and none of a deleted client.
    """
    now = tx.now()
    clients = {c.id: c.name for c in tx.clients()}
    found = [
        Ending(
            f"API token {token.id} of client {clients[token.client_id]}",
            token.id,
            token.expires_at,
            f"kms-jwks client token rotate {clients[token.client_id]} {token.id}",
        )
        for token in tx.tokens()
        if token.client_id in clients and token.ends_soon(now)
    ]
    key_sets = {s.id: s.name for s in tx.key_sets()}
    found += [
        Ending(
            f"external key {external.kid} of key set {key_sets[external.key_set_id]}",
            external.kid,
            external.remove_at,
            "Its tokens are rejected from then on: let none be valid any longer (docs/migrate.md, step 4).",
        )
        for external in tx.external_keys()
        if external.key_set_id in key_sets and ends_soon(external.created_at, external.remove_at, now)
    ]
    return sorted(found, key=lambda ending: ending.end)
