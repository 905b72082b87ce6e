"""A creation that is sent again with its Idempotency-Key creates nothing further: after a lost answer, at the same
time, on another worker; for a day, for its own caller, and for the very same call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from kms_jwks import errors, wire
from kms_jwks.access import Role
from kms_jwks.algorithms import Algorithm
from kms_jwks.backends.base import GeneratedKey
from kms_jwks.model import DAY, VersionState
from kms_jwks.service import RequestContext, Service
from tests.service.test_lost_answers import lose_answers
from tests.service.world import World
from tests.service.world import world as make_world

JWK = {
    "kty": "EC",
    "crv": "P-256",
    "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
}
numbers = itertools.count(1)


def keyed(context: RequestContext, key: str, route: str = "/v1/things") -> RequestContext:
    """The context of a call with an Idempotency-Key."""
    return replace(context, idempotency_key=key, route=route, caller=None)


def create_key_set(service: Service, context: RequestContext, name: str) -> object:
    request = wire.convert({"name": name, "keys": [{"name": "first", "alg": "ES256"}]}, wire.KeySetCreate)
    return service.key_sets.create(context, request).answer.created_at


def create_key(service: Service, context: RequestContext, name: str) -> object:
    return service.keys.create(context, "main", wire.KeyCreate(name=name, alg="ES256")).answer.created_at


def create_external_key(service: Service, context: RequestContext, name: str) -> object:
    body = {"kid": name, "alg": "ES256", "remove_at": "2035-01-01T00:00:00Z", "jwk": JWK}
    return service.external_keys.create(context, "main", wire.convert(body, wire.ExternalKeyCreate)).created_at


def create_client(service: Service, context: RequestContext, name: str) -> object:
    return service.clients.create(context, wire.ClientCreate(name=name)).id


def create_version(service: Service, context: RequestContext, name: str = "bare") -> object:
    return service.versions.create(context, "main", name, wire.VersionCreate()).answer.number


Create = Callable[[Service, RequestContext, str], object]
CREATIONS: list[Create] = [create_key_set, create_key, create_external_key, create_client]


def everything(world: World) -> list[object]:
    with world.registry.read() as tx:
        versions = [(v.key_id, v.number) for v in tx.versions()]
        externals = tx.external_keys(include_removed=True)
        keys = [k.id for k in tx.keys(None)]
        return [tx.key_sets(), keys, versions, externals, tx.clients(), tx.grants(), tx.tokens()]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """With a key set `main`. What a test makes in it has a name of its own."""
    with make_world(tmp_path_factory.mktemp("world")) as made:
        made.create(keys=[{"name": "bare", "alg": "ES256"}])
        made.standby()
        yield made


@pytest.fixture
def name() -> str:
    """For the object of a test, and for its Idempotency-Key."""
    return f"made-{next(numbers)}"


@pytest.mark.parametrize("create", CREATIONS)
def test_the_same_call_again_answers_what_the_first_one_made(shared: World, name: str, create: Create) -> None:
    first = create(shared.service, keyed(shared.admin, name), name)
    shared.until(lambda: all(v.visible_since for v in shared.versions()))
    before = everything(shared)
    assert create(shared.service, keyed(shared.admin, name), name) == first
    assert everything(shared) == before
    with pytest.raises(errors.Conflict):
        create(shared.service, keyed(shared.admin, f"{name}-2"), name)


def test_a_grant_that_was_deleted_meanwhile_is_not_given_again(shared: World, name: str) -> None:
    grant = wire.convert({"client": "signer", "role": "verifier", "scope": {"key_set": "main"}}, wire.GrantCreate)
    made = shared.service.clients.create_grant(keyed(shared.admin, name), grant)
    shared.service.clients.delete_grant(shared.admin, made.id)
    with pytest.raises(errors.NotFound):
        shared.service.clients.create_grant(keyed(shared.admin, name), grant)
    assert made.id not in {g.id for g in shared.service.clients.grants(shared.admin, 200, None).items}


def test_a_client_that_was_deleted_meanwhile_was_not_created(shared: World, name: str) -> None:
    create_client(shared.service, keyed(shared.admin, name), name)
    shared.service.clients.delete(shared.admin, name)
    with pytest.raises(errors.NotFound):
        create_client(shared.service, keyed(shared.admin, name), name)


def test_a_key_that_was_refused_to_the_first_call_is_refused_to_the_second_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The set stays, with the keys of its other document: without its answer a caller would take it for complete."""
    generate = world.backend.generate

    def refuse(label: str, alg: Algorithm, **rest: Any) -> GeneratedKey:
        if alg.is_post_quantum:
            raise errors.BackendRefused("not this one")
        return generate(label, alg, **rest)

    monkeypatch.setattr(world.backend, "generate", refuse)
    keys = [{"name": "main", "alg": "ES256"}, {"name": "pq", "alg": "ML-DSA-44"}]
    request = wire.convert({"name": "shop", "keys": keys}, wire.KeySetCreate)
    for _ in range(2):
        with pytest.raises(errors.BackendRefused) as refusal:
            world.service.key_sets.create(keyed(world.admin, "k"), request)
        assert refusal.value.fields == {"key": "pq", "number": 1, "created": ["main"]}
    monkeypatch.undo()
    world.service.keys.create(world.admin, "shop", wire.KeyCreate(name="pq", alg="ML-DSA-44"))
    made = world.service.key_sets.create(keyed(world.admin, "k"), request)
    assert [key.name for key in made.answer.keys] == ["main", "pq"]


def test_a_further_version_is_requested_once(quiet: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kms_jwks.service.control.CUSTODIAN_WAIT", 0.0)
    quiet.create(keys=[{"name": "bare", "alg": "ES256"}])
    with quiet.registry.write() as tx:
        (version,) = tx.versions()
        tx.save(replace(version, state=VersionState.DESTROYED, destroyed_at=tx.now()))
    assert [create_version(quiet.service, keyed(quiet.admin, "k")) for _ in range(2)] == [2, 2]
    assert len(quiet.versions()) == 2
    with pytest.raises(errors.TransitionRefused):
        create_version(quiet.service, keyed(quiet.admin, "k-2"))


@pytest.mark.parametrize("create", [create_key_set, create_client])
def test_after_a_lost_answer_of_the_database(
    shared: World, name: str, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was made and the record of it are in one transaction."""
    with monkeypatch.context() as patched:
        lose_answers(patched, shared.service.store)
        with pytest.raises(errors.StoreUnavailable):
            create(shared.service, keyed(shared.admin, name), name)
    made = create(shared.service, keyed(shared.admin, name), name)
    assert made == create(shared.service, keyed(shared.admin, name), name)


def test_at_the_same_time_and_on_another_worker(two_workers: World) -> None:
    world = two_workers
    workers = [*world.workers] * 3
    with ThreadPoolExecutor(len(workers)) as threads:
        answers = list(threads.map(lambda worker: create_key_set(worker, keyed(world.admin, "k"), "other"), workers))
    assert len(set(answers)) == 1
    with world.registry.read() as tx:
        assert [s.name for s in tx.key_sets()] == ["other"]


def test_a_token_is_shown_once_and_its_plain_text_is_kept_nowhere(shared: World, name: str) -> None:
    clients = shared.service.clients
    made = clients.create_token(keyed(shared.admin, name), "signer", wire.TokenCreate())
    with pytest.raises(errors.TokenNotShownAgain) as refusal:
        clients.create_token(keyed(shared.admin, name), "signer", wire.TokenCreate())
    assert refusal.value.fields == {"token_id": made.id}
    stored = b"".join(file.read_bytes() for file in shared.folder.glob("registry.sqlite3*"))
    assert made.id.encode() in stored
    assert made.token.encode() not in stored
    assert clients.create_token(keyed(shared.admin, f"{name}-2"), "signer", wire.TokenCreate()).id != made.id


def test_a_rotation_that_is_sent_again_rotates_nothing_further(shared: World, name: str) -> None:
    clients = shared.service.clients
    create_client(shared.service, shared.admin, name)
    old = clients.create_token(shared.admin, name, wire.TokenCreate())
    made = clients.rotate_token(keyed(shared.admin, name), name, old.id, wire.TokenRotate())
    with pytest.raises(errors.TokenNotShownAgain) as refusal:
        clients.rotate_token(keyed(shared.admin, name), name, old.id, wire.TokenRotate())
    assert refusal.value.fields == {"token_id": made.id}
    assert [token.id for token in clients.tokens(shared.admin, name, 50, None).items] == [old.id, made.id]


@pytest.mark.parametrize(
    ("context", "body"),
    [({"route": "/v1/others"}, {}), ({}, {"name": "another-name"})],
    ids=["another route", "another body"],
)
def test_another_call_under_the_same_key_is_refused(
    shared: World, name: str, context: dict[str, str], body: dict[str, Any]
) -> None:
    create_client(shared.service, keyed(shared.admin, name), name)
    before = everything(shared)
    with pytest.raises(errors.IdempotencyKeyReused):
        shared.service.clients.create(
            keyed(shared.admin, name, **context), wire.convert({"name": name} | body, wire.ClientCreate)
        )
    assert everything(shared) == before


def test_names_in_the_path_belong_to_the_call(shared: World, name: str) -> None:
    create_client(shared.service, shared.admin, name)
    shared.service.clients.create_token(keyed(shared.admin, name), name, wire.TokenCreate())
    with pytest.raises(errors.IdempotencyKeyReused):
        shared.service.clients.create_token(keyed(shared.admin, name), "signer", wire.TokenCreate())


def test_a_body_that_means_the_same_is_the_same(shared: World, name: str) -> None:
    made = shared.service.key_sets.create(keyed(shared.admin, name), wire.KeySetCreate(name=name)).answer
    spelled = wire.convert({"access": "public", "keys": [], "name": name, "purpose": "jwt"}, wire.KeySetCreate)
    assert shared.service.key_sets.create(keyed(shared.admin, name), spelled).answer.created_at == made.created_at


def test_keys_are_kept_for_each_caller_alone_who_still_needs_the_permission(shared: World, name: str) -> None:
    other = shared.client(f"{name}-admin", Role.ADMIN)
    made = create_client(shared.service, keyed(shared.admin, name), name)
    with pytest.raises(errors.NameTaken):
        create_client(shared.service, keyed(other, name), name)
    assert create_client(shared.service, keyed(other, name), f"{name}-2") != made
    (grant,) = shared.service.clients.grants(shared.admin, 50, None, client=f"{name}-admin").items
    shared.service.clients.delete_grant(shared.admin, grant.id)
    with pytest.raises(errors.Forbidden):
        create_client(shared.service, keyed(other, name), f"{name}-2")


def test_a_refusal_is_not_kept(shared: World, name: str) -> None:
    with pytest.raises(errors.NameTaken):
        create_client(shared.service, keyed(shared.admin, name), "signer")
    assert create_client(shared.service, keyed(shared.admin, name), name)


def test_a_record_is_kept_for_a_day_and_then_swept(quiet: World) -> None:
    def swept() -> bool:
        with quiet.registry.read() as tx:
            return not tx.has_expired_idempotency_records()

    made = create_client(quiet.service, keyed(quiet.admin, "k"), "shop")
    quiet.advance(DAY - 60)
    assert create_client(quiet.service, keyed(quiet.admin, "k"), "shop") == made
    quiet.advance(61)
    assert not swept()
    with pytest.raises(errors.NameTaken):
        create_client(quiet.service, keyed(quiet.admin, "k"), "shop")
    quiet.custodian().tick()
    assert swept()
