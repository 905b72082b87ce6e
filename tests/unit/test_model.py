"""Names, ids, states and transitions, epochs and bounds of the registry's things."""

import time
import uuid
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms_jwks.model import (
    IN_JWKS,
    MAX_KID,
    RESERVED_NAMES,
    TRANSITIONS,
    Bounds,
    Epoch,
    Policy,
    SigningProfile,
    VersionState,
    kid_error,
    name_error,
    new_id,
)

S = VersionState

# The table of states: state → what it may become.
MAY_BECOME = {
    S.CREATING: {S.PUBLISHED, S.REVOKED, S.DESTROYED},
    S.PUBLISHED: {S.ACTIVE, S.RETIRED, S.REVOKED},
    S.ACTIVE: {S.RETIRING, S.REVOKED},
    S.RETIRING: {S.RETIRED, S.REVOKED},
    S.RETIRED: {S.REVOKED, S.DESTROYED},
    S.REVOKED: {S.DESTROYED},
    S.DESTROYED: set(),
}


@pytest.mark.parametrize(("state", "other"), list(product(S, S)), ids=str)
def test_transitions(state: VersionState, other: VersionState) -> None:
    assert state.may_become(other) is (other in MAY_BECOME[state])


def test_every_state_has_a_row() -> None:
    assert set(TRANSITIONS) == set(S) == set(MAY_BECOME)


def test_no_way_leads_back() -> None:
    """Once out of the JWKS, always out; once revoked, never anything but destroyed."""

    def reachable(state: VersionState) -> set[VersionState]:
        found: set[VersionState] = set()
        queue = [state]
        while queue:
            for after in TRANSITIONS[queue.pop()] - found:
                found.add(after)
                queue.append(after)
        return found

    for state in S:
        assert state not in reachable(state)
    assert reachable(S.REVOKED) == {S.DESTROYED}
    for state in (S.RETIRED, S.REVOKED, S.DESTROYED):
        assert not reachable(state) & IN_JWKS


@pytest.mark.parametrize("state", list(S))
def test_what_the_jwks_shows(state: VersionState) -> None:
    assert state.in_jwks is (state in {S.PUBLISHED, S.ACTIVE, S.RETIRING})


@pytest.mark.parametrize("name", ["a", "0", "default", "issuer-1", "a--b", "a-", "x" * 63, "keyset", "v2"])
def test_names(name: str) -> None:
    assert name_error(name) is None


@pytest.mark.parametrize(
    "name", ["", "-a", "A", "a_b", "a.b", "a/b", "a b", "é", "x" * 64, "a\n", "\u0661", "..", "%61"]
)
def test_names_outside_the_grammar(name: str) -> None:
    problem = name_error(name)
    assert problem is not None
    assert "1 to 63" in problem


@pytest.mark.parametrize("name", sorted(RESERVED_NAMES))
def test_words_that_routes_use_are_no_names(name: str) -> None:
    problem = name_error(name)
    assert problem is not None
    assert name in problem


def test_ids_are_uuid7_of_now_and_distinct() -> None:
    before = time.time_ns() // 1_000_000
    ids = [new_id() for _ in range(1000)]
    after = time.time_ns() // 1_000_000
    assert len(set(ids)) == 1000
    for text in ids:
        parsed = uuid.UUID(text)
        assert str(parsed) == text
        assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
        assert before <= parsed.int >> 80 <= after
    assert all(one[:13] <= other[:13] for one, other in pairwise(ids))


def test_defaults_are_those_of_the_design() -> None:
    day = 86_400
    assert Policy() == Policy(90 * day, day, False, 3600, 300, 60, 30 * day)
    assert SigningProfile() == SigningProfile("default", "JWT", 300)


@pytest.mark.parametrize(
    ("epoch", "other", "reached"),
    [
        (Epoch("a", 5), Epoch("a", 5), True),
        (Epoch("a", 6), Epoch("a", 5), True),
        (Epoch("a", 4), Epoch("a", 5), False),
        (Epoch("b", 9), Epoch("a", 5), False),  # a restored registry counts anew
        (Epoch("a", 9), Epoch("b", 5), False),
    ],
)
def test_an_epoch_reaches_another_only_within_its_incarnation(epoch: Epoch, other: Epoch, reached: bool) -> None:
    assert epoch.reaches(other) is reached


bounds = st.builds(Bounds, *[st.integers(0, 10**6)] * 5)


@settings(deadline=None)
@given(bounds, bounds)
def test_widening_never_shrinks(one: Bounds, other: Bounds) -> None:
    wide = one.widened(other)
    names = Bounds.__slots__
    assert all(getattr(wide, name) == max(getattr(one, name), getattr(other, name)) for name in names)
    assert wide.widened(one) == wide == other.widened(one)


@pytest.mark.parametrize(
    "kid",
    ["1", "a/b", "//", "a+b=", "50%", "%2F", "Schlüssel-ключ-鍵", "a b", "~x", "-x", "...", "a/.b/..c", "x" * MAX_KID],
)
def test_a_kid_is_anything_that_can_be_shown_and_named(kid: str) -> None:
    assert kid_error(kid) is None


@pytest.mark.parametrize(
    "kid",
    [
        "",
        "x" * (MAX_KID + 1),
        "a\n",
        "\ta",
        "\x1b[0m",
        "\0",
        "\u202e",
        "\ud800",
        "\u00a0",
        " a",
        "a ",
        ".",
        "..",
        "a/..",
        "./a",
    ],
)
def test_what_is_no_kid(kid: str) -> None:
    assert kid_error(kid) is not None
