"""A fleet of verifiers with the caches of the field, issuers that sign all the time, and rotation after rotation.

The rotations are the custodian's own, at the smallest `rotate_every` that the defaults allow: each standby signs in the
moment its publish lead is over. 20 rotations; 1,000 with KMS_JWKS_TEST_LONG=1.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from kms_jwks import wire
from kms_jwks.model import DAY, SECOND, VersionState
from tests.simulation.fleet import FOR_EVER, HABITS, Fleet, Verifier
from tests.simulation.oracle import Oracle
from tests.simulation.plant import Plant, simulated

ROTATIONS = 1000 if os.environ.get("KMS_JWKS_TEST_LONG") == "1" else 20
SOONEST = DAY + 3600 + 300 + 10
S = VersionState
AROUND = (0.1, 0.4, 2, 8, 20, 28, 2, 5, 60, 180, 300, 900, 2000, 460, 5, 30, 60)
"""Seconds between signatures from an activation on: past the handover, the end of the old tokens, the retirement."""
HOUR = 3600


def active(plant: Plant) -> int:
    return next(v.number for v in plant.versions() if v.state is S.ACTIVE)


def rotate_for_long(fleet: Fleet, rotations: int) -> None:
    """Sign and verify through that many rotations by schedule."""
    plant = fleet.plant
    lifetimes = (1, 60, 300, 1800, 3600)
    for _ in range(rotations):
        number = active(plant)
        fleet.restart_some()
        for pause in AROUND:
            fleet.wait(pause)
            fleet.work(plant.random.choice(lifetimes))
        while active(plant) == number:
            started = next(v.activated_at for v in plant.versions() if v.number == number)
            assert started is not None
            left = (started + soonest(plant) * SECOND - plant.wall()) / SECOND
            # Closer and closer, to sign in the last moment before and the first one after.
            fleet.wait(max(0.1, min(left / 2, 6 * HOUR)) if left > 0 else 0.1)
            fleet.work(plant.random.choice(lifetimes))


def soonest(plant: Plant) -> int:
    api = plant.api()
    assert api is not None
    return api.keys.get(plant.who, "main", "default").policy.rotate_every


def a_fleet(plant: Plant, **policy: Any) -> Fleet:
    plant.create({"name": "default", "alg": "EdDSA", "policy": {"rotate_every": SOONEST, "rotate_jitter": 0} | policy})
    plant.settle()
    return Fleet(plant)


def test_no_token_is_rejected_at_the_defaults(figure: Callable[[str], None]) -> None:
    with simulated(nodes=3) as plant:
        oracle = Oracle(plant)
        fleet = a_fleet(plant)
        rotate_for_long(fleet, ROTATIONS)
        rotated = sum(1 for v in plant.versions() if v.deactivated_at is not None)
        tally = fleet.tally
        figure(
            f"fleet at the defaults: {rotated} rotations, {tally.tokens} tokens, {tally.verified} verifications by "
            f"{len(HABITS)} kinds of client, {tally.rejections} rejected"
        )
        assert tally.rejected == {}
        assert rotated >= ROTATIONS
        assert oracle.documents > 0
        assert {b for v in plant.versions() for b in v.breaches} == set()


def test_without_a_publish_lead_tokens_are_rejected(figure: Callable[[str], None]) -> None:
    with simulated(nodes=3) as plant:
        fleet = a_fleet(plant, publish_lead=0, allow_unsafe_publish_lead=True, rotate_every=3910)
        rotate_for_long(fleet, 20)
        tally = fleet.tally
        figure(
            f"fleet with publish_lead 0: 20 rotations, {tally.tokens} tokens, {tally.rejections} rejected by "
            f"{', '.join(sorted(tally.rejected))}"
        )
        # These ask only when their document has become old; the others fetch on an unknown kid.
        assert set(tally.rejected) >= {".NET IdentityModel", "AWS API Gateway"}
        assert "Spring NimbusJwtDecoder" not in tally.rejected


@pytest.mark.parametrize(("age", "known"), [(30 * HOUR, True), (60, False)], ids=["an old standby", "a young standby"])
def test_an_emergency_and_the_second_rotation_after_it(age: int, known: bool, figure: Callable[[str], None]) -> None:
    """Who rejects the successor's tokens, who goes on trusting the revoked key, and for how long, at the worst.

    `known`: verifiers fetched after the standby was published, so that nothing makes those ask that keep for ever.
    """
    with simulated(nodes=3) as plant:
        fleet = a_fleet(plant, rotate_every=90 * DAY)
        plant.advance(40 * HOUR)
        api = plant.api()
        assert api is not None
        if not known:
            everybody_fetches(fleet)
        api.keys.rotate(plant.who, "main", "default", wire.RotateRequest())
        plant.settle()
        if known:
            everybody_fetches(fleet)
        for _ in range(int(age // 60)):
            fleet.wait(60)
            fleet.work(300)
        revoked = next(v for v in plant.versions() if v.state is S.ACTIVE)
        assert revoked.kid is not None
        before = dict(fleet.tally.rejected)
        began = plant.now
        api.revocation.revoke_version(
            plant.who, "main", "default", str(revoked.number), wire.RevokeRequest(reason="leaked")
        )
        rejects: dict[str, int] = {}
        trusts: dict[str, int] = {}
        while plant.now < began + 26 * HOUR * SECOND:
            token = fleet.issue(60)
            for verifier in fleet.verifiers:
                name, passed = verifier.habit.client, (plant.now - began) // SECOND
                if not verifier.accepts(token.kid, plant.now):
                    rejects[name] = passed
                if still_trusts(verifier, revoked.kid, plant.now):
                    trusts[name] = passed
            fleet.wait(10 if plant.now < began + HOUR * SECOND else 60)
        for what, found in (("rejects the successor", rejects), ("trusts the revoked key", trusts)):
            listed = ", ".join(f"{name} {seconds} s" for name, seconds in sorted(found.items(), key=lambda x: -x[1]))
            figure(f"emergency, standby visible for {age} s: {what} for up to: {listed or 'nobody'}")
        assert before == {}
        limits = {h.client: h.keeps + 61 for h in HABITS}
        for name, seconds in trusts.items():
            # Who keeps for ever asks when the second rotation, a publish lead later, shows a kid it never saw.
            assert seconds <= (24 * HOUR + 180 if limits[name] == FOR_EVER else limits[name]), name
        assert not any(still_trusts(v, revoked.kid, plant.now) for v in fleet.verifiers)
        if known:
            assert rejects == {}
            assert max(trusts.values()) > 24 * HOUR, "only the second rotation reaches those that keep for ever"
        else:
            assert set(rejects) >= {"Envoy", ".NET IdentityModel"}
        assert active(plant) == revoked.number + 2


def everybody_fetches(fleet: Fleet) -> None:
    token = fleet.issue(60)
    for index, verifier in enumerate(fleet.verifiers):
        fleet.verifiers[index] = Verifier(verifier.habit, fleet.kids)
        fleet.verifiers[index].accepts(token.kid, fleet.plant.now)


def still_trusts(verifier: Verifier, kid: str, now: int) -> bool:
    """Whether a forged token with the revoked kid would pass, without making the verifier ask for it."""
    return now < verifier.kept.get(kid, 0)
