"""Permissions, roles, scopes, and `allow`, which decides. Pure: authn/ finds the caller, service/guard calls `allow`.

A grant gives a client a role within a scope: everything, a key set, or a key. Without a grant nothing is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from kms_jwks.model import Grant, Id


class Permission(StrEnum):
    """One verb on one kind of object. Every use case needs exactly one, and `break-glass` to override an invariant."""

    JWT_SIGN = "jwt:sign"
    JWS_SIGN = "jws:sign"
    RAW_SIGN = "raw:sign"
    TOKEN_VERIFY = "token:verify"  # noqa: S105 - the name of a permission
    JWKS_READ = "jwks:read"
    KEY_SET_READ = "key-set:read"
    KEY_SET_CREATE = "key-set:create"
    KEY_SET_UPDATE = "key-set:update"
    KEY_SET_DELETE = "key-set:delete"
    """Delete a key set, or retire it with all its keys."""
    KEY_READ = "key:read"
    KEY_CREATE = "key:create"
    KEY_ADOPT = "key:adopt"
    KEY_UPDATE = "key:update"
    KEY_ROTATE = "key:rotate"
    KEY_DISABLE = "key:disable"
    KEY_ENABLE = "key:enable"
    KEY_DELETE = "key:delete"
    """Delete a key, or retire it."""
    VERSION_ACTIVATE = "version:activate"
    VERSION_REVOKE = "version:revoke"
    VERSION_DESTROY = "version:destroy"
    BREAK_GLASS = "break-glass"
    """Needed in addition to the permission of the step itself when I1 or I2 is to be overridden."""
    EXTERNAL_KEY_MANAGE = "external-key:manage"
    """Publish a foreign key, or go on publishing it: its owner can sign for the key set's issuer."""
    EXTERNAL_KEY_REMOVE = "external-key:remove"
    CLIENT_READ = "client:read"
    CLIENT_MANAGE = "client:manage"
    GRANT_MANAGE = "grant:manage"
    BACKEND_READ = "backend:read"
    NODE_READ = "node:read"
    NODE_MANAGE = "node:manage"


class Role(StrEnum):
    """A named set of permissions; the sets are in `ROLES`."""

    SIGNER = "signer"
    RAW_SIGNER = "raw-signer"
    VERIFIER = "verifier"
    OPERATOR = "operator"
    AUDITOR = "auditor"
    ADMIN = "admin"
    BREAK_GLASS = "break-glass"


_P = Permission
_LOOK = frozenset({_P.KEY_SET_READ, _P.KEY_READ, _P.JWKS_READ})
_WATCH = _LOOK | {_P.BACKEND_READ, _P.NODE_READ, _P.TOKEN_VERIFY}
_OPERATE = _WATCH | {
    _P.KEY_ROTATE,
    _P.KEY_DISABLE,
    _P.KEY_ENABLE,
    _P.VERSION_ACTIVATE,
    _P.VERSION_REVOKE,
    _P.NODE_MANAGE,
}
_SIGN = frozenset({_P.JWT_SIGN, _P.JWS_SIGN, _P.RAW_SIGN})

ROLES: Mapping[Role, frozenset[Permission]] = MappingProxyType(
    {
        Role.SIGNER: frozenset({_P.JWT_SIGN, _P.KEY_READ, _P.JWKS_READ, _P.TOKEN_VERIFY}),
        Role.RAW_SIGNER: frozenset({_P.JWS_SIGN, _P.RAW_SIGN, _P.KEY_READ, _P.JWKS_READ}),
        Role.VERIFIER: frozenset({_P.JWKS_READ, _P.TOKEN_VERIFY}),
        Role.OPERATOR: _OPERATE,
        Role.AUDITOR: _WATCH | {_P.CLIENT_READ},
        # Separation of duties: an administrator does not sign, and overrides an invariant only with a second role.
        Role.ADMIN: frozenset(_P) - _SIGN - {_P.BREAK_GLASS},
        Role.BREAK_GLASS: frozenset({_P.BREAK_GLASS}),
    }
)


INSTALLATION_WIDE = frozenset({_P.EXTERNAL_KEY_MANAGE, _P.KEY_ADOPT})
"""Permissions that only a grant over everything gives, whatever object the call names.

With a foreign key in a JWKS its owner signs for the set's issuer. A module is shared by all key sets, so the right to
adopt from it covers any application's key.
"""

_SEPARATE_FROM_ADMIN = frozenset({Role.SIGNER, Role.RAW_SIGNER, Role.BREAK_GLASS})


@dataclass(frozen=True, slots=True)
class Scope:
    """The objects that a use case concerns. Both None: the installation. A `key_id` comes with its `key_set_id`."""

    key_set_id: Id | None = None
    key_id: Id | None = None


EVERYTHING = Scope()


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated client with its grants, as one transaction or snapshot saw them."""

    client_id: Id
    client: str
    token_id: Id | None
    """The API token that authenticated it; None for the operator of the node on the command line."""
    grants: tuple[Grant, ...]


def allow_within(grants: Iterable[Grant], permission: Permission, key_set_id: Id) -> bool:
    """Whether a grant has `permission` on a key set or on any of its keys. For the JWKS and for verifying tokens.

    A client with a grant on one key sees no more of the key set by this than its JWKS.
    """
    return any(permission in ROLES[Role(grant.role)] and grant.key_set_id in (None, key_set_id) for grant in grants)


def allow(grants: Iterable[Grant], permission: Permission, scope: Scope) -> bool:
    """Whether one of `grants` has a role with `permission` in a scope that covers `scope`.

    A narrower grant never covers a wider scope. A permission of `INSTALLATION_WIDE` needs a grant over everything.
    """
    if permission in INSTALLATION_WIDE:
        scope = EVERYTHING
    return any(
        permission in ROLES[Role(grant.role)]
        and (
            grant.key_set_id is None or (grant.key_set_id == scope.key_set_id and grant.key_id in (None, scope.key_id))
        )
        for grant in grants
    )


def combined_duties(held: Iterable[Grant], grant: Grant) -> list[Grant]:
    """The grants among `held` that combine duties with `grant` of the same client.

    One of the two has the role admin, the other signs or overrides invariants, and their scopes overlap: everything
    overlaps every scope, a key set its keys.
    """
    return [other for other in held if _separate(grant.role, other.role) and _overlap(grant, other)]


def _separate(one: str, other: str) -> bool:
    return (one == Role.ADMIN and other in _SEPARATE_FROM_ADMIN) or (
        other == Role.ADMIN and one in _SEPARATE_FROM_ADMIN
    )


def _overlap(one: Grant, other: Grant) -> bool:
    if one.key_set_id is None or other.key_set_id is None:
        return True
    same_key = one.key_id is None or other.key_id is None or one.key_id == other.key_id
    return one.key_set_id == other.key_set_id and same_key
