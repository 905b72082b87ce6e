"""Adoption of key pairs that a module holds already: what is examined, refused, accepted and recorded."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from kms_jwks import errors, jose, wire
from kms_jwks.access import Role
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import Digest, GeneratedKey, KeyRef, Message
from kms_jwks.doctor.checks import State
from kms_jwks.doctor.registry import Registry, same_keys
from kms_jwks.model import DAY, Origin, VersionState
from kms_jwks.service.adoption import PUBLIC_KEY_GIVEN
from kms_jwks.service.guard import RequestContext
from kms_jwks.service.signing_job import SigningOperation
from kms_jwks.timeline import later
from kms_jwks.times import to_datetime
from tests.service.world import World

S = VersionState
WEAK = {
    "imported": "it was not generated in the module",
    "extractable": "it is or was extractable",
    "versatile": "it may do more than sign",
}


def foreign(world: World, alg: str = "ES256", label: str = "theirs", rsa_bits: int | None = None) -> GeneratedKey:
    """A key pair that was not made by this service, of any size."""
    if rsa_bits is not None:
        ref = KeyRef.of(id=f"{label}-{rsa_bits}", label=label)
        world.backend.keys[ref["id"]] = (label, rsa.generate_private_key(65537, rsa_bits))
        return GeneratedKey(ref, world.backend.public_key(ref))
    return world.backend.generate(label, ALGORITHMS[alg])


def adopt(world: World, locator: str = "theirs", **more: Any) -> dict[str, Any]:
    """The JSON of a key to create by adoption."""
    alg = more.pop("alg", "ES256")
    fields: dict[str, Any] = {name: more.pop(name) for name in ("name", "rsa_bits") if name in more}
    return {"name": "default", "alg": alg, **fields, "adopt": {"locator": locator, **more}}


def create_key(world: World, key: dict[str, Any], context: RequestContext | None = None) -> wire.Key:
    return world.service.keys.create(context or world.admin, "main", wire.convert(key, wire.KeyCreate)).answer


def create_version(world: World, context: RequestContext | None = None, **adopted: Any) -> wire.Version:
    request = wire.convert({"adopt": {"locator": "theirs", **adopted}}, wire.VersionCreate)
    return world.service.versions.create(context or world.admin, "main", "default", request).answer


def signing_kid(world: World) -> str | None:
    """The kid that the worker signs with now, None where no version is active."""
    try:
        return world.sign().kid
    except errors.NoActiveVersion:
        return None


# --- what is adopted


def test_an_adopted_key_is_the_first_version_and_signs(world: World) -> None:
    pair = foreign(world)
    made = world.create(keys=[adopt(world)])
    (key,) = made.keys
    first = key.versions[0]
    assert (first.number, first.state, first.origin, first.weaknesses) == (1, "active", "adopted", [])
    assert first.kid == jose.thumbprint(pair.public_jwk)
    assert world.sign().kid == first.kid
    assert key.warnings == []
    assert world.version(1).evidence == {
        "attributes": {"memory": True},
        "generated_in_module": True,
        "non_extractable": True,
        "sign_only": True,
    }


def test_the_standby_of_an_adopted_version_is_generated(world: World) -> None:
    foreign(world)
    world.create(keys=[adopt(world)])
    standby = world.standby()
    assert (standby.number, standby.origin.value) == (2, "generated")


def test_an_adopted_version_keeps_the_kid_that_verifiers_know(world: World) -> None:
    foreign(world)
    world.create(existing_issuer=True, keys=[adopt(world, kid="2019/key#7")])
    assert world.kids() == ["2019/key#7"]
    world.advance(DAY + 1)
    assert world.until(lambda: signing_kid(world)) == "2019/key#7"
    assert world.service.versions.get(world.admin, "main", "default", "2019/key#7").number == 1


def test_an_adopted_key_waits_for_the_publish_lead_in_a_set_that_published_before(world: World) -> None:
    world.create(keys=[{"name": "other", "alg": "ES256"}])
    foreign(world)
    made = create_key(world, adopt(world))
    assert [v.state for v in made.versions] == ["published"]
    with pytest.raises(errors.NotYetUsable):
        world.service.versions.activate(world.admin, "main", "default", "1")
    world.advance(DAY + 1)
    world.until(lambda: world.service.keys.get(world.admin, "main", "default").active_kid)


@pytest.mark.parametrize("alg", sorted(ALGORITHMS))
def test_a_pair_of_every_algorithm_is_adopted(world: World, alg: str) -> None:
    bits = 2048 if ALGORITHMS[alg].is_rsa else None
    pair = foreign(world, alg, rsa_bits=bits)
    (key,) = world.create(keys=[adopt(world, alg=alg)]).keys
    assert key.versions[0].public_jwk is not None
    assert jose.thumbprint(key.versions[0].public_jwk) == jose.thumbprint(pair.public_jwk)
    assert key.rsa_bits == bits


def test_several_first_keys_of_a_set_sign_at_once(world: World) -> None:
    foreign(world, label="one")
    foreign(world, label="two")
    keys = [
        adopt(world, "one", name="one"),
        {"name": "made", "alg": "ES256"},
        adopt(world, "two", name="two"),
    ]
    made = world.create(keys=keys)
    assert [k.active_kid is not None for k in made.keys] == [True, True, True]


def test_a_version_is_adopted_beside_the_standby_and_activated_by_name(world: World) -> None:
    world.create()
    world.standby()
    foreign(world)
    made = create_version(world, kid="theirs-1")
    assert (made.number, made.state, made.origin) == (3, "published", "adopted")
    with pytest.raises(errors.NotYetUsable):
        world.service.versions.activate(world.admin, "main", "default", "3")
    world.advance(DAY + 1)
    world.service.versions.activate(world.admin, "main", "default", "theirs-1")
    assert signing_kid(world) == "theirs-1"


def test_the_input_of_the_trial_signature_fits_no_token(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    signed: list[bytes] = []
    really = world.backend.sign

    def sign(ref: KeyRef, alg: Any, what: Message | Digest, deadline: float) -> bytes:
        assert isinstance(what, Message)
        signed.append(what.data)
        return really(ref, alg, what, deadline)

    monkeypatch.setattr(world.backend, "sign", sign)
    foreign(world)
    world.create(keys=[adopt(world)])
    (trial,) = signed
    assert b"\0" in trial  # never part of a JWS signing input, which is base64url and a dot
    assert len(trial) >= 32


# --- what is refused


@pytest.mark.parametrize("weakness", sorted(WEAK))
def test_a_weak_key_is_refused_until_it_is_accepted(world: World, weakness: str) -> None:
    pair = foreign(world)
    getattr(world.backend, weakness).add(pair.ref["id"])
    with pytest.raises(errors.AdoptionRefused) as refusal:
        world.create(keys=[adopt(world)])
    assert refusal.value.fields["weaknesses"] == [WEAK[weakness]]
    assert world.versions() == []

    made = world.create(keys=[adopt(world, accept=True)])
    (key,) = made.keys
    assert key.versions[0].weaknesses == [WEAK[weakness]]
    assert key.warnings == [f"version 1 was adopted although {WEAK[weakness]}"]
    listed = world.service.versions.list(world.admin, "main", "default", 10, None).items
    assert [v.weaknesses for v in listed if v.number == 1] == [[WEAK[weakness]]]
    assert world.service.keys.list(world.admin, "main", 10, None).items[0].warnings == key.warnings
    assert world.service.key_sets.get(world.admin, "main").keys[0].warnings == key.warnings


def test_accept_alone_makes_no_key_weak(world: World) -> None:
    foreign(world)
    assert world.create(keys=[adopt(world, accept=True)]).keys[0].versions[0].weaknesses == []


def test_a_pair_without_its_public_half_needs_a_given_one_and_accept(world: World) -> None:
    pair = foreign(world)
    world.backend.halved.add(pair.ref["id"])
    with pytest.raises(errors.AdoptionRefused, match="public half"):
        world.create(keys=[adopt(world, accept=True)])
    with pytest.raises(errors.AdoptionRefused) as refusal:
        world.create(keys=[adopt(world, public_key=dict(pair.public_jwk))])
    assert refusal.value.fields["weaknesses"] == [PUBLIC_KEY_GIVEN]

    pem = jose.to_pem(pair.public_jwk)
    (key,) = world.create(keys=[adopt(world, accept=True, public_key=pem)]).keys
    assert key.versions[0].weaknesses == [PUBLIC_KEY_GIVEN]
    world.sign()


def test_a_given_public_key_of_another_pair_is_refused(world: World) -> None:
    pair = foreign(world)
    world.backend.halved.add(pair.ref["id"])
    other = jose.public_jwk(ec.generate_private_key(ec.SECP256R1()).public_key())
    with pytest.raises(errors.AdoptionRefused, match="does not verify"):
        world.create(keys=[adopt(world, accept=True, public_key=other)])
    world.backend.halved.clear()
    with pytest.raises(errors.InvalidField, match="not the one that the module holds"):
        world.create(keys=[adopt(world, accept=True, public_key=other)])
    assert world.versions() == []


@pytest.mark.parametrize(
    ("made", "wanted", "words"),
    [
        ("ES256", "ES384", "crv"),
        ("ES256", "RS256", "kty"),
        ("ES256", "ES256K", "crv"),
        ("ML-DSA-44", "ML-DSA-65", "ML-DSA-44"),
        ("EdDSA", "ES256", "kty"),
    ],
)
def test_a_key_of_another_algorithm_is_refused(world: World, made: str, wanted: str, words: str) -> None:
    foreign(world, made)
    with pytest.raises(errors.AdoptionRefused, match=words):
        world.create(keys=[adopt(world, alg=wanted, accept=True)])


@pytest.mark.parametrize(("bits", "wanted"), [(2048, 3072), (2176, None)])
def test_a_modulus_of_another_size_is_refused(world: World, bits: int, wanted: int | None) -> None:
    world.backend.keys["theirs"] = ("theirs", rsa.generate_private_key(65537, bits))
    key = adopt(world, alg="RS256", accept=True) | ({"rsa_bits": wanted} if wanted else {})
    with pytest.raises(errors.AdoptionRefused, match=str(bits)):
        world.create(keys=[key])


def test_a_locator_that_names_no_pair_or_several_is_refused(world: World) -> None:
    with pytest.raises(errors.AdoptionRefused):
        world.create(keys=[adopt(world, "unknown")])
    one = foreign(world, label="a")
    foreign(world, label="b")
    world.backend.keys[one.ref["id"]] = ("b", world.backend.keys[one.ref["id"]][1])
    with pytest.raises(errors.AdoptionRefused, match="Several"):
        world.create(keys=[adopt(world, "b")])


def test_an_adoption_from_a_failing_module_raises_its_error_and_writes_nothing(world: World) -> None:
    foreign(world)
    world.backend.fail = errors.BackendUnavailable()
    with pytest.raises(errors.BackendUnavailable):
        world.create(keys=[adopt(world)])
    world.backend.fail = errors.BackendRefused("The PIN is wrong.")
    with pytest.raises(errors.BackendRefused):
        world.create(keys=[adopt(world)])
    world.backend.fail = None
    with pytest.raises(errors.KeySetNotFound):
        world.service.key_sets.get(world.admin, "main")


@pytest.mark.parametrize("kid", ["", "k" * 256, "line\nbreak", " outer", "..", "a/./b"])
def test_a_kid_outside_its_bounds_is_refused(world: World, kid: str) -> None:
    foreign(world)
    with pytest.raises(errors.InvalidField):
        world.create(keys=[adopt(world, kid=kid)])


# --- twice


def test_one_pair_is_one_version_of_a_set_only(world: World) -> None:
    pair = foreign(world)
    world.create(keys=[adopt(world)])
    for more in ({}, {"kid": "another"}, {"accept": True}):
        with pytest.raises(errors.KeyTaken) as refusal:
            create_version(world, None, **more)
        assert refusal.value.fields["kid"] == world.version(1).kid
    # The same key under another reference: a copy.
    world.backend.keys["copy"] = ("copy", world.backend.keys[pair.ref["id"]][1])
    with pytest.raises(errors.KeyTaken):
        create_version(world, locator="copy", kid="copy")


def test_a_generated_pair_is_not_adopted(world: World) -> None:
    world.create()
    standby = world.standby()
    assert standby.ref is not None
    with pytest.raises(errors.KeyTaken):
        create_version(world, locator=standby.ref["label"])
    with pytest.raises(errors.KeyTaken):
        world.create("second", keys=[adopt(world, standby.ref["label"], accept=True)])


def test_a_revoked_pair_is_not_adopted_again(world: World) -> None:
    foreign(world)
    world.create(keys=[adopt(world)])
    world.service.revocation.revoke_version(world.admin, "main", "default", "1", wire.RevokeRequest())
    with pytest.raises(errors.KeyTaken):
        create_version(world, kid="under another name")
    with pytest.raises(errors.KeyTaken, match="revoked"):
        world.create("second", keys=[adopt(world, accept=True)])


def test_of_two_simultaneous_adoptions_of_one_pair_one_succeeds(world: World) -> None:
    foreign(world)
    world.create()
    both_examined = threading.Barrier(2, timeout=60)
    world.backend.before = lambda call: both_examined.wait() if call == "sign" else None  # type: ignore[assignment]

    def adopted(number: int) -> str | None:
        try:
            return create_key(world, adopt(world, name=f"key-{number}", kid=f"kid-{number}")).name
        except errors.KeyTaken:
            return None

    with ThreadPoolExecutor(2) as both:
        names = list(both.map(adopted, range(2)))
    assert names.count(None) == 1
    assert len([v for v in world.versions() if v.origin is Origin.ADOPTED]) == 1


def test_one_pair_twice_in_one_call_is_refused_and_nothing_is_written(world: World) -> None:
    foreign(world)
    with pytest.raises(errors.KeyTaken):
        world.create(keys=[adopt(world, name="one"), adopt(world, name="two", kid="two")])
    with pytest.raises(errors.KeySetNotFound):
        world.service.key_sets.get(world.admin, "main")


def publish_external(world: World, kid: str, jwk: Any, key_set: str = "main", alg: str = "ES256") -> wire.ExternalKey:
    request = wire.ExternalKeyCreate(kid=kid, alg=alg, remove_at=to_datetime(later(world.now(), DAY)), jwk=dict(jwk))
    return world.service.external_keys.create(world.admin, key_set, request)


def test_a_kid_stays_with_what_it_was_given_to(world: World) -> None:
    foreign(world, label="other")
    world.create()
    publish_external(world, "known", foreign(world).public_jwk)
    with pytest.raises(errors.KidTaken, match="external key"):
        create_version(world, locator="other", kid="known")
    with pytest.raises(errors.KidTaken):
        create_version(world, locator="other", kid=world.version(1).kid)


def test_a_version_takes_the_place_of_the_external_key_with_its_kid(world: World) -> None:
    world.create()
    publish_external(world, "known", foreign(world).public_jwk)
    made = create_version(world, kid="known")
    assert (made.kid, made.weaknesses) == ("known", [])
    assert world.kids().count("known") == 1
    with pytest.raises(errors.ExternalKeyNotFound):
        world.service.external_keys.get(world.admin, "main", "known")


def test_under_another_kid_than_its_external_key_a_pair_is_adopted_only_if_that_is_accepted(world: World) -> None:
    world.create()
    publish_external(world, "known", foreign(world).public_jwk)
    with pytest.raises(errors.AdoptionRefused, match="known"):
        create_version(world)
    made = create_version(world, accept=True)  # under its thumbprint
    assert {"known", made.kid} <= set(world.kids())
    assert len(made.weaknesses) == 1
    revoked = world.service.revocation.revoke_version(
        world.admin, "main", "default", str(made.kid), wire.RevokeRequest(reason="stolen")
    )
    assert [(e.kid, e.withdrawn, e.same_key_as) for e in revoked.external_keys] == [("known", True, made.kid)]
    assert not {"known", made.kid} & set(world.kids())
    with pytest.raises(errors.KeyTaken, match="revoked"):
        publish_external(world, "known", made.public_jwk and {k: made.public_jwk[k] for k in ("kty", "crv", "x", "y")})


def test_one_pair_behind_two_issuers_is_a_weakness_that_is_accepted_and_seen(world: World) -> None:
    """Two domains with one key: both keep the kid, and an emergency reaches both, or says that it does not."""
    foreign(world)
    world.create(keys=[adopt(world, kid="1a")])
    with pytest.raises(errors.AdoptionRefused) as refusal:
        world.create("second", keys=[adopt(world, kid="1a")])
    assert refusal.value.fields["weaknesses"] == ["key set 'main' has the same key, with kid 1a"]
    made = world.create("second", keys=[adopt(world, kid="1a", accept=True)])
    assert made.keys[0].versions[0].weaknesses == refusal.value.fields["weaknesses"]
    assert "key set 'second'" in world.service.key_sets.get(world.admin, "main").keys[0].warnings[0]
    assert "second" in world.service.versions.safety(world.admin, "main", "default", "1a").warnings[0]
    signed = {name: sign_in(world, name) for name in ("main", "second")}
    assert {name: s.kid for name, s in signed.items()} == {"main": "1a", "second": "1a"}
    for name, token in signed.items():
        assert verify_in(world, name, token.token) == "1a"
        with pytest.raises(errors.TokenIssuerMismatch):
            verify_in(world, "second" if name == "main" else "main", token.token)
    assert [c.state for c in same_keys(Registry.of(world.registry))] == [State.WARNING]

    world.standby()
    said = revoke(world, "main", "1a", dry_run=True)
    assert [(p.key_set, p.kid, p.state) for p in said.same_key] == [("second", "1a", "active")]
    done = revoke(world, "main", "1a")
    assert done.same_key == said.same_key
    assert sign_in(world, "second").kid == "1a"
    assert [c.state for c in same_keys(Registry.of(world.registry))] == [State.FAILURE]
    with world.registry.write() as tx:
        second = tx.key_set("second")
        assert second is not None
        copy = tx.version_by_kid(second.id, "1a")
        assert copy is not None
        tx.save(replace(copy, backend="elsewhere"))  # a copy in another module is the same key
    everything = world.service.revocation.revoke_scope(
        world.admin, wire.RevocationCreate(reason="stolen", backend="memory")
    )
    assert {v.version.kid for v in everything.versions if v.key_set == "second"} >= {"1a"}
    assert list(same_keys(Registry.of(world.registry))) == []


def test_a_pair_that_two_sets_use_is_not_destroyed(world: World) -> None:
    foreign(world)
    world.create(keys=[adopt(world)])
    world.create("second", keys=[adopt(world, accept=True)])
    revoke(world, "main", "1")
    with pytest.raises(errors.TransitionRefused, match="'second' uses the same key pair"):
        world.service.versions.destroy(world.admin, "main", "default", "1", wire.DestroyRequest())
    revoke(world, "second", "1")
    world.service.versions.destroy(world.admin, "main", "default", "1", wire.DestroyRequest())


SPECIAL = "2024/ключ+=%2F ~"


def test_a_pair_whose_key_set_was_deleted_before_it_published_is_adopted_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kms_jwks.service.control.CUSTODIAN_WAIT", 0.0)
    foreign(world)

    def be_away(*_: Any, **__: Any) -> GeneratedKey:
        raise errors.BackendUnavailable

    monkeypatch.setattr(world.backend, "generate", be_away)
    moved = adopt(world, kid="old-1")
    world.create(keys=[moved, {"name": "slow", "alg": "ES256"}])  # the first document waits for both pairs
    world.service.key_sets.delete(world.admin, "main")
    monkeypatch.undo()
    world.create(keys=[moved])
    assert signing_kid(world) == "old-1"


def test_two_sets_with_one_kid_for_two_pairs_sign_with_their_own(world: World) -> None:
    """Nothing that is kept by kid mixes them up: the check of signatures, the last check, `versions/{kid}`."""
    for name in ("main", "second"):
        foreign(world, label=name)
        world.create(name, keys=[adopt(world, name, kid=SPECIAL)])
    for name in ("main", "second", "main"):
        for _ in range(3):
            assert verify_in(world, name, sign_in(world, name).token) == SPECIAL
    shown = [world.service.versions.get(world.admin, n, "default", SPECIAL).public_jwk for n in ("main", "second")]
    assert shown[0] != shown[1]
    world.standby()
    revoke(world, "second", SPECIAL)
    assert sign_in(world, "main").kid == SPECIAL
    assert sign_in(world, "second").kid != SPECIAL


def revoke(world: World, key_set: str, version: str, *, dry_run: bool = False) -> wire.Revoked:
    request = wire.RevokeRequest(reason="stolen", dry_run=dry_run)
    return world.service.revocation.revoke_version(world.admin, key_set, "default", version, request)


def sign_in(world: World, key_set: str) -> wire.SignedJwt:
    answer = world.service.signing.handle(
        SigningOperation.JWT, world.signer, key_set, "default", {"claims": {"aud": "a"}}
    )
    assert isinstance(answer, wire.SignedJwt)
    return answer


def verify_in(world: World, key_set: str, token: str) -> str:
    return world.service.verifiers.verify_token(world.admin, key_set, wire.VerifyRequest(token=token, audience="a")).kid


def test_each_refusal_has_a_next_step_that_can_work(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for made, wanted in (("ES256", "ES384"), ("EdDSA", "ES256"), ("ML-DSA-44", "ML-DSA-65")):
        foreign(world, made, label=made)
        with pytest.raises(errors.AdoptionRefused) as refusal:
            world.create(keys=[adopt(world, made, alg=wanted)])
        assert made in refusal.value.next_step
        assert "accept" not in refusal.value.next_step
    for error, step in (
        (errors.UnsupportedAlgorithm("a curve that JOSE does not sign with"), "No acceptance helps"),
        (errors.BackendRefused("in vain"), "No acceptance helps"),
        (errors.BackendRefused("in vain", next_step="Enable it."), "Enable it."),
        (errors.BackendKeyNotFound("none"), "Check the label or id"),
    ):

        def refuse(*_: object, error: errors.BackendError = error) -> GeneratedKey:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(world.backend, "adopt", refuse)
            with pytest.raises(errors.AdoptionRefused) as refusal:
                world.create(keys=[adopt(world)])
        assert refusal.value.next_step.startswith(step)
    pair = foreign(world)
    monkeypatch.setattr(world.backend, "sign", refuse)  # CKA_SIGN is false, or the key's policy forbids it
    with pytest.raises(errors.AdoptionRefused):
        world.create(keys=[adopt(world)])
    assert pair.ref["id"] in world.backend.keys


def test_a_public_key_with_a_kid_of_its_own_is_not_contradicted(world: World) -> None:
    pair = foreign(world)
    jwk = {**pair.public_jwk, "kid": "theirs-1"}
    with pytest.raises(errors.InvalidField, match="theirs-1"):
        world.create(keys=[adopt(world, kid="theirs-2", public_key=jwk)])
    assert world.create(keys=[adopt(world, public_key=jwk)]).keys[0].active_kid == "theirs-1"


# --- permissions, destruction, limits


def test_an_adoption_needs_its_permission(world: World) -> None:
    foreign(world)
    world.create(keys=[{"name": "default", "alg": "ES256"}])
    operator = world.client("operator", Role.OPERATOR)
    for call in (
        lambda: create_version(world, operator),
        lambda: create_key(world, adopt(world, name="more"), operator),
        lambda: create_version(world, world.signer),
    ):
        with pytest.raises(errors.Forbidden) as refusal:
            call()
        assert refusal.value.fields["permission"] == "key:adopt"


def test_a_refused_caller_causes_no_call_to_the_module(world: World) -> None:
    world.create()
    asked: list[str] = []
    world.backend.before = asked.append
    with pytest.raises(errors.Forbidden):
        create_version(world, world.signer)
    assert "adopt" not in asked


def test_a_disabled_key_adopts_no_pair(world: World) -> None:
    foreign(world)
    world.create()
    world.service.keys.disable(world.admin, "main", "default")
    with pytest.raises(errors.KeyDisabled):
        create_version(world)


def test_an_adopted_pair_is_destroyed_on_request_only(world: World) -> None:
    pair = foreign(world)
    world.create(keys=[adopt(world)])
    world.standby()
    world.advance(DAY + 1)
    world.service.keys.rotate(world.admin, "main", "default", wire.RotateRequest())
    world.advance(2 * 3600)
    world.until(lambda: world.version(1).state is S.RETIRED)
    assert world.version(1).destroy_at is None
    world.advance(40 * DAY)
    assert pair.ref["id"] in world.backend.keys

    world.service.versions.destroy(world.admin, "main", "default", "1", wire.DestroyRequest())
    assert world.version(1).destroy_at is not None
    world.advance(31 * DAY)
    world.until(lambda: world.version(1).state is S.DESTROYED)
    assert pair.ref["id"] not in world.backend.keys


def test_a_revoked_adopted_pair_stays_in_its_module(world: World) -> None:
    foreign(world)
    world.create(keys=[adopt(world)])
    world.standby()
    done = world.service.revocation.revoke_version(
        world.admin, "main", "default", "1", wire.RevokeRequest(reason="test")
    )
    assert (done.version.state, done.version.destroy_at) == ("revoked", None)
    assert done.successor is not None


def test_adoptions_fill_the_document_up_to_its_limit(world: World) -> None:
    world.create()
    world.standby()
    for number in range(6):
        foreign(world, label=f"theirs-{number}")
        create_version(world, locator=f"theirs-{number}")
    foreign(world, label="one too many")
    with pytest.raises(errors.LimitReached):
        create_version(world, locator="one too many")
    assert len(world.kids()) == 8, "one retiring version and one spare kid still fit"
