"""The tables of the AWS KMS backend: every algorithm, every exception of botocore, the forms of a key's name."""

from __future__ import annotations

import pytest
from botocore import exceptions as vendor

from kms_jwks import errors
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.aws_kms.error_map import CODES, EXCEPTIONS, translate
from kms_jwks.backends.aws_kms.keys import ROWS, Arn, make_alias, parse_locator, parse_public_key, prepare_message
from kms_jwks.backends.base import Digest, Message
from kms_jwks.config import AwsKmsOptions


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
    error = translate(raised, "Sign")
    assert error.detail and error.next_step
    assert not error.retryable or error.retry_after


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("operation", ["Sign", "CreateKey", "AssumeRole"])
def test_every_code_becomes_one_of_ours(code: str, operation: str) -> None:
    error = translate(client_error(code, operation=operation), operation)
    assert isinstance(error, errors.BackendError)
    assert code in error.detail
    assert "SECRET" not in error.detail + error.next_step, "the message of KMS may repeat a session token"
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
        (RuntimeError("unknown"), errors.BackendUnavailable),
        (client_error("NewAndOurs"), errors.BackendRefused),
        (client_error("NewAndTheirs", 503), errors.BackendUnavailable),
        (client_error("NotFoundException", operation="AssumeRole"), errors.BackendRefused),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
def test_errors_by_kind(raised: Exception, becomes: type[errors.BackendError]) -> None:
    assert type(translate(raised, "Sign")) is becomes


def test_the_rows_are_of_exceptions() -> None:
    assert all(issubclass(cls, Exception) for cls in EXCEPTIONS)


# --- names ------------------------------------------------------------------------------------------------------------


def test_the_parts_of_an_arn() -> None:
    arn = Arn.parse("arn:aws-cn:kms:cn-north-1:111122223333:alias/kj/x")
    assert arn is not None
    assert (arn.region, arn.account, arn.is_alias, arn.name) == ("cn-north-1", "111122223333", True, "kj/x")
    assert arn.with_key("id") == "arn:aws-cn:kms:cn-north-1:111122223333:key/id"
    assert Arn.parse(arn.with_key("id")) is not None


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
def test_text_that_is_not_the_arn_of_a_key(text: str) -> None:
    assert Arn.parse(text) is None


def test_locators() -> None:
    for same in (
        "0a1b2c3d-0000-1111-2222-0123456789ab",
        "mrk-0123456789abcdef0123456789abcdef",
        "arn:aws:kms:eu-central-1:111122223333:alias/x",
        "alias/x",
    ):
        assert parse_locator(same) == same
    assert parse_locator("issuer_1/main") == "alias/issuer_1/main"
    for wrong in ("", "alias/", "a b", "ä", "arn:aws:s3:::b"):
        with pytest.raises(errors.BackendRefused):
            parse_locator(wrong)


def test_labels() -> None:
    assert make_alias("kj-a-1") == "alias/kj-a-1"
    for wrong in ("", "a" * 41, "aws/x", "a:b", "a b", "ä", "a\n"):
        with pytest.raises(errors.BackendRefused):
            make_alias(wrong)


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_malformed_public_key() -> None:
    with pytest.raises(errors.BackendRefused):
        parse_public_key(b"no DER")


def test_eddsa_signs_messages_of_limited_length_and_no_digests() -> None:
    facts = parse_public_key(_ed25519_spki())
    assert prepare_message(ALGORITHMS["EdDSA"], Message(b"x" * 4096), facts) == ("RAW", b"x" * 4096)
    for what in (Digest(bytes(32)), Message(b""), Message(bytes(4097))):
        with pytest.raises(errors.BackendRefused):
            prepare_message(ALGORITHMS["EdDSA"], what, facts)


def test_options_out_of_range() -> None:
    for wrong in ({"connect_timeout_ms": 0}, {"read_timeout_ms": -1}, {"waiting": 0}):
        with pytest.raises(ValueError, match="should be greater than or equal to"):
            AwsKmsOptions(type="aws-kms", region="eu-central-1", **wrong)


def test_the_custodian_has_credentials_of_its_own() -> None:
    role, own = (f"arn:aws:iam::123456789012:role/{name}" for name in ("sign", "custodian"))
    for management, profile, role_arn in (
        (None, "issuer", role),
        ({"role_arn": own}, "issuer", own),
        ({"profile": "maker"}, "maker", None),
    ):
        options = AwsKmsOptions.model_validate(
            {
                "type": "aws-kms",
                "region": "eu-central-1",
                "profile": "issuer",
                "role_arn": role,
                "management": management,
            }
        )
        custodians = options.for_custodian()
        assert (custodians.profile, custodians.role_arn) == (profile, role_arn)
        assert (options.profile, options.role_arn) == ("issuer", role)


def _ed25519_spki() -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
