"""How keys and key sets end: pairs that a module declines to make, deletion before a publication, retirement after it.

In virtual time, on the registry in memory (`tests/simulation`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kms_jwks import errors, timeline, wire
from kms_jwks.access import Role
from kms_jwks.algorithms import ALGORITHMS, Algorithm
from kms_jwks.custodian import transitions
from kms_jwks.custodian.intents import MAX_GENERATIONS
from kms_jwks.doctor import find_orphans
from kms_jwks.doctor import registry as registry_checks
from kms_jwks.doctor.registry import Registry
from kms_jwks.model import DAY, Client, IntentKind, IntentState, KeyVersion, VersionState
from kms_jwks.service.clients import add_grant
from kms_jwks.service.signing_job import SigningOperation
from kms_jwks.timeline import RETRY_AFTER_REFUSAL
from tests.lifecycle.test_crashes import crash, done, overtake, play
from tests.simulation.oracle import Oracle
from tests.simulation.plant import URL, Node, Plant, SimWorker, simulated
from tests.unit import builders
from tests.unit.builders import T0

LONG = os.environ.get("KMS_JWKS_TEST_LONG") == "1"
S = VersionState
POLICY = {
    "rotate_every": 20_000,
    "publish_lead": 7200,
    "max_token_ttl": 600,
    "clock_skew": 60,
    "rotate_jitter": 0,
    "destroy_after": 7 * DAY,
}
RETIRABLE = 60 + 10 + 600 + 60
"""Seconds from the end of signing until no token is alive: handover, lease, max_token_ttl and clock_skew (I2)."""


@pytest.fixture
def plant() -> Iterator[Plant]:
    with simulated(nodes=1) as made:
        Oracle(made)
        yield made


def api(plant: Plant) -> SimWorker:
    found = plant.api()
    assert found is not None
    return found


def spec(name: str, alg: str = "EdDSA") -> wire.KeyCreate:
    return wire.convert({"name": name, "alg": alg, "policy": POLICY}, wire.KeyCreate)


def start(plant: Plant) -> None:
    plant.create({"name": "default", "alg": "EdDSA", "policy": POLICY})
    plant.until(lambda: any(v.number == 2 and v.visible_since for v in plant.versions()))


def states(plant: Plant) -> dict[int, str]:
    return {v.number: v.state.value for v in plant.versions()}


def version(plant: Plant, number: int) -> KeyVersion:
    return next(v for v in plant.versions() if v.number == number)


def jwks(plant: Plant, key_set: str = "main") -> list[str] | None:
    snapshot = api(plant).snapshot
    assert snapshot is not None
    found = snapshot.key_sets.get(key_set)
    if found is None or found.jwks is None:
        return None
    return [part.split('"')[0] for part in found.jwks.body.decode().split('"kid":"')[1:]]


def decline(plant: Plant, error: errors.BackendError, *algs: str) -> None:
    """The module answers everything, but makes no pairs, or none of `algs`."""
    generate = type(plant.backend).generate

    def refuse(label: str, alg: Algorithm, **rest: Any) -> Any:
        if not algs or alg.name in algs:
            raise error
        return generate(plant.backend, label, alg, **rest)

    plant.backend.generate = refuse  # type: ignore[method-assign]


def comply(plant: Plant) -> None:
    plant.backend.__dict__.pop("generate", None)


def doctor(plant: Plant) -> list[tuple[str, str]]:
    return [(c.state.value, c.detail) for c in registry_checks.given_up(Registry.of(plant.view))]


def attempts(plant: Plant, of: KeyVersion) -> list[IntentState]:
    with plant.view.registry_view() as tx:
        return [i.state for i in tx.intents(version_id=of.id) if i.kind is IntentKind.GENERATE]


# --- a pair that is not made


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (errors.UnsupportedAlgorithm("no such mechanism"), errors.UnsupportedAlgorithmRequested),
        (errors.BackendRefused("CKR_TEMPLATE_INCONSISTENT"), errors.BackendRefused),
    ],
)
def test_a_creation_that_the_module_declines_answers_so_and_leaves_no_half_key(
    plant: Plant, error: errors.BackendError, answer: type[errors.Error]
) -> None:
    start(plant)
    decline(plant, error)
    with pytest.raises(answer) as refusal:
        api(plant).keys.create(plant.who, "main", spec("second"))
    assert (refusal.value.detail, refusal.value.fields["key"]) == (error.detail, "second")
    assert refusal.value.next_step == f"No key was created. {answer.next_step}"
    with pytest.raises(errors.KeyNotFound):
        api(plant).keys.get(plant.who, "main", "second")
    with pytest.raises(answer):
        api(plant).key_sets.create(plant.who, wire.KeySetCreate(name="other", keys=[spec("a"), spec("b")]))
    with pytest.raises(errors.KeySetNotFound):
        api(plant).key_sets.get(plant.who, "other")
    comply(plant)
    # Their names are free: nothing of them was ever published.
    assert api(plant).keys.create(plant.who, "main", spec("second")).complete
    assert api(plant).key_sets.create(plant.who, wire.KeySetCreate(name="other", keys=[spec("a")])).complete
    plant.settle()
    assert find_orphans(plant.view, plant.backends()) == []


def test_a_key_set_that_is_published_without_one_of_its_keys_says_what_is_there(plant: Plant) -> None:
    decline(plant, errors.BackendRefused("no"), "ES256")
    with pytest.raises(errors.BackendRefused) as refusal:
        api(plant).key_sets.create(plant.who, wire.KeySetCreate(name="main", keys=[spec("a"), spec("b", "ES256")]))
    assert (refusal.value.fields["key"], refusal.value.fields["created"]) == ("b", ["a"])
    assert "exists with a" in refusal.value.next_step
    plant.settle()
    [key] = api(plant).key_sets.get(plant.who, "main").keys
    assert (key.name, key.active_kid is not None) == ("a", True)


def test_a_standby_that_the_module_declines_ends_with_the_reason_and_is_asked_for_again(plant: Plant) -> None:
    start(plant)
    decline(plant, errors.BackendRefused("the token is full"))
    plant.advance(20_000, rounds=8)
    failed = version(plant, 3)
    assert (failed.state, failed.kid, attempts(plant, failed)) == (S.DESTROYED, None, [IntentState.FAILED])
    shown = api(plant).versions.get(plant.who, "main", "default", "3")
    assert (shown.state, shown.trouble) == ("destroyed", "the token is full")
    assert api(plant).keys.get(plant.who, "main", "default").warnings[-1] == "version 3 was not made: the token is full"
    lacking = "version 3 of main default was not made, the key has no standby: the token is full"
    assert doctor(plant) == [("warning", lacking)]
    step = next(s for s in api(plant).keys.timeline(plant.who, "main", "default").steps if s.kind == "create")
    assert "its module declined" in step.waits_for
    with pytest.raises(errors.NoStandby):
        api(plant).keys.rotate(plant.who, "main", "default", wire.RotateRequest())
    comply(plant)
    plant.advance(RETRY_AFTER_REFUSAL, rounds=8)
    assert states(plant)[4] == "published"
    assert api(plant).keys.get(plant.who, "main", "default").warnings == []
    assert doctor(plant) == []


@pytest.mark.parametrize(
    "error",
    [errors.BackendTimeout("late"), errors.BackendUnavailable("away"), errors.BackendThrottled("slow down")],
)
def test_other_failures_end_after_a_bounded_number_of_attempts(plant: Plant, error: errors.BackendError) -> None:
    start(plant)
    decline(plant, error)
    made = api(plant).keys.create(plant.who, "main", spec("second"))
    assert (made.complete, made.answer.versions[0].trouble) == (False, error.detail)
    first = plant.versions()[-1]
    for _ in range(MAX_GENERATIONS):
        plant.advance(61, rounds=1)
    assert attempts(plant, first) == [IntentState.FAILED] * MAX_GENERATIONS
    shown = api(plant).versions.get(plant.who, "main", "second", "1")
    assert (shown.state, shown.trouble) == ("destroyed", error.detail)
    assert api(plant).keys.get(plant.who, "main", "second").warnings == [f"version 1 was not made: {error.detail}"]
    [(state, words)] = doctor(plant)
    assert (state, words) == (
        "failure",
        f"version 1 of main second was not made, the key cannot sign: {error.detail}",
    )
    comply(plant)
    # It is not made in secret later: the operator asks again, or deletes the key.
    plant.advance(DAY)
    assert len(attempts(plant, first)) == MAX_GENERATIONS
    assert api(plant).versions.create(plant.who, "main", "second", wire.VersionCreate()).complete


def test_a_module_that_refuses_everything_says_nothing_about_the_pair(plant: Plant) -> None:
    """A wrong PIN is mended by its operator: the attempts go on, and one succeeds."""
    start(plant)
    plant.backend.fail = errors.BackendRefused("the PIN is wrong")
    made = api(plant).keys.create(plant.who, "main", spec("second"))
    assert (made.complete, made.answer.versions[0].state) == (False, "creating")
    plant.backend.fail = None
    plant.advance(61, rounds=8)
    assert states(plant)[1] == "published"


def test_a_version_that_a_revocation_gave_up_is_an_answer_too(plant: Plant) -> None:
    start(plant)
    decline(plant, errors.BackendUnavailable("away"))

    def revoke(node: Node, point: str) -> None:
        if point == "generate" or not any(v.state is S.CREATING for v in plant.versions()):
            return
        plant.at_point = lambda *_: None
        request = wire.RevocationCreate(reason="stolen", backend="memory", disable_keys=False)
        api(plant).revocation.revoke_scope(plant.who, request)

    plant.at_point = revoke
    with pytest.raises(errors.Conflict, match="given up"):
        api(plant).keys.create(plant.who, "main", spec("second"))
    with pytest.raises(errors.KeyNotFound):
        api(plant).keys.get(plant.who, "main", "second")


# --- deletion


def test_what_never_published_anything_can_be_deleted_and_its_name_is_free(plant: Plant) -> None:
    start(plant)
    decline(plant, errors.BackendUnavailable("away"))
    api(plant).keys.create(plant.who, "main", spec("mistake"))
    issuer = "https://issuer.example"
    api(plant).key_sets.create(plant.who, wire.KeySetCreate(name="typo", issuer=issuer, keys=[spec("a")]))
    with plant.view.write() as tx:
        key_set, typo = tx.key_set("main"), tx.key_set("typo")
        assert key_set is not None
        assert typo is not None
        key = tx.key(key_set.id, "mistake")
        assert key is not None
        tx.add(client := Client(id=key.id, name="shop", created_at=tx.now()))
        grants = [
            add_grant(tx, client, Role.SIGNER, key_set.id, key.id).id,
            add_grant(tx, client, Role.SIGNER, typo.id, None).id,
        ]
    api(plant).keys.delete(plant.who, "main", "mistake")
    api(plant).key_sets.delete(plant.who, "typo")
    comply(plant)
    plant.advance(DAY)
    with plant.view.registry_view() as tx:
        assert tx.grants(client.id) == []
        # Tombstones, with the reason.
        assert {g.id for g in tx.grants(client.id, include_deleted=True)} == set(grants)
        ended = [v for v in tx.versions() if v.failure is not None]
        assert [(v.state, v.failure and v.failure["code"]) for v in ended] == [(S.DESTROYED, "key_not_found")] * 2
        assert not tx.intents(states={IntentState.PENDING, IntentState.STARTED})
    for gone in ("mistake", "default"):
        with pytest.raises(errors.KeyNotFound if gone == "mistake" else errors.AlreadyPublished):
            api(plant).keys.delete(plant.who, "main", gone)
    api(plant).keys.create(plant.who, "main", spec("mistake"))
    api(plant).key_sets.create(plant.who, wire.KeySetCreate(name="typo", issuer=issuer, keys=[spec("a")]))
    with plant.view.registry_view() as tx:
        assert tx.grants(client.id) == [], "a grant on the deleted key says nothing about its successor"


def test_a_pair_that_waits_for_the_first_document_is_destroyed_with_its_key(plant: Plant) -> None:
    decline(plant, errors.BackendUnavailable("away"), "ES256")
    api(plant).key_sets.create(plant.who, wire.KeySetCreate(name="main", keys=[spec("a"), spec("b", "ES256")]))
    assert {v.alg: (v.state, v.kid is not None) for v in plant.versions()} == {
        "EdDSA": (S.CREATING, True),
        "ES256": (S.CREATING, False),
    }
    plant.backend.fail = errors.BackendUnavailable("away")
    api(plant).key_sets.delete(plant.who, "main")
    plant.settle()
    assert len(plant.backend.keys) == 1
    assert jwks(plant) is None
    plant.backend.fail = None
    plant.advance(61)
    assert plant.backend.keys == {}
    assert {v.alg: (v.state, v.absence is not None) for v in plant.versions()} == {
        "EdDSA": (S.DESTROYED, True),
        "ES256": (S.DESTROYED, False),
    }


def test_the_key_that_held_up_the_first_document_can_be_deleted(plant: Plant) -> None:
    decline(plant, errors.BackendUnavailable("away"), "ES256")
    api(plant).key_sets.create(plant.who, wire.KeySetCreate(name="main", keys=[spec("a"), spec("b", "ES256")]))
    api(plant).keys.delete(plant.who, "main", "b")
    plant.settle()
    assert {(v.alg, v.state) for v in plant.versions() if v.number == 1} == {
        ("EdDSA", S.ACTIVE),
        ("ES256", S.DESTROYED),
    }


def test_a_pair_that_comes_after_its_key_was_deleted_is_destroyed(plant: Plant) -> None:
    start(plant)
    before = set(plant.backend.keys)

    def delete(node: Node, point: str) -> None:
        if point == "generated":
            plant.at_point = lambda *_: None
            api(plant).keys.delete(plant.who, "main", "second")

    plant.at_point = delete
    with pytest.raises(errors.KeyNotFound):
        api(plant).keys.create(plant.who, "main", spec("second"))
    plant.settle()
    assert set(plant.backend.keys) == before


def test_the_default_key_set_is_neither_deleted_nor_retired(plant: Plant) -> None:
    plant.create(name="default")
    for end in (api(plant).key_sets.delete, api(plant).key_sets.retire):
        with pytest.raises(errors.Conflict, match="default_key_set") as refusal:
            end(plant.who, "default")
        assert "default_key_set" in refusal.value.next_step


# --- retirement


def test_a_retired_key_stops_signing_leaves_when_i2_allows_and_is_destroyed_by_its_policy(plant: Plant) -> None:
    start(plant)
    active, standby = version(plant, 1), version(plant, 2)
    retired = api(plant).keys.retire(plant.who, "main", "default")
    assert (retired.retired_at is not None, retired.enabled, retired.active_kid) == (True, False, None)
    assert states(plant) == {1: "retiring", 2: "retired"}
    body = {"claims": {"sub": "a"}}
    with pytest.raises(errors.KeyRetired):
        api(plant).signing.handle(SigningOperation.JWT, plant.who, "main", "default", body)
    assert jwks(plant) == [active.kid]
    with plant.view.registry_view() as tx:
        key = tx.keys()[0]
        assert version(plant, 1).deactivated_at == key.retired_at
    plant.advance(RETIRABLE - 5)
    assert jwks(plant) == [active.kid], "a token of it may be alive"
    plant.advance(6)
    assert states(plant) == {1: "retired", 2: "retired"}
    assert jwks(plant) == [], "an empty JWKS, not 404: caches may hold the one before"
    plant.advance(7 * DAY - RETIRABLE - 10)
    assert len(plant.backend.keys) == 2
    plant.advance(RETIRABLE + 20, rounds=8)
    assert states(plant) == {1: "destroyed", 2: "destroyed"}
    assert plant.backend.keys == {}
    assert all(v.absence is not None for v in plant.versions())
    # The tombstone: what it was stays readable, and its name and kids are taken.
    shown = api(plant).keys.get(plant.who, "main", "default")
    assert shown.retired_at == retired.retired_at
    assert standby.kid in {v.kid for v in api(plant).versions.list(plant.who, "main", "default", 50, None).items}
    with pytest.raises(errors.NameTaken):
        api(plant).keys.create(plant.who, "main", spec("default"))


@pytest.mark.parametrize(
    "change",
    [
        lambda keys, _, who: keys.enable(who, "main", "default"),
        lambda keys, _, who: keys.rotate(who, "main", "default", wire.RotateRequest()),
        lambda _, versions, who: versions.create(who, "main", "default", wire.VersionCreate()),
        lambda _, versions, who: versions.activate(who, "main", "default", "2"),
    ],
)
def test_a_retired_key_never_comes_back(plant: Plant, change: Callable[..., object]) -> None:
    start(plant)
    first = api(plant).keys.retire(plant.who, "main", "default")
    with pytest.raises(errors.KeyRetired):
        change(api(plant).keys, api(plant).versions, plant.who)
    # Repeating the call is safe: it changes nothing, and waits as the first one did.
    assert api(plant).keys.retire(plant.who, "main", "default") == first
    with pytest.raises(errors.AlreadyPublished) as refusal:
        api(plant).keys.delete(plant.who, "main", "default")
    assert "key retire" in refusal.value.next_step
    plant.advance(RETIRABLE + 1)
    plant.advance(7 * DAY)
    assert states(plant) == {1: "destroyed", 2: "destroyed"}


def test_a_version_of_a_retired_key_can_be_revoked_and_no_other_takes_over(plant: Plant) -> None:
    start(plant)
    api(plant).keys.retire(plant.who, "main", "default")
    done_ = api(plant).revocation.revoke_version(plant.who, "main", "default", "1", wire.RevokeRequest(reason="leaked"))
    assert (done_.successor, done_.without_successor) == (None, False)
    assert done_.exposure is not None
    assert {v.cured_by_second_rotation for v in done_.exposure.verifiers} == {False}, "no rotation follows"
    assert {v.ends for v in done_.exposure.verifiers if v.source == "go-oidc 3"} == {"restart"}
    plant.settle()
    assert (states(plant), jwks(plant)) == ({1: "revoked", 2: "retired"}, [])


def test_a_retired_key_makes_room_and_lets_the_others_rotate(plant: Plant) -> None:
    plant.create(*({"name": f"k{n}", "alg": "EdDSA", "policy": POLICY} for n in range(4)))
    plant.settle()
    with pytest.raises(errors.LimitReached):
        api(plant).keys.create(plant.who, "main", spec("k4"))
    api(plant).keys.retire(plant.who, "main", "k0")
    api(plant).keys.create(plant.who, "main", spec("k4"))
    plant.advance(20_000, rounds=12)
    for _ in range(6):
        plant.advance(RETIRABLE + 1)
    rotated = {v.key_id for v in plant.versions() if v.number == 2 and v.state is S.ACTIVE}
    assert len(rotated) >= 3


def test_the_algorithm_of_a_retired_key_binds_its_set_until_its_last_version_has_left(plant: Plant) -> None:
    plant.create({"name": "main", "alg": "ES256K", "policy": POLICY})
    plant.settle()
    api(plant).keys.retire(plant.who, "main", "main")
    with pytest.raises(errors.LimitReached):
        api(plant).keys.create(plant.who, "main", spec("other"))
    plant.advance(RETIRABLE + 1)
    assert jwks(plant) == []
    assert api(plant).keys.create(plant.who, "main", spec("other")).answer.enabled


def test_a_retired_key_set_serves_an_empty_jwks_and_takes_nothing_more(plant: Plant) -> None:
    start(plant)
    api(plant).keys.create(plant.who, "main", spec("young"))  # published, and not old enough to sign
    retired = api(plant).key_sets.retire(plant.who, "main")
    assert all(k.retired_at == retired.retired_at for k in retired.keys)
    assert len(jwks(plant) or []) == 1, "only what signed may be in a token"
    for add in (
        lambda: api(plant).keys.create(plant.who, "main", spec("more")),
        lambda: api(plant).external_keys.create(
            plant.who,
            "main",
            wire.convert(
                {
                    "kid": "old",
                    "alg": "EdDSA",
                    "remove_at": "2096-01-01T00:00:00Z",
                    "jwk": {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"},
                },
                wire.ExternalKeyCreate,
            ),
        ),
    ):
        with pytest.raises(errors.KeySetRetired):
            add()
    plant.advance(RETIRABLE + 1)
    assert jwks(plant) == []
    assert api(plant).key_sets.retire(plant.who, "main").retired_at == retired.retired_at
    patch = wire.KeySetPatch(issuer="https://c.example")
    revision = api(plant).key_sets.get(plant.who, "main").revision
    with pytest.raises(errors.KeySetRetired):
        api(plant).key_sets.patch(plant.who, "main", patch, revision)
    for name, issuer in (("main", "https://b.example"), ("b", f"{URL}/main")):
        with pytest.raises((errors.NameTaken, errors.InvalidField)):
            api(plant).key_sets.create(plant.who, wire.KeySetCreate(name=name, issuer=issuer))
    with pytest.raises(errors.AlreadyPublished):
        api(plant).key_sets.delete(plant.who, "main")


def test_an_adopted_pair_stays_in_its_module(plant: Plant) -> None:
    plant.on_commit.clear()  # the oracle holds that every version begins without a pair
    start(plant)
    plant.backend.generate("theirs", ALGORITHMS["EdDSA"])
    adopted = wire.convert({"name": "theirs", "alg": "EdDSA", "adopt": {"locator": "theirs"}}, wire.KeyCreate)
    api(plant).keys.create(plant.who, "main", adopted)
    api(plant).key_sets.retire(plant.who, "main")
    plant.advance(RETIRABLE + 1)
    plant.advance(60 * DAY, rounds=8)
    assert [label for label, _ in plant.backend.keys.values()] == ["theirs"]
    theirs = next(v for v in plant.versions() if v.weaknesses == () and v.origin.value == "adopted")
    assert (theirs.state, theirs.destroy_at) == (S.RETIRED, None)


def test_after_a_restore_what_ended_stays_ended_and_what_waits_is_not_made_twice(plant: Plant) -> None:
    decline(plant, errors.BackendUnavailable("away"), "ES256")
    api(plant).key_sets.create(plant.who, wire.KeySetCreate(name="main", keys=[spec("a"), spec("b", "ES256")]))
    api(plant).key_sets.create(plant.who, wire.KeySetCreate(name="typo", keys=[spec("a"), spec("b", "ES256")]))
    plant.backend.fail = errors.BackendUnavailable("away")
    api(plant).key_sets.delete(plant.who, "typo")
    with plant.nodes[0].store().write() as tx:
        transitions.start_new_incarnation(tx)
    plant.backend.fail = None
    comply(plant)
    for key in ("a", "b"):
        api(plant).keys.enable(plant.who, "main", key)
    plant.advance(61, rounds=8)
    kept = [v for v in plant.versions() if v.kid is not None and v.failure is None and v.number == 1]
    assert [v.state for v in kept] == [S.ACTIVE, S.ACTIVE]
    assert len(plant.backend.keys) == 4, "two keys with a standby each, and nothing of the deleted set"
    assert find_orphans(plant.view, plant.backends()) == []


def test_after_a_restore_the_revoked_pair_of_a_deleted_key_is_still_destroyed(plant: Plant) -> None:
    plant.on_commit.clear()  # the oracle knows no revocation of a pair that was never published
    decline(plant, errors.BackendUnavailable("away"), "ES256")
    api(plant).key_sets.create(plant.who, wire.KeySetCreate(name="main", keys=[spec("a"), spec("b", "ES256")]))
    api(plant).revocation.revoke_version(plant.who, "main", "a", "1", wire.RevokeRequest())
    plant.backend.fail = errors.BackendUnavailable("away")
    api(plant).key_sets.delete(plant.who, "main")
    with plant.nodes[0].store().write() as tx:
        transitions.start_new_incarnation(tx)
    plant.backend.fail = None
    plant.advance(61, rounds=8)
    assert plant.backend.keys == {}
    assert {v.state for v in plant.versions()} == {S.DESTROYED}


# --- crashes


def a_life_that_ends(plant: Plant) -> None:
    """A standby is declined and made later; a key and a key set are deleted; the key is retired and destroyed."""
    start(plant)
    decline(plant, errors.UnsupportedAlgorithm("no"))
    plant.advance(20_000)
    plant.until(lambda: states(plant).get(3) == "destroyed" and states(plant)[2] == "active")
    comply(plant)
    plant.advance(RETRY_AFTER_REFUSAL)
    plant.until(lambda: any(v.number == 4 and v.visible_since for v in plant.versions()))
    decline(plant, errors.BackendUnavailable("away"), "ES256")
    api(plant).keys.create(plant.who, "main", spec("second", "ES256"))
    api(plant).keys.delete(plant.who, "main", "second")
    api(plant).key_sets.create(plant.who, wire.KeySetCreate(name="typo", keys=[spec("a"), spec("b", "ES256")]))
    plant.until(lambda: any(v.state is S.CREATING and v.kid for v in plant.versions()))
    api(plant).key_sets.delete(plant.who, "typo")
    comply(plant)
    plant.settle(60)
    api(plant).keys.retire(plant.who, "main", "default")
    plant.advance(RETIRABLE + 20)
    plant.until(lambda: states(plant)[2] == "retired")
    plant.advance(8 * DAY)
    plant.until(lambda: all(v.state is S.DESTROYED for v in plant.versions()))
    plant.settle(60)


def everything_ended(plant: Plant) -> int:
    """Every version is destroyed with its evidence or its reason. Returns how many pairs are surplus."""
    with plant.view.registry_view() as tx:
        intents = tx.intents()
    assert not [i for i in intents if i.state in (IntentState.PENDING, IntentState.STARTED)]
    for v in plant.versions():
        assert (v.ref is not None) == (v.absence is not None)
        assert v.ref is not None or v.failure is not None
        assert len(done(intents, IntentKind.GENERATE, v.id)) == (v.ref is not None), "each pair is recorded once"
        assert len(done(intents, IntentKind.DESTROY, v.id)) == (v.ref is not None), "and destroyed once"
    surplus = set(plant.backend.keys)
    assert {orphan.ref["id"] for orphan in find_orphans(plant.view, plant.backends())} == surplus
    return len(surplus)


@pytest.mark.parametrize("act", [crash, overtake])
def test_a_custodian_that_ends_in_the_middle_of_an_end(
    act: Callable[[Node, str], None], figure: Callable[[str], None]
) -> None:
    points = play(0, act, life=a_life_that_ends, judge=everything_ended).seen
    assert {"generated", "destroy", "destroyed"} <= set(points)
    first = 1 if act is crash else 2
    played = range(first, len(points) + 1, 1 if LONG else 7)
    for at in played:
        play(at, act, life=a_life_that_ends, judge=everything_ended)
    figure(f"ends: {act.__name__} at {len(played)} of {len(points)} points of an end, nothing lost or doubled")


def test_the_plan_knows_no_step_for_a_version_that_was_given_up() -> None:
    key_set, key = builders.key_set(), builders.key()
    failure = {"code": "key_retired", "detail": "x"}
    given_up = builders.version(2, S.CREATING, kid="k2", destroy_at=T0, failure=failure)
    steps = timeline.plan(key_set, [key], [builders.version(1, S.ACTIVE), given_up], T0)
    assert {s.subject for s in steps if s.kind is timeline.StepKind.PUBLISH} == set()
    assert timeline.safety(given_up, key, key_set, T0).next.startswith("its key pair is destroyed")
