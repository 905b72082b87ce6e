"""The one table of routes: Flask's rules, OpenAPI, the docs page and `--routes` are all made from it."""

from __future__ import annotations

from types import UnionType
from typing import TYPE_CHECKING, Any, Literal

from kms_jwks import errors, wire
from kms_jwks.access import Permission
from kms_jwks.http import admin, data, operation
from kms_jwks.http.exchange import JSON, NO_STORE, Empty, Endpoint, Filter, Request, Response, Route, Side

if TYPE_CHECKING:
    from kms_jwks.service import Service

P = Permission

# --- the kinds of rows ------------------------------------------------------------------------------------------------


def _document(name: str, path: str, endpoint: Endpoint, summary: str, *media: str) -> tuple[Route, Route]:
    """A document that verifiers fetch, and the CORS preflight that browsers send before it."""
    return (
        Route(
            method="GET",
            path=path,
            endpoint=endpoint,
            name=f"get_{name}",
            summary=summary,
            side=Side.PUBLIC,
            hot=True,
            media=media or ("application/json",),
            statuses=(200, 304),
            permission=(P.JWKS_READ,),
            problems=(
                errors.RouteNotFound,
                errors.KeySetNotFound,
                errors.NotPublished,
                errors.StoreUnavailable,
            ),
        ),
        Route(
            method="OPTIONS",
            path=path,
            endpoint=data.preflight,
            name=f"preflight_{name}",
            summary="CORS preflight",
            side=Side.PUBLIC,
            statuses=(204,),
        ),
    )


_NOT_SIGNED = (
    errors.PurposeMismatch,
    errors.KeyDisabled,
    errors.KeyRetired,
    errors.NoActiveVersion,
    errors.KidNotActive,
)


def _signing(
    name: str,
    endpoint: Endpoint,
    request: type[wire.Request] | UnionType,
    answer: type[wire.Answer],
    *permission: P,
    invalid: tuple[type[errors.InvalidRequest], ...],
    operation: str = "",
) -> Route:
    return Route(
        method="POST",
        path=f"{_KEY}/{name}",
        endpoint=endpoint,
        name=operation,
        summary=(endpoint.__doc__ or "").rstrip("."),
        hot=True,
        request=request,
        batch=True,
        answer=answer,
        permission=permission,
        problems=(*invalid, *_NOT_SIGNED, errors.InvalidBatch, errors.Unavailable, errors.BackendError),
    )


def _get(
    path: str,
    endpoint: Endpoint,
    permission: P,
    answer: type[wire.Answer] | None = None,
    *,
    items: type[wire.Answer] | None = None,
    etag: bool = False,
    **rest: Any,
) -> Route:
    rest.setdefault("problems", (errors.StoreUnavailable,))
    rest.setdefault("paged", items is not None)
    return Route(
        method="GET",
        path=path,
        endpoint=endpoint,
        summary=(endpoint.__doc__ or "").rstrip("."),
        answer=wire.Page if items else answer,
        items=items,
        statuses=(200, 304) if etag else (200,),
        permission=(permission,),
        **rest,
    )


def _change(
    method: Literal["POST", "PATCH", "DELETE"],
    path: str,
    endpoint: Endpoint,
    permission: P | tuple[P, ...],
    request: type[wire.Request] | None = None,
    answer: type[wire.Answer] | None = None,
    *statuses: int,
    problems: tuple[type[errors.Error], ...] = (),
    **rest: Any,
) -> Route:
    # A route that answers 201 creates something, and a caller may have to send it again.
    rest.setdefault("creates", 201 in statuses)
    return Route(
        method=method,
        path=path,
        endpoint=endpoint,
        summary=(endpoint.__doc__ or "").rstrip("."),
        request=request,
        answer=answer,
        statuses=statuses or ((200,) if answer else (204,)),
        permission=permission if isinstance(permission, tuple) else (permission,),
        problems=(errors.Conflict, errors.StoreUnavailable, *problems),
        **rest,
    )


def _health(
    name: str,
    path: str,
    endpoint: Endpoint,
    *statuses: int,
    side: Side = Side.BOTH,
    filters: tuple[Filter, ...] = (),
) -> Route:
    return Route(
        method="GET",
        path=path,
        endpoint=endpoint,
        name=name,
        summary=(endpoint.__doc__ or "").rstrip("."),
        side=side,
        filters=filters,
        answer=wire.Readiness,
        statuses=statuses,
    )


# --- the description of the API: its endpoints need the whole table ---------------------------------------------------


def _openapi_document(service: Service, request: Request) -> Response:
    from kms_jwks.http import openapi

    return Response(200, [("Content-Type", JSON), NO_STORE], openapi.encoded(ROUTES, service.settings.public_url))


def _docs_page(service: Service, request: Request) -> Response:
    from kms_jwks.http import docs

    page, policy = docs.rendered(ROUTES, service.settings.public_url)
    return Response(
        200,
        [("Content-Type", "text/html; charset=utf-8"), ("Content-Security-Policy", policy), NO_STORE],
        page,
    )


# --- the table --------------------------------------------------------------------------------------------------------

_SETS = "/v1/key-sets"
_SET = f"{_SETS}/{{key_set}}"
_KEY = f"{_SET}/keys/{{key}}"
_VERSION = f"{_KEY}/versions/{{version}}"
_CLIENT = "/v1/clients/{client}"
_IF_MATCH = (errors.RevisionMismatch, errors.RevisionRequired)
_MODULE = (errors.Unavailable, errors.BackendError, errors.BackendTimeout)
_NEW_KEY = (errors.BackendUnknown, *_MODULE)

ROUTES: tuple[Route, ...] = (
    *_document(
        "jwks", "/{key_set}/.well-known/jwks.json", data.jwks, "The JWKS of a key set", "application/json", data.JWK_SET
    ),
    *_document(
        "default_jwks",
        "/.well-known/jwks.json",
        data.jwks,
        "The JWKS of the default key set",
        "application/json",
        data.JWK_SET,
    ),
    *_document(
        "pq_jwks",
        "/{key_set}/.well-known/jwks-pq.json",
        data.jwks_pq,
        "The JWKS of a key set's ML-DSA keys",
        "application/json",
        data.JWK_SET,
    ),
    *_document(
        "default_pq_jwks",
        "/.well-known/jwks-pq.json",
        data.jwks_pq,
        "The JWKS of the default key set's ML-DSA keys",
        "application/json",
        data.JWK_SET,
    ),
    *_document(
        "openid_configuration",
        "/{key_set}/.well-known/openid-configuration",
        data.discovery,
        "Issuer metadata (OpenID Connect)",
    ),
    *_document(
        "default_openid_configuration",
        "/.well-known/openid-configuration",
        data.discovery,
        "Issuer metadata where the service is the issuer",
    ),
    *_document(
        "oauth_metadata",
        "/.well-known/oauth-authorization-server/{key_set}",
        data.discovery,
        "Issuer metadata (RFC 8414)",
    ),
    *_document(
        "default_oauth_metadata",
        "/.well-known/oauth-authorization-server",
        data.discovery,
        "Issuer metadata (RFC 8414) where the service is the issuer",
    ),
    *_document(
        "oauth_metadata_below_issuer",
        "/{key_set}/.well-known/oauth-authorization-server",
        data.discovery,
        "Issuer metadata (RFC 8414), below the issuer",
    ),
    # signing
    _signing("jwt", data.sign_jwt, wire.JwtRequest, wire.SignedJwt, P.JWT_SIGN, invalid=(errors.ClaimsRefused,)),
    _signing("jws", data.sign_jws, wire.JwsRequest, wire.SignedJws, P.JWS_SIGN, invalid=(errors.InvalidPayload,)),
    _signing(
        "signature",
        data.sign_signature,
        wire.SigningInputRequest | wire.RawSignatureRequest,
        wire.Signature,
        P.JWT_SIGN,
        P.RAW_SIGN,
        invalid=(errors.SigningInputRefused, errors.InvalidPayload, errors.InvalidDigest),
        operation="sign_input",
    ),
    _get(
        f"{_KEY}/active",
        data.active,
        P.KEY_READ,
        wire.Active,
        name="get_active_version",
        hot=True,
        problems=(errors.KeyDisabled, errors.KeyRetired, errors.NoActiveVersion, errors.Unavailable),
    ),
    Route(
        method="POST",
        path=f"{_SET}/verify",
        endpoint=data.verify,
        name="verify_token",
        summary="Verify a token against the keys that the key set publishes",
        hot=True,
        request=wire.VerifyRequest,
        answer=wire.Verified,
        permission=(P.TOKEN_VERIFY,),
        problems=(errors.TokenRejected, errors.PurposeMismatch, errors.Unavailable),
    ),
    # key sets
    _get(_SETS, admin.list_key_sets, P.KEY_SET_READ, items=wire.KeySetSummary, filters=admin.KEY_SET_FILTERS),
    _change(
        "POST",
        _SETS,
        admin.create_key_set,
        P.KEY_SET_CREATE,
        wire.KeySetCreate,
        wire.KeySet,
        201,
        202,
        problems=_NEW_KEY,
    ),
    _get(_SET, admin.get_key_set, P.KEY_SET_READ, wire.KeySet, etag=True),
    _change("PATCH", _SET, admin.patch_key_set, P.KEY_SET_UPDATE, wire.KeySetPatch, wire.KeySet, problems=_IF_MATCH),
    _change("POST", f"{_SET}/retire", admin.retire_key_set, P.KEY_SET_DELETE, Empty, wire.KeySet),
    _change("DELETE", _SET, admin.delete_key_set, P.KEY_SET_DELETE),
    # keys
    _get(f"{_SET}/keys", admin.list_keys, P.KEY_READ, items=wire.Key, filters=admin.KEY_FILTERS),
    _change(
        "POST",
        f"{_SET}/keys",
        admin.create_key,
        (P.KEY_CREATE, P.KEY_ADOPT),
        wire.KeyCreate,
        wire.Key,
        201,
        202,
        problems=_NEW_KEY,
    ),
    _get(_KEY, admin.get_key, P.KEY_READ, wire.Key, etag=True),
    _get(f"{_KEY}/timeline", admin.key_timeline, P.KEY_READ, wire.Timeline, name="get_key_timeline"),
    _change("PATCH", _KEY, admin.patch_key, P.KEY_UPDATE, wire.KeyPatch, wire.Key, problems=_IF_MATCH),
    _change("POST", f"{_KEY}/rotate", admin.rotate_key, P.KEY_ROTATE, wire.RotateRequest, wire.Key),
    _change("POST", f"{_KEY}/disable", admin.disable_key, P.KEY_DISABLE, Empty, wire.Key),
    _change("POST", f"{_KEY}/enable", admin.enable_key, P.KEY_ENABLE, Empty, wire.Key),
    _change("POST", f"{_KEY}/retire", admin.retire_key, P.KEY_DELETE, Empty, wire.Key),
    _change("DELETE", _KEY, admin.delete_key, P.KEY_DELETE),
    # versions
    _get(f"{_KEY}/versions", admin.list_versions, P.KEY_READ, items=wire.Version, filters=admin.VERSION_FILTERS),
    _change(
        "POST",
        f"{_KEY}/versions",
        admin.create_version,
        (P.KEY_ROTATE, P.KEY_ADOPT),
        wire.VersionCreate,
        wire.Version,
        201,
        202,
        problems=_MODULE,
    ),
    _get(_VERSION, admin.get_version, P.KEY_READ, wire.Version),
    _get(
        f"{_VERSION}/public-key",
        admin.public_key,
        P.KEY_READ,
        name="get_public_key",
        media=(admin.JWK, admin.PEM, admin.DER),
    ),
    _get(f"{_VERSION}/safety", admin.safety, P.KEY_READ, wire.Safety, name="get_version_safety"),
    _get(
        f"{_VERSION}/attributes",
        admin.attributes,
        P.KEY_READ,
        wire.Attributes,
        name="get_version_attributes",
        problems=_MODULE,
    ),
    _change(
        "POST", f"{_VERSION}/activate", admin.activate_version, P.VERSION_ACTIVATE, wire.ActivateRequest, wire.Version
    ),
    _change("POST", f"{_VERSION}/retire", admin.retire_version, P.KEY_ROTATE, wire.RetireRequest, wire.Version),
    _change("POST", f"{_VERSION}/revoke", admin.revoke_version, P.VERSION_REVOKE, wire.RevokeRequest, wire.Revoked),
    _change("POST", f"{_VERSION}/destroy", admin.destroy_version, P.VERSION_DESTROY, wire.DestroyRequest, wire.Version),
    _change("POST", f"{_VERSION}/cancel-destroy", admin.cancel_destroy, P.VERSION_DESTROY, Empty, wire.Version),
    _change(
        "POST",
        "/v1/revocations",
        admin.create_revocation,
        P.VERSION_REVOKE,
        wire.RevocationCreate,
        wire.Revocation,
        problems=(errors.KeySetNotFound, errors.BackendUnknown),
    ),
    # external keys
    _get(f"{_SET}/external-keys", admin.list_external_keys, P.KEY_READ, items=wire.ExternalKey),
    _change(
        "POST",
        f"{_SET}/external-keys",
        admin.create_external_key,
        P.EXTERNAL_KEY_MANAGE,
        wire.ExternalKeyCreate,
        wire.ExternalKey,
        201,
    ),
    _get(f"{_SET}/external-keys/{{kid}}", admin.get_external_key, P.KEY_READ, wire.ExternalKey),
    _change(
        "PATCH",
        f"{_SET}/external-keys/{{kid}}",
        admin.patch_external_key,
        P.EXTERNAL_KEY_MANAGE,
        wire.ExternalKeyPatch,
        wire.ExternalKey,
    ),
    _change("DELETE", f"{_SET}/external-keys/{{kid}}", admin.delete_external_key, P.EXTERNAL_KEY_REMOVE),
    # callers
    _get("/v1/clients", admin.list_clients, P.CLIENT_READ, items=wire.Client),
    _change("POST", "/v1/clients", admin.create_client, P.CLIENT_MANAGE, wire.ClientCreate, wire.Client, 201),
    _get(_CLIENT, admin.get_client, P.CLIENT_READ, wire.Client),
    _change("DELETE", _CLIENT, admin.delete_client, P.CLIENT_MANAGE),
    _get(f"{_CLIENT}/tokens", admin.list_tokens, P.CLIENT_READ, items=wire.Token, filters=admin.TOKEN_FILTERS),
    _change("POST", f"{_CLIENT}/tokens", admin.create_token, P.CLIENT_MANAGE, wire.TokenCreate, wire.TokenCreated, 201),
    _change("DELETE", f"{_CLIENT}/tokens/{{token}}", admin.revoke_token, P.CLIENT_MANAGE),
    _change(
        "POST",
        f"{_CLIENT}/tokens/{{token}}/rotate",
        admin.rotate_token,
        P.CLIENT_MANAGE,
        wire.TokenRotate,
        wire.TokenRotated,
        201,
    ),
    _get(
        "/v1/grants",
        admin.list_grants,
        P.CLIENT_READ,
        items=wire.Grant,
        filters=admin.GRANT_FILTERS,
        problems=(errors.StoreUnavailable, errors.NotFound),
    ),
    _change(
        "POST",
        "/v1/grants",
        admin.create_grant,
        P.GRANT_MANAGE,
        wire.GrantCreate,
        wire.Grant,
        201,
        problems=(errors.ClientNotFound, errors.KeySetNotFound, errors.KeyNotFound),
    ),
    _get("/v1/grants/{grant}", admin.get_grant, P.CLIENT_READ, wire.Grant),
    _change("DELETE", "/v1/grants/{grant}", admin.delete_grant, P.GRANT_MANAGE),
    # operation
    _get("/v1/nodes", operation.list_nodes, P.NODE_READ, items=wire.Node, filters=operation.NODE_FILTERS),
    _change("DELETE", "/v1/nodes/{worker}", operation.forget_worker, P.NODE_MANAGE),
    _get("/v1/custodian", operation.get_custodian, P.NODE_READ, wire.Custodian),
    _get("/v1/backends", operation.list_backends, P.BACKEND_READ, items=wire.Backend, paged=False, problems=_MODULE),
    _get("/v1/backends/{backend}", operation.get_backend, P.BACKEND_READ, wire.Backend, problems=_MODULE),
    _health("get_health", "/healthz", operation.healthz, 200),
    _health("get_readiness", "/readyz", operation.readyz, 200, 503),
    _health(
        "get_signing_readiness",
        "/readyz/sign",
        operation.readyz_sign,
        200,
        503,
        side=Side.PRIVATE,
        filters=operation.SIGNING_READINESS_FILTERS,
    ),
    Route(
        method="GET",
        path="/openapi.json",
        endpoint=_openapi_document,
        name="get_openapi",
        summary="This API in OpenAPI 3.1",
        media=("application/json",),
    ),
    Route(
        method="GET",
        path="/docs",
        endpoint=_docs_page,
        name="get_docs",
        summary="This API on one page for people",
        media=("text/html",),
    ),
)


def served(routes: Literal["public", "private", "all"]) -> tuple[Route, ...]:
    """The rows that `serve --routes` keeps; the paths of the others answer 404."""
    side = {"public": Side.PUBLIC, "private": Side.PRIVATE, "all": Side.BOTH}[routes]
    return tuple(route for route in ROUTES if route.side & side)
