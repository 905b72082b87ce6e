"""Which error of ours an error code of KMS, or an exception of botocore, becomes: one table, and its application.

An error of ours has the code and the operation, never the message of KMS: the message of a refused request signature
repeats the request's headers, session token included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from botocore import exceptions as vendor

from kms_jwks import errors

_SERVER_ERROR: Final = 500
_CREDENTIALS: Final = (
    "Give the process credentials that boto3 finds (AWS_PROFILE, a role of the machine, a web identity token, or "
    "profile and role_arn in the backend's settings). New ones are picked up without a restart."
)
_STS: Final = "Check that the source credentials may call sts:AssumeRole on role_arn, and that the role trusts them."
_NETWORK: Final = "Check that the KMS endpoint of the region can be reached: route, proxy, VPC endpoint, endpoint_url."
_WAIT: Final = "Repeat the call after Retry-After. If it persists look at AWS's health dashboard."
_STATE: Final = (
    "Enable the key in KMS (EnableKey), after CancelKeyDeletion where its deletion is pending; or revoke the version: "
    "its standby takes over."
)


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """One row. `next_step` may contain `{operation}`.

    `retry`: the same call makes another attempt. `renew_credentials`: the next attempt searches for new credentials.
    """

    error: type[errors.BackendError]
    next_step: str
    retry_after: int | None = None
    retry: bool = False
    renew_credentials: bool = False


_THROTTLED: Final = ErrorRow(
    errors.BackendThrottled,
    "Repeat the call after Retry-After. If it persists ask AWS for a higher request quota for KMS in this region.",
    retry_after=1,
)
_INTERNAL: Final = ErrorRow(errors.BackendUnavailable, _WAIT, retry_after=1, retry=True)
_UNREACHABLE: Final = ErrorRow(errors.BackendUnavailable, _NETWORK, retry_after=2, retry=True)
_SILENT: Final = ErrorRow(errors.BackendTimeout, _NETWORK)
_DENIED: Final = ErrorRow(
    errors.BackendRefused,
    "Allow kms:{operation} for these credentials, in their IAM policy and in the key's policy. Check that they are of "
    "the right account.",
)
_EXPIRED: Final = ErrorRow(errors.BackendUnavailable, _CREDENTIALS, retry_after=5, renew_credentials=True)
_WRONG_CREDENTIALS: Final = ErrorRow(
    errors.BackendRefused,
    "Check that the credentials are right and still valid. New ones are picked up without a restart.",
    renew_credentials=True,
)
_SIGNATURE: Final = ErrorRow(
    errors.BackendRefused,
    "Check that region and endpoint_url belong together, and that this machine's clock and the secret key are right.",
    renew_credentials=True,
)
_WRONG_STATE: Final = ErrorRow(errors.BackendRefused, _STATE)
_OURS: Final = ErrorRow(errors.BackendRefused, "Look at the key in KMS: this operation is not for keys of its kind.")

CODES: Final[Mapping[str, ErrorRow]] = MappingProxyType(
    {
        # throttling and quotas
        "ThrottlingException": _THROTTLED,
        "Throttling": _THROTTLED,
        "ThrottledException": _THROTTLED,
        "RequestThrottledException": _THROTTLED,
        "RequestLimitExceeded": _THROTTLED,
        "TooManyRequestsException": _THROTTLED,
        "LimitExceededException": ErrorRow(
            errors.BackendRefused,
            "A resource quota of KMS is used up (keys, aliases, tags or the size of a policy): remove some, or ask AWS "
            "for more.",
        ),
        # failures inside KMS
        "KMSInternalException": _INTERNAL,
        "InternalFailure": _INTERNAL,
        "InternalServiceError": _INTERNAL,
        "ServiceUnavailable": _INTERNAL,
        "ServiceUnavailableException": _INTERNAL,
        "DependencyTimeoutException": _INTERNAL,
        "RequestTimeout": _INTERNAL,
        "RequestTimeoutException": _INTERNAL,
        "KeyUnavailableException": ErrorRow(errors.BackendUnavailable, _WAIT, retry_after=2, retry=True),
        # the key
        "NotFoundException": ErrorRow(errors.BackendKeyNotFound, errors.BackendKeyNotFound.next_step),
        "DisabledException": _WRONG_STATE,
        "KMSInvalidStateException": _WRONG_STATE,
        "InvalidKeyUsageException": _OURS,
        "UnsupportedOperationException": ErrorRow(
            errors.UnsupportedAlgorithm, "The region or the key does not offer this; look at the key's KeySpec in KMS."
        ),
        "AlreadyExistsException": ErrorRow(errors.KeyExists, ""),
        "InvalidArnException": ErrorRow(errors.BackendRefused, "Name the key by a key id, a key ARN or an alias."),
        "InvalidAliasNameException": ErrorRow(errors.BackendRefused, "An alias is letters, digits and /_- only."),
        "TagException": ErrorRow(errors.BackendRefused, "A KMS key has at most 50 tags; remove some."),
        "MalformedPolicyDocumentException": ErrorRow(errors.BackendRefused, "Correct the policy in key_policy_file."),
        "ValidationException": _OURS,
        "InvalidGrantTokenException": _OURS,
        # credentials and permissions
        "AccessDeniedException": _DENIED,
        "AccessDenied": _DENIED,
        "OptInRequired": ErrorRow(errors.BackendRefused, "Enable the region for the account."),
        "ExpiredTokenException": _EXPIRED,
        "ExpiredToken": _EXPIRED,
        "RequestExpired": _SIGNATURE,
        "UnrecognizedClientException": _WRONG_CREDENTIALS,
        "InvalidClientTokenId": _WRONG_CREDENTIALS,
        "IncompleteSignature": _SIGNATURE,
        "MissingAuthenticationToken": _SIGNATURE,
        "MissingAuthenticationTokenException": _SIGNATURE,
        "InvalidSignatureException": _SIGNATURE,
        "SignatureDoesNotMatch": _SIGNATURE,
    }
)
"""By the error code of an answer. Codes that are not listed go by their HTTP status."""

EXCEPTIONS: Final[Mapping[type[Exception], ErrorRow]] = MappingProxyType(
    {
        vendor.ReadTimeoutError: _SILENT,
        vendor.ConnectTimeoutError: _UNREACHABLE,
        vendor.EndpointConnectionError: _UNREACHABLE,
        vendor.ConnectionClosedError: _UNREACHABLE,
        vendor.ProxyConnectionError: _UNREACHABLE,
        vendor.SSLError: ErrorRow(
            errors.BackendUnavailable,
            "The endpoint's certificate is not trusted: check endpoint_url, a proxy in between, and AWS_CA_BUNDLE.",
            retry_after=5,
        ),
        vendor.ConnectionError: _UNREACHABLE,
        vendor.HTTPClientError: _UNREACHABLE,
        vendor.NoCredentialsError: _EXPIRED,
        vendor.PartialCredentialsError: _EXPIRED,
        vendor.CredentialRetrievalError: _EXPIRED,
        vendor.TokenRetrievalError: _EXPIRED,
        vendor.NoAuthTokenError: _EXPIRED,
        vendor.MetadataRetrievalError: _EXPIRED,
        vendor.SSOError: _EXPIRED,
        vendor.LoginError: _EXPIRED,
        OSError: _EXPIRED,  # a token file of a web identity, a credential process
        vendor.RefreshWithMFAUnsupportedError: ErrorRow(
            errors.BackendRefused,
            "A service cannot enter MFA codes: use a profile without mfa_serial.",
            renew_credentials=True,
        ),
        vendor.ProfileNotFound: ErrorRow(
            errors.BackendRefused,
            "Add the profile to AWS's shared configuration files, or correct `profile` in the backend's settings.",
            renew_credentials=True,
        ),
        vendor.ConfigNotFound: ErrorRow(errors.BackendRefused, "Correct AWS_CONFIG_FILE.", renew_credentials=True),
        vendor.ConfigParseError: ErrorRow(
            errors.BackendRefused, "Correct AWS's shared configuration files.", renew_credentials=True
        ),
        vendor.InvalidConfigError: ErrorRow(
            errors.BackendRefused, "Correct AWS's shared configuration files.", renew_credentials=True
        ),
        vendor.BaseEndpointResolverError: ErrorRow(errors.BackendRefused, "Correct `region`.", renew_credentials=True),
        vendor.InvalidRegionError: ErrorRow(errors.BackendRefused, "Correct `region`.", renew_credentials=True),
        vendor.ParamValidationError: _OURS,
        ValueError: ErrorRow(errors.BackendRefused, "Correct region and endpoint_url.", renew_credentials=True),
    }
)
"""By the class of the exception that botocore raised instead of an answer, or by its nearest ancestor."""

_UNKNOWN: Final = ErrorRow(errors.BackendUnavailable, _WAIT, retry_after=2)


def find_row(error: Exception) -> ErrorRow:
    """The row of an exception of botocore."""
    if isinstance(error, vendor.ClientError):
        row = CODES.get(code_of(error))
        if row is not None:
            return row
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", _SERVER_ERROR)
        return _INTERNAL if status >= _SERVER_ERROR else _OURS
    return next((EXCEPTIONS[cls] for cls in type(error).__mro__ if cls in EXCEPTIONS), _UNKNOWN)


def code_of(error: Exception) -> str:
    """The answer's error code, or the name of the exception's class if there was no answer."""
    if isinstance(error, vendor.ClientError):
        return str(error.response.get("Error", {}).get("Code", "an error"))
    return type(error).__name__


def translate(error: Exception, operation: str) -> errors.BackendError:
    """The error of ours for an exception that botocore raised when `operation` (Sign, CreateKey, …) was called."""
    row, code = find_row(error), code_of(error)
    step = row.next_step.format(operation=operation)
    if isinstance(error, vendor.ClientError):
        if error.operation_name.startswith("AssumeRole"):
            kind = row.error if row.error is not errors.BackendKeyNotFound else errors.BackendRefused
            next_step = _STS if kind is errors.BackendRefused else step
            return kind(
                f"STS answered {code} to {error.operation_name}.", next_step=next_step, retry_after=row.retry_after
            )
        detail = f"KMS answered {code} to {operation}."
    elif row is _SILENT:
        detail = f"KMS did not answer {operation} in time."
    elif row is _UNREACHABLE:
        detail = f"KMS cannot be reached for {operation} ({code})."
    else:
        detail = f"The call of {operation} failed before it reached KMS ({code})."
    return row.error(detail, next_step=step, retry_after=row.retry_after)


def is_about_state(error: errors.BackendRefused) -> bool:
    """Whether KMS refused because of the key's state."""
    return code_of(_cause(error)) in ("DisabledException", "KMSInvalidStateException")


def is_denial(error: errors.BackendRefused) -> bool:
    """Whether KMS authenticated the caller and denied the operation."""
    return code_of(_cause(error)) == "AccessDeniedException"


def _cause(error: BaseException) -> Exception:
    return error.__cause__ if isinstance(error.__cause__, Exception) else Exception()
