"""AWS KMS adopts the backends' contract: on a fake with all rules of KMS, and on moto for what moto does rightly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import pytest

from kms_jwks import errors
from kms_jwks.backends.aws_kms import AwsKmsBackend
from kms_jwks.backends.base import GeneratedKey
from kms_jwks.config import AwsKmsOptions
from tests.contract.suite import BackendContract, Factory, VendorError
from tests.fake_kms.server import REGION, FakeKms, Fault
from tests.moto_server import moto


def make_backend(url: str) -> AwsKmsBackend:
    """Picklable. Credentials are in the environment."""
    return AwsKmsBackend("aws", AwsKmsOptions(type="aws-kms", region=REGION, endpoint_url=url, read_timeout_ms=10_000))


@pytest.fixture(scope="module", autouse=True)
def _credentials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FakeKms.environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeKms]:
    with FakeKms() as made:
        yield made


@pytest.fixture(scope="module")
def moto_url() -> Iterator[str]:
    with moto() as url:
        yield url


# --- the errors that KMS documents ------------------------------------------------------------------------------------

_MANY = 40
"""More than the attempts of any call."""


def _code(
    code: str, becomes: type[errors.BackendError], *, call: str, operation: str, status: int = 400
) -> VendorError:
    def arrange(fake: FakeKms, key: GeneratedKey) -> None:
        fake.fail(operation, code, times=_MANY, status=status)

    return VendorError(arrange, becomes, call)


def _fault(fault: Fault, becomes: type[errors.BackendError], *, call: str = "sign", says: str = "") -> VendorError:
    operation = {"sign": "Sign", "ping": "ListAliases"}[call]
    return VendorError(lambda fake, key: fake.fault(operation, fault, times=_MANY), becomes, call, says)


_CALLS = {
    "sign": "Sign",
    "public_key": "GetPublicKey",
    "attributes": "DescribeKey",
    "list_keys": "ListKeys",
    "ping": "ListAliases",
    "adopt": "DescribeKey",
    "schedule_destroy": "ScheduleKeyDeletion",
    "destroy": "ScheduleKeyDeletion",
}
_ANYWHERE: Mapping[str, tuple[type[errors.BackendError], int]] = {
    "ThrottlingException": (errors.BackendThrottled, 400),
    "KMSInternalException": (errors.BackendUnavailable, 500),
    "DependencyTimeoutException": (errors.BackendUnavailable, 503),
    "InternalFailure": (errors.BackendUnavailable, 500),
    "ServiceUnavailable": (errors.BackendUnavailable, 503),
    "AccessDeniedException": (errors.BackendRefused, 400),
    "ExpiredTokenException": (errors.BackendUnavailable, 400),
    "UnrecognizedClientException": (errors.BackendRefused, 400),
    "InvalidSignatureException": (errors.BackendRefused, 403),
    "OptInRequired": (errors.BackendRefused, 403),
    "ValidationException": (errors.BackendRefused, 400),
    "SomethingNewException": (errors.BackendRefused, 400),
    "SomethingNewAtTheirs": (errors.BackendUnavailable, 500),
}
_OF_ONE_CALL: Mapping[tuple[str, str, str], tuple[type[errors.BackendError], int]] = {
    ("sign", "Sign", "NotFoundException"): (errors.BackendKeyNotFound, 400),
    ("sign", "Sign", "DisabledException"): (errors.BackendRefused, 400),
    ("sign", "Sign", "KMSInvalidStateException"): (errors.BackendRefused, 400),
    ("sign", "Sign", "KeyUnavailableException"): (errors.BackendUnavailable, 500),
    ("sign", "Sign", "InvalidKeyUsageException"): (errors.BackendRefused, 400),
    ("sign", "Sign", "InvalidGrantTokenException"): (errors.BackendRefused, 400),
    ("public_key", "GetPublicKey", "UnsupportedOperationException"): (errors.UnsupportedAlgorithm, 400),
    ("public_key", "GetPublicKey", "InvalidArnException"): (errors.BackendRefused, 400),
    ("generate", "CreateKey", "LimitExceededException"): (errors.BackendRefused, 400),
    ("generate", "CreateKey", "TagException"): (errors.BackendRefused, 400),
    ("generate", "CreateKey", "MalformedPolicyDocumentException"): (errors.BackendRefused, 400),
    ("generate", "CreateKey", "UnsupportedOperationException"): (errors.UnsupportedAlgorithm, 400),
    ("generate", "CreateKey", "KMSInternalException"): (errors.BackendUnavailable, 500),
    ("generate", "CreateAlias", "LimitExceededException"): (errors.BackendRefused, 400),
    ("generate", "CreateAlias", "InvalidAliasNameException"): (errors.BackendRefused, 400),
    ("generate", "DescribeKey", "AccessDeniedException"): (errors.BackendRefused, 400),
    ("generate", "Sign", "AccessDeniedException"): (errors.BackendRefused, 400),
    ("schedule_destroy", "ScheduleKeyDeletion", "KMSInvalidStateException"): (errors.BackendRefused, 400),
    ("list_keys", "ListKeys", "InvalidMarkerException"): (errors.BackendRefused, 400),
}

VENDOR_ERRORS = {
    f"{code}-{call}": _code(code, becomes, call=call, operation=operation, status=status)
    for call, operation in _CALLS.items()
    for code, (becomes, status) in _ANYWHERE.items()
    # KMS has authenticated the caller before it denies ListAliases, so KMS works.
    if (call, code) != ("ping", "AccessDeniedException")
} | {
    f"{code}-{operation}-{call}": _code(code, becomes, call=call, operation=operation, status=status)
    for (call, operation, code), (becomes, status) in _OF_ONE_CALL.items()
}
VENDOR_ERRORS |= {
    "silence": _fault(Fault(hang=True), errors.BackendTimeout),
    "cut-connection": _fault(Fault(cut=True), errors.BackendUnavailable, says="endpoint"),
    "cut-connection-ping": _fault(Fault(cut=True), errors.BackendUnavailable, call="ping"),
    "no-answer-of-kms": _fault(Fault(garbage=b"<html>captive portal</html>"), errors.BackendUnavailable),
}


class TestFakeKms(BackendContract):
    scheduled_destruction = True
    lengths: Mapping[str, range] = dict.fromkeys(("EdDSA", "Ed25519"), range(1, 4097))
    vendor_errors: ClassVar[Mapping[str, VendorError]] = VENDOR_ERRORS

    @pytest.fixture(scope="class")
    @classmethod
    def factory(cls, fake: FakeKms) -> Factory:
        return functools.partial(make_backend, fake.url)

    @pytest.fixture(scope="class")
    @classmethod
    def vendor(cls, fake: FakeKms) -> Any:
        return fake

    @pytest.fixture(scope="class")
    @classmethod
    def wait(cls, fake: FakeKms) -> Callable[[int], None]:
        return lambda seconds: fake.advance(seconds / 86_400)


_SALT = "moto's PSS salt is as long as the key allows, which strict verifiers refuse"
_NO_SPEC = "moto has no such KeySpec"
_NO_DIGEST = "moto hashes a digest again"
_NEVER_GONE = "moto never destroys a key whose date has come, and signs with it meanwhile"


class TestMoto(BackendContract):
    scheduled_destruction = True
    left_out: Mapping[str, str] = {
        **dict.fromkeys(("PS256", "PS384", "PS512"), _SALT),
        **dict.fromkeys(("EdDSA", "Ed25519", "ML-DSA-44", "ML-DSA-65", "ML-DSA-87"), _NO_SPEC),
        "test_a_digest_is_signed_as_its_message_is": _NO_DIGEST,
        "test_a_long_message_is_signed_or_clearly_refused": _NO_DIGEST,
        "test_any_message_is_signed": _NO_DIGEST,  # the empty one goes as a digest
        "test_destruction_is_final_and_may_be_repeated": _NEVER_GONE,
        "test_a_reference_to_nothing_is_not_found": _NEVER_GONE,
        "test_a_key_that_is_there_is_adopted": _NEVER_GONE,
        "test_processes_see_each_others_keys_come_and_go": _NEVER_GONE,
    }

    @pytest.fixture(scope="class")
    @classmethod
    def factory(cls, moto_url: str) -> Factory:
        return functools.partial(make_backend, moto_url)


def test_nothing_is_left_out_with_the_fake() -> None:
    assert not TestFakeKms.left_out
    assert not TestFakeKms.unsupported


def test_moto_signs_with_what_it_does_rightly() -> None:
    tried = TestFakeKms().vendor_errors.keys()
    assert len(tried) > 100
    names = {"RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "ES256K"}
    assert not names & TestMoto.left_out.keys()
    assert len(TestMoto.left_out) == 15
