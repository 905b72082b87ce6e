"""The signing path above a real signer in memory: every answer is verified by a library that we did not write."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jwt
import pytest
import structlog.testing
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from kms_jwks import errors, jose, strictjson, wire
from kms_jwks.access import Role
from kms_jwks.model import DAY, SECOND, VersionState
from kms_jwks.service.definitions import add_key_set
from kms_jwks.service.guard import RequestContext
from kms_jwks.service.signing import Batch, Steps
from kms_jwks.service.signing_job import SigningJob, SigningOperation
from tests.service.world import World

RAW = [{"name": "default", "alg": "ES256"}]


def call(
    world: World,
    operation: SigningOperation,
    body: dict[str, Any],
    who: RequestContext | None = None,
    name: str = "main",
    key: str = "default",
) -> Any:
    return world.service.signing.handle(operation, who or world.signer, name, key, body)


def decode(world: World, token: str, kid: str) -> dict[str, Any]:
    document: Any = strictjson.loads(world.service.verifiers.jwks(RequestContext(), "main").body)
    entry = next(jwk for jwk in document["keys"] if jwk["kid"] == kid)
    claims: dict[str, Any] = jwt.decode(token, jwt.PyJWK(entry), audience="demo", issuer="https://keys.example/main")
    return claims


def signing_input(world: World, kid: str, claims: dict[str, Any] | None = None, **header: Any) -> str:
    now = world.now() // SECOND
    claims = {"iss": "https://keys.example/main", "exp": now + 300} | (claims or {})
    head = {"alg": "ES256", "kid": kid, "typ": "JWT"} | header
    return ".".join(jose.b64u_encode(strictjson.dumps(part)) for part in (head, claims))


# --- jwt


def test_a_token_is_whole(world: World) -> None:
    kid = world.create().keys[0].active_kid or ""
    answer = world.sign({"sub": "alice", "aud": "demo"})
    header = jwt.get_unverified_header(answer.token)
    assert header == {"alg": "ES256", "kid": kid, "typ": "JWT"} == {"alg": answer.alg, "kid": answer.kid, "typ": "JWT"}
    claims = decode(world, answer.token, kid)
    assert claims["sub"] == "alice"
    assert claims["jti"] == answer.jti
    assert claims["exp"] - claims["iat"] == 300
    assert answer.expires_at.timestamp() == claims["exp"]


def test_a_profile_makes_access_tokens(world: World) -> None:
    world.create(keys=[{"name": "default", "alg": "ES256", "profile": {"typ": "at+jwt", "default_lifetime": 60}}])
    token = world.sign({"sub": "a", "aud": "demo", "client_id": "c"}).token
    assert jwt.get_unverified_header(token)["typ"] == "at+jwt"
    with pytest.raises(errors.ClaimsRefused):
        world.sign({"sub": "a"})


@pytest.mark.parametrize(
    "body",
    [
        {"claims": []},
        {"claims": {}, "alg": "none"},
        {"claims": {}, "kid": "x"},
        {"claims": {}, "header": {}},
        {"claims": {}, "expires_in": 0},
        {"claims": {}, "expires_in": "60"},
        {"claims": {}, "profile": "other"},
        {},
    ],
)
def test_fields_that_are_refused(world: World, body: dict[str, Any]) -> None:
    world.create()
    with pytest.raises(errors.InvalidRequest):
        call(world, SigningOperation.JWT, body)


@pytest.mark.parametrize("name", ["EXP", "I\u017fS", "exp\0"])
def test_a_claim_that_a_decoder_reads_as_another_is_signed_by_no_route(world: World, name: str) -> None:
    kid = world.create().keys[0].active_kid or ""
    body = {"claims": {"sub": "alice", name: 32_503_680_000}, "expires_in": 5}
    with pytest.raises(errors.ClaimsRefused):
        call(world, SigningOperation.JWT, body)
    shown = {"signing_input": signing_input(world, kid, {name: 32_503_680_000}), "kid": kid}
    with pytest.raises(errors.SigningInputRefused):
        call(world, SigningOperation.SIGNATURE, shown)
    good = {"claims": {"sub": "alice"}}
    first, second = call(world, SigningOperation.JWT, {"batch": [body, good]}).items
    assert isinstance(first, errors.ClaimsRefused)
    assert isinstance(second, wire.SignedJwt)
    (only,) = call(world, SigningOperation.SIGNATURE, {"batch": [shown]}).items
    assert isinstance(only, errors.SigningInputRefused)


# --- who may


def test_only_the_right_grant_signs(world: World) -> None:
    world.create()
    with world.registry.read() as tx:
        key_set = tx.key_set("main")
        assert key_set is not None
        (key,) = tx.keys(key_set.id)
    right = world.client("right", Role.SIGNER, key_set.id, key.id)
    world.until(lambda: world.service.sync.snapshot().epoch.counter and _admitted(world, right))
    for who, error in [
        (RequestContext(), errors.CredentialsMissing),
        (RequestContext("Bearer nonsense"), errors.CredentialsMalformed),
        (RequestContext(f"Bearer {_unknown()}"), errors.CredentialsUnknown),
        (world.admin, errors.Forbidden),
        (world.raw_signer, errors.Forbidden),
    ]:
        with pytest.raises(error):
            call(world, SigningOperation.JWT, {"claims": {}}, who)


def _unknown() -> str:
    from kms_jwks import authn

    return authn.new_token().token


def _admitted(world: World, who: RequestContext) -> bool:
    try:
        return bool(call(world, SigningOperation.JWT, {"claims": {}}, who))
    except errors.CredentialsUnknown:
        return False


def test_a_caller_without_a_grant_is_refused_before_its_body_is_read(world: World) -> None:
    """With the error that it would get afterwards; one that may sign is let through without a word."""
    world.create()
    world.create("raw", keys=RAW, purpose="raw")
    jwt_, raw = SigningOperation.JWT, SigningOperation.SIGNATURE
    for who, operation, names, error in [
        (world.signer, jwt_, ("main", "default"), None),
        (world.raw_signer, raw, ("raw", "default"), None),
        (world.admin, jwt_, ("main", "default"), errors.Forbidden),
        (world.raw_signer, jwt_, ("main", "default"), errors.Forbidden),
        (world.signer, raw, ("raw", "default"), errors.Forbidden),
        (world.signer, jwt_, ("main", "other"), errors.KeyNotFound),
        (world.signer, jwt_, ("other", "default"), errors.KeySetNotFound),
    ]:
        world.service.authenticate(who, data_plane=True)
        with pytest.raises(error) if error else contextlib.nullcontext():
            world.service.signing.refuse_early(operation, who, *names)


def test_purposes_keep_apart(world: World) -> None:
    world.create()
    world.create("raw", keys=RAW, purpose="raw")
    payload = {"payload": jose.b64u_encode(b"x")}
    with pytest.raises(errors.PurposeMismatch):
        call(world, SigningOperation.JWS, payload, world.raw_signer)
    with pytest.raises(errors.Forbidden):
        call(world, SigningOperation.SIGNATURE, {"input": "eA"}, world.raw_signer)
    assert call(world, SigningOperation.JWS, payload, world.raw_signer, "raw")
    with pytest.raises(errors.PurposeMismatch):
        call(world, SigningOperation.JWT, {"claims": {}}, name="raw")
    with pytest.raises(errors.Forbidden):
        call(world, SigningOperation.SIGNATURE, {"input": "eA"}, world.signer, "raw")


# --- signing input and pinned kids


def test_a_caller_that_pins_reads_again_before_the_handover_is_over(world: World) -> None:
    """Half the handover is left: what it signs meanwhile is signed, whenever the rotation was."""
    old = world.create().keys[0].active_kid or ""
    world.standby()
    world.advance(DAY + 1)
    before = world.now()
    active = world.service.signing.active(world.signer, "main", "default")
    world.service.keys.rotate(world.admin, "main", "default", wire.RotateRequest())
    assert active.kid == old
    assert 29 < active.refresh_after.timestamp() - before / SECOND < 35
    world.advance(50)
    assert call(world, SigningOperation.SIGNATURE, {"signing_input": signing_input(world, old), "kid": old}).kid == old


@pytest.mark.parametrize(
    ("body", "right"),
    [
        ({"input": "eA"}, "send signing_input (header.payload of a JWT) and kid"),
        ({"digest": "eA", "kid": "x"}, "send signing_input (header.payload of a JWT) and kid"),
        ({"payload": "eA"}, "the fields here are signing_input, kid"),
    ],
)
def test_the_form_of_a_raw_set_is_refused_with_the_fields_of_a_jwt_set(
    world: World, body: dict[str, Any], right: str
) -> None:
    world.create()
    with pytest.raises(errors.InvalidField) as refusal:
        call(world, SigningOperation.SIGNATURE, body)
    assert refusal.value.detail.endswith(right)


def test_the_form_of_a_jwt_set_is_refused_with_the_fields_of_a_raw_set(world: World) -> None:
    world.create("raw", keys=RAW, purpose="raw")
    with pytest.raises(errors.InvalidField) as refusal:
        call(world, SigningOperation.SIGNATURE, {"signing_input": "a.b", "kid": "x"}, world.raw_signer, "raw")
    assert refusal.value.detail == (
        "signing_input: not in a key set with purpose raw; "
        "send input or digest (base64url), and kid if it is to be pinned"
    )
    assert refusal.value.fields == {"field": "signing_input"}


def test_exactly_the_bytes_shown_are_signed(world: World) -> None:
    kid = world.create().keys[0].active_kid or ""
    shown = signing_input(world, kid, {"aud": "demo"})
    answer = call(world, SigningOperation.SIGNATURE, {"signing_input": shown, "kid": kid})
    assert decode(world, f"{shown}.{answer.signature}", kid)["aud"] == "demo"


def test_a_pinned_kid_is_honoured_within_its_handover_only(world: World) -> None:
    old = world.create().keys[0].active_kid or ""
    new = world.standby().kid or ""
    with pytest.raises(errors.KidNotActive):
        call(world, SigningOperation.SIGNATURE, {"signing_input": signing_input(world, new), "kid": new})
    world.advance(DAY + 1)
    world.service.keys.rotate(world.admin, "main", "default", wire.RotateRequest())
    assert call(world, SigningOperation.SIGNATURE, {"signing_input": signing_input(world, old), "kid": old}).kid == old
    world.advance(61)
    with pytest.raises(errors.KidNotActive) as refusal:
        call(world, SigningOperation.SIGNATURE, {"signing_input": signing_input(world, old), "kid": old})
    assert refusal.value.fields["active_kid"] == new


def test_a_pinned_kid_is_never_honoured_after_its_revocation(world: World) -> None:
    old = world.create().keys[0].active_kid or ""
    world.standby()
    world.advance(DAY + 1)
    world.service.keys.rotate(world.admin, "main", "default", wire.RotateRequest())
    world.service.revocation.revoke_version(world.admin, "main", "default", "1", wire.RevokeRequest())
    with pytest.raises(errors.KidNotActive):
        call(world, SigningOperation.SIGNATURE, {"signing_input": signing_input(world, old), "kid": old})


# --- raw


def test_detached_and_attached_jws(world: World) -> None:
    world.create("raw", keys=RAW, purpose="raw")
    payload = jose.b64u_encode(b"any bytes \x00\xff")
    attached = call(
        world, SigningOperation.JWS, {"payload": payload, "typ": "example", "cty": "x"}, world.raw_signer, "raw"
    ).jws
    assert attached.split(".")[1] == payload
    assert jwt.PyJWS().get_unverified_header(attached)["typ"] == "example"
    detached = call(world, SigningOperation.JWS, {"payload": payload, "detached": True}, world.raw_signer, "raw").jws
    assert detached.split(".")[1] == ""


def test_input_and_digest_give_signatures_of_the_same_message(world: World) -> None:
    made = world.create("raw", keys=RAW, purpose="raw")
    public = jose.public_key(made.keys[0].versions[0].public_jwk or {})
    assert isinstance(public, ec.EllipticCurvePublicKey)
    for body in (
        {"input": jose.b64u_encode(b"message")},
        {"digest": jose.b64u_encode(hashlib.sha256(b"message").digest())},
        {"input": jose.b64u_encode(b"message"), "kid": made.keys[0].active_kid},
    ):
        raw = jose.b64u_decode(call(world, SigningOperation.SIGNATURE, body, world.raw_signer, "raw").signature)
        r, s = int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big")
        public.verify(utils.encode_dss_signature(r, s), b"message", ec.ECDSA(hashes.SHA256()))


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"digest": jose.b64u_encode(b"short")}, errors.InvalidDigest),
        ({"input": "eA=="}, errors.InvalidPayload),
        ({"input": "e+A"}, errors.InvalidPayload),
        ({"input": "eA", "digest": "eA"}, errors.InvalidField),
        ({}, errors.InvalidField),
        ({"input": "eA", "kid": "other"}, errors.KidNotActive),
    ],
)
def test_raw_bodies_that_are_refused(world: World, body: dict[str, Any], error: type[errors.Error]) -> None:
    world.create("raw", keys=RAW, purpose="raw")
    with pytest.raises(error):
        call(world, SigningOperation.SIGNATURE, body, world.raw_signer, "raw")


def test_eddsa_takes_no_digest(world: World) -> None:
    world.create("raw", keys=[{"name": "default", "alg": "EdDSA"}], purpose="raw")
    with pytest.raises(errors.InvalidDigest):
        call(world, SigningOperation.SIGNATURE, {"digest": jose.b64u_encode(bytes(32))}, world.raw_signer, "raw")


# --- batches


def test_a_batch_answers_in_order_with_errors_in_place(world: World) -> None:
    world.create()
    answer = world.batch([{"claims": {"sub": "a"}}, {"claims": {"iss": "x"}}, 7, {"claims": {"sub": "b"}}])
    first, second, third, fourth = answer.items
    assert isinstance(first, wire.SignedJwt)
    assert isinstance(second, errors.ClaimsRefused)
    assert isinstance(third, errors.InvalidField)
    assert isinstance(fourth, wire.SignedJwt)
    assert first.jti != fourth.jti


@pytest.mark.parametrize("items", [[], [{"claims": {}}] * 257, "x", None])
def test_batches_that_are_refused(world: World, items: Any) -> None:
    world.create()
    with pytest.raises(errors.InvalidBatch):
        world.batch(items)


def test_a_batch_does_not_wait_for_a_module_that_has_failed(world: World) -> None:
    world.create()
    calls: list[str] = []
    world.backend.before = calls.append
    world.backend.fail = errors.BackendUnavailable("away", retry_after=1)
    answer = world.batch([{"claims": {}}] * 20)
    assert all(isinstance(item, errors.BackendUnavailable) for item in answer.items)
    assert calls.count("sign") == 1


# --- what overtakes a signature


def during_sign(world: World, action: Any) -> None:
    """Run `action` in the midst of the next signature."""
    done = threading.Event()

    def before(call_name: str) -> None:
        if call_name == "sign" and not done.is_set():
            done.set()
            action()

    world.backend.before = before


def test_a_revocation_that_overtakes_a_signature_wins(world: World) -> None:
    old = world.create().keys[0].active_kid
    world.standby()
    during_sign(
        world,
        lambda: world.service.revocation.revoke_version(world.admin, "main", "default", "1", wire.RevokeRequest()),
    )
    assert world.sign().kid != old


def test_a_pinned_call_that_a_revocation_overtakes_is_refused(world: World) -> None:
    old = world.create().keys[0].active_kid or ""
    world.standby()
    shown = signing_input(world, old)
    during_sign(
        world,
        lambda: world.service.revocation.revoke_version(world.admin, "main", "default", "1", wire.RevokeRequest()),
    )
    with pytest.raises(errors.KidNotActive):
        call(world, SigningOperation.SIGNATURE, {"signing_input": shown, "kid": old})


def test_a_batch_that_outlives_its_token_delivers_nothing(world: World) -> None:
    world.create()
    with world.registry.read() as tx:
        owner = tx.client("signer")
        assert owner is not None
        (token,) = tx.tokens(owner.id)
    during_sign(world, lambda: world.service.clients.revoke_token(world.admin, "signer", token.id))
    with pytest.raises(errors.CredentialsRevoked):
        world.batch([{"claims": {}}] * 10)


def test_a_disabled_key_s_signature_does_not_leave(world: World) -> None:
    world.create()
    during_sign(world, lambda: world.service.keys.disable(world.admin, "main", "default"))
    with pytest.raises(errors.KeyDisabled):
        world.sign()


def test_a_lease_that_ends_during_a_signature_keeps_it_back(world: World) -> None:
    world.create()

    def cut_off() -> None:
        world.service.sync._stop.set()
        world.service.sync._kick.set()
        thread = world.service.sync._thread
        assert thread is not None
        thread.join()
        world.offset += 11 * SECOND

    during_sign(world, cut_off)
    with pytest.raises(errors.RegistryStale):
        world.sign()
    assert world.kids()


# --- modules that are slow


def test_a_call_that_hangs_is_answered_by_its_deadline(world: World) -> None:
    world.create()
    world.backend.sign_in_place = False
    release = threading.Event()

    def hang(name: str) -> None:
        if name == "sign":
            release.wait(5)

    world.backend.before = hang
    started = time.monotonic()
    with pytest.raises(errors.BackendTimeout):
        world.sign()
    assert time.monotonic() - started < 3
    release.set()
    world.backend.before = lambda _: None
    assert world.sign().token


# --- one thread waits for many


async def drive(steps: Steps) -> wire.Answer | Batch:
    """Take the steps of a call in an event loop."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            pending = next(steps)
        except StopIteration as end:
            answer: wire.Answer | Batch = end.value
            return answer
        done = asyncio.Event()
        pending.on_done(lambda done=done: loop.call_soon_threadsafe(done.set))  # type: ignore[misc]
        deadline = getattr(pending, "deadline", None)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), deadline and max(0.0, deadline - time.monotonic()))


def steps_of(world: World, body: dict[str, Any]) -> Steps:
    return world.service.signing.steps(SigningOperation.JWT, world.signer, "main", "default", body)


@pytest.mark.parametrize("in_place", [True, False])
def test_an_event_loop_drives_many_calls_in_one_thread(world: World, in_place: bool) -> None:
    world.create()
    world.backend.sign_in_place = in_place

    async def all_of_them() -> list[Any]:
        body = {"claims": {"sub": "a"}}
        calls = [steps_of(world, body) for _ in range(8)] + [steps_of(world, {"batch": [body] * 3})]
        return await asyncio.gather(*map(drive, calls))

    *singles, batch = asyncio.run(all_of_them())
    assert len({answer.jti for answer in singles}) == 8
    assert [type(item) for item in batch.items] == [wire.SignedJwt] * 3


def test_an_event_loop_answers_a_hung_call_by_its_deadline_and_can_cancel_one(world: World) -> None:
    world.create()
    world.backend.sign_in_place = False
    release = threading.Event()

    def held(name: str) -> None:
        if name == "sign":
            release.wait(20)

    world.backend.before = held

    async def hang() -> None:
        hung = asyncio.create_task(drive(steps_of(world, {"claims": {}})))
        steps = steps_of(world, {"claims": {}})
        next(steps)
        steps.close()
        with pytest.raises(errors.BackendTimeout):
            await hung

    asyncio.run(hang())
    release.set()
    world.backend.before = lambda _: None
    world.until(lambda: world.service.backends.stuck() == 0)
    assert world.sign().token


# --- the record of a signature


class HeldTicket:
    """A record that is durable, or lost, when the test says so."""

    def __init__(self, lost: bool = False) -> None:
        self.ended = threading.Event()
        self.lost = lost

    def wait(self) -> None:
        assert self.ended.wait(20)

    def on_done(self, callback: Callable[[], object]) -> None:
        raise AssertionError("the thread waits")

    def result(self) -> None:
        assert self.ended.is_set()
        if self.lost:
            raise errors.Unavailable("The record could not be written.")


def test_an_answer_leaves_once_its_record_is_durable(world: World) -> None:
    kid = world.create().keys[0].active_kid
    tickets: list[tuple[Any, HeldTicket]] = []

    def record(context: RequestContext, job: SigningJob) -> HeldTicket:
        tickets.append(((context.caller and context.caller.client, job.signer.kid, job.jti, job.profile), HeldTicket()))
        return tickets[-1][1]

    world.service.signing._record = record
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(world.sign)
        world.until(lambda: tickets)
        assert not answer.done()
        tickets[0][1].ended.set()
        assert tickets[0][0] == ("signer", kid, answer.result(20).jti, "default")
        batch = thread.submit(world.batch, [{"claims": {}}] * 3)
        world.until(lambda: len(tickets) == 4)
        assert not batch.done(), "all of a batch are signed before one of its records is waited for"
        for _, ticket in tickets:
            ticket.ended.set()
        assert len(batch.result(20).items) == 3


def test_a_signature_whose_record_is_lost_does_not_leave(world: World) -> None:
    world.create()

    def record(context: RequestContext, job: SigningJob) -> HeldTicket:
        ticket = HeldTicket(lost=True)
        ticket.ended.set()
        return ticket

    world.service.signing._record = record
    with pytest.raises(errors.Unavailable, match="record"):
        world.sign()
    with pytest.raises(errors.Unavailable, match="record"):
        world.batch([{"claims": {}}])


# --- active and verify


def test_active_tells_what_comes_next(world: World) -> None:
    kid = world.create().keys[0].active_kid
    standby = world.standby()

    def find() -> wire.Active | None:
        answer = world.service.signing.active(world.signer, "main", "default")
        return answer if answer.next is not None and answer.next.not_before is not None else None

    answer = world.until(find)
    assert answer is not None
    assert (answer.kid, answer.alg) == (kid, "ES256")
    assert answer.next is not None
    assert answer.next.kid == standby.kid


def test_verify_follows_the_registry(world: World) -> None:
    world.create()
    world.standby()
    token = world.sign({"sub": "a", "aud": "demo"}).token
    request = wire.VerifyRequest(token=token, audience="demo")
    assert world.service.verifiers.verify_token(world.signer, "main", request).claims["sub"] == "a"
    with pytest.raises(errors.TokenAudienceMismatch):
        world.service.verifiers.verify_token(world.signer, "main", wire.VerifyRequest(token=token, audience="other"))
    world.service.revocation.revoke_version(world.admin, "main", "default", "1", wire.RevokeRequest())
    with pytest.raises(errors.TokenKeyRevoked):
        world.service.verifiers.verify_token(world.signer, "main", request)
    assert world.version(1).state is VersionState.REVOKED


def test_who_signs_with_one_key_may_verify_with_its_set(world: World) -> None:
    world.create()
    world.create("other")
    with world.registry.read() as tx:
        key_set = tx.key_set("main")
        assert key_set is not None
        (key,) = tx.keys(key_set.id)
    narrow = world.client("narrow", Role.SIGNER, key_set.id, key.id)
    world.until(lambda: _admitted(world, narrow))
    request = wire.VerifyRequest(token=world.sign({"aud": "demo"}).token, audience="demo")
    assert world.service.verifiers.verify_token(narrow, "main", request).kid
    with pytest.raises(errors.Forbidden):
        world.service.verifiers.verify_token(narrow, "other", request)


def test_a_batch_is_whole_or_stale(world: World) -> None:
    world.create()
    assert isinstance(world.batch([{"claims": {}}] * 256), Batch)


# --- the database's clock


@pytest.mark.parametrize("step", [-400, 400])
def test_a_key_does_not_sign_while_the_database_s_clock_is_off_by_more_than_its_clock_skew(
    quiet: World, step: int
) -> None:
    """The custodian has halted by then; the key that allows more signs on, and neither needs a restart."""
    world, sync = quiet, quiet.service.sync
    custodian = world.custodian()
    with world.store().write() as tx:
        control = world.service.key_sets._control
        keys = [wire.KeyCreate(name="default", alg="ES256")]
        keys.append(wire.KeyCreate(name="patient", alg="ES256", policy=wire.PolicyFields(clock_skew=900)))
        add_key_set(tx, control, wire.KeySetCreate(name="main", keys=keys))

    def both_sign() -> bool:
        custodian.tick()
        return [v.state for v in world.versions()].count(VersionState.ACTIVE) == 2

    world.until(both_sign)
    sync.poll()
    assert world.sign().token

    def states() -> dict[str, str]:
        return {d.name: d.state for d in world.service.operation.ready_sign(RequestContext()).dependencies}

    # The wall clock is SQLite's clock; the boot clock stays as it is.
    real, world.wall_step = world.wall, step * SECOND  # type: ignore[attr-defined]
    for store in world._stores:
        store._database._wall = lambda: real() + world.wall_step  # type: ignore[attr-defined]
    with structlog.testing.capture_logs() as logs:
        sync.poll()
        sync.poll()
        with pytest.raises(errors.ClocksDisagree, match=rf"moved by \{step:+d}\.0 s"):
            world.sign()
        with pytest.raises(errors.ClocksDisagree):
            world.batch([{"claims": {}}])
        patient = call(world, SigningOperation.JWT, {"claims": {}}, name="main", key="patient")
        assert patient.token
        assert states()["clock"] == "clocks_disagree"
        custodian.tick()
        world.wall_step = 0  # type: ignore[attr-defined]
        sync.poll()
    assert world.sign().token
    assert "clock" not in states()
    events = [line["event"] for line in logs if "clock" in line["event"] or "halted" in line["event"]]
    assert events == ["database_clock_stepped", "custodian_halted", "database_clock_agrees"]
