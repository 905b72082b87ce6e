"""Who may do what: the roles as a table, and scopes that never widen."""

from __future__ import annotations

import pytest

from kms_jwks.access import EVERYTHING, ROLES, Permission, Role, Scope, allow, allow_within
from kms_jwks.model import Grant, Id, Instant

P = Permission
SET, OTHER_SET, KEY, OTHER_KEY = Id("set"), Id("other-set"), Id("key"), Id("other-key")


def grant(role: Role, key_set: Id | None = None, key: Id | None = None) -> Grant:
    return Grant(Id("g"), Id("c"), role.value, Instant(0), key_set, key)


def test_every_role_has_its_permissions() -> None:
    assert set(ROLES) == set(Role)
    assert all(ROLES[role] for role in Role)


@pytest.mark.parametrize(
    ("role", "may", "may_not"),
    [
        (Role.SIGNER, {P.JWT_SIGN}, {P.JWS_SIGN, P.RAW_SIGN, P.KEY_ROTATE, P.CLIENT_READ}),
        (Role.RAW_SIGNER, {P.JWS_SIGN, P.RAW_SIGN}, {P.JWT_SIGN, P.KEY_ROTATE}),
        (Role.VERIFIER, {P.JWKS_READ, P.TOKEN_VERIFY}, {P.JWT_SIGN, P.KEY_READ}),
        (Role.OPERATOR, {P.KEY_ROTATE, P.VERSION_REVOKE}, {P.JWT_SIGN, P.GRANT_MANAGE, P.CLIENT_MANAGE, P.KEY_CREATE}),
        (Role.AUDITOR, {P.KEY_READ, P.CLIENT_READ, P.NODE_READ}, {P.KEY_ROTATE, P.JWT_SIGN, P.GRANT_MANAGE}),
        (
            Role.ADMIN,
            {P.KEY_CREATE, P.GRANT_MANAGE, P.VERSION_DESTROY},
            {P.JWT_SIGN, P.JWS_SIGN, P.RAW_SIGN, P.BREAK_GLASS},
        ),
        (Role.BREAK_GLASS, {P.BREAK_GLASS}, set(P) - {P.BREAK_GLASS}),
    ],
)
def test_roles(role: Role, may: set[Permission], may_not: set[Permission]) -> None:
    for permission in may:
        assert allow([grant(role)], permission, EVERYTHING)
    for permission in may_not:
        assert not allow([grant(role)], permission, EVERYTHING)


@pytest.mark.parametrize(
    ("key_set", "key", "covered", "not_covered"),
    [
        (None, None, [EVERYTHING, Scope(SET), Scope(SET, KEY)], []),
        (SET, None, [Scope(SET), Scope(SET, KEY)], [EVERYTHING, Scope(OTHER_SET), Scope(OTHER_SET, KEY)]),
        (SET, KEY, [Scope(SET, KEY)], [EVERYTHING, Scope(SET), Scope(SET, OTHER_KEY), Scope(OTHER_SET, KEY)]),
    ],
)
def test_scopes(key_set: Id | None, key: Id | None, covered: list[Scope], not_covered: list[Scope]) -> None:
    held = [grant(Role.SIGNER, key_set, key)]
    assert all(allow(held, P.JWT_SIGN, scope) for scope in covered)
    assert not any(allow(held, P.JWT_SIGN, scope) for scope in not_covered)


def test_the_public_side_of_a_set_is_open_to_who_has_one_of_its_keys() -> None:
    held = [grant(Role.SIGNER, SET, KEY)]
    assert allow_within(held, P.TOKEN_VERIFY, SET)
    assert not allow_within(held, P.TOKEN_VERIFY, OTHER_SET)
    assert not allow_within(held, P.KEY_ROTATE, SET)


def test_no_grant_no_permission() -> None:
    assert not any(allow([], permission, EVERYTHING) for permission in P)


def test_permissions_of_different_grants_do_not_add_up_across_scopes() -> None:
    held = [grant(Role.SIGNER, SET), grant(Role.OPERATOR, OTHER_SET)]
    assert not allow(held, P.JWT_SIGN, Scope(OTHER_SET))
    assert not allow(held, P.KEY_ROTATE, Scope(SET))
