"""Who may do what: the roles as a table, and scopes that never widen."""

from __future__ import annotations

import pytest

from kms_jwks.access import (
    EVERYTHING,
    INSTALLATION_WIDE,
    ROLES,
    Permission,
    Role,
    Scope,
    allow,
    allow_within,
    combined_duties,
)
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


@pytest.mark.parametrize("permission", P)
def test_some_permissions_need_a_grant_over_everything(permission: Permission) -> None:
    held = {scope: [grant(Role.ADMIN, scope.key_set_id, scope.key_id)] for scope in (EVERYTHING, Scope(SET))}
    given = permission in ROLES[Role.ADMIN]
    assert allow(held[EVERYTHING], permission, Scope(SET)) is given
    assert allow(held[Scope(SET)], permission, Scope(SET)) is (given and permission not in INSTALLATION_WIDE)
    assert {P.EXTERNAL_KEY_MANAGE, P.KEY_ADOPT} == INSTALLATION_WIDE


_ADMIN, _APART = Role.ADMIN, (Role.SIGNER, Role.RAW_SIGNER, Role.BREAK_GLASS)
_SCOPES = [(None, None), (SET, None), (SET, KEY), (SET, OTHER_KEY), (OTHER_SET, None), (OTHER_SET, KEY)]
_APART_SCOPES = {
    frozenset(pair)
    for pair in (
        ((SET, None), (OTHER_SET, None)),
        ((SET, None), (OTHER_SET, KEY)),
        ((SET, KEY), (OTHER_SET, None)),
        ((SET, KEY), (OTHER_SET, KEY)),
        ((SET, KEY), (SET, OTHER_KEY)),
        ((SET, OTHER_KEY), (OTHER_SET, None)),
        ((SET, OTHER_KEY), (OTHER_SET, KEY)),
    )
}


@pytest.mark.parametrize("role", _APART)
def test_admin_is_not_combined_within_overlapping_scopes(role: Role) -> None:
    for one in _SCOPES:
        for other in _SCOPES:
            overlap = frozenset((one, other)) not in _APART_SCOPES
            for first, second in ((_ADMIN, role), (role, _ADMIN)):
                held = [grant(Role.VERIFIER), grant(first, *one)]
                assert combined_duties(held, grant(second, *other)) == ([held[1]] if overlap else []), (one, other)


def test_other_roles_are_combined_freely() -> None:
    for one in Role:
        for other in Role:
            apart = {one, other} in ({_ADMIN, role} for role in _APART)
            assert bool(combined_duties([grant(one)], grant(other))) is apart, (one, other)
