"""Rotations of a running service, watched by verifiers that keep their caches and by an issuer that pins its kid.

The publish lead is cut to seconds, just above the time for which PyJWKClient and jose do not ask again: with less, the
last test shows, they reject. That time is an option of theirs, 5 s here; with KMS_JWKS_TEST_LONG=1 it is their default,
30 s, and rotations go by schedule too, which takes some minutes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import jwt
import pytest

from kms_jwks.client import Client
from tests.integration.conftest import Server, fresh, wait_until
from tests.interop.conftest import Issuer
from tests.interop.remote_keys import remote_key
from tests.interop.verifiers import Jose, JoseError

LONG = os.environ.get("KMS_JWKS_TEST_LONG") == "1"
COOL_DOWN = 30 if LONG else 5
LEAD = COOL_DOWN + 3
TTL = 20
FASTEST = LEAD + TTL + 60 + 10
"""The smallest rotate_every: lead, token lifetime, clock skew, lease."""


class Watchers:
    """PyJWKClient and jose, each one verifier for the whole test, and an issuer that builds tokens with PyJWT."""

    def __init__(self, issuer: Issuer, jose: Jose, cool_down: float = 30) -> None:
        self.issuer, self.jose = issuer, jose
        self.jose.cool_down[issuer.name] = cool_down
        self.pyjwt = jwt.PyJWKClient(issuer.jwks_uri, cooldown_duration=cool_down)
        self.kids: list[str] = []
        self.verified = 0
        self.pin()

    def pin(self) -> None:
        """Read the active version once; sign with its kid until `refresh_after`."""
        active = self.issuer.client.active(self.issuer.name, "main")
        self.key = remote_key(self.issuer.client, self.issuer.name, "main")
        self.refresh_after = active.refresh_after

    def look(self) -> None:
        """One token by the pinned kid and one by whatever is active; both verify everywhere, or this raises."""
        if datetime.now(UTC) >= self.refresh_after:
            self.pin()
        now = int(time.time())
        claims = {"iss": self.issuer.url, "sub": "alice", "aud": "shop", "iat": now, "exp": now + TTL}
        pinned = jwt.encode(claims, self.key, algorithm="ES256", headers={"kid": self.key.kid})
        for token in (pinned, self.issuer.client.sign_jwt(self.issuer.name, "main", claims).token):
            self.kids.append(jwt.get_unverified_header(token)["kid"])
            found = self.pyjwt.get_signing_key_from_jwt(token)
            jwt.decode(token, found, algorithms=["ES256"], issuer=self.issuer.url, audience="shop")
            self.jose.verify(
                token,
                self.issuer.jwks_uri,
                alg="ES256",
                issuer=self.issuer.url,
                audience="shop",
                cache=self.issuer.name,
            )
            self.verified += 2


def an_issuer(server: Server, admin: Client, **policy: Any) -> Issuer:
    name = fresh("fast")
    key = {"name": "main", "alg": "ES256", "policy": {"allow_unsafe_publish_lead": True, "rotate_jitter": 0} | policy}
    server.must("POST", "/v1/key-sets", {"name": name, "keys": [key]})
    client = Client(server.url, server.client("signer", key_set=name))
    wait_until(lambda: server.must("GET", f"/v1/key-sets/{name}/keys/main")["active_kid"])
    assert "unsafe publish_lead" in admin.key(name, "main").warnings[0]
    return Issuer(name, "ES256", f"{server.url}/{name}", f"{server.url}/{name}/.well-known/jwks.json", client)


def standby_usable_at(admin: Client, issuer: Issuer) -> float | None:
    waiting = [v for v in admin.key(issuer.name, "main").versions if v.state == "published"]
    return waiting[0].usable_at.timestamp() if waiting and waiting[0].usable_at else None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["by command", "by schedule"] if LONG else ["by command"])
def test_two_rotations_are_noticed_by_nobody(
    server: Server, admin: Client, jose: Jose, how: str, figure: Callable[[str], None]
) -> None:
    policy = {"rotate_every": FASTEST, "clock_skew": 60} if how == "by schedule" else {}
    issuer = an_issuer(server, admin, publish_lead=LEAD, max_token_ttl=TTL, **policy)
    with issuer.client:
        watchers = Watchers(issuer, jose, COOL_DOWN)
        for rotations in range(2):
            while len(set(watchers.kids)) < rotations + 2:
                watchers.look()
                usable = standby_usable_at(admin, issuer)
                if how == "by command" and usable is not None and usable < time.time():
                    admin.rotate(issuer.name, "main")
                time.sleep(0.2)
        watchers.look()
    figure(
        f"two rotations {how}, watched by PyJWKClient and jose (publish_lead {LEAD} s): {len(set(watchers.kids))} "
        f"kids, {watchers.verified} verifications, 0 failed; a pinned PyJWT issuer signed through them"
    )
    assert len(set(watchers.kids)) == 3


def test_without_a_lead_a_verifier_that_has_just_asked_rejects(server: Server, admin: Client, jose: Jose) -> None:
    issuer = an_issuer(server, admin, publish_lead=0, max_token_ttl=TTL)

    def rotate_and_look() -> None:
        for _ in range(3):
            watchers.look()
            wait_until(lambda: standby_usable_at(admin, issuer))
            admin.rotate(issuer.name, "main")
            watchers.look()

    with issuer.client:
        watchers = Watchers(issuer, jose)
        with pytest.raises((JoseError, jwt.PyJWKClientError)) as rejected:
            rotate_and_look()
    assert "no applicable key found" in str(rejected.value) or "Unable to find a signing key" in str(rejected.value)
