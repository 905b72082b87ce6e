"""The life of key versions through the use cases; the tests move the clock."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kms_jwks import errors, wire
from kms_jwks.access import Role
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.model import DAY, IntentKind, VersionState
from kms_jwks.service.guard import RequestContext
from kms_jwks.timeline import later
from kms_jwks.times import to_datetime, to_instant
from tests.service.world import UNSAFE, World

S = VersionState
NOTHING = wire.RotateRequest()


def retirement(world: World) -> float:
    """Seconds from a deactivation until the version may leave the JWKS, at the defaults."""
    return 60 + 10 + 3600 + 300


# --- creation and first publication (I1)


def test_the_first_keys_of_a_set_sign_at_once(world: World) -> None:
    made = world.create(keys=[{"name": "default", "alg": "ES256"}, {"name": "second", "alg": "EdDSA"}])
    assert [k.active_kid is not None for k in made.keys] == [True, True]
    assert world.sign().kid == made.keys[0].active_kid
    assert set(world.kids()[:2]) == {k.active_kid for k in made.keys}


def test_an_active_version_gets_a_standby(world: World) -> None:
    made = world.create()
    standby = world.standby()
    assert standby.number == 2
    world.until(lambda: world.kids() == [made.keys[0].active_kid, standby.kid])


def test_a_set_that_never_published_has_no_jwks(world: World) -> None:
    world.create(keys=[])
    with pytest.raises(errors.NotPublished):
        world.kids()


def test_a_key_added_later_waits_for_the_publish_lead(world: World) -> None:
    world.create()
    made = world.service.keys.create(world.admin, "main", wire.KeyCreate(name="second", alg="ES256"))
    (version,) = made.answer.versions
    assert (made.complete, version.state, made.answer.active_kid) == (True, "published", None)
    with pytest.raises(errors.NotYetUsable) as refusal:
        world.service.versions.activate(world.admin, "main", "second", "1")
    assert refusal.value.fields["usable_at"] == version.usable_at
    world.advance(DAY - 60)
    assert world.service.keys.get(world.admin, "main", "second").active_kid is None
    world.advance(61)
    world.until(lambda: world.service.keys.get(world.admin, "main", "second").active_kid)


def test_an_existing_issuer_has_no_first_publication(world: World) -> None:
    made = world.create(existing_issuer=True)
    assert made.keys[0].active_kid is None
    assert len(world.kids()) == 1
    with pytest.raises(errors.NoActiveVersion):
        world.sign()
    world.advance(DAY + 1)
    world.until(lambda: world.service.key_sets.get(world.admin, "main").keys[0].active_kid)


def test_a_silent_worker_delays_visibility_and_a_stopped_one_does_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kms_jwks.service.control.CUSTODIAN_WAIT", 1.0)
    silent = world.worker()
    silent.sync.poll()
    request = wire.KeySetCreate(name="main", keys=[wire.KeyCreate(name="default", alg="ES256")])
    world.until(silent.sync.has_lease)
    made = world.service.key_sets.create(world.admin, request)
    assert not made.complete, "a worker that has not confirmed cannot be passed over"
    silent.stop()
    world.until(lambda: world.service.key_sets.get(world.admin, "main").keys[0].active_kid)


# --- rotation


def test_rotate_names_the_earliest_time_and_succeeds_then(world: World) -> None:
    first = world.create().keys[0].active_kid
    standby = world.standby()
    with pytest.raises(errors.NotYetUsable) as refusal:
        world.service.keys.rotate(world.admin, "main", "default", NOTHING)
    assert refusal.value.fields["usable_at"] is not None
    assert world.sign().kid == first
    world.advance(DAY + 1)
    answer = world.service.keys.rotate(world.admin, "main", "default", NOTHING)
    assert answer.active_kid == standby.kid == world.sign().kid
    assert [v.state for v in answer.versions][:2] == ["retiring", "active"]
    world.until(lambda: len(world.kids()) == 3)
    assert world.kids()[0] == standby.kid


def test_a_retiring_version_leaves_when_no_token_can_be_alive_and_is_destroyed_on_its_date(world: World) -> None:
    first = world.create().keys[0].active_kid
    world.standby()
    world.advance(DAY + 1)
    world.service.keys.rotate(world.admin, "main", "default", NOTHING)
    world.advance(retirement(world) - 5)
    assert first in world.kids()
    world.advance(10)
    world.until(lambda: first not in world.kids())
    retired = world.version(1)
    assert retired.state is S.RETIRED
    assert retired.ref is not None
    assert retired.ref["id"] in world.backend.keys
    world.advance(30 * DAY + 60)
    gone = world.until(lambda: world.version(1) if world.version(1).state is S.DESTROYED else None)
    assert gone is not None
    assert retired.ref["id"] not in world.backend.keys


def test_a_destruction_can_be_cancelled(world: World) -> None:
    world.create()
    world.standby()
    world.advance(DAY + 1)
    world.service.keys.rotate(world.admin, "main", "default", NOTHING)
    with pytest.raises(errors.TransitionRefused):
        world.service.versions.destroy(world.admin, "main", "default", "1", wire.DestroyRequest())
    world.advance(retirement(world) + 5)
    world.until(lambda: world.version(1).state is S.RETIRED)
    assert world.service.versions.cancel_destroy(world.admin, "main", "default", "1").destroy_at is None
    with pytest.raises(errors.TransitionRefused):
        world.service.versions.cancel_destroy(world.admin, "main", "default", "1")
    world.advance(60 * DAY)
    assert world.version(1).state is S.RETIRED
    scheduled = world.service.versions.destroy(world.admin, "main", "default", "1", wire.DestroyRequest())
    assert scheduled.destroy_at is not None


def test_a_destruction_date_is_at_least_a_week_ahead(world: World) -> None:
    world.create()
    world.service.revocation.revoke_version(world.admin, "main", "default", "1", wire.RevokeRequest())
    soon = wire.convert({"destroy_at": "2026-01-01T00:00:00Z"}, wire.DestroyRequest)
    with pytest.raises(errors.InvalidField, match="destroy_at"):
        world.service.versions.destroy(world.admin, "main", "default", "1", soon)


def test_rotate_with_another_expected_kid_changes_nothing(world: World) -> None:
    world.create()
    world.standby()
    world.advance(DAY + 1)
    with pytest.raises(errors.ActiveKidMismatch) as refusal:
        world.service.keys.rotate(world.admin, "main", "default", wire.RotateRequest(expected_kid="another"))
    assert refusal.value.fields["active_kid"] == world.sign().kid


def test_keys_of_a_set_rotate_one_at_a_time(world: World) -> None:
    world.create(keys=[{"name": "default", "alg": "ES256"}, {"name": "second", "alg": "ES256"}])
    world.until(lambda: len([v for v in world.versions() if v.state is S.PUBLISHED and v.visible_since]) == 2)
    world.advance(DAY + 1)
    world.service.keys.rotate(world.admin, "main", "default", NOTHING)
    with pytest.raises(errors.RotationInProgress):
        world.service.keys.rotate(world.admin, "main", "second", NOTHING)
    world.advance(retirement(world) + 5)
    world.until(lambda: world.version(1).state is S.RETIRED)
    assert world.service.keys.rotate(world.admin, "main", "second", NOTHING).active_kid


# --- revocation


def test_a_revoked_version_is_gone_at_once_and_the_standby_signs(two_workers: World) -> None:
    world = two_workers
    first = world.create().keys[0].active_kid
    standby = world.standby()
    answer = world.service.revocation.revoke_version(
        world.admin, "main", "default", "1", wire.RevokeRequest(reason="it leaked")
    )
    for worker in world.workers:
        assert world.sign(worker=worker).kid == standby.kid
        assert first not in world.kids(worker)
    assert answer.successor is not None
    assert answer.successor.kid == standby.kid
    assert answer.successor.breaches[0].invariant == "I1"
    assert answer.version.revoke_reason == "it leaked"
    assert answer.unconfirmed == []
    world.until(lambda: world.version(3).state is S.PUBLISHED)


def test_a_revocation_without_a_standby_stops_signing_until_one_is_visible(world: World) -> None:
    world.create()
    world.standby()
    world.service.revocation.revoke_version(world.admin, "main", "default", "2", wire.RevokeRequest())
    world.backend.fail = errors.BackendUnavailable("away")
    world.service.revocation.revoke_version(world.admin, "main", "default", "1", wire.RevokeRequest())
    with pytest.raises((errors.NoActiveVersion, errors.BackendUnavailable)):
        world.sign()
    world.backend.fail = None
    world.advance(120)
    world.until(lambda: any(v.state is S.ACTIVE for v in world.versions()))
    successor = next(v for v in world.versions() if v.state is S.ACTIVE)
    assert successor.breaches


def test_a_revocation_can_be_repeated_after_a_lost_answer(world: World) -> None:
    world.create()
    world.standby()
    first = world.service.revocation.revoke_version(
        world.admin, "main", "default", "1", wire.RevokeRequest(reason="once")
    )
    active = [v.number for v in world.versions() if v.state is S.ACTIVE]
    again = world.service.revocation.revoke_version(
        world.admin, "main", "default", "1", wire.RevokeRequest(reason="twice")
    )
    assert again.version == first.version
    assert (again.successor, again.unconfirmed) == (None, [])
    assert [v.number for v in world.versions() if v.state is S.ACTIVE] == active


# --- disable, enable


def test_a_disabled_key_signs_nothing_and_stays_published(two_workers: World) -> None:
    world = two_workers
    kid = world.create().keys[0].active_kid
    assert not world.service.keys.disable(world.admin, "main", "default").enabled
    for worker in world.workers:
        with pytest.raises(errors.KeyDisabled):
            world.sign(worker=worker)
        assert kid in world.kids(worker)
    assert world.service.keys.enable(world.admin, "main", "default").enabled
    for worker in world.workers:
        assert world.sign(worker=worker).kid == kid


# --- definitions that are refused


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"name": "UPPER"}, errors.InvalidField),
        ({"name": "v1"}, errors.InvalidField),
        ({"issuer": "urn:x"}, errors.InvalidField),
        ({"issuer": "https://user@issuer.example"}, errors.InvalidField),
        ({"issuer": "https://issuer.example/?a"}, errors.InvalidField),
        ({"cache_lifetime": 59}, errors.InvalidField),
        ({"cache_lifetime": 901}, errors.InvalidField),
        ({"keys": [{"name": "a", "alg": "HS256"}]}, errors.UnsupportedAlgorithmRequested),
        ({"keys": [{"name": "a", "alg": "ES256", "rsa_bits": 2048}]}, errors.InvalidField),
        ({"keys": [{"name": "a", "alg": "ES256", "backend": "other"}]}, errors.BackendUnknown),
        ({"keys": [{"name": "a", "alg": "ES256", "policy": {"publish_lead": 60}}]}, errors.PolicyRefused),
        ({"keys": [{"name": "a", "alg": "ES256"}, {"name": "a", "alg": "ES256"}]}, errors.NameTaken),
        ({"keys": [{"name": "a", "alg": "ES256"}, {"name": "b", "alg": "ES256K"}]}, errors.LimitReached),
        ({"keys": [{"name": n, "alg": "ES256"} for n in "abcde"]}, errors.LimitReached),
    ],
)
def test_refused_definitions_write_nothing(world: World, fields: dict[str, Any], error: type[errors.Error]) -> None:
    with pytest.raises(error):
        world.create(**({"name": "main"} | fields))
    with world.registry.read() as tx:
        assert tx.key_sets() == []
        assert tx.keys() == []
        assert tx.versions() == []


def test_a_name_is_taken_for_ever(world: World) -> None:
    world.create()
    with pytest.raises(errors.NameTaken):
        world.create()


def test_an_issuer_has_one_key_set(world: World) -> None:
    world.create("a", keys=[], issuer="https://issuer.example")
    with pytest.raises(errors.IssuerTaken):
        world.create("b", keys=[], issuer="https://issuer.example", purpose="raw")
    world.create("c", keys=[])
    with pytest.raises(errors.IssuerTaken):
        world.service.key_sets.patch(world.admin, "c", wire.KeySetPatch(issuer="https://issuer.example"), 1)


def test_a_default_lifetime_that_no_token_could_have_is_refused(world: World) -> None:
    long = {"name": "default", "alg": "ES256", "profile": {"default_lifetime": 4000}}
    with pytest.raises(errors.PolicyRefused):
        world.create(keys=[long])
    short = {"name": "default", "alg": "ES256", "policy": {"max_token_ttl": 60}}
    made = world.create(keys=[short])
    assert made.keys[0].profile.default_lifetime == 60


def test_an_emergency_takes_a_standby_that_is_not_visible_yet(short_lease: World) -> None:
    world = short_lease
    world.create()
    world.standby()
    silent = world.worker()
    silent.sync.poll()
    world.service.revocation.revoke_version(world.admin, "main", "default", "1", wire.RevokeRequest())
    young = world.until(lambda: next((v for v in world.versions() if v.number == 3 and v.state is S.PUBLISHED), None))
    assert young is not None
    assert young.visible_since is None, "a silent worker keeps it from being visible"
    answer = world.service.revocation.revoke_version(world.admin, "main", "default", "2", wire.RevokeRequest())
    assert answer.successor is not None
    assert (answer.successor.number, answer.successor.breaches[0].invariant) == (3, "I1")
    assert world.sign().kid == young.kid
    silent.stop()


def test_the_refusal_of_a_key_that_cannot_be_made_names_the_reason(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kms_jwks.service.control.CUSTODIAN_WAIT", 0.5)
    world.backend.fail = errors.BackendRefused("the PIN is wrong")
    request = wire.KeySetCreate(name="main", keys=[wire.KeyCreate(name="default", alg="ES256")])
    made = world.service.key_sets.create(world.admin, request)
    assert not made.complete
    assert made.answer.keys[0].versions[0].trouble == "the PIN is wrong"
    world.backend.fail = None


def test_an_algorithm_that_the_module_lacks_is_refused_and_nothing_is_written(world: World) -> None:
    world.backend.offered = frozenset({"RS256"})
    with pytest.raises(errors.UnsupportedAlgorithmRequested):
        world.create()
    with world.registry.read() as tx:
        assert tx.key_sets() == []


def test_a_full_document_takes_no_more_keys(world: World) -> None:
    world.create(keys=[{"name": "default", "alg": "ES256", "policy": UNSAFE}])
    for number in range(2, 10):
        world.until(lambda: any(v.number == number and v.visible_since for v in world.versions()))  # noqa: B023
        world.service.keys.rotate(world.admin, "main", "default", NOTHING)
    world.until(lambda: len(world.kids()) == 10)
    foreign = world.backend.generate("foreign", ALGORITHMS["ES256"])
    request = wire.ExternalKeyCreate(
        kid="old", alg="ES256", remove_at=to_datetime(later(world.now(), 3600)), jwk=dict(foreign.public_jwk)
    )
    with pytest.raises(errors.LimitReached):
        world.service.external_keys.create(world.admin, "main", request)
    with pytest.raises(errors.LimitReached):
        world.service.keys.create(world.admin, "main", wire.KeyCreate(name="second", alg="ES256"))
    assert len(world.kids()) == 10


def test_a_destruction_put_off_while_the_module_is_away_waits_for_its_new_date(world: World) -> None:
    world.create()
    world.standby()
    world.service.revocation.revoke_version(world.admin, "main", "default", "1", wire.RevokeRequest())
    world.until(lambda: any(v.number == 3 and v.state is S.PUBLISHED for v in world.versions()))
    world.backend.fail = errors.BackendUnavailable("away")
    world.advance(31 * DAY)

    def begun() -> bool:
        with world.registry.read() as tx:
            return any(i.kind is IntentKind.DESTROY for i in tx.intents())

    world.until(begun)
    far = wire.DestroyRequest(destroy_at=to_datetime(later(world.now(), 90 * DAY)))

    def put_off() -> bool:
        try:
            return world.service.versions.destroy(world.admin, "main", "default", "1", far).destroy_at is not None
        except errors.TransitionRefused:
            return False  # an attempt is under way at this moment

    world.until(put_off)
    world.backend.fail = None
    world.advance(120)
    time.sleep(0.5)
    assert world.version(1).state is S.REVOKED
    world.advance(91 * DAY)
    world.until(lambda: world.version(1).state is S.DESTROYED)


def test_an_unsafe_policy_is_shown_with_a_warning(world: World) -> None:
    made = world.create(keys=[{"name": "default", "alg": "ES256", "policy": UNSAFE}])
    assert "unsafe publish_lead" in made.keys[0].warnings[0]


# --- changes


def test_a_change_needs_the_revision_it_was_read_at(world: World) -> None:
    world.create()
    change = wire.KeySetPatch(cache_lifetime=600)
    with pytest.raises(errors.RevisionRequired):
        world.service.key_sets.patch(world.admin, "main", change, None)
    revision = world.service.key_sets.get(world.admin, "main").revision
    with pytest.raises(errors.RevisionMismatch):
        world.service.key_sets.patch(world.admin, "main", change, revision - 1)
    changed = world.service.key_sets.patch(world.admin, "main", change, revision)
    assert (changed.cache_lifetime, changed.revision) == (600, revision + 1)


def test_the_issuer_is_immutable_once_a_key_could_sign(world: World) -> None:
    world.create("empty", keys=[])
    change = wire.KeySetPatch(issuer="https://elsewhere.example")
    assert world.service.key_sets.patch(world.admin, "empty", change, 1).issuer == "https://elsewhere.example"
    made = world.create()
    with pytest.raises(errors.Immutable):
        world.service.key_sets.patch(world.admin, "main", change, made.revision)


def test_a_larger_ttl_is_remembered_on_every_version_that_can_sign(world: World) -> None:
    world.create()
    longer = wire.KeyPatch(policy=wire.PolicyFields(max_token_ttl=7200))
    shorter = wire.KeyPatch(policy=wire.PolicyFields(max_token_ttl=600))
    answer = world.service.keys.patch(world.admin, "main", "default", longer, 1)
    world.service.keys.patch(world.admin, "main", "default", shorter, answer.revision)
    assert world.version(1).bounds.max_token_ttl == 7200
    assert world.sign(expires_in=600).token
    with pytest.raises(errors.ClaimsRefused):
        world.sign(expires_in=601)


# --- reading


def test_safety_and_attributes(world: World) -> None:
    world.create()
    standby = world.standby()
    safety = world.service.versions.safety(world.admin, "main", "default", "2")
    assert (safety.kid, [c.holds for c in safety.checks]) == (standby.kid, [False])
    evidence = world.service.versions.attributes(world.admin, "main", "default", "1")
    assert (evidence.generated_in_module, evidence.non_extractable, evidence.sign_only) == (True, True, True)
    assert evidence.recorded["sign_only"] is True


def test_versions_are_found_by_number_and_kid_of_their_own_key_only(world: World) -> None:
    made = world.create(keys=[{"name": "default", "alg": "ES256"}, {"name": "second", "alg": "ES256"}])
    kid = made.keys[1].active_kid or ""
    assert world.service.versions.get(world.admin, "main", "second", kid).number == 1
    with pytest.raises(errors.VersionNotFound):
        world.service.versions.get(world.admin, "main", "default", kid)
    for other in ("99", "01", "0"):
        with pytest.raises(errors.VersionNotFound):
            world.service.versions.get(world.admin, "main", "default", other)


def test_lists_are_paged(world: World) -> None:
    for name in ("a", "b", "c"):
        world.create(name, keys=[])
    first = world.service.key_sets.list(world.admin, 2, None)
    assert [s.name for s in first.items] == ["a", "b"]
    second = world.service.key_sets.list(world.admin, 2, str(first.next))
    assert [s.name for s in second.items] == ["c"]


def test_a_list_shows_what_the_grants_cover(world: World) -> None:
    world.create("a", keys=[])
    world.create("b", keys=[])
    with world.registry.read() as tx:
        found = tx.key_set("b")
    assert found is not None
    narrow = world.client("narrow", Role.OPERATOR, found.id)
    assert [s.name for s in world.service.key_sets.list(narrow, 10, None).items] == ["b"]
    with pytest.raises(errors.Forbidden):
        world.service.key_sets.get(narrow, "a")
    with pytest.raises(errors.Forbidden):
        world.service.key_sets.get(narrow, "unknown")
    with pytest.raises(errors.CredentialsMissing):
        world.service.key_sets.list(RequestContext(), 10, None)


# --- external keys


def test_an_external_key_is_published_until_its_date(world: World) -> None:
    world.create(existing_issuer=True)
    foreign = world.backend.generate("foreign", ALGORITHMS["RS256"])
    remove_at = to_datetime(later(world.now(), 3600))
    request = wire.ExternalKeyCreate(kid="old-key", alg="RS256", remove_at=remove_at, jwk=dict(foreign.public_jwk))
    made = world.service.external_keys.create(world.admin, "main", request)
    assert to_instant(made.remove_at) > world.now()
    assert "old-key" in world.kids()
    with pytest.raises(errors.KidTaken):
        world.service.external_keys.create(world.admin, "main", request)
    world.advance(3601)
    world.until(lambda: "old-key" not in world.kids())
    later_on = wire.ExternalKeyCreate(
        kid="old-key", alg="RS256", remove_at=to_datetime(later(world.now(), 60)), jwk=dict(foreign.public_jwk)
    )
    world.service.external_keys.create(world.admin, "main", later_on)
    assert "old-key" in world.kids(), "the identical key comes back"
