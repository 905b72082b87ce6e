"""What an answer of KMS, or the lack of one, means for us: one table, and the way from there to an error of ours.

A message of ours holds the vendor's code and the operation, never the vendor's own words: those of a refused request
signature repeat the request's headers, session token included.
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
_STS: Final = "See that the source credentials may call sts:AssumeRole on role_arn, and that the role trusts them."
_NETWORK: Final = "See that the KMS endpoint of the region can be reached: route, proxy, VPC endpoint, endpoint_url."
_WAIT: Final = "Repeat the call after Retry-After; if it persists look at AWS's health dashboard."
_STATE: Final = (
    "Enable the key in KMS (EnableKey), after CancelKeyDeletion where its deletion is pending; or revoke the version: "
    "its standby takes over."
)


@dataclass(frozen=True, slots=True)
class Meaning:
    """One row. `next_step` may name `{operation}`; `again`: the same call makes another attempt; `reopen`: credentials
    are looked for anew before the next one."""

    error: type[errors.BackendError]
    next_step: str
    retry_after: int | None = None
    again: bool = False
    reopen: bool = False


_THROTTLED: Final = Meaning(
    errors.BackendThrottled,
    "Repeat the call after Retry-After. If it persists ask AWS for a higher request quota for KMS in this region.",
    retry_after=1,
)
_INTERNAL: Final = Meaning(errors.BackendUnavailable, _WAIT, retry_after=1, again=True)
_UNREACHABLE: Final = Meaning(errors.BackendUnavailable, _NETWORK, retry_after=2, again=True)
_SILENT: Final = Meaning(errors.BackendTimeout, _NETWORK)
_DENIED: Final = Meaning(
    errors.BackendRefused,
    "Allow kms:{operation} for these credentials, in their IAM policy and in the key's policy; see that they are of "
    "the right account.",
)
_EXPIRED: Final = Meaning(errors.BackendUnavailable, _CREDENTIALS, retry_after=5, reopen=True)
_WRONG_CREDENTIALS: Final = Meaning(
    errors.BackendRefused,
    "See that the credentials are right and not withdrawn. New ones are picked up without a restart.",
    reopen=True,
)
_SIGNATURE: Final = Meaning(
    errors.BackendRefused,
    "See that region and endpoint_url belong together, that this machine's clock is right, and that the secret key is.",
    reopen=True,
)
_WRONG_STATE: Final = Meaning(errors.BackendRefused, _STATE)
_OURS: Final = Meaning(errors.BackendRefused, "Look at the key in KMS: it is not one this operation is for.")

CODES: Final[Mapping[str, Meaning]] = MappingProxyType(
    {
        # too much
        "ThrottlingException": _THROTTLED,
        "Throttling": _THROTTLED,
        "ThrottledException": _THROTTLED,
        "RequestThrottledException": _THROTTLED,
        "RequestLimitExceeded": _THROTTLED,
        "TooManyRequestsException": _THROTTLED,
        "LimitExceededException": Meaning(
            errors.BackendRefused,
            "A resource quota of KMS is used up (keys, aliases, tags or the size of a policy): remove some, or ask AWS "
            "for more.",
        ),
        # KMS itself
        "KMSInternalException": _INTERNAL,
        "InternalFailure": _INTERNAL,
        "InternalServiceError": _INTERNAL,
        "ServiceUnavailable": _INTERNAL,
        "ServiceUnavailableException": _INTERNAL,
        "DependencyTimeoutException": _INTERNAL,
        "RequestTimeout": _INTERNAL,
        "RequestTimeoutException": _INTERNAL,
        "KeyUnavailableException": Meaning(errors.BackendUnavailable, _WAIT, retry_after=2, again=True),
        # the key
        "NotFoundException": Meaning(errors.BackendKeyNotFound, errors.BackendKeyNotFound.next_step),
        "DisabledException": _WRONG_STATE,
        "KMSInvalidStateException": _WRONG_STATE,
        "InvalidKeyUsageException": _OURS,
        "UnsupportedOperationException": Meaning(
            errors.UnsupportedAlgorithm, "The region or the key does not offer this; look at the key's KeySpec in KMS."
        ),
        "AlreadyExistsException": Meaning(errors.KeyExists, ""),
        "InvalidArnException": Meaning(errors.BackendRefused, "Name the key by a key id, a key ARN or an alias."),
        "InvalidAliasNameException": Meaning(errors.BackendRefused, "An alias is letters, digits and /_- only."),
        "TagException": Meaning(errors.BackendRefused, "A KMS key has at most 50 tags; remove some."),
        "MalformedPolicyDocumentException": Meaning(errors.BackendRefused, "Correct the policy in key_policy_file."),
        "ValidationException": _OURS,
        "InvalidGrantTokenException": _OURS,
        # the caller
        "AccessDeniedException": _DENIED,
        "AccessDenied": _DENIED,
        "OptInRequired": Meaning(errors.BackendRefused, "Enable the region for the account."),
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
"""By the error code of an answer; others by their HTTP status."""

FAILURES: Final[Mapping[type[Exception], Meaning]] = MappingProxyType(
    {
        vendor.ReadTimeoutError: _SILENT,
        vendor.ConnectTimeoutError: _UNREACHABLE,
        vendor.EndpointConnectionError: _UNREACHABLE,
        vendor.ConnectionClosedError: _UNREACHABLE,
        vendor.ProxyConnectionError: _UNREACHABLE,
        vendor.SSLError: Meaning(
            errors.BackendUnavailable,
            "The endpoint's certificate is not trusted: see endpoint_url, a proxy in between, and AWS_CA_BUNDLE.",
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
        vendor.RefreshWithMFAUnsupportedError: Meaning(
            errors.BackendRefused, "A service cannot type MFA codes: use a profile without mfa_serial.", reopen=True
        ),
        vendor.ProfileNotFound: Meaning(
            errors.BackendRefused,
            "Add the profile to AWS's shared configuration files, or correct `profile` in the backend's settings.",
            reopen=True,
        ),
        vendor.ConfigNotFound: Meaning(errors.BackendRefused, "Correct AWS_CONFIG_FILE.", reopen=True),
        vendor.ConfigParseError: Meaning(
            errors.BackendRefused, "Correct AWS's shared configuration files.", reopen=True
        ),
        vendor.InvalidConfigError: Meaning(
            errors.BackendRefused, "Correct AWS's shared configuration files.", reopen=True
        ),
        vendor.BaseEndpointResolverError: Meaning(errors.BackendRefused, "Correct `region`.", reopen=True),
        vendor.InvalidRegionError: Meaning(errors.BackendRefused, "Correct `region`.", reopen=True),
        vendor.ParamValidationError: _OURS,
        ValueError: Meaning(errors.BackendRefused, "Correct region and endpoint_url.", reopen=True),
    }
)
"""By the class of what botocore raised instead of an answer, or the nearest ancestor of it."""

_UNKNOWN: Final = Meaning(errors.BackendUnavailable, _WAIT, retry_after=2)


def meaning_of(error: Exception) -> Meaning:
    """The row of what botocore raised."""
    if isinstance(error, vendor.ClientError):
        row = CODES.get(code_of(error))
        if row is not None:
            return row
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", _SERVER_ERROR)
        return _INTERNAL if status >= _SERVER_ERROR else _OURS
    return next((FAILURES[cls] for cls in type(error).__mro__ if cls in FAILURES), _UNKNOWN)


def code_of(error: Exception) -> str:
    """The answer's error code, or the class of what was raised instead of an answer."""
    if isinstance(error, vendor.ClientError):
        return str(error.response.get("Error", {}).get("Code", "an error"))
    return type(error).__name__


def translated(error: Exception, operation: str) -> errors.BackendError:
    """Our error for what botocore raised when `operation` (Sign, CreateKey, …) was called."""
    row, code = meaning_of(error), code_of(error)
    step = row.next_step.format(operation=operation)
    if isinstance(error, vendor.ClientError):
        if error.operation_name.startswith("AssumeRole"):
            kind = row.error if row.error is not errors.BackendKeyNotFound else errors.BackendRefused
            wanted = _STS if kind is errors.BackendRefused else step
            return kind(
                f"STS answered {code} to {error.operation_name}.", next_step=wanted, retry_after=row.retry_after
            )
        detail = f"KMS answered {code} to {operation}."
    elif row is _SILENT:
        detail = f"KMS did not answer {operation} in time."
    elif row is _UNREACHABLE:
        detail = f"KMS cannot be reached for {operation} ({code})."
    else:
        detail = f"{operation} could not be asked of KMS ({code})."
    return row.error(detail, next_step=step, retry_after=row.retry_after)


def is_about_state(error: errors.BackendRefused) -> bool:
    """Whether KMS refused because of the state the key is in."""
    return code_of(_cause(error)) in ("DisabledException", "KMSInvalidStateException")


def is_denial(error: errors.BackendRefused) -> bool:
    """Whether KMS knows the caller and does not allow this."""
    return code_of(_cause(error)) == "AccessDeniedException"


def _cause(error: BaseException) -> Exception:
    return error.__cause__ if isinstance(error.__cause__, Exception) else Exception()
