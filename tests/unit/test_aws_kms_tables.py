"""The tables of the AWS KMS backend: every algorithm, every exception of botocore, every name of a key."""

from __future__ import annotations

import pytest
from botocore import exceptions as vendor

from kms_jwks import errors
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.aws_kms import AwsKmsOptions
from kms_jwks.backends.aws_kms.error_map import CODES, FAILURES, translated
from kms_jwks.backends.aws_kms.keys import ROWS, Arn, alias_of, facts_of, key_id_of, prepared
from kms_jwks.backends.base import Digest, Message


def every_exception() -> list[type[Exception]]:
    found: list[type[Exception]] = []
    queue: list[type[Exception]] = [vendor.BotoCoreError, vendor.ClientError]
    while queue:
        cls = queue.pop()
        found.append(cls)
        queue.extend(cls.__subclasses__())
    return sorted(set(found), key=lambda cls: cls.__name__)


def client_error(code: str, status: int = 400, operation: str = "Sign") -> vendor.ClientError:
    answer = {"Error": {"Code": code, "Message": "SECRET"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return vendor.ClientError(answer, operation)


def test_every_algorithm_has_a_row() -> None:
    assert ROWS.keys() == ALGORITHMS.keys()
    for name, row in ROWS.items():
        assert row.specs.keys() == set(ALGORITHMS[name].rsa_bits or (None,))


@pytest.mark.parametrize("cls", every_exception(), ids=lambda cls: cls.__name__)
def test_every_exception_of_botocore_becomes_one_of_ours(cls: type[Exception]) -> None:
    raised = cls.__new__(cls)
    if isinstance(raised, vendor.ClientError):
        raised = client_error("Whatever")
    error = translated(raised, "Sign")
    assert error.detail and error.next_step
    assert not error.retryable or error.retry_after


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("operation", ["Sign", "CreateKey", "AssumeRole"])
def test_every_code_becomes_one_of_ours(code: str, operation: str) -> None:
    error = translated(client_error(code, operation=operation), operation)
    assert isinstance(error, errors.BackendError)
    assert code in error.detail
    assert "SECRET" not in error.detail + error.next_step, "the vendor's words may repeat a session token"
    assert "{" not in error.next_step
    assert error.next_step or isinstance(error, errors.KeyExists)
    assert not error.retryable or error.retry_after


@pytest.mark.parametrize(
    ("raised", "becomes"),
    [
        (vendor.ReadTimeoutError(endpoint_url="x"), errors.BackendTimeout),
        (vendor.EndpointConnectionError(endpoint_url="x"), errors.BackendUnavailable),
        (vendor.NoCredentialsError(), errors.BackendUnavailable),
        (vendor.ProfileNotFound(profile="x"), errors.BackendRefused),
        (vendor.SSLError(endpoint_url="x", error="y"), errors.BackendUnavailable),
        (FileNotFoundError("token"), errors.BackendUnavailable),
        (RuntimeError("nobody knows"), errors.BackendUnavailable),
        (client_error("NewAndOurs"), errors.BackendRefused),
        (client_error("NewAndTheirs", 503), errors.BackendUnavailable),
        (client_error("NotFoundException", operation="AssumeRole"), errors.BackendRefused),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
def test_what_becomes_of_what(raised: Exception, becomes: type[errors.BackendError]) -> None:
    assert type(translated(raised, "Sign")) is becomes


def test_the_rows_are_of_exceptions() -> None:
    assert all(issubclass(cls, Exception) for cls in FAILURES)


# --- names ------------------------------------------------------------------------------------------------------------


def test_the_parts_of_an_arn() -> None:
    arn = Arn.of("arn:aws-cn:kms:cn-north-1:111122223333:alias/kj/x")
    assert arn is not None
    assert (arn.region, arn.account, arn.is_alias, arn.name) == ("cn-north-1", "111122223333", True, "kj/x")
    assert arn.key("id") == "arn:aws-cn:kms:cn-north-1:111122223333:key/id"
    assert Arn.of(arn.key("id")) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "arn:aws:iam::111122223333:role/x",
        "arn:aws:kms:eu-central-1:1111:key/x",
        "arn:aws:kms:eu-central-1:111122223333:key/",
        "arn:aws:kms:eu-central-1:111122223333:grant/x",
        "xarn:aws:kms:eu-central-1:111122223333:key/x",
    ],
)
def test_what_is_no_arn_of_a_key(text: str) -> None:
    assert Arn.of(text) is None


def test_locators() -> None:
    for same in (
        "0a1b2c3d-0000-1111-2222-0123456789ab",
        "mrk-0123456789abcdef0123456789abcdef",
        "arn:aws:kms:eu-central-1:111122223333:alias/x",
        "alias/x",
    ):
        assert key_id_of(same) == same
    assert key_id_of("issuer_1/main") == "alias/issuer_1/main"
    for wrong in ("", "alias/", "a b", "ä", "arn:aws:s3:::b"):
        with pytest.raises(errors.BackendRefused):
            key_id_of(wrong)


def test_labels() -> None:
    assert alias_of("kj-a-1") == "alias/kj-a-1"
    for wrong in ("", "a" * 41, "aws/x", "a:b", "a b", "ä", "a\n"):
        with pytest.raises(errors.BackendRefused):
            alias_of(wrong)


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_public_half_that_is_none() -> None:
    with pytest.raises(errors.BackendRefused):
        facts_of(b"no DER")


def test_a_digest_of_what_has_none() -> None:
    facts = facts_of(_ed25519_spki())
    assert prepared(ALGORITHMS["EdDSA"], Message(b"x" * 4096), facts) == ("RAW", b"x" * 4096)
    for what in (Digest(bytes(32)), Message(b""), Message(bytes(4097))):
        with pytest.raises(errors.BackendRefused):
            prepared(ALGORITHMS["EdDSA"], what, facts)


def test_options_that_cannot_be() -> None:
    for wrong in ({"connect_timeout": 0.0}, {"read_timeout": -1.0}, {"connections": 0}):
        with pytest.raises(ValueError, match="must be"):
            AwsKmsOptions(region="eu-central-1", **wrong)


def _ed25519_spki() -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
