"""The data plane's endpoints: documents, signatures, `active`, `verify`. They read the snapshot, never the database."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from kms_jwks import errors, wire
from kms_jwks.http import problems
from kms_jwks.http.exchange import JSON, Endpoint, Request, Response, ok
from kms_jwks.service.signing import Batch
from kms_jwks.service.signing_job import SigningOperation

if TYPE_CHECKING:
    from kms_jwks.service import Service
    from kms_jwks.worker.snapshot import Document

JWK_SET = "application/jwk-set+json"


# --- documents --------------------------------------------------------------------------------------------------------


def jwks(service: Service, request: Request) -> Response:
    """The JWKS of a key set; of the default one where the path names none."""
    return _jwks(service, request, post_quantum=False)


def jwks_pq(service: Service, request: Request) -> Response:
    """The JWKS of a key set's ML-DSA keys; of the default set's where the path names none."""
    return _jwks(service, request, post_quantum=True)


def _jwks(service: Service, request: Request, *, post_quantum: bool) -> Response:
    name = request.params.get("key_set") or service.verifiers.default_key_set
    document = service.verifiers.jwks(request.context, name, post_quantum=post_quantum)
    # Some clients reject the registered media type, so it is sent only where Accept names it.
    named = JWK_SET in (request.header("accept") or "").lower()
    return _published(request, document, JWK_SET if named else JSON, vary="Accept")


def discovery(service: Service, request: Request) -> Response:
    """Issuer metadata, under either of its well-known names."""
    return _published(request, service.verifiers.discovery(request.context, request.params.get("key_set")), JSON)


def preflight(service: Service, request: Request) -> Response:
    """CORS preflight. The answer is the same whether the key set exists or not."""
    return Response(
        204,
        [
            ("Allow", "GET, HEAD, OPTIONS"),
            ("Access-Control-Allow-Origin", "*"),
            ("Access-Control-Allow-Methods", "GET, HEAD"),
            ("Access-Control-Allow-Headers", "Accept, If-None-Match"),
            ("Access-Control-Max-Age", "86400"),
            ("Cache-Control", "no-store"),
        ],
    )


def _published(request: Request, document: Document, media_type: str, vary: str | None = None) -> Response:
    headers = [("ETag", document.etag), ("Cache-Control", document.cache_control)]
    if not document.public:
        vary = f"{vary}, Authorization" if vary else "Authorization"
    if vary:
        headers.append(("Vary", vary))
    if document.public:
        headers.append(("Access-Control-Allow-Origin", "*"))
    if request.has(document.etag):
        return Response(304, headers)
    headers.append(("Content-Type", media_type))
    return Response(200, headers, document.body)


# --- signatures -------------------------------------------------------------------------------------------------------


def _signing(name: str, operation: SigningOperation, summary: str) -> Endpoint:
    def sign(service: Service, request: Request, body: dict[str, object]) -> Response:
        params = request.params
        outcome = service.signing.handle(operation, request.context, params["key_set"], params["key"], body)
        return _batch(outcome, request.context.request_id) if isinstance(outcome, Batch) else ok(outcome)

    sign.__name__, sign.__doc__ = name, summary
    return sign


sign_jwt = _signing("sign_jwt", SigningOperation.JWT, "Sign claims as a JWT.")
sign_jws = _signing("sign_jws", SigningOperation.JWS, "Sign any payload as a compact JWS, in raw key sets.")
sign_signature = _signing(
    "sign_signature",
    SigningOperation.SIGNATURE,
    "The signature alone: over a JWT's signing input, or over bytes in raw key sets.",
)


def _batch(batch: Batch, request_id: str) -> Response:
    response = ok(
        {
            "batch": [
                {"error": problems.document(item, request_id)} if isinstance(item, errors.Error) else item
                for item in batch.items
            ]
        }
    )
    if failed := Counter(item.code for item in batch.items if isinstance(item, errors.Error)):
        response.notes = {"failed": [f"{code}: {count}" for code, count in failed.items()]}
    return response


# --- the rest of the data plane ---------------------------------------------------------------------------------------


def active(service: Service, request: Request) -> Response:
    """The kid that signs now, and the next one."""
    return ok(service.signing.active(request.context, request.params["key_set"], request.params["key"]))


def verify(service: Service, request: Request, body: wire.VerifyRequest) -> Response:
    """Verify a token against the keys that the key set publishes."""
    return ok(service.verifiers.verify_token(request.context, request.params["key_set"], body))
