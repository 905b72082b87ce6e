"""AWS KMS beyond the contract: accounts, regions, credentials, consistency, deadlines, what is logged. On the fake."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import multiprocessing
import os
import re
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kms_jwks import errors, jose
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends import make_backend
from kms_jwks.backends.aws_kms import AwsKmsBackend
from kms_jwks.backends.aws_kms.connection import Connection
from kms_jwks.backends.base import GeneratedKey, KeyRef, Message
from kms_jwks.config import AwsKmsOptions
from tests.fake_kms.operations import OPERATIONS, Place
from tests.fake_kms.server import ACCOUNT, OTHER_ACCOUNT, REGION, FakeKms, Fault
from tests.fake_kms.signing import Refused
from tests.moto_server import moto

ES256 = ALGORITHMS["ES256"]
PAGE = Path(__file__).parents[2] / "docs" / "backends" / "aws-kms.md"
THEIRS = Place(OTHER_ACCOUNT, REGION)
MakeBackend = Callable[..., AwsKmsBackend]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKms]:
    use(monkeypatch)
    with FakeKms() as made:
        yield made


@pytest.fixture
def make(fake: FakeKms) -> Iterator[MakeBackend]:
    """`make(**options)` → a backend on the fake, closed at the end."""
    made = []

    def new(**options: Any) -> AwsKmsBackend:
        settings = AwsKmsOptions(**{"type": "aws-kms", "region": REGION, "endpoint_url": fake.url, **options})
        made.append(AwsKmsBackend("aws", settings))
        return made[-1]

    yield new
    for backend in made:
        backend.close()


def use(monkeypatch: pytest.MonkeyPatch, account: str = ACCOUNT, **credentials: Any) -> None:
    """Let boto3 find credentials of an account."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in FakeKms.environment(account, **credentials).items():
        monkeypatch.setenv(name, value)


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def sign(backend: AwsKmsBackend, key: GeneratedKey, message: bytes = b"message", seconds: float = 10.0) -> bytes:
    """An ES256 signature, verified."""
    signature = backend.sign(key.ref, ES256, Message(message), soon(seconds))
    jose.verify_signature(ES256, key.public_jwk, message, signature)
    return signature


def refusal(call: Callable[[], object], kind: type[errors.BackendError] = errors.BackendRefused) -> errors.BackendError:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert caught.value.next_step
    return caught.value


# --- making -----------------------------------------------------------------------------------------------------------


def test_a_key_says_what_it_is_for(fake: FakeKms, make: MakeBackend, tmp_path: Path) -> None:
    policy = {"Version": "2012-10-17", "Statement": []}
    (tmp_path / "policy.json").write_text(json.dumps(policy))
    backend = make(key_policy_file=tmp_path / "policy.json")
    key = backend.generate("kj-abc-1", ES256, purpose={"key-set": "shop", "key": "main", "version": "3"})
    made = fake.held.keys[key.ref["arn"]]
    assert made.tags == {
        "kms-jwks:label": "kj-abc-1",
        "kms-jwks:key-set": "shop",
        "kms-jwks:key": "main",
        "kms-jwks:version": "3",
    }
    assert "kj-abc-1" in made.description
    assert json.loads(made.policy or "") == policy
    assert made.place.arn("alias/kj-abc-1") in fake.held.aliases


def test_a_policy_that_cannot_be_read_makes_nothing(fake: FakeKms, make: MakeBackend, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "missing.json"):
        error = refusal(lambda: make(key_policy_file=tmp_path / name).generate("kj-a-1", ES256))  # noqa: B023
        assert "key_policy_file" in error.next_step
    assert not fake.held.keys


@pytest.mark.parametrize("operation", ["DescribeKey", "GetPublicKey", "CreateAlias", "Sign"])
def test_a_new_key_that_fails_is_scheduled_for_deletion(fake: FakeKms, make: MakeBackend, operation: str) -> None:
    backend = make()
    if operation == "DescribeKey":
        fake.fail("DescribeKey", "NotFoundException")  # the lookup of the alias
    fake.fail(operation, "AccessDeniedException", times=3)
    refusal(lambda: backend.generate("kj-a-1", ES256))
    assert [key.state for key in fake.held.keys.values()] == ["PendingDeletion"]
    fake.heal()
    assert backend.list_keys("kj-") == []


def test_if_the_removal_fails_too_the_error_names_the_key(fake: FakeKms, make: MakeBackend) -> None:
    backend = make()
    fake.fail("Sign", "AccessDeniedException")
    fake.fail("ScheduleKeyDeletion", "AccessDeniedException")
    error = refusal(lambda: backend.generate("kj-a-1", ES256))
    (arn,) = fake.held.keys
    assert arn in error.next_step
    assert [stored.label for stored in backend.list_keys("kj-a-")] == ["kj-a-1"]


def test_a_key_without_its_alias_is_found_by_its_tag(fake: FakeKms, make: MakeBackend) -> None:
    """A crash between CreateKey and CreateAlias leaves such a key."""
    backend = make()
    left = fake.make(tags={"kms-jwks:label": "kj-a-1"})
    fake.make(tags={"kms-jwks:label": "kj-b-1"})
    fake.make(tags={"owner": "kj-a-9"})
    ((ref, label),) = [(stored.ref, stored.label) for stored in backend.list_keys("kj-a-")]
    assert (ref["arn"], label) == (left.arn, "kj-a-1")
    refusal(lambda: backend.destroy(ref), errors.BackendUnavailable)
    assert backend.list_keys("kj-a-") == []


def test_lists_of_more_than_a_page(fake: FakeKms, make: MakeBackend) -> None:
    for number in range(130):
        fake.alias(f"kj-a-{number}", fake.make())
    assert len(make().list_keys("kj-a-")) == 130


def test_two_keys_made_at_once_with_one_label(fake: FakeKms, make: MakeBackend) -> None:
    """KMS refuses the second alias, and the second key's deletion is scheduled."""
    backend = make()
    first = backend.generate("kj-a-1", ES256)
    fake.fail("DescribeKey", "NotFoundException")  # the lookup before does not find the alias yet
    with pytest.raises(errors.KeyExists):
        backend.generate("kj-a-1", ES256)
    states = {arn: key.state for arn, key in fake.held.keys.items()}
    assert states.pop(first.ref["arn"]) == "Enabled"
    assert list(states.values()) == ["PendingDeletion"]


def test_a_key_that_becomes_visible_late_is_waited_for(fake: FakeKms, make: MakeBackend) -> None:
    fake.held.new_keys_unseen = 4
    backend = make()
    sign(backend, backend.generate("kj-a-1", ES256))


def test_create_key_is_called_once(fake: FakeKms, make: MakeBackend) -> None:
    backend = make()
    fake.fail("CreateKey", "KMSInternalException", status=500)
    with fake.counted() as calls:
        refusal(lambda: backend.generate("kj-a-1", ES256), errors.BackendUnavailable)
    assert calls["CreateKey"] == 1


# --- accounts and regions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["key id", "key ARN", "alias", "bare alias", "alias ARN"])
def test_adoption_by_any_name(fake: FakeKms, make: MakeBackend, form: str) -> None:
    key = fake.make()
    arn = fake.alias("old/signer_1", key)
    locator = {
        "key id": key.key_id,
        "key ARN": key.arn,
        "alias": "alias/old/signer_1",
        "bare alias": "old/signer_1",
        "alias ARN": arn,
    }[form]
    backend = make()
    adopted = backend.adopt(locator)
    assert adopted.ref.as_dict() == {"arn": key.arn, "key_id": key.key_id, "account": ACCOUNT, "region": REGION}
    sign(backend, adopted)
    assert backend.attributes(adopted.ref).holds


def test_a_key_of_another_account_is_adopted_when_its_policy_allows(fake: FakeKms, make: MakeBackend) -> None:
    shared, private = fake.make(place=THEIRS, shared_with={ACCOUNT}), fake.make(place=THEIRS)
    backend = make()
    adopted = backend.adopt(shared.arn)
    assert adopted.ref["account"] == ACCOUNT
    assert OTHER_ACCOUNT in adopted.ref["arn"]
    sign(backend, adopted)
    backend.bind(adopted.ref)
    backend.generate("kj-a-1", ES256)
    for end in (backend.destroy, backend.cancel_destroy, lambda ref: backend.schedule_destroy(ref, 7)):
        assert OTHER_ACCOUNT in refusal(lambda: end(adopted.ref)).detail  # noqa: B023
    assert shared.state == "Enabled"
    assert "kms:DescribeKey" in refusal(lambda: backend.adopt(private.arn)).next_step


def test_an_alias_that_does_not_exist(fake: FakeKms, make: MakeBackend) -> None:
    error = refusal(lambda: make().adopt("alias/nothing"), errors.BackendKeyNotFound)
    assert "alias/nothing" in error.detail
    assert REGION in error.detail


@pytest.mark.parametrize("locator", ["", "alias/", "a b", "arn:aws:s3:::bucket", "pkcs11:token=x", "kj\n"])
def test_malformed_locators(make: MakeBackend, fake: FakeKms, locator: str) -> None:
    refusal(lambda: make().adopt(locator))
    assert not fake.calls


def test_a_key_of_another_region(fake: FakeKms, make: MakeBackend) -> None:
    elsewhere = fake.make(place=Place(ACCOUNT, "us-east-1"))
    error = refusal(lambda: make().adopt(elsewhere.arn))
    assert "us-east-1" in error.detail
    assert "region" in error.next_step
    ref = make(region="us-east-1").adopt(elsewhere.arn).ref
    for call in (make().public_key, make().attributes, lambda ref: make().sign(ref, ES256, Message(b"x"), soon())):
        assert "us-east-1" in refusal(lambda: call(ref)).detail  # noqa: B023
    assert fake.calls["Sign"] == 0


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"usage": "ENCRYPT_DECRYPT", "spec": "RSA_2048"}, errors.BackendRefused, "ENCRYPT_DECRYPT"),
        ({"state": "Disabled"}, errors.BackendRefused, "Disabled"),
        ({"state": "PendingDeletion"}, errors.BackendRefused, "PendingDeletion"),
    ],
)
def test_keys_that_cannot_be_adopted(
    fake: FakeKms, make: MakeBackend, fields: dict[str, Any], error: type[errors.BackendError], says: str
) -> None:
    key = fake.make(**fields)
    assert says in refusal(lambda: make().adopt(key.arn), error).detail


def test_imported_material_shows_its_weakness(fake: FakeKms, make: MakeBackend) -> None:
    backend = make()
    evidence = backend.attributes(backend.adopt(fake.make(origin="EXTERNAL").arn).ref)
    assert evidence.attributes["Origin"] == "EXTERNAL"
    assert not evidence.generated_in_module and not evidence.non_extractable and evidence.sign_only
    assert len(evidence.weaknesses) == 2
    assert not backend.attributes(backend.adopt(fake.make(origin="EXTERNAL_KEY_STORE").arn).ref).holds


def test_credentials_of_another_account(fake: FakeKms, make: MakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    key = make().generate("kj-a-1", ES256)
    use(monkeypatch, OTHER_ACCOUNT)
    bound = make()
    bound.bind(key.ref)
    for backend in (bound, make(account=ACCOUNT)):
        for call in (
            lambda: backend.sign(key.ref, ES256, Message(b"x"), soon()),  # noqa: B023
            lambda: backend.public_key(key.ref),  # noqa: B023
            lambda: backend.generate("kj-a-2", ES256),  # noqa: B023
            backend.ping,
        ):
            error = refusal(call)
            assert OTHER_ACCOUNT in error.detail
            assert ACCOUNT in error.detail
            assert "account" in error.next_step
    assert all(held.place.account == ACCOUNT for held in fake.held.keys.values())


def test_a_reference_of_another_account_than_the_setting(fake: FakeKms, make: MakeBackend) -> None:
    key = make().generate("kj-a-1", ES256)
    assert OTHER_ACCOUNT in refusal(lambda: make(account=OTHER_ACCOUNT).public_key(key.ref)).detail


def test_an_account_that_shows_only_when_the_key_is_made(fake: FakeKms, make: MakeBackend) -> None:
    """Without kms:ListAliases the account is known only from the new key, whose deletion is then scheduled."""
    fake.denied.add((ACCOUNT, "ListAliases"))
    assert OTHER_ACCOUNT in refusal(lambda: make(account=OTHER_ACCOUNT).generate("kj-a-1", ES256)).detail
    assert [key.state for key in fake.held.keys.values()] == ["PendingDeletion"]


# --- credentials ------------------------------------------------------------------------------------------------------


def test_a_worker_needs_three_rights(fake: FakeKms, make: MakeBackend) -> None:
    key = make().generate("kj-a-1", ES256)
    every = {"CreateKey", "CreateAlias", "ListAliases", "ListKeys", "ListResourceTags", "ScheduleKeyDeletion"}
    fake.denied |= {(ACCOUNT, operation) for operation in every}
    fresh = make()
    assert fresh.ping().facts["account"] == "unknown"
    fresh.bind(key.ref)
    assert fresh.ping().facts["account"] == ACCOUNT
    sign(fresh, key)
    assert fresh.attributes(key.ref).holds
    for call, right in (
        (lambda: fresh.generate("kj-a-2", ES256), "kms:CreateKey"),
        (lambda: fresh.list_keys("kj-"), "kms:ListAliases"),
        (lambda: fresh.schedule_destroy(key.ref, 7), "kms:ScheduleKeyDeletion"),
    ):
        assert right in refusal(call).next_step


def documented(number: int) -> set[str]:
    """The operations that a policy on the page of this backend allows."""
    blocks = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    found: set[str] = set()
    for statement in json.loads(blocks[number])["Statement"]:
        actions = statement["Action"]
        found |= {action.removeprefix("kms:") for action in ([actions] if isinstance(actions, str) else actions)}
    return found


def test_the_documented_policies_suffice_and_hold_nothing_more(fake: FakeKms, make: MakeBackend) -> None:
    """Only the operations are checked; IAM alone evaluates conditions and resources."""

    def only(allowed: set[str]) -> None:
        fake.denied = {(ACCOUNT, operation) for operation in OPERATIONS if operation not in allowed}

    only(documented(1))
    with fake.counted() as calls:
        custodian = make()
        custodian.ping()
        key = custodian.generate("kj-a-1", ES256, purpose={"key": "main"})
        fake.make(tags={"kms-jwks:label": "kj-a-2"})
        assert len(custodian.list_keys("kj-a-")) == 2
        custodian.adopt("alias/kj-a-1")
        custodian.schedule_destroy(key.ref, 7)
        custodian.cancel_destroy(key.ref)
    assert calls.keys() == documented(1) - {"TagResource"}, "CreateKey with tags needs that right, and does not call it"
    only(documented(0))
    with fake.counted() as calls:
        worker = make()
        worker.bind(key.ref)
        worker.ping()
        sign(worker, key)
        assert worker.attributes(key.ref).holds
    assert calls.keys() - {"ListAliases"} == documented(0)


def test_the_documented_settings_are_settings() -> None:
    first, *rest = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    section = tomllib.loads(first)["backends"]["aws"]
    for more in rest:
        section |= tomllib.loads(more)
    settings = AwsKmsOptions.model_validate(section)
    assert settings.management is not None
    assert settings.management.role_arn != settings.role_arn


def test_missing_credentials_are_found_once_they_exist(
    fake: FakeKms, make: MakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = make().generate("kj-a-1", ES256)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr("kms_jwks.backends.aws_kms.connection._RENEW_EVERY", 0.0)
    backend = make()
    error = refusal(lambda: sign(backend, key), errors.BackendUnavailable)
    assert "NoCredentials" in error.detail
    assert "role_arn" in error.next_step
    use(monkeypatch)
    sign(backend, key)


def test_an_expired_token_is_replaced_without_a_restart(
    fake: FakeKms, make: MakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kms_jwks.backends.aws_kms.connection._RENEW_EVERY", 0.0)
    use(monkeypatch, token="first")
    backend = make()
    key = backend.generate("kj-a-1", ES256)
    opened = backend.recovered_at
    fake.expired_tokens.add("first")
    assert "ExpiredToken" in refusal(lambda: sign(backend, key), errors.BackendUnavailable).detail
    use(monkeypatch, token="second")
    sign(backend, key)
    assert backend.recovered_at > opened


def test_a_wrong_secret(fake: FakeKms, make: MakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, secret="not-the-secret", token="a-session-token")
    error = refusal(lambda: make().ping())
    assert "clock" in error.next_step
    assert "a-session-token" not in repr(error) + error.detail + error.next_step


def test_an_unknown_profile(make: MakeBackend) -> None:
    backend = make(profile="unknown")
    for call in (backend.ping, lambda: backend.generate("kj-a-1", ES256)):
        assert "profile" in refusal(call).next_step


def test_profiles_of_a_file_and_management_of_its_own(fake: FakeKms, tmp_path: Path, monkeypatch: Any) -> None:
    for name in FakeKms.environment():
        monkeypatch.delenv(name)
    lines = []
    for profile, account in (("signer", ACCOUNT), ("maker", OTHER_ACCOUNT)):
        found = FakeKms.environment(account)
        lines += [f"[{profile}]", *(f"{name.lower()} = {found[name]}" for name in list(found)[:2])]
    (tmp_path / "credentials").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    settings = AwsKmsOptions.model_validate(
        {
            "type": "aws-kms",
            "region": REGION,
            "endpoint_url": fake.url,
            "profile": "signer",
            "management": {"profile": "maker"},
        }
    )
    for management, account in ((False, ACCOUNT), (True, OTHER_ACCOUNT)):
        backend = make_backend("aws", settings, tmp_path, management=management)
        assert backend.ping().facts["account"] == account
        assert not backend.sign_in_place
        backend.close()


def test_a_role_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By moto's STS."""
    use(monkeypatch)
    role = "arn:aws:iam::444455556666:role/kms-jwks"
    with moto() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", url)
        backend = AwsKmsBackend("aws", AwsKmsOptions(type="aws-kms", region=REGION, endpoint_url=url, role_arn=role))
        health = backend.ping()
        assert health.facts["credentials"] == "assume-role"
        assert health.facts["account"] == OTHER_ACCOUNT
        key = backend.generate("kj-a-1", ES256)
        assert key.ref["account"] == OTHER_ACCOUNT
        sign(backend, key)
        backend.close()


def test_a_role_that_cannot_be_assumed(fake: FakeKms, make: MakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake's STS refuses every caller."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", fake.url)
    backend = make(role_arn="arn:aws:iam::111122223333:role/unknown")
    error = refusal(backend.ping)
    assert "AssumeRole" in error.detail
    assert "sts:AssumeRole" in error.next_step


# --- time -------------------------------------------------------------------------------------------------------------


def test_one_failure_of_kms_is_retried(fake: FakeKms, make: MakeBackend) -> None:
    backend = make()
    key = backend.generate("kj-a-1", ES256)
    for fault in (
        Fault(error=Refused("KMSInternalException", status=500)),
        Fault(error=Refused("NotFoundException")),
        Fault(cut=True),
    ):
        fake.fault("Sign", fault)
        with fake.counted() as calls:
            sign(backend, key)
        assert calls["Sign"] == 2


def test_throttling_is_not_retried(fake: FakeKms, make: MakeBackend) -> None:
    backend = make()
    key = backend.generate("kj-a-1", ES256)
    fake.fail("Sign", "ThrottlingException", times=3)
    with fake.counted() as calls:
        error = refusal(lambda: sign(backend, key), errors.BackendThrottled)
    assert calls["Sign"] == 1
    assert error.retry_after == 1


def test_a_call_that_hangs_ends_about_at_its_deadline(fake: FakeKms, make: MakeBackend) -> None:
    backend = make(read_timeout_ms=20_000)
    key = backend.generate("kj-a-1", ES256)
    fake.fault("Sign", Fault(hang=True), times=2)
    begun = time.monotonic()
    refusal(lambda: sign(backend, key, seconds=2.0), errors.BackendTimeout)
    assert time.monotonic() - begun < 15, "its own timeout of 20 s did not count"


def test_an_endpoint_that_is_not_there(make: MakeBackend) -> None:
    backend = make(endpoint_url="http://127.0.0.1:9")
    ref = KeyRef.of(arn=f"arn:aws:kms:{REGION}:{ACCOUNT}:key/x", key_id="x", account=ACCOUNT, region=REGION)
    error = refusal(lambda: backend.sign(ref, ES256, Message(b"x"), soon()), errors.BackendUnavailable)
    assert error.retry_after
    assert "endpoint" in error.next_step


def test_the_environment_does_not_say_where_kms_is(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://elsewhere.example")
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", "http://elsewhere.example")
    connection = Connection(AwsKmsOptions(type="aws-kms", region=REGION), lambda: None)
    assert connection._client(soon()).meta.endpoint_url == f"https://kms.{REGION}.amazonaws.com"
    connection.close()


@pytest.mark.parametrize("url", ["no-url", "ftp://host", "http://"])
def test_malformed_endpoint_urls(make: MakeBackend, url: str) -> None:
    with pytest.raises(ValidationError, match="endpoint_url"):
        make(endpoint_url=url)


@pytest.mark.parametrize("url", ["https://", "https:///path"])
def test_an_endpoint_url_without_a_host(make: MakeBackend, url: str) -> None:
    with pytest.raises(errors.BackendError):
        make(endpoint_url=url).ping()


def test_disabling_a_key_is_no_revocation(fake: FakeKms, make: MakeBackend) -> None:
    """KMS may sign with a disabled key for a while; the service's own revocation does not depend on DisableKey."""
    backend = make()
    key = backend.generate("kj-a-1", ES256)
    fake.held.disabled_late = 2
    fake.held.disable_key(Place(ACCOUNT, REGION), {"KeyId": key.ref["key_id"]})
    sign(backend, key)
    sign(backend, key)
    error = refusal(lambda: sign(backend, key))
    assert error.fields["key_state"] == "Disabled"
    assert "EnableKey" in error.next_step


def test_a_cancelled_deletion_leaves_the_key_enabled(fake: FakeKms, make: MakeBackend) -> None:
    backend = make()
    key = backend.generate("kj-a-1", ES256)
    held = fake.held.keys[key.ref["arn"]]
    assert backend.schedule_destroy(key.ref, 30)
    assert refusal(lambda: sign(backend, key)).fields["key_state"] == "PendingDeletion"
    backend.cancel_destroy(key.ref)
    assert held.state == "Enabled"
    backend.schedule_destroy(key.ref, 7)
    fake.fail("EnableKey", "AccessDeniedException")
    error = refusal(lambda: backend.cancel_destroy(key.ref))
    assert "disabled" in error.next_step and "kms:EnableKey" in error.next_step
    assert held.state == "Disabled"
    backend.cancel_destroy(key.ref)
    assert held.state == "Enabled", "a repeated call completes a cancellation that stopped half-way"
    held.state = "PendingReplicaDeletion"
    with pytest.raises(errors.BackendUnavailable) as waits:
        backend.destroy(key.ref)
    assert waits.value.retry_after == 7 * 86_400, "KMS does not say when its replicas are gone"
    with fake.counted() as calls:
        assert backend.schedule_destroy(key.ref, 30)
    assert calls.keys() == {"DescribeKey"}, "the deletion is not cancelled and scheduled again"


@pytest.mark.parametrize(("asked", "days"), [(1, 7), (7, 7), (12, 12), (30, 30), (90, 30)])
def test_days_are_what_kms_allows(fake: FakeKms, make: MakeBackend, asked: int, days: int) -> None:
    backend = make()
    key = backend.generate("kj-a-1", ES256)
    backend.schedule_destroy(key.ref, asked)
    error = refusal(lambda: backend.destroy(key.ref), errors.BackendUnavailable)
    assert error.retry_after is not None and 0 <= days * 86_400 - error.retry_after < 120
    fake.advance(days + 1)
    backend.destroy(key.ref)
    assert backend.schedule_destroy(key.ref, 7)


# --- processes, threads, logs -----------------------------------------------------------------------------------------


def _sign_in_child(backend: AwsKmsBackend, key: GeneratedKey) -> bool:
    return len(sign(backend, key)) == 64


def test_a_backend_crosses_a_fork(fake: FakeKms, make: MakeBackend) -> None:
    backend = make()
    key = backend.generate("kj-a-1", ES256)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: os._exit(0 if _sign_in_child(backend, key) else 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads; gunicorn's master has none
        child.start()
    child.join(30)
    assert child.exitcode == 0
    sign(backend, key)


def test_many_threads_begin_at_once(fake: FakeKms, make: MakeBackend) -> None:
    key = make().generate("kj-a-1", ES256)
    backend = make()
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        signed = list(threads.map(lambda n: sign(backend, key, f"{n}".encode(), 30.0), range(64)))
    assert len(set(signed)) == 64


def test_nothing_secret_is_logged(
    fake: FakeKms, make: MakeBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    use(monkeypatch, token="a-session-token")
    backend = make()
    key = backend.generate("kj-a-1", ES256)
    signature = sign(backend, key, b"a secret message")
    fake.fail("Sign", "InvalidSignatureException", text="x-amz-security-token:a-session-token")
    refusal(lambda: sign(backend, key))
    said = caplog.text
    secrets = [f"secret-of-AKIA{ACCOUNT}", "a-session-token", "a secret message", f"AKIA{ACCOUNT}"]
    secrets += [jose.b64u_encode(signature), signature.hex()]
    assert not [secret for secret in secrets if secret in said]
    assert "Authorization" not in said
    assert "Signature" not in said
