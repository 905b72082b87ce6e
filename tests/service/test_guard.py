"""The guard reports every decision, calls that were let in and refusals, with the caller where it is known."""

from __future__ import annotations

from typing import Any

import pytest

from kms_jwks import authn, errors, wire
from kms_jwks.access import Permission
from kms_jwks.service.guard import Decision, RequestContext
from kms_jwks.service.signing_job import SigningOperation
from tests.service.world import World

P = Permission


@pytest.fixture
def decided(world: World) -> list[tuple[str | None, Decision]]:
    """The client and the decision, of every call from now on."""
    world.create()
    decisions: list[tuple[str | None, Decision]] = []
    world.service.guard._observe = lambda context, decision: decisions.append(
        (context.caller.client if context.caller else None, decision)
    )
    return decisions


def sign(world: World, context: RequestContext, key_set: str = "main", key: str = "default") -> Any:
    return world.service.signing.handle(SigningOperation.JWT, context, key_set, key, {"claims": {}})


def test_calls_that_are_let_in(world: World, decided: list[tuple[str | None, Decision]]) -> None:
    sign(world, world.signer)
    world.service.keys.get(world.admin, "main", "default")
    world.service.key_sets.list(world.admin, 10, None)
    assert decided == [
        ("signer", Decision(P.JWT_SIGN, "main", "default", None)),
        ("admin", Decision(P.KEY_READ, "main", "default", None)),
        ("admin", Decision(P.KEY_SET_READ, None, None, None)),
    ]


def test_refusals_name_the_caller_where_the_credentials_are_good(
    world: World, decided: list[tuple[str | None, Decision]]
) -> None:
    unknown = RequestContext(f"Bearer {authn.new_token().token}")
    for refused, call in (
        (errors.Forbidden, lambda: sign(world, world.admin)),
        (errors.KeyNotFound, lambda: sign(world, world.signer, key="none")),
        (errors.CredentialsUnknown, lambda: sign(world, unknown)),
        (errors.CredentialsMissing, lambda: sign(world, RequestContext())),
        (errors.Forbidden, lambda: world.service.keys.rotate(world.signer, "main", "default", wire.RotateRequest())),
        (errors.KeySetNotFound, lambda: world.service.key_sets.get(world.admin, "none")),
        (errors.CredentialsMalformed, lambda: world.service.clients.list(RequestContext("Basic x"), 10, None)),
    ):
        with pytest.raises(refused):
            call()
    assert decided == [
        ("admin", Decision(P.JWT_SIGN, "main", "default", "forbidden")),
        ("signer", Decision(P.JWT_SIGN, "main", "none", "key_not_found")),
        (None, Decision(None, "main", "default", "credentials_unknown")),
        (None, Decision(None, "main", "default", "credentials_missing")),
        ("signer", Decision(P.KEY_ROTATE, "main", "default", "forbidden")),
        ("admin", Decision(P.KEY_SET_READ, "none", None, "key_set_not_found")),
        (None, Decision(P.CLIENT_READ, None, None, "credentials_malformed")),
    ]


@pytest.mark.parametrize("data_plane", [True, False])
def test_authentication_alone_reports_refusals(
    world: World, decided: list[tuple[str | None, Decision]], data_plane: bool
) -> None:
    world.service.authenticate(world.signer, data_plane=data_plane)
    assert world.signer.caller is not None
    assert world.signer.caller.client == "signer"
    assert decided == [], "which permission the call needs is decided later"
    stranger = RequestContext()
    with pytest.raises(errors.CredentialsMissing):
        world.service.authenticate(stranger, data_plane=data_plane)
    assert decided == [(None, Decision(None, None, None, "credentials_missing"))]
    assert stranger.caller is None
