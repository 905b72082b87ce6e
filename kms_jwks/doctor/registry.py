"""Checks of what the registry holds: clocks, custodian, intents, workers, policies, backends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kms_jwks import errors, jose, timeline
from kms_jwks.access import Role, combined_duties
from kms_jwks.config import Settings
from kms_jwks.custodian.expiry import Ending, list_ending
from kms_jwks.doctor.checks import Check, State, some
from kms_jwks.model import (
    DAY,
    EXPIRY_NOTICE,
    SECOND,
    Client,
    CustodianLease,
    Epoch,
    ExternalKey,
    Grant,
    Id,
    Instant,
    Intent,
    IntentState,
    Key,
    KeySet,
    KeyVersion,
    VersionState,
    Worker,
)
from kms_jwks.store import Store
from kms_jwks.times import format_instant
from kms_jwks.worker.epoch_record import EpochRecord

CLOCK_WARNING = 5
"""Seconds that the database's time may differ from this node's."""
CLOCK_FAILURE = 60
STUCK = 60
"""Seconds after which an intent that was not started, or did not end, counts as stuck."""
MAX_ENDING = 20
"""Tokens and external keys that are listed when they end soon."""
CUSTODIAN_GRACE = 30
"""Seconds without an acting custodian that a restart may take; only then is it a failure."""


@dataclass(frozen=True, slots=True)
class Registry:
    """One consistent read of everything that the checks use."""

    installation: str
    epoch: Epoch
    now: Instant
    key_sets: list[KeySet]
    keys: list[Key]
    versions: list[KeyVersion]
    workers: list[Worker]
    intents: list[Intent]
    lease: CustodianLease | None
    clients: list[Client]
    grants: list[Grant]
    external_records: list[ExternalKey]
    """The external keys of all key sets, removed ones included."""
    ending: list[Ending]
    given_up: list[KeyVersion]
    """The latest version of each key in use, where its pair was not made."""
    revoked_keys: frozenset[str] = frozenset()
    """The thumbprints of the public keys that were revoked, destroyed ones included."""

    @classmethod
    def of(cls, store: Store) -> Registry:
        """Read the registry. Raises StoreUnavailable."""
        with store.read() as tx:
            versions, keys = tx.versions(), tx.keys()
            latest = {v.key_id: v for v in sorted(versions, key=lambda v: v.number)}
            externals = tx.external_keys(include_removed=True)
            revoked = [v.public_jwk for v in versions if v.revoked_at is not None and v.public_jwk]
            revoked += [e.public_jwk for e in externals if e.revoked_at is not None]
            return cls(
                installation=tx.installation().id,
                epoch=tx.epoch(),
                now=tx.now(),
                key_sets=tx.key_sets(),
                keys=keys,
                versions=[v for v in versions if v.state is not VersionState.DESTROYED],
                workers=tx.workers(),
                intents=tx.intents(),
                lease=tx.custodian_lease(),
                clients=tx.clients(),
                grants=tx.grants(),
                external_records=externals,
                ending=list_ending(tx),
                given_up=[
                    v for k in keys if k.retired_at is None and (v := latest.get(k.id)) and v.failure is not None
                ],
                revoked_keys=frozenset(jose.thumbprint(jwk) for jwk in revoked),
            )

    def name_of(self, version: KeyVersion) -> str:
        """Key set, key and number, as the command line takes them."""
        key = next((k.name for k in self.keys if k.id == version.key_id), version.key_id)
        key_set = next((s.name for s in self.key_sets if s.id == version.key_set_id), version.key_set_id)
        return f"{key_set} {key} {version.number}"


def find_rollback(settings: Settings, store: Store) -> errors.StoreUnavailable | None:
    """Why this node refuses the registry; None where it accepts it."""
    try:
        known = EpochRecord(settings.state_dir).load()
        with store.read() as tx:
            tx.known_epoch = known
            tx.require_known_history()
    except errors.StoreUnavailable as error:
        return error
    return None


def history(settings: Settings, epoch: Epoch, rollback: errors.StoreUnavailable | None) -> Check:
    """Whether the registry, at `epoch`, holds what this node has confirmed."""
    if rollback is not None:
        return Check("registry history", State.FAILURE, rollback.detail.rstrip("."), rollback.next_step)
    if not EpochRecord(settings.state_dir).file.exists():
        return Check("registry history", State.OK, "this node has confirmed no epoch: it takes the registry as it is")
    return Check("registry history", State.OK, f"epoch {epoch.counter} continues what this node has confirmed")


def clocks(registry: Registry, difference: int) -> Iterator[Check]:
    """Whether the times agree; `difference`: the database's minus this node's, in microseconds."""
    apart = abs(difference) / SECOND
    step = "Let both machines' clocks follow the same NTP servers."
    if apart > CLOCK_FAILURE:
        yield Check(
            "clocks", State.FAILURE, f"the database's time is {difference / SECOND:+.1f} s from this node's", step
        )
    elif apart > CLOCK_WARNING:
        yield Check(
            "clocks", State.WARNING, f"the database's time is {difference / SECOND:+.1f} s from this node's", step
        )
    else:
        yield Check("clocks", State.OK, f"database and node are {apart:.1f} s apart")
    latest = max(
        [w.heartbeat_at for w in registry.workers] + ([registry.lease.renewed_at] if registry.lease else []), default=0
    )
    if latest - registry.now > CLOCK_WARNING * SECOND:
        yield Check(
            "clocks",
            State.FAILURE,
            f"the registry holds times {(latest - registry.now) / SECOND:.0f} s in the future: the clock went back",
            "Correct the database's clock; until then no key changes its state by date.",
        )


def custodian(registry: Registry) -> Iterator[Check]:
    """Whether a custodian acts."""
    lease, serving = registry.lease, any(not silence(w, registry.now) for w in registry.workers)
    start = "Run `kms-jwks serve` or `kms-jwks custodian`."
    if lease is None:
        yield Check("custodian", State.WARNING, "none has ever acted: no key can be made", start)
        return
    if lease.halted is not None:
        yield Check(
            "custodian", State.FAILURE, f"it has halted: {lease.halted}", "Correct the clocks; it continues by itself."
        )
        return
    over = (registry.now - lease.expires_at) / SECOND
    if over <= 0:
        yield Check("custodian", State.OK, f"term {lease.term} acts on node {lease.node}")
    elif serving and over > CUSTODIAN_GRACE:
        yield Check("custodian", State.FAILURE, f"workers run, and no custodian has acted for {over:.0f} s", start)
    else:
        yield Check("custodian", State.WARNING, f"none acts; the last one stopped {over:.0f} s ago", start)


def intents(registry: Registry) -> Iterator[Check]:
    """Whether the custodian's intents make progress."""
    found = False
    by_id = {v.id: v for v in registry.versions}
    for intent in registry.intents:
        version = by_id.get(intent.version_id)
        name = registry.name_of(version) if version else intent.version_id
        since = (registry.now - max(intent.created_at, intent.not_before)) / SECOND
        if intent.state in (IntentState.PENDING, IntentState.STARTED) and since > STUCK:
            found = True
            waiting = "waits for a custodian" if intent.state is IntentState.PENDING else "was begun and did not end"
            yield Check(
                "intents",
                State.FAILURE,
                f"{intent.kind.value} for {name} {waiting} for {since:.0f} s (label {intent.label})",
                "Check the custodian and its log. A new term abandons this attempt and starts another.",
            )
        elif intent.state is IntentState.PENDING and intent.attempt > 1 and version is not None:
            found = True
            last = max(
                (i for i in registry.intents if i.version_id == intent.version_id and i.error),
                key=lambda i: i.attempt,
                default=None,
            )
            yield Check(
                "intents",
                State.WARNING,
                f"{intent.kind.value} for {name} waits for attempt {intent.attempt}: {last.error if last else ''}",
                "Fix the cause that the error names; the custodian continues by itself.",
            )
    if not found:
        yield Check("intents", State.OK, "none is stuck")


def given_up(registry: Registry) -> Iterator[Check]:
    """Key pairs that a module declined to make, so that a key has no standby or cannot sign at all."""
    for version in registry.given_up:
        assert version.failure is not None
        key_set, key, number = registry.name_of(version).split()
        signs = any(v.key_id == version.key_id and v.state is VersionState.ACTIVE for v in registry.versions)
        what = "the key has no standby" if signs else "the key cannot sign"
        step = (
            "Fix the cause that the error names; the custodian asks again an hour later."
            if signs
            else f"Fix the cause, then kms-jwks version create {key_set} {key}; or kms-jwks key delete {key_set} {key}"
        )
        detail = f"version {number} of {key_set} {key} was not made, {what}: {version.failure['detail']}"
        yield Check("key pairs", State.WARNING if signs else State.FAILURE, detail, step)


def workers(registry: Registry) -> Iterator[Check]:
    """Whether every registered worker sends heartbeats."""
    found = False
    for worker in registry.workers:
        if silent := silence(worker, registry.now):
            found = True
            yield Check(
                "workers",
                State.WARNING,
                f"worker {worker.id} on node {worker.node} is silent for {silent:.0f} s and holds up activations",
                f"Start its node; if the node will not come back: kms-jwks node forget {worker.id}",
            )
    if not found:
        yield Check("workers", State.OK, f"{len(registry.workers)} registered, none silent")


def silence(worker: Worker, now: Instant) -> float:
    """Seconds since a worker's last heartbeat, if that is longer than its lease allows; otherwise 0."""
    seconds = (now - worker.heartbeat_at) / SECOND
    return seconds if seconds > worker.lease + 1 else 0.0


def policies(registry: Registry) -> Iterator[Check]:
    """The warnings about the keys' policies that every report must show."""
    for key in registry.keys:
        key_set = next(s for s in registry.key_sets if s.id == key.key_set_id)
        for warning in timeline.policy_warnings(key.policy, cache_lifetime=key_set.cache_lifetime):
            yield Check(
                "policy",
                State.WARNING,
                f"{key_set.name} {key.name}: {warning}",
                f"kms-jwks key update {key_set.name} {key.name} --publish-lead 24h --no-allow-unsafe-publish-lead",
            )


def external_keys(registry: Registry) -> Iterator[Check]:
    """The foreign keys that key sets publish and have published, with the clients that added them."""
    for key_set in registry.key_sets:
        added = [e for e in registry.external_records if e.key_set_id == key_set.id]
        for external in added:
            if external.removed_at is None:
                yield Check(
                    "external key",
                    State.WARNING,
                    f"{key_set.name} publishes {external.kid} ({external.alg}){_added(external)}, until "
                    f"{format_instant(external.remove_at)}: its owner can sign for {key_set.issuer}",
                    "Nothing, while an issuer moves here with this key. Otherwise: kms-jwks external-key remove "
                    f"{key_set.name} {external.kid}",
                )
        removed = [e for e in added if e.removed_at is not None]
        if removed:
            last = max(removed, key=lambda e: e.removed_at or 0)
            yield Check(
                "external key",
                State.OK,
                f"{key_set.name} published {len(removed)} before; the last one removed was {last.kid}{_added(last)}",
            )


def _added(external: ExternalKey) -> str:
    by = f" by {external.created_by}" if external.created_by else ""
    return f", added{by} at {format_instant(external.created_at)}"


def duties(registry: Registry) -> Iterator[Check]:
    """Clients that administrate what they sign or override."""
    found = False
    for client in registry.clients:
        held = [g for g in registry.grants if g.client_id == client.id]
        for grant in held:
            for other in combined_duties(held, grant) if grant.role == Role.ADMIN else ():
                found = True
                later = max(grant, other, key=lambda g: g.created_at)
                by = f" by {later.created_by}" if later.created_by else ""
                accepted = f"accepted{by} at" if later.accepted_combined_duties else "never accepted, given at"
                yield Check(
                    "duties",
                    State.WARNING,
                    f"client {client.name} has the roles admin ({_scope(registry, grant)}) and {other.role} "
                    f"({_scope(registry, other)}): {accepted} {format_instant(later.created_at)}",
                    f"Give one of the roles to another client, then: kms-jwks grant delete {other.id}",
                )
    if not found:
        yield Check("duties", State.OK, "no client administrates what it signs or overrides")


def _scope(registry: Registry, grant: Grant) -> str:
    if grant.key_set_id is None:
        return "everything"
    key_set = next((s.name for s in registry.key_sets if s.id == grant.key_set_id), grant.key_set_id)
    key = next((f" {k.name}" for k in registry.keys if k.id == grant.key_id), "")
    return f"{key_set}{key}"


def expiry(registry: Registry) -> Iterator[Check]:
    """API tokens and external keys that end soon."""
    for ending in registry.ending[:MAX_ENDING]:
        days = (ending.end - registry.now) // (DAY * SECOND)
        yield Check(
            "expiry",
            State.WARNING,
            f"{ending.words} ends at {format_instant(ending.end)}, in {days} days",
            ending.next_step,
        )
    if more := len(registry.ending[MAX_ENDING:]):
        yield Check("expiry", State.WARNING, f"{more} more end soon", "kms-jwks client token list CLIENT")
    if not registry.ending:
        days = EXPIRY_NOTICE // DAY
        yield Check("expiry", State.OK, f"no API token and no external key ends within {days} days")


def same_keys(registry: Registry) -> Iterator[Check]:
    """Public keys that are in use although they were revoked, and those that several key sets use."""
    names = {s.id: s.name for s in registry.key_sets}
    holders: dict[str, list[tuple[Id, str]]] = {}
    for version in registry.versions:
        if version.public_jwk is not None and version.revoked_at is None:
            place = holders.setdefault(jose.thumbprint(version.public_jwk), [])
            place.append((version.key_set_id, f"version {registry.name_of(version)}"))
    for external in (e for e in registry.external_records if e.removed_at is None):
        place = holders.setdefault(jose.thumbprint(external.public_jwk), [])
        place.append((external.key_set_id, f"external key {names[external.key_set_id]} {external.kid}"))
    for thumbprint, found in holders.items():
        listed = some([words for _, words in found])
        if thumbprint in registry.revoked_keys:
            yield Check(
                "same key",
                State.FAILURE,
                f"in use although its public key was revoked elsewhere: {listed}",
                "Revoke it there too: kms-jwks version revoke, or kms-jwks external-key remove.",
            )
        elif len({key_set for key_set, _ in found}) > 1:
            yield Check(
                "same key",
                State.WARNING,
                f"one key pair in several key sets: {listed}",
                "Rotate or remove all but one: the signer of one set makes tokens that the keys of the other verify.",
            )


def unknown_backends(registry: Registry, backends: Iterable[str]) -> Iterator[Check]:
    """Backends that hold keys and are not configured on this node."""
    for name in sorted({v.backend for v in registry.versions} - set(backends)):
        versions = [registry.name_of(v) for v in registry.versions if v.backend == name]
        yield Check(
            f"backend {name}",
            State.FAILURE,
            f"not configured on this node, and holds the keys of {some(versions)}",
            f"Add [backends.{name}] to the settings.",
        )
