"""The domain's errors: one class per problem type. This file knows no HTTP.

::

    Error
    ├── InvalidRequest            the request cannot succeed as it is
    │   ├── MalformedBody · InvalidField · BodyTooLarge · UnsupportedMediaType · LengthMismatch
    │   ├── ClaimsRefused · SigningInputRefused · InvalidPayload · InvalidDigest
    │   └── InvalidJwk · InvalidBatch · UnsupportedAlgorithmRequested · PolicyRefused
    ├── TokenRejected             `verify`: the token is not valid
    │   └── TokenMalformed · TokenSignatureInvalid · TokenExpired · TokenNotYetValid · TokenIssuerMismatch ·
    │       TokenAudienceMismatch · TokenTypeMismatch · TokenKeyUnknown · TokenKeyRevoked
    ├── Unauthenticated           the caller is not authenticated
    │   └── CredentialsMissing · CredentialsMalformed · CredentialsUnknown · CredentialsExpired · CredentialsRevoked
    ├── Forbidden                 the caller lacks the permission
    ├── NotFound                  KeySetNotFound · KeyNotFound · VersionNotFound · ClientNotFound · ApiTokenNotFound ·
    │                             GrantNotFound · ExternalKeyNotFound · WorkerNotFound · BackendUnknown · NotPublished ·
    │                             RouteNotFound
    ├── MethodNotAllowed
    ├── Conflict                  a valid request that the present state does not allow
    │   ├── NameTaken · IssuerTaken · KidTaken · KeyDisabled · NoActiveVersion · KidNotActive · NotYetUsable · NoStandby
    │   ├── TransitionRefused · LimitReached · PurposeMismatch · Immutable · RotationInProgress
    │   ├── ActiveKidMismatch · AdoptionRefused · KeyTaken · CombinedDuties · TokenNotShownAgain
    │   └── AlreadyPublished · KeyRetired · KeySetRetired
    ├── RevisionMismatch · RevisionRequired · IdempotencyKeyReused
    ├── Unavailable               retry later: RegistryStale · ClocksDisagree ·
    │                             StoreUnavailable (PoolerUnsuitable · RegistryRolledBack)
    ├── BackendError              the only errors that leave a backend
    │   ├── KeyExists · BackendKeyNotFound · UnsupportedAlgorithm
    │   ├── BackendUnavailable · BackendThrottled      (retryable)
    │   └── BackendTimeout · BackendRefused
    ├── ConfigurationError        settings, files, PINs: reported at start or by `doctor`
    ├── SchemaMismatch            the registry's schema is not the one this program was built for
    ├── ClientError               only in kms_jwks.client: ServiceUnreachable · UnexpectedAnswer
    └── InternalError             a defect of the service; details stay in the log
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class Error(Exception):
    """Base of every error the service raises on purpose.

    `code` is the stable name in the problem type ``urn:kms-jwks:problem:<code>``. `title` is the fixed title for
    people, `detail` says what happened this time, `next_step` what the reader can do about it. `fields` are further
    members for programs (strings, integers, lists of these). None of them holds a secret, a token or a signature.
    """

    code: ClassVar[str] = ""
    title: ClassVar[str] = ""
    next_step: str = ""
    status: int | None = None
    """The HTTP status of the answer; only the client sets it."""
    request_id: str | None = None
    """The id under which the service logged the request; only the client sets it."""

    def __init__(
        self,
        detail: str = "",
        *,
        next_step: str | None = None,
        retry_after: int | None = None,
        fields: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(detail or self.title)
        self.detail = detail or self.title
        if next_step is not None:
            self.next_step = next_step
        self.retry_after = retry_after
        """Whole seconds after which the same call may succeed; None where waiting does not help."""
        self.fields: dict[str, object] = dict(fields or {})

    @property
    def explanation(self) -> dict[str, object]:
        """What a log line says of it: the code, the cause where it is known, what happened, and the next step."""
        cause = {"cause": self.fields["cause"]} if "cause" in self.fields else {}
        return {"code": self.code, **cause, "detail": self.detail, "next_step": self.next_step}


# --- the request -----------------------------------------------------------------------------------------------------


class InvalidRequest(Error):
    code = "invalid_request"
    title = "The request is not valid"
    next_step = "Correct the request; sending it again unchanged gives the same answer."


class MalformedBody(InvalidRequest):
    code = "malformed_body"
    title = "The body is not the JSON that was expected"
    next_step = "Send one JSON object in UTF-8, without duplicate names, NaN, infinities or lone surrogates."


class InvalidField(InvalidRequest):
    code = "invalid_field"
    title = "A field is missing, unknown or has a wrong value"


class BodyTooLarge(InvalidRequest):
    code = "body_too_large"
    title = "The body is larger than the service reads"
    next_step = "Send a smaller body, or several requests."


class UnsupportedMediaType(InvalidRequest):
    code = "unsupported_media_type"
    title = "The body's media type is not application/json"
    next_step = "Send Content-Type: application/json."


class LengthMismatch(InvalidRequest):
    code = "length_mismatch"
    title = "The body is not as long as its Content-Length says, or the length is missing"
    next_step = "Send a correct Content-Length, or use chunked transfer coding."


class ClaimsRefused(InvalidRequest):
    code = "claims_refused"
    title = "The signing profile does not allow these claims"


class SigningInputRefused(InvalidRequest):
    code = "signing_input_refused"
    title = "The signing input's header or claims break the rules of this key"


class InvalidPayload(InvalidRequest):
    code = "invalid_payload"
    title = "The payload or input is not base64url without padding"


class InvalidDigest(InvalidRequest):
    code = "invalid_digest"
    title = "The digest does not fit the key's algorithm"


class InvalidJwk(InvalidRequest):
    code = "invalid_jwk"
    title = "The public key cannot be used"


class InvalidBatch(InvalidRequest):
    code = "invalid_batch"
    title = "The batch is empty or too long"
    next_step = "Send at least one item, and no more than the detail allows."


class UnsupportedAlgorithmRequested(InvalidRequest):
    code = "unsupported_algorithm_requested"
    title = "No configured module offers this algorithm or size"


class PolicyRefused(InvalidRequest):
    code = "policy_refused"
    title = "The policy breaks a rule"


# --- verify ----------------------------------------------------------------------------------------------------------


class TokenRejected(Error):
    code = "token_rejected"
    title = "The token is not valid"
    next_step = "Do not trust the token."


class TokenMalformed(TokenRejected):
    code = "token_malformed"
    title = "The token is not a JWS in compact form with a JSON header and claims"


class TokenSignatureInvalid(TokenRejected):
    code = "token_signature_invalid"
    title = "The token's signature does not match"


class TokenExpired(TokenRejected):
    code = "token_expired"
    title = "The token has expired"


class TokenNotYetValid(TokenRejected):
    code = "token_not_yet_valid"
    title = "The token is not valid yet"


class TokenIssuerMismatch(TokenRejected):
    code = "token_issuer_mismatch"
    title = "The token's issuer is not the key set's"


class TokenAudienceMismatch(TokenRejected):
    code = "token_audience_mismatch"
    title = "The token is not meant for this audience"


class TokenTypeMismatch(TokenRejected):
    code = "token_type_mismatch"
    title = "The token's typ is not the expected one"


class TokenKeyUnknown(TokenRejected):
    code = "token_key_unknown"
    title = "The token names a key that the key set does not publish"


class TokenKeyRevoked(TokenRejected):
    code = "token_key_revoked"
    title = "The token names a key that was revoked"


# --- the caller ------------------------------------------------------------------------------------------------------


class Unauthenticated(Error):
    code = "unauthenticated"
    title = "The caller is not authenticated"
    next_step = "Send a valid API token as Authorization: Bearer."


class CredentialsMissing(Unauthenticated):
    code = "credentials_missing"
    title = "The request carries no credentials"


class CredentialsMalformed(Unauthenticated):
    code = "credentials_malformed"
    title = "The Authorization header is not a bearer API token"


class CredentialsUnknown(Unauthenticated):
    code = "credentials_unknown"
    title = "The API token is not known"


class CredentialsExpired(Unauthenticated):
    code = "credentials_expired"
    title = "The API token has expired"
    next_step = "Ask an administrator for a new token."


class CredentialsRevoked(Unauthenticated):
    code = "credentials_revoked"
    title = "The API token was revoked"
    next_step = "Ask an administrator for a new token."


class Forbidden(Error):
    code = "forbidden"
    title = "The caller may not do this"
    next_step = "Ask an administrator for a grant whose role and scope cover this."


# --- objects that do not exist ---------------------------------------------------------------------------------------


class NotFound(Error):
    code = "not_found"
    title = "The object does not exist"
    next_step = "Check the names and the id in the path."


class RouteNotFound(NotFound):
    code = "route_not_found"
    title = "There is no such route"
    next_step = "See /docs for the routes."


class KeySetNotFound(NotFound):
    code = "key_set_not_found"
    title = "There is no such key set"


class KeyNotFound(NotFound):
    code = "key_not_found"
    title = "There is no such key in the key set"


class VersionNotFound(NotFound):
    code = "version_not_found"
    title = "There is no such key version"


class ExternalKeyNotFound(NotFound):
    code = "external_key_not_found"
    title = "There is no such external key"


class ClientNotFound(NotFound):
    code = "client_not_found"
    title = "There is no such client"


class ApiTokenNotFound(NotFound):
    code = "api_token_not_found"
    title = "There is no such API token"


class GrantNotFound(NotFound):
    code = "grant_not_found"
    title = "There is no such grant"


class WorkerNotFound(NotFound):
    code = "worker_not_found"
    title = "There is no such worker"


class BackendUnknown(NotFound):
    code = "backend_not_found"
    title = "There is no such backend in the configuration"
    next_step = "Name one of the backends that `GET /v1/backends` lists."


class NotPublished(NotFound):
    code = "not_published"
    title = "The key set has published no key in this document yet"
    next_step = "Create a key in it and wait until its first version is published."


class MethodNotAllowed(Error):
    code = "method_not_allowed"
    title = "The route does not know this method"
    next_step = "Use one of the methods that the Allow header names."


# --- the state of things ---------------------------------------------------------------------------------------------


class Conflict(Error):
    code = "conflict"
    title = "The present state does not allow this"
    next_step = "Read the object again: the detail says which state it has to be in."


class NameTaken(Conflict):
    code = "name_taken"
    title = "The name is in use, or was used before"
    next_step = "Choose another name."


class IssuerTaken(Conflict):
    code = "issuer_taken"
    title = "Another key set has this issuer, and verifiers trust every kid of an issuer's set"
    next_step = "Choose another issuer, or use that key set."


class KidTaken(Conflict):
    code = "kid_taken"
    title = "The kid is bound to a key already, and a kid is never bound again"
    next_step = "Choose another kid."


class KeyTaken(Conflict):
    code = "key_taken"
    title = "The key pair belongs to a key version already"
    next_step = "Use the version that it belongs to: a key pair belongs to one version only."


class AdoptionRefused(Conflict):
    """`fields["weaknesses"]` lists in words what an administrator has to accept; empty where accepting cannot help."""

    code = "adoption_refused"
    title = "The key pair is not adopted"
    next_step = "Make a new key and rotate to it, or send `accept`: the version then records the weakness."


class CombinedDuties(Conflict):
    """`fields["grants"]` lists the ids of the client's grants that the new one would combine with."""

    code = "combined_duties"
    title = "The client would administrate what it signs or overrides"
    next_step = (
        "Give the role to another client, or send `accept_combined_duties` (`--accept-combined-duties`): every list of "
        "grants and `kms-jwks doctor` then show it."
    )


class TokenNotShownAgain(Conflict):
    """`fields["token_id"]` names the token that the first call made."""

    code = "token_not_shown_again"
    title = "This call has made its API token already, and a token is shown once"
    next_step = "If the first answer is lost, revoke that token and create another with a fresh Idempotency-Key."


class KeyDisabled(Conflict):
    code = "key_disabled"
    title = "The key is disabled"
    next_step = "Enable the key (`kms-jwks key enable`), or use another one."


class KeyRetired(Conflict):
    code = "key_retired"
    title = "The key is retired: it signs no longer, for ever"
    next_step = "Use another key, or create one under another name."


class KeySetRetired(Conflict):
    code = "key_set_retired"
    title = "The key set is retired: it takes no new key"
    next_step = "Use another key set, or create one under another name and issuer."


class AlreadyPublished(Conflict):
    code = "already_published"
    title = "It has published a key, so verifiers may hold its kid and tokens of it may be alive"
    next_step = "Retire it instead: `kms-jwks key retire` or `kms-jwks key-set retire`."


class NoActiveVersion(Conflict):
    code = "no_active_version"
    title = "The key has no active version"
    next_step = "Wait until its first version is active, or activate one."


class KidNotActive(Conflict):
    code = "kid_not_active"
    title = "The pinned kid is neither active nor within its handover"
    next_step = "Build the signing input again with the active kid that is named here, and repeat the call."


class NotYetUsable(Conflict):
    code = "not_yet_usable"
    title = "Verifiers could not have fetched this version for long enough (I1)"
    next_step = "Repeat the call at usable_at or later."


class NoStandby(Conflict):
    code = "no_standby"
    title = "The key has no published standby version to rotate to"
    next_step = "Wait until the custodian has made one."


class RotationInProgress(Conflict):
    code = "rotation_in_progress"
    title = "The keys of a key set rotate one at a time (I5)"
    next_step = "Repeat the call once the retiring version has left the JWKS."


class ActiveKidMismatch(Conflict):
    code = "active_kid_mismatch"
    title = "The active version is not the expected one"
    next_step = "Read the key again: another call rotated it."


class TransitionRefused(Conflict):
    code = "transition_refused"
    title = "A version in this state cannot become that"


class LimitReached(Conflict):
    code = "limit_reached"
    title = "The key set's document has no room for this (I5)"
    next_step = "Use another key set."


class PurposeMismatch(Conflict):
    code = "purpose_mismatch"
    title = "The key set's purpose does not allow this route"
    next_step = "Raw signatures need a key set with purpose raw, JWTs one with purpose jwt."


class Immutable(Conflict):
    code = "immutable"
    title = "The field cannot be changed any more"
    next_step = "Leave the field out, or create a new object with the other value."


class RevisionMismatch(Error):
    code = "revision_mismatch"
    title = "The object has changed since it was read"
    next_step = "Read it again and repeat the change with its new ETag in If-Match."


class RevisionRequired(Error):
    code = "revision_required"
    title = "A change needs If-Match"
    next_step = "Read the object and send its ETag in If-Match."


class IdempotencyKeyReused(Error):
    code = "idempotency_key_reused"
    title = "The Idempotency-Key belongs to another call of this client"
    next_step = "Send a fresh Idempotency-Key with each new call, and the old one only with the very same call."


# --- retry later -----------------------------------------------------------------------------------------------------


class Unavailable(Error):
    code = "unavailable"
    title = "The service cannot do this now"
    next_step = "Repeat the call after Retry-After."


class RegistryStale(Unavailable):
    code = "registry_stale"
    title = "This worker could not confirm the registry's state within its signing lease"


class StoreUnavailable(Unavailable):
    code = "store_unavailable"
    title = "The registry's database cannot be reached"


class PoolerUnsuitable(StoreUnavailable):
    """`serve` and `custodian` do not start on it: no limit of a session holds, and a lock may stay held."""

    code = "pooler_unsuitable"
    title = "The pooler before the registry's database does not keep sessions"
    next_step = "Set the pooler to session mode (PgBouncer: pool_mode = session), or name the database in database_url."


class RegistryRolledBack(StoreUnavailable):
    """The registry does not hold what this node has confirmed before: an old copy, or a standby that was behind."""

    code = "registry_rolled_back"
    title = "The registry has lost changes that this node knows, and is not believed"
    next_step = (
        "Bring the newer database back. If its last changes are lost for good, run `kms-jwks db restored` on the node."
    )


class ClocksDisagree(Unavailable):
    code = "clocks_disagree"
    title = "The database's clock was set, or this node's stood still: times in tokens would be wrong"
    next_step = (
        "Set the database's clock right; signing goes on by itself. If the database is right, restart the service."
    )


# --- backends --------------------------------------------------------------------------------------------------------


class BackendError(Error):
    """An error of a backend. Backends translate every vendor exception into one of these with ``raise … from``."""

    code = "backend_error"
    title = "The module reported an error"
    next_step = "Run `kms-jwks doctor` on the node."
    retryable: ClassVar[bool] = False


class KeyExists(BackendError):
    code = "backend_key_exists"
    title = "The module already holds a key under this label"
    next_step = "Repeat the call: the next attempt uses another label."


class BackendKeyNotFound(BackendError):
    """The module is healthy and does not hold the key. Never raised while the module's health is in doubt."""

    code = "backend_key_not_found"
    title = "The module does not hold this key"
    next_step = "Run `kms-jwks doctor`; revoke the version and rotate if the key is gone."


class UnsupportedAlgorithm(BackendError):
    code = "backend_unsupported_algorithm"
    title = "The module does not offer this algorithm or size"
    next_step = "Use one of the algorithms that `GET /v1/backends` lists for this backend."


class BackendUnavailable(BackendError):
    code = "backend_unavailable"
    title = "The module cannot be reached"
    next_step = "Repeat the call after Retry-After; the service recovers by itself once the module is back."
    retryable = True


class BackendThrottled(BackendError):
    code = "backend_throttled"
    title = "The module is at its rate limit"
    next_step = "Repeat the call after Retry-After."
    retryable = True


class BackendTimeout(BackendError):
    code = "backend_timeout"
    title = "The module did not answer in time"
    next_step = "Repeat the call; if it times out again, check the module."


class BackendRefused(BackendError):
    """Wrong PIN, no permission, wrong key state: repeating the call gives the same answer."""

    code = "backend_refused"
    title = "The module refused the operation"
    next_step = "Run `kms-jwks doctor` on the node."


# --- operation -------------------------------------------------------------------------------------------------------


class ConfigurationError(Error):
    code = "configuration_error"
    title = "The configuration is not usable"
    next_step = "Correct the setting and start again."


class SchemaMismatch(Error):
    code = "schema_mismatch"
    title = "The registry's schema is not the one this program needs"
    next_step = "Run `kms-jwks db upgrade`."


class ClientError(Error):
    code = "client_error"
    title = "The service could not be used"
    next_step = "Check KMS_JWKS_ADDR and that the service runs."


class ServiceUnreachable(ClientError):
    code = "service_unreachable"
    title = "The service cannot be reached"
    next_step = "Check KMS_JWKS_ADDR and that the service runs."


class UnexpectedAnswer(ClientError):
    code = "unexpected_answer"
    title = "This client does not understand the answer"
    next_step = "Check that KMS_JWKS_ADDR names the service, and that client and service have compatible versions."


class InternalError(Error):
    code = "internal_error"
    title = "The service failed internally"
    next_step = "Report the request_id; the cause is in the service's log under it."


def _walk(cls: type[Error]) -> list[type[Error]]:
    return [cls, *(c for sub in cls.__subclasses__() for c in _walk(sub))]


BY_CODE: Mapping[str, type[Error]] = {cls.code: cls for cls in _walk(Error) if cls.code}
"""Every problem code → its class. The client raises these classes and the docs list them."""
