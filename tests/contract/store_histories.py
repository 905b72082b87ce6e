"""Random histories of a registry, and the rule of the epoch that must hold after each transaction.

The counter grows by one when what a snapshot holds has changed, and else stays. What a snapshot holds is spelled out
here a second time, from the definition and not from the store's table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from kms_jwks import errors
from kms_jwks.model import (
    ApiToken,
    Client,
    ExternalKey,
    Grant,
    Id,
    Instant,
    Intent,
    IntentKind,
    IntentState,
    Key,
    KeySet,
    KeyVersion,
    VersionState,
    Worker,
    new_id,
)
from kms_jwks.store import ReadTx, RegistryContents, Store, WriteTx
from tests.unit.builders import T0, external, key, key_set, version

S = VersionState
KINDS = ("key_set", "key", "version", "external", "client", "token", "grant", "worker", "intent")
MOMENTS = st.one_of(st.none(), st.integers(1, 3).map(lambda n: Instant(T0 + n)))


@dataclass(frozen=True)
class Step:
    """Add an entity of a kind, or change an existing one, which `pick` selects."""

    kind: str
    pick: int
    changes: Mapping[str, Any] | None


@dataclass(frozen=True)
class Transaction:
    """Steps that are committed together or not at all."""

    steps: tuple[Step, ...]
    broken_off: bool
    reborn: bool


CHANGES: Mapping[str, Mapping[str, st.SearchStrategy[Any]]] = {
    "key_set": {
        "cache_lifetime": st.sampled_from([60, 300]),
        "revision": st.integers(1, 3),
        "updated_at": st.integers(T0, T0 + 2),
        "first_published_at": MOMENTS,
    },
    "key": {"disabled_at": MOMENTS, "revision": st.integers(1, 3), "updated_at": st.integers(T0, T0 + 2)},
    "version": {
        "state": st.sampled_from(list(S)),
        "revoked_at": MOMENTS,
        "visible_since": MOMENTS,
        "destroy_at": MOMENTS,
        "published_epoch": st.one_of(st.none(), st.integers(1, 3)),
        "evidence": st.sampled_from([None, {"a": 1}]),
        "revoke_reason": st.sampled_from([None, "lost"]),
        "x5c": st.sampled_from([(), ("AA",)]),
    },
    "external": {"removed_at": MOMENTS, "remove_at": st.integers(T0, T0 + 2)},
    "client": {"deleted_at": MOMENTS},
    "token": {"revoked_at": MOMENTS, "last_used_at": MOMENTS},
    "grant": {"deleted_at": MOMENTS},
    "worker": {"heartbeat_at": st.integers(T0, T0 + 2), "stopped_at": MOMENTS},
    "intent": {"state": st.sampled_from(list(IntentState)), "error": st.sampled_from([None, "x"])},
}


@st.composite
def _steps(draw: st.DrawFn) -> Step:
    kind = draw(st.sampled_from(KINDS))
    if draw(st.booleans()):
        return Step(kind, draw(st.integers(0, 9)), None)
    changes = draw(st.fixed_dictionaries({}, optional=dict(CHANGES[kind])))
    return Step(kind, draw(st.integers(0, 9)), changes)


histories = st.lists(
    st.builds(
        Transaction,
        st.lists(_steps(), max_size=5).map(tuple),
        st.sampled_from([False, False, False, True]),
        st.sampled_from([False] * 9 + [True]),
    ),
    min_size=1,
    max_size=7,
)


class History:
    """Runs transactions on a store, and keeps a model of what the store must hold."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._root = new_id()
        self._things: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        with store.write() as tx:
            for kind in KINDS:
                self._add(tx, self._things, kind, 0)

    def play(self, transaction: Transaction) -> None:
        """Run one transaction and check its outcome against the rule."""
        before, counted = self._read()
        things = {kind: list(found) for kind, found in self._things.items()}
        tx = None
        try:
            with self._store.write() as tx:
                for step in transaction.steps:
                    self._step(tx, things, step)
                if transaction.reborn:
                    tx.new_incarnation()
                if transaction.broken_off:
                    raise ZeroDivisionError
            self._things = things
        except ZeroDivisionError:
            pass
        after, counts = self._read()
        changed = held(after) != held(before) or (transaction.reborn and not transaction.broken_off)
        assert after.epoch.counter - before.epoch.counter == (1 if changed else 0)
        assert tx is not None
        assert tx.committed_epoch == (after.epoch if changed else None)
        assert counts == counted if transaction.broken_off else counts == len(list(self._mine()))
        self._compare(after)

    def _mine(self) -> Iterator[Any]:
        for found in self._things.values():
            yield from found

    def _read(self) -> tuple[RegistryContents, int]:
        with self._store.read() as tx:
            return tx.contents(), sum(_stored(tx, thing) is not None for thing in self._mine())

    def _compare(self, contents: RegistryContents) -> None:
        """Every entity is stored as the model has it; the contents have those that a snapshot holds, and no others."""
        inside = {thing.id for things in _lists(contents) for thing in things}
        with self._store.read() as tx:
            for thing in self._mine():
                assert _stored(tx, thing) == thing
                assert (thing.id in inside) == (_held(thing) is not None)

    def _step(self, tx: WriteTx, things: dict[str, list[Any]], step: Step) -> None:
        if step.changes is None:
            try:
                self._add(tx, things, step.kind, step.pick)
            except errors.Conflict:
                return
        else:
            at = step.pick % len(things[step.kind])
            changed = replace(things[step.kind][at], **step.changes)
            try:
                tx.save(changed)
            except errors.TransitionRefused:
                active = [v.id for v in things["version"] if v.key_id == changed.key_id and v.state is S.ACTIVE]
                assert active, "refused a first active version"
                assert active != [changed.id]
                return
            things[step.kind][at] = changed

    def _add(self, tx: WriteTx, things: dict[str, list[Any]], kind: str, pick: int) -> None:
        thing = self._made(things, kind, pick)
        tx.add(thing)
        things[kind].append(thing)

    def _made(self, things: dict[str, list[Any]], kind: str, pick: int) -> Any:
        fresh = new_id()

        def some(of: str) -> Any:
            return things[of][pick % len(things[of])]

        match kind:
            case "key_set":
                return key_set(id=fresh, name=fresh, issuer=f"https://issuer.example/{fresh}")
            case "key":
                return key(id=fresh, key_set_id=some("key_set").id, name=fresh)
            case "version":
                of = some("key")
                number = 1 + sum(v.key_id == of.id for v in things["version"])
                state = list(S)[pick % len(S)]
                # Every third uses a kid that is bound already.
                kid = things["version"][0].kid if pick % 3 == 1 and things["version"] else f"kid-{fresh}"
                return version(number, state, id=fresh, key_id=of.id, key_set_id=of.key_set_id, kid=kid)
            case "external":
                return external(id=fresh, key_set_id=some("key_set").id, kid=f"external-{fresh}")
            case "client":
                return Client(fresh, fresh, T0)
            case "token":
                return ApiToken(fresh, some("client").id, fresh, T0, T0)
            case "grant":
                return Grant(fresh, some("client").id, "signer", T0, some("key_set").id)
            case "worker":
                return Worker(fresh, "node", 1, 10, T0, T0)
            case _:
                of = some("version")
                return Intent(fresh, IntentKind.GENERATE, of.id, "b", fresh, IntentState.PENDING, T0, T0)


def held(contents: RegistryContents) -> dict[Id, object]:
    """What a snapshot of these contents holds, by id."""
    return {thing.id: _held(thing) for things in _lists(contents) for thing in things}


def _lists(contents: RegistryContents) -> Iterator[tuple[Any, ...]]:
    yield from (contents.key_sets, contents.keys, contents.versions, contents.external_keys)
    yield from (contents.clients, contents.tokens, contents.grants)


def _held(thing: Any) -> object:
    match thing:
        case KeySet() | Key():
            return replace(thing, revision=0, updated_at=T0)
        case KeyVersion(state=S.CREATING):
            return None
        case KeyVersion(revoked_at=int(moment)):
            return (thing.id, thing.key_set_id, thing.kid, moment)
        case KeyVersion(state=S.PUBLISHED | S.ACTIVE | S.RETIRING):
            return replace(thing, destroy_at=None, evidence=None, published_epoch=None)
        case KeyVersion():
            return None
        case ExternalKey():
            return thing if thing.removed_at is None else None
        case Client() | Grant():
            return thing if thing.deleted_at is None else None
        case ApiToken():
            return replace(thing, last_used_at=None)
        case _:
            return None


def _stored(tx: ReadTx, thing: Any) -> Any:
    finders: Mapping[type, Any] = {
        KeySet: tx.key_set_by_id,
        Key: tx.key_by_id,
        KeyVersion: tx.version,
        ExternalKey: lambda id_: next((e for e in tx.external_keys(include_removed=True) if e.id == id_), None),
        Client: tx.client_by_id,
        ApiToken: tx.token,
        Grant: tx.grant,
        Worker: tx.worker,
        Intent: tx.intent,
    }
    return finders[type(thing)](thing.id)
