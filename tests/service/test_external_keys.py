"""External keys: kids, dates that move, keys that come back, keys that never do, and emergencies."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from kms_jwks import errors, jose, wire
from kms_jwks.access import Role
from kms_jwks.doctor.checks import State
from kms_jwks.doctor.registry import Registry, same_keys
from kms_jwks.model import DAY
from kms_jwks.timeline import later
from kms_jwks.times import to_datetime
from tests.service.world import World


def public_key() -> dict[str, Any]:
    return dict(jose.public_jwk(ec.generate_private_key(ec.SECP256R1()).public_key()))


def add(world: World, key_set: str = "main", /, *, days: int = 30, **fields: Any) -> wire.ExternalKey:
    """Add a key; by default a new one with kid `old`."""
    given: dict[str, Any] = {"kid": "old", "alg": "ES256"} if "jwk" not in fields else {}
    if "jwk" not in fields and "pem" not in fields:
        fields["jwk"] = public_key()
    when = to_datetime(later(world.now(), days * DAY)).isoformat()
    request = wire.convert({**given, "remove_at": when, **fields}, wire.ExternalKeyCreate)
    return world.service.external_keys.create(world.admin, key_set, request)


def move(world: World, kid: str, seconds: int) -> wire.ExternalKey:
    request = wire.ExternalKeyPatch(remove_at=to_datetime(later(world.now(), seconds)))
    return world.service.external_keys.update(world.admin, "main", kid, request)


def revoke_set(world: World, **fields: Any) -> wire.Revocation:
    given = {"reason": "stolen", "key_set": "main", **fields}
    request = wire.convert({name: value for name, value in given.items() if value is not None}, wire.RevocationCreate)
    return world.service.revocation.revoke_scope(world.admin, request)


def plain(jwk: dict[str, Any] | None) -> dict[str, Any]:
    assert jwk is not None
    return {name: jwk[name] for name in ("kty", "crv", "x", "y")}


# --- back and forth


def test_a_date_moves_and_a_removed_key_comes_back_and_each_change_is_recorded(world: World) -> None:
    world.create()
    jwk = public_key()
    add(world, jwk=jwk, kid="old", alg="ES256", days=1)
    with pytest.raises(errors.InvalidField, match="past"):
        move(world, "old", -1)
    moved = move(world, "old", 40 * DAY)
    world.advance(2 * DAY)
    assert "old" in world.kids(), "its first date has passed, the one that counts has not"
    move(world, "old", 40 * DAY)
    again = wire.ExternalKeyPatch(remove_at=world.service.external_keys.get(world.admin, "main", "old").remove_at)
    unchanged = world.service.external_keys.update(world.admin, "main", "old", again)
    assert [c.what for c in unchanged.changes] == ["added", "moved", "moved"]

    world.service.external_keys.delete(world.admin, "main", "old")
    assert "old" not in world.kids()
    with pytest.raises(errors.ExternalKeyNotFound):
        move(world, "old", DAY)
    with pytest.raises(errors.KidTaken, match="another public key"):
        add(world, jwk=public_key(), kid="old", alg="ES256")
    back = add(world, jwk=jwk, kid="old", alg="ES256", days=1)
    assert "old" in world.kids()
    assert [(c.what, c.who) for c in back.changes] == [
        (what, "admin") for what in ("added", "moved", "moved", "removed", "added")
    ]
    assert back.changes[1].remove_at == moved.remove_at
    with pytest.raises(errors.KidTaken, match="this very key"):
        add(world, jwk=jwk, kid="old", alg="ES256")

    world.advance(DAY + 1)
    world.until(lambda: "old" not in world.kids())
    assert [(c.what, c.who) for c in add(world, jwk=jwk, kid="old", alg="ES256").changes][-2:] == [
        ("expired", None),
        ("added", "admin"),
    ]


def test_a_record_of_changes_is_bounded(world: World) -> None:
    world.create()
    add(world)
    with world.registry.write() as tx:
        from dataclasses import replace

        [found] = tx.external_keys()
        tx.save(replace(found, changes=found.changes * 100))
    with pytest.raises(errors.LimitReached):
        move(world, "old", DAY)
    world.service.external_keys.delete(world.admin, "main", "old")


def test_a_retired_version_s_key_may_be_published_under_its_kid_and_goes_when_it_is_revoked(world: World) -> None:
    made = world.create()
    first = made.keys[0].versions[0]
    fields: dict[str, Any] = {"kid": first.kid, "alg": "ES256", "jwk": plain(first.public_jwk)}
    world.standby()
    with pytest.raises(errors.KidTaken, match="version 1"):
        add(world, **fields)
    world.advance(DAY + 1)
    world.service.keys.rotate(world.admin, "main", "default", wire.RotateRequest())
    world.advance(2 * 3600)
    world.until(lambda: first.kid not in world.kids())
    add(world, **fields)
    assert first.kid in world.kids()
    request = wire.RevokeRequest(reason="stolen")
    done = world.service.revocation.revoke_version(world.admin, "main", "default", "1", request)
    assert [(e.kid, e.withdrawn) for e in done.external_keys] == [(first.kid, True)]
    assert first.kid not in world.kids()
    assert done.exposure is not None
    assert done.version.revoked_at is not None
    assert done.exposure.withdrawn_at > done.version.revoked_at, "the copy left now, not when the version retired"
    with pytest.raises(errors.KeyTaken, match="revoked"):
        add(world, **fields)


# --- kids


def test_a_kid_that_cannot_be_shown_or_named_is_refused(world: World) -> None:
    world.create()
    for kid in ("", "old-2024\n", "a\tb", "\x1b[31m", " ", ".", "..", "a/../b", " a", "\u202e", "\0", "x" * 256):
        with pytest.raises(errors.InvalidField, match="kid"):
            add(world, kid=kid)
        with pytest.raises(errors.InvalidField, match="kid"):
            add(world, jwk={**public_key(), "kid": kid}, alg="ES256")
    assert list(world.service.external_keys.list(world.admin, "main", 9, None).items) == []


def test_a_jwk_s_own_kid_and_alg_count_and_are_not_contradicted(world: World) -> None:
    world.create()
    jwk = {**public_key(), "kid": "its own", "alg": "ES256", "use": "jwt-svid", "x5c": ["AA=="], "x5t#S256": "AA"}
    with pytest.raises(errors.InvalidField, match="its own") as refusal:
        add(world, jwk=jwk, kid="another")
    assert "'another'" in refusal.value.detail
    with pytest.raises(errors.InvalidJwk, match="alg"):
        add(world, jwk=jwk, alg="ES384")
    with pytest.raises(errors.InvalidField, match="not a string"):
        add(world, jwk={**jwk, "kid": 7})
    made = add(world, jwk=jwk)
    assert (made.kid, made.alg, made.ignored) == ("its own", "ES256", ["x5c", "x5t#S256"])
    assert add(world, jwk=plain(public_key()), kid="second", alg="ES256").ignored == []
    for missing in ("kid", "alg"):
        rest = {name: value for name, value in {**jwk, **public_key()}.items() if name != missing}
        with pytest.raises(errors.InvalidField, match=f"{missing}: missing"):
            add(world, jwk=rest)
    with pytest.raises(errors.InvalidJwk, match="JWKS"):
        add(world, jwk={"keys": [jwk]}, kid="a", alg="ES256")


def test_two_issuers_may_call_their_keys_the_same_and_one_key_may_be_behind_both(world: World) -> None:
    world.create()
    world.create("second")
    one = public_key()
    add(world, jwk=one, kid="1", alg="ES256")
    add(world, "second", jwk=public_key(), kid="1", alg="ES256")
    shared = add(world, "second", jwk=one, kid="a/b", alg="ES256")
    assert shared.warnings == ["the same public key is an external key of key set 'main', with kid 1"]
    listed = world.service.external_keys.list(world.admin, "main", 9, None).items
    assert [e.warnings for e in listed] == [
        ["the same public key is an external key of key set 'second', with kid a/b"]
    ]
    assert {"1"} <= set(world.kids()) & set(world.kids(key_set="second"))
    assert [c.state for c in same_keys(Registry.of(world.registry))] == [State.WARNING]


# --- emergencies


def test_an_emergency_over_a_set_names_its_external_keys_and_withdraws_them_on_request(world: World) -> None:
    world.create()
    world.create("second")
    jwk = public_key()
    add(world, jwk=jwk, kid="old", alg="ES256")
    add(world, "second", jwk=jwk, kid="theirs", alg="ES256")
    world.standby()
    before = set(world.kids())

    said = revoke_set(world, dry_run=True)
    assert [(e.kid, e.withdrawn, e.same_key_as) for e in said.external_keys] == [("old", False, None)]
    said = revoke_set(world, dry_run=True, external_keys=True)
    assert [(e.kid, e.withdrawn) for e in said.external_keys] == [("old", True)]
    assert [(p.key_set, p.kid, p.state, p.same_key_as) for p in said.same_key] == [
        ("second", "theirs", "external", "old")
    ]
    assert set(world.kids()) == before

    done = revoke_set(world)
    assert [(e.kid, e.withdrawn) for e in done.external_keys] == [("old", False)]
    assert "old" in world.kids()
    done = revoke_set(world, external_keys=True)
    assert [(e.kid, e.withdrawn) for e in done.external_keys] == [("old", True)]
    assert "old" not in world.kids()
    with pytest.raises(errors.KeyTaken, match="revoked"):
        add(world, jwk=jwk, kid="old", alg="ES256")
    with pytest.raises(errors.KeyTaken, match="revoked"):
        add(world, "second", jwk=jwk, kid="again", alg="ES256")
    assert [c.state for c in same_keys(Registry.of(world.registry))] == [State.FAILURE]
    world.service.external_keys.delete(world.admin, "second", "theirs")
    assert list(same_keys(Registry.of(world.registry))) == []


def test_external_keys_of_an_emergency_alone_have_an_exposure(world: World) -> None:
    world.create(keys=[])
    add(world)
    done = revoke_set(world, external_keys=True)
    assert [(s.key_set, s.exposure.second_rotation_not_before) for s in done.exposures] == [("main", None)]
    assert world.kids() == []


def test_a_module_s_emergency_reaches_the_external_keys_of_every_set_or_needs_the_permission(world: World) -> None:
    made = world.create()
    world.create("second", keys=[])
    add(world, "second", kid="copy", alg="ES256", jwk=plain(made.keys[0].versions[0].public_jwk))
    add(world, "second", kid="sound")
    with world.registry.read() as tx:
        main = tx.key_set("main")
    assert main is not None
    request = wire.RevocationCreate(reason="stolen", backend="memory")
    local = world.client("local", Role.OPERATOR, main.id)
    with pytest.raises(errors.Forbidden):
        world.service.revocation.revoke_scope(local, request)
    with pytest.raises(errors.InvalidField, match="external_keys"):
        revoke_set(world, key_set=None, backend="memory", external_keys=True)
    assert sorted(world.kids(key_set="second")) == ["copy", "sound"]
    done = world.service.revocation.revoke_scope(world.admin, request)
    assert [(e.key_set, e.kid, e.withdrawn) for e in done.external_keys] == [("second", "copy", True)]
    assert world.kids(key_set="second") == ["sound"]


def test_a_verifier_learns_that_a_withdrawn_kid_was_revoked(world: World) -> None:
    world.create()
    private = ec.generate_private_key(ec.SECP256R1())
    add(world, jwk=dict(jose.public_jwk(private.public_key())), kid="old", alg="ES256")
    import jwt

    claims = {"iss": "https://keys.example/main", "aud": "a", "exp": world.now() // 1_000_000 + 600}
    token = jwt.encode(claims, private, algorithm="ES256", headers={"kid": "old"})
    request = wire.VerifyRequest(token=token, audience="a")
    assert world.service.verifiers.verify_token(world.admin, "main", request).kid == "old"
    revoke_set(world, external_keys=True)
    with pytest.raises(errors.TokenKeyRevoked):
        world.service.verifiers.verify_token(world.admin, "main", request)


# --- room


def test_a_full_document_says_how_many_fit_and_what_leaves_first(world: World) -> None:
    world.create()
    for number in range(5):
        add(world, kid=f"k{number}", days=30 - number)
    add(world, kid="k5")
    with pytest.raises(errors.LimitReached, match="room for 0 more external keys") as refusal:
        add(world, kid="k6")
    assert refusal.value.fields["room"] == 0
    step = refusal.value.next_step
    assert step.index("k4 (") < step.index("k0 (")


def test_the_date_of_a_key_that_was_revoked_in_another_set_moves_to_earlier_ones_alone(world: World) -> None:
    world.create()
    world.service.key_sets.create(world.admin, wire.KeySetCreate(name="second"))
    jwk = public_key()
    add(world, "main", jwk=jwk, kid="old", alg="ES256", days=30)
    add(world, "second", jwk=jwk, kid="old", alg="ES256", days=30)
    revoke_set(world, key_set="second", external_keys=True)
    with pytest.raises(errors.KeyTaken, match="revoked"):
        move(world, "old", 40 * DAY)
    assert move(world, "old", DAY).changes[-1].what == "moved"
