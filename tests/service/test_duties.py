"""Separate duties, external keys and their record, API tokens that rotate, and what is said about what ends soon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import structlog.testing

from kms_jwks import doctor, errors, wire
from kms_jwks.access import Role
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.model import DAY, Id
from kms_jwks.service.guard import RequestContext
from kms_jwks.times import later, to_datetime
from tests.service.world import World

ALL: dict[str, str] = {}
MAIN = {"key_set": "main"}
OTHER = {"key_set": "other"}


@pytest.fixture
def sets(quiet: World) -> World:
    """Two key sets without keys, and the clients `one` and `two` without grants."""
    for name in ("main", "other"):
        quiet.create(name, keys=[])
    for name in ("one", "two"):
        quiet.service.clients.create(quiet.admin, wire.ClientCreate(name=name))
    return quiet


def give(world: World, client: str, role: str, scope: dict[str, str], *, accept: bool = False) -> wire.Grant:
    body = {"client": client, "role": role, "scope": scope, "accept_combined_duties": accept}
    return world.service.clients.create_grant(world.admin, wire.convert(body, wire.GrantCreate))


def grants(world: World) -> list[Any]:
    return world.service.clients.grants(world.admin, 100, None).items


def findings(world: World, *names: str) -> list[tuple[str, str, str]]:
    """What doctor says under some names: state, detail and next step."""
    checks = doctor.examine(world.settings, world.registry, world.backends(), wall=world.wall)
    return [(c.state.value, c.detail, c.next_step) for c in checks if c.name in names]


# --- combined duties


def test_a_client_does_not_administrate_what_it_signs_or_overrides(sets: World) -> None:
    """Whichever of the two it gets first; `test_access` has the table of roles and scopes."""
    for client, held, wanted in (
        ("one", ("admin", MAIN), [("signer", ALL), ("raw-signer", MAIN), ("break-glass", MAIN)]),
        ("two", ("break-glass", MAIN), [("admin", ALL), ("admin", MAIN)]),
    ):
        first = give(sets, client, *held)
        before = grants(sets)
        for role, scope in wanted:
            with pytest.raises(errors.CombinedDuties, match=f"{client}.*{held[0]}.*{role}") as refusal:
                give(sets, client, role, scope)
            assert refusal.value.fields == {"grants": [first.id]}
            assert "--accept-combined-duties" in refusal.value.next_step
        assert grants(sets) == before
        assert give(sets, client, wanted[0][0], OTHER).combined_with == []


def test_accepted_duties_stay_visible(sets: World) -> None:
    signer = give(sets, "one", "signer", MAIN)
    with structlog.testing.capture_logs() as logs:
        admin = give(sets, "one", "admin", ALL, accept=True)
    assert [(line["event"], line["client"], line["by"]) for line in logs] == [("combined_duties", "one", "admin")]
    assert (admin.combined_with, admin.accepted_combined_duties, admin.created_by) == ([signer.id], True, "admin")
    shown = {g.id: g for g in grants(sets)}
    assert shown[admin.id] == admin == sets.service.clients.grant(sets.admin, admin.id)
    assert (shown[signer.id].combined_with, shown[signer.id].accepted_combined_duties) == ([admin.id], False)
    ((state, detail, step),) = findings(sets, "duties")
    assert state == "warning"
    assert detail.startswith("client one has the roles admin (everything) and signer (main): accepted by admin at 20")
    assert step.endswith(f"kms-jwks grant delete {signer.id}")
    assert give(sets, "one", "admin", ALL).id == admin.id, "the same grant twice is one, and asks for nothing again"

    sets.service.clients.delete_grant(sets.admin, signer.id)
    assert sets.service.clients.grant(sets.admin, admin.id).combined_with == []
    assert findings(sets, "duties") == [("ok", "no client administrates what it signs or overrides", "")]


def test_nothing_is_recorded_as_accepted_where_nothing_is_combined(sets: World) -> None:
    assert give(sets, "one", "signer", MAIN, accept=True).accepted_combined_duties is False


def test_a_combination_from_before_is_shown_as_never_accepted(sets: World) -> None:
    give(sets, "one", "signer", ALL)
    admin = give(sets, "one", "admin", ALL, accept=True)
    with sets.registry.write() as tx:
        found = tx.grant(Id(admin.id))
        assert found is not None
        tx.save(replace(found, accepted_combined_duties=False, created_by=None))
    ((state, detail, _),) = findings(sets, "duties")
    assert state == "warning"
    assert "(everything): never accepted, given at 20" in detail


def test_a_client_changes_no_grant_of_its_own(sets: World) -> None:
    own = next(g for g in grants(sets) if g.client == "admin")
    for role in ("signer", "break-glass", "verifier", "admin"):
        with pytest.raises(errors.Forbidden, match="its own grants"):
            give(sets, "admin", role, ALL, accept=True)
    with pytest.raises(errors.Forbidden, match="its own grants"):
        sets.service.clients.delete_grant(sets.admin, own.id)
    assert next(g for g in grants(sets) if g.client == "admin") == own
    second = sets.client("second", Role.ADMIN)
    sets.service.clients.delete_grant(second, own.id)
    with pytest.raises(errors.Forbidden):
        grants(sets)


# --- external keys


def add_external(world: World, context: RequestContext, kid: str, *, days: float = 365) -> wire.ExternalKey:
    foreign = world.backend.generate(f"foreign-{kid}", ALGORITHMS["ES256"])
    end = to_datetime(later(world.now(), int(days * DAY)))
    request = wire.ExternalKeyCreate(kid=kid, alg="ES256", remove_at=end, jwk=dict(foreign.public_jwk))
    return world.service.external_keys.create(context, "main", request)


def test_who_administrates_a_key_set_alone_publishes_no_key_of_its_own(sets: World) -> None:
    with sets.registry.read() as tx:
        key_set = tx.key_set("main")
    assert key_set is not None
    local = sets.client("local", Role.ADMIN, key_set.id)
    with pytest.raises(errors.Forbidden, match="over everything") as refusal:
        add_external(sets, local, "forged")
    assert refusal.value.fields == {"permission": "external-key:manage"}
    assert "whole installation" in refusal.value.next_step
    assert sets.service.key_sets.get(sets.admin, "main").external_keys == []
    add_external(sets, sets.admin, "old")
    sets.service.external_keys.delete(local, "main", "old")  # what verifiers trust no longer is its own affair


def test_each_addition_is_shown_and_its_record_survives_the_removal(world: World) -> None:
    world.create(existing_issuer=True)
    with structlog.testing.capture_logs() as logs:
        made = add_external(world, world.admin, "old")
    added = [line for line in logs if line["event"] == "external_key_added"]
    assert [(line["key_set"], line["kid"], line["client"]) for line in added] == [("main", "old", "admin")]
    assert made.created_by == "admin"
    found = world.service.key_sets.get(world.admin, "main")
    assert (found.external_keys, found.external_keys_removed) == ([made], 0)
    safety = world.service.versions.safety(world.admin, "main", "default", "1")
    assert (safety.external_keys, safety.external_keys_removed) == ([made], 0)
    ((state, detail, step),) = findings(world, "external key")
    assert state == "warning"
    assert detail.startswith("main publishes old (ES256), added by admin at 20")
    assert detail.endswith("its owner can sign for https://keys.example/main")
    assert "kms-jwks external-key remove main old" in step

    world.service.external_keys.delete(world.admin, "main", "old")
    found = world.service.key_sets.get(world.admin, "main")
    assert (found.external_keys, found.external_keys_removed) == ([], 1)
    safety = world.service.versions.safety(world.admin, "main", "default", "1")
    assert (safety.external_keys, safety.external_keys_removed) == ([], 1)
    (record,) = world.service.external_keys.list(world.admin, "main", 10, None).items
    assert (record.kid, record.created_by, record.removed_at is not None) == ("old", "admin", True)
    ((state, detail, _),) = findings(world, "external key")
    assert state == "ok"
    assert detail.startswith("main published 1 before; the last one removed was old, added by admin at 20")


# --- rotation of API tokens


def token_of(world: World, client: str, lifetime: int = 90 * DAY) -> wire.TokenCreated:
    return world.service.clients.create_token(world.admin, client, wire.TokenCreate(expires_in=lifetime))


def works(world: World, token: wire.TokenCreated) -> bool:
    try:
        world.service.authenticate(RequestContext(f"Bearer {token.token}"), data_plane=True)
        world.service.authenticate(RequestContext(f"Bearer {token.token}"), data_plane=False)
    except errors.CredentialsExpired:
        return False
    return True


def test_a_rotated_token_ends_after_the_overlap(sets: World) -> None:
    for body, overlap in (
        ({}, DAY),
        ({"overlap": 3600}, 3600),
        ({"overlap": 0}, 0),
        ({"overlap": 30 * DAY}, 10 * DAY),  # never beyond its own end
    ):
        old = token_of(sets, "one", 10 * DAY)
        request = wire.convert({**body, "expires_in": 60 * DAY}, wire.TokenRotate)
        made = sets.service.clients.rotate_token(sets.admin, "one", old.id, request)
        assert made.replaces == old.id
        assert (made.expires_at - to_datetime(sets.now())).days == 59
        ends_in = (made.replaced_expires_at - to_datetime(sets.now())).total_seconds()
        assert overlap - 60 < ends_in <= overlap
        assert made.replaced_expires_at <= old.expires_at
        listed = {t.id: t for t in sets.service.clients.tokens(sets.admin, "one", 100, None).items}
        assert (listed[old.id].replaced_by, listed[old.id].expires_at) == (made.id, made.replaced_expires_at)
        assert listed[made.id].replaced_by is None
        if overlap:
            assert works(sets, old)
            sets.advance(overlap + 1)
        assert [works(sets, token) for token in (old, made)] == [False, True]


def test_what_cannot_be_rotated(sets: World) -> None:
    rotate: Callable[..., Any] = sets.service.clients.rotate_token
    revoked, short, other = token_of(sets, "one"), token_of(sets, "one", 60), token_of(sets, "two")
    sets.service.clients.revoke_token(sets.admin, "one", revoked.id)
    sets.advance(61)
    give(sets, "two", "signer", ALL)
    before = sets.service.clients.tokens(sets.admin, "one", 10, None).items
    for context, token, error, words in (
        (sets.admin, revoked.id, errors.Conflict, "was revoked"),
        (sets.admin, short.id, errors.Conflict, "has expired"),
        (sets.admin, other.id, errors.ApiTokenNotFound, "no such token"),
        (RequestContext(f"Bearer {other.token}"), other.id, errors.Forbidden, "client:manage"),
    ):
        with pytest.raises(error, match=words) as refusal:
            rotate(context, "one" if token != other.id or context is sets.admin else "two", token, wire.TokenRotate())
        if error is errors.Conflict:
            assert refusal.value.next_step.endswith("kms-jwks client token create one")
    assert sets.service.clients.tokens(sets.admin, "one", 10, None).items == before


# --- what ends soon


def test_what_ends_within_30_days_is_shown_and_logged_once_a_day(sets: World) -> None:
    now = [0.0]
    custodian = sets.custodian()
    custodian._monotonic = lambda: now[0]
    custodian._next_expiry = 0.0

    def logged() -> list[str]:
        with structlog.testing.capture_logs() as logs:
            for _ in range(3):
                custodian.tick()
        return [f"{line['log_level']} {line['subject']}" for line in logs if line["event"] == "ends_soon"]

    def warned() -> list[str]:
        tokens = sets.service.clients.tokens(sets.admin, "one", 10, None).items
        return [t.id for t in tokens if t.warnings]

    soon, late = token_of(sets, "one", 29 * DAY), token_of(sets, "one", 31 * DAY)
    hourly, rotated = token_of(sets, "one", 3600), token_of(sets, "one", 20 * DAY)
    revoked, gone = token_of(sets, "one", 20 * DAY), token_of(sets, "two", 20 * DAY)
    sets.service.clients.rotate_token(sets.admin, "one", rotated.id, wire.TokenRotate())
    sets.service.clients.revoke_token(sets.admin, "one", revoked.id)
    sets.service.clients.delete(sets.admin, "two")
    add_external(sets, sets.admin, "leaves", days=25)
    add_external(sets, sets.admin, "stays", days=40)

    assert logged() == ["warning leaves", f"warning {soon.id}"]
    assert logged() == [], "once a day"
    assert warned() == [soon.id]
    assert hourly.id not in warned()
    assert gone.id not in logged()
    ((_, first, _), (state, second, step)) = findings(sets, "expiry")
    assert first.startswith("external key leaves of key set main ends at ")
    assert state == "warning"
    assert second.startswith(f"API token {soon.id} of client one ends at ")
    assert second.endswith(", in 28 days")
    assert step == f"kms-jwks client token rotate one {soon.id}"

    now[0] += 86_400
    sets.advance(2 * DAY)
    assert logged() == ["warning leaves", f"warning {soon.id}", f"warning {late.id}"]
    assert set(warned()) == {soon.id, late.id}
