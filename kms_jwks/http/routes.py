"""The one table of routes: Flask's rules, OpenAPI, the docs page and `--routes` are all made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Flag, auto
from types import UnionType
from typing import Any, Literal

from kms_jwks import errors, wire
from kms_jwks.access import Permission
from kms_jwks.http import admin, callers, data, operation
from kms_jwks.http.exchange import Empty, Response

P = Permission
Endpoint = Callable[..., Response]
"""`(service, request)`, and the converted body as a third argument where the route has one."""


class Side(Flag):
    """Which kind of server answers a route (`serve --routes`)."""

    PUBLIC = auto()
    """For verifiers: needs neither PIN nor module."""
    PRIVATE = auto()
    """For issuers and admins."""
    BOTH = PUBLIC | PRIVATE


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One route. `permission` and `problems` are for the documentation; the use case decides."""

    method: Literal["GET", "POST", "PATCH", "DELETE", "OPTIONS"]
    """HEAD comes with every GET."""
    path: str
    """With `{name}` for each parameter."""
    endpoint: Endpoint
    summary: str
    side: Side = Side.PRIVATE
    hot: bool = False
    """Data plane: served from the snapshot, which the answer keeps pinned until it has left."""
    request: type[wire.Request] | UnionType | None = None
    """The body's struct. A union of structs is taken as a plain object, which the use case converts."""
    batch: bool = False
    """`{"batch": […]}` of `request` is accepted too, and a larger body with it."""
    answer: type[wire.Answer] | UnionType | None = None
    """The body of a success; None where it is not one of ours (documents, keys) or there is none."""
    items: type[wire.Answer] | None = None
    """What a Page holds."""
    paged: bool = False
    """Takes `?limit&cursor`."""
    media: tuple[str, ...] = ()
    """Media types of a success that is no struct."""
    statuses: tuple[int, ...] = (200,)
    """Of successes, and of refusals that are no problem document."""
    permission: tuple[P, ...] = ()
    """One of these; empty: nobody is asked who they are."""
    problems: tuple[type[errors.Error], ...] = ()
    """Beyond what every route of its kind can answer."""

    @property
    def params(self) -> tuple[str, ...]:
        """The names in the path template."""
        return tuple(part[1:-1] for part in self.path.split("/") if part.startswith("{"))


# --- the kinds of rows ------------------------------------------------------------------------------------------------


def _document(path: str, endpoint: Endpoint, summary: str, *media: str) -> tuple[Route, Route]:
    """A document that verifiers fetch, and the preflight that browsers send before."""
    return (
        Route(
            method="GET",
            path=path,
            endpoint=endpoint,
            summary=summary,
            side=Side.PUBLIC,
            hot=True,
            media=media or ("application/json",),
            statuses=(200, 304),
            permission=(P.JWKS_READ,),
            problems=(errors.NotFound, errors.StoreUnavailable),
        ),
        Route(
            method="OPTIONS",
            path=path,
            endpoint=data.preflight,
            summary="CORS preflight",
            side=Side.PUBLIC,
            statuses=(204,),
        ),
    )


def _signing(
    name: str, endpoint: Endpoint, request: type[wire.Request] | UnionType, answer: type[wire.Answer], *permission: P
) -> Route:
    return Route(
        method="POST",
        path=f"{_KEY}/{name}",
        endpoint=endpoint,
        summary=(endpoint.__doc__ or "").rstrip("."),
        hot=True,
        request=request,
        batch=True,
        answer=answer,
        permission=permission,
        problems=(errors.Conflict, errors.Unavailable, errors.BackendError, errors.BackendTimeout),
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
) -> Route:
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
    )


def _health(path: str, endpoint: Endpoint, *statuses: int, side: Side = Side.BOTH) -> Route:
    return Route(
        method="GET",
        path=path,
        endpoint=endpoint,
        summary=(endpoint.__doc__ or "").rstrip("."),
        side=side,
        answer=wire.Readiness,
        statuses=statuses,
    )


# --- the table --------------------------------------------------------------------------------------------------------

_SETS = "/v1/key-sets"
_SET = f"{_SETS}/{{key_set}}"
_KEY = f"{_SET}/keys/{{key}}"
_VERSION = f"{_KEY}/versions/{{version}}"
_CLIENT = "/v1/clients/{client}"
_IF_MATCH = (errors.RevisionMismatch, errors.RevisionRequired)
_MODULE = (errors.Unavailable, errors.BackendError, errors.BackendTimeout)

ROUTES: tuple[Route, ...] = (
    *_document(
        "/{key_set}/.well-known/jwks.json", data.jwks, "The JWKS of a key set", "application/json", data.JWK_SET
    ),
    *_document(
        "/.well-known/jwks.json", data.jwks, "The JWKS of the default key set", "application/json", data.JWK_SET
    ),
    *_document(
        "/{key_set}/.well-known/jwks-pq.json",
        data.jwks_pq,
        "The JWKS of a key set's ML-DSA keys",
        "application/json",
        data.JWK_SET,
    ),
    *_document(
        "/.well-known/jwks-pq.json",
        data.jwks_pq,
        "The JWKS of the default key set's ML-DSA keys",
        "application/json",
        data.JWK_SET,
    ),
    *_document("/{key_set}/.well-known/openid-configuration", data.discovery, "Issuer metadata (OpenID Connect)"),
    *_document("/.well-known/openid-configuration", data.discovery, "Issuer metadata where the service is the issuer"),
    *_document("/.well-known/oauth-authorization-server/{key_set}", data.discovery, "Issuer metadata (RFC 8414)"),
    *_document(
        "/.well-known/oauth-authorization-server",
        data.discovery,
        "Issuer metadata (RFC 8414) where the service is the issuer",
    ),
    # signing
    _signing("jwt", data.sign_jwt, wire.JwtRequest, wire.SignedJwt, P.JWT_SIGN),
    _signing("jws", data.sign_jws, wire.JwsRequest, wire.SignedJws, P.JWS_SIGN),
    _signing(
        "signature",
        data.sign_signature,
        wire.SigningInputRequest | wire.RawSignatureRequest,
        wire.Signature,
        P.JWT_SIGN,
        P.RAW_SIGN,
    ),
    _get(
        f"{_KEY}/active", data.active, P.KEY_READ, wire.Active, hot=True, problems=(errors.Conflict, errors.Unavailable)
    ),
    Route(
        method="POST",
        path=f"{_SET}/verify",
        endpoint=data.verify,
        summary="A token held against what the key set publishes",
        hot=True,
        request=wire.VerifyRequest,
        answer=wire.Verified,
        permission=(P.TOKEN_VERIFY,),
        problems=(errors.TokenRejected, errors.Conflict, errors.Unavailable),
    ),
    # key sets
    _get(_SETS, admin.list_key_sets, P.KEY_SET_READ, items=wire.KeySet),
    _change("POST", _SETS, admin.create_key_set, P.KEY_SET_CREATE, wire.KeySetCreate, wire.KeySet, 201, 202),
    _get(_SET, admin.get_key_set, P.KEY_SET_READ, wire.KeySet, etag=True),
    _change("PATCH", _SET, admin.patch_key_set, P.KEY_SET_UPDATE, wire.KeySetPatch, wire.KeySet, problems=_IF_MATCH),
    # keys
    _get(f"{_SET}/keys", admin.list_keys, P.KEY_READ, items=wire.Key),
    _change(
        "POST",
        f"{_SET}/keys",
        admin.create_key,
        (P.KEY_CREATE, P.KEY_ADOPT),
        wire.KeyCreate,
        wire.Key,
        201,
        202,
        problems=_MODULE,
    ),
    _get(_KEY, admin.get_key, P.KEY_READ, wire.Key, etag=True),
    _get(f"{_KEY}/timeline", admin.key_timeline, P.KEY_READ, wire.Timeline),
    _change("PATCH", _KEY, admin.patch_key, P.KEY_UPDATE, wire.KeyPatch, wire.Key, problems=_IF_MATCH),
    _change("POST", f"{_KEY}/rotate", admin.rotate_key, P.KEY_ROTATE, wire.RotateRequest, wire.Key),
    _change("POST", f"{_KEY}/disable", admin.disable_key, P.KEY_DISABLE, Empty, wire.Key),
    _change("POST", f"{_KEY}/enable", admin.enable_key, P.KEY_ENABLE, Empty, wire.Key),
    # versions
    _get(f"{_KEY}/versions", admin.list_versions, P.KEY_READ, items=wire.Version),
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
    _get(f"{_VERSION}/public-key", admin.public_key, P.KEY_READ, media=(admin.JWK, admin.PEM, admin.DER)),
    _get(f"{_VERSION}/safety", admin.safety, P.KEY_READ, wire.Safety),
    _get(f"{_VERSION}/attributes", admin.attributes, P.KEY_READ, wire.Attributes, problems=_MODULE),
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
    _change("DELETE", f"{_SET}/external-keys/{{kid}}", admin.delete_external_key, P.EXTERNAL_KEY_MANAGE),
    # callers
    _get("/v1/clients", callers.list_clients, P.CLIENT_READ, items=wire.Client),
    _change("POST", "/v1/clients", callers.create_client, P.CLIENT_MANAGE, wire.ClientCreate, wire.Client, 201),
    _get(_CLIENT, callers.get_client, P.CLIENT_READ, wire.Client),
    _change("DELETE", _CLIENT, callers.delete_client, P.CLIENT_MANAGE),
    _get(f"{_CLIENT}/tokens", callers.list_tokens, P.CLIENT_READ, items=wire.Token),
    _change(
        "POST", f"{_CLIENT}/tokens", callers.create_token, P.CLIENT_MANAGE, wire.TokenCreate, wire.TokenCreated, 201
    ),
    _change("DELETE", f"{_CLIENT}/tokens/{{token}}", callers.revoke_token, P.CLIENT_MANAGE),
    _get("/v1/grants", callers.list_grants, P.CLIENT_READ, items=wire.Grant),
    _change("POST", "/v1/grants", callers.create_grant, P.GRANT_MANAGE, wire.GrantCreate, wire.Grant, 201),
    _get("/v1/grants/{grant}", callers.get_grant, P.CLIENT_READ, wire.Grant),
    _change("DELETE", "/v1/grants/{grant}", callers.delete_grant, P.GRANT_MANAGE),
    # operation
    _get("/v1/nodes", operation.list_nodes, P.NODE_READ, items=wire.Node),
    _change("DELETE", "/v1/nodes/{worker}", operation.forget_worker, P.NODE_MANAGE),
    _get("/v1/custodian", operation.get_custodian, P.NODE_READ, wire.Custodian),
    _get("/v1/backends", operation.list_backends, P.BACKEND_READ, items=wire.Backend, paged=False, problems=_MODULE),
    _get("/v1/backends/{backend}", operation.get_backend, P.BACKEND_READ, wire.Backend, problems=_MODULE),
    _health("/healthz", operation.healthz, 200),
    _health("/readyz", operation.readyz, 200, 503),
    _health("/readyz/sign", operation.readyz_sign, 200, 503, side=Side.PRIVATE),
    Route(
        method="GET",
        path="/openapi.json",
        endpoint=operation.openapi,
        summary="This API in OpenAPI 3.1",
        media=("application/json",),
    ),
    Route(
        method="GET",
        path="/docs",
        endpoint=operation.docs,
        summary="This API on one page for people",
        media=("text/html",),
    ),
)


def served(routes: Literal["public", "private", "all"]) -> tuple[Route, ...]:
    """The rows that `serve --routes` leaves; the paths of the others are 404."""
    side = {"public": Side.PUBLIC, "private": Side.PRIVATE, "all": Side.BOTH}[routes]
    return tuple(route for route in ROUTES if route.side & side)
