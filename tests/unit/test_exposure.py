"""Which verifiers keep trusting a revoked key: the table of verifiers, and the instants that follow from it."""

from __future__ import annotations

import pytest

from kms_jwks import exposure
from kms_jwks.exposure import Case, Ends, Exposed, Keeps, Learns, UnknownKid
from kms_jwks.model import DAY
from tests.unit.builders import T0, at


def case(**changes: object) -> Case:
    """A key that leaves at T0, whose successor verifiers could fetch for a day."""
    fields: dict[str, object] = {
        "withdrawn_at": T0,
        "cache_lifetime": 300,
        "stale_if_error": 3600,
        "has_successor": True,
        "successor_visible_since": at(-DAY),
        "second_rotation_at": at(DAY),
    }
    return Case(**(fields | changes))  # type: ignore[arg-type]


def rows(**changes: object) -> dict[str, Exposed]:
    return {row.verifier.source: row for row in exposure.report(case(**changes))}


def test_every_kind_of_verifier_has_one_row_with_its_source() -> None:
    assert len({v.name for v in exposure.VERIFIERS}) == len(exposure.VERIFIERS) >= 16
    for verifier in exposure.VERIFIERS:
        assert verifier.source
        assert (verifier.keeps is Keeps.SECONDS) <= (verifier.seconds > 0)


@pytest.mark.parametrize(
    ("source", "until", "learns"),
    [
        ("PyJWT 2.15", 300, Learns.KNOWS),
        ("panva/jose 6", 600, Learns.KNOWS),
        ("jwks-rsa-java", 36_000, Learns.KNOWS),
        (".NET IdentityModel", 43_200, Learns.KNOWS),
        ("AWS API Gateway developer guide", 7200, Learns.KNOWS),
        ("Istio", 3600, Learns.KNOWS),
        ("kube-apiserver", 300, Learns.KNOWS),
        ("lestrrat-go/jwx 2", 900, Learns.KNOWS),
        ("go-oidc 3", None, Learns.FETCHES),
        ("AWS Elastic Load Balancing", None, Learns.UNKNOWN),
        ("aws-jwt-verify 5", None, Learns.FETCHES),
        ("jose4j 0.9", 300, Learns.KNOWS),
        ("fast-jwt 6, get-jwks 11", None, Learns.FETCHES),
        ("python-jose 3", None, Learns.UNKNOWN),
        ("jsonwebtoken 9, node-jwks-rsa 4", 600, Learns.KNOWS),
        ("java-jwt 4, jwks-rsa-java", 36_000, Learns.KNOWS),
        ("Spring Security", 300, Learns.KNOWS),
        ("Spring Security, reactive", None, Learns.FETCHES),
        ("lestrrat-go/jwx 3", 900, Learns.KNOWS),
    ],
)
def test_until_when_each_may_accept_the_revoked_kid(source: str, until: int | None, learns: Learns) -> None:
    row = rows()[source]
    assert row.trusts_until == (None if until is None else at(until))
    assert row.trusts_until_behind_cache == (None if until is None else at(until + 300))
    assert (row.learns, row.learns_by) == (learns, None)


def test_cache_control_counts_where_it_is_honoured_and_nowhere_else() -> None:
    before, after = rows(), rows(cache_lifetime=900)
    changed = {source for source in before if before[source].trusts_until != after[source].trusts_until}
    assert changed == {"RFC 9111, RFC 5861", "kube-apiserver", "jose4j 0.9"}


def test_a_shared_cache_may_hand_out_the_older_document_while_it_cannot_reach_us() -> None:
    cache = rows()["RFC 9111, RFC 5861"]
    assert (cache.trusts_until, cache.trusts_until_behind_cache) == (at(300), at(3900))
    assert "purge" in cache.words


def test_a_young_successor_is_unknown_to_verifiers_that_do_not_fetch_at_an_unknown_kid() -> None:
    young = rows(successor_visible_since=at(-60))
    assert (young["Envoy"].learns, young["Envoy"].learns_by) == (Learns.WAITS, at(-60 + 600 + 300))
    assert "reject" in young["Envoy"].words
    assert (young["PyJWT 2.15"].learns, young["PyJWT 2.15"].learns_by) == (Learns.FETCHES, at(-60 + 30 + 300))
    assert young["MicahParks/jwkset"].learns_by == at(-60 + 300 + 300), "it may not fetch sooner"
    assert (young[".NET IdentityModel"].learns, "application" in young[".NET IdentityModel"].words) == (
        Learns.WAITS,
        True,
    )


def test_a_verifier_that_caches_for_ever_fetches_at_a_kid_it_cannot_hold() -> None:
    assert rows()["go-oidc 3"].ends is Ends.SECOND_ROTATION
    fresh = rows(successor_visible_since=None, second_rotation_at=None)
    assert fresh["go-oidc 3"].ends is Ends.SUCCESSOR
    assert fresh["Authlib 1.9"].learns is Learns.FETCHES


def test_each_row_says_whether_the_second_rotation_ends_its_trust() -> None:
    """It does where one unknown kid replaces all that a verifier holds."""
    cured = {source: row.cured for source, row in rows().items()}
    ends = {source for source, found in cured.items() if found}
    assert ends == {
        *("panva/jose 6", "PyJWT 2.15", "Authlib 1.9", "go-oidc 3", "MicahParks/jwkset", "Nimbus JOSE + JWT"),
        *("Spring Security", "Spring Security, reactive", "aws-jwt-verify 5", "jose4j 0.9"),
    }
    per_kid = {"node-jwks-rsa 4", "jsonwebtoken 9, node-jwks-rsa 4", "jwks-rsa-java", "java-jwt 4, jwks-rsa-java"}
    waiting = {"lestrrat-go/jwx 2", "lestrrat-go/jwx 3", "kube-apiserver", "Envoy", "Istio", "RFC 9111, RFC 5861"}
    assert {source for source, found in cured.items() if found is False} == {
        *(per_kid | waiting),
        "fast-jwt 6, get-jwks 11",
    }
    for source in per_kid:
        assert "each kid by itself" in rows()[source].words


def test_a_cache_that_use_refreshes_has_no_limit_and_no_cure() -> None:
    row = rows()["fast-jwt 6, get-jwks 11"]
    assert (row.keeps, row.trusts_until, row.ends, row.cured) == (None, None, Ends.RESTART, False)
    assert "at least every 60 s" in row.words
    application = rows()["python-jose 3"]
    assert (application.ends, application.cured) == (Ends.APPLICATION, None)
    assert application.words == "It fetches nothing itself: the application decides how long it keeps a JWKS."


def test_no_rotation_follows_the_revocation_of_a_retired_key() -> None:
    found = rows(has_successor=False, successor_visible_since=None, second_rotation_at=None, is_retired=True)
    assert {row.cured for row in found.values()} == {False}
    assert (found["go-oidc 3"].ends, found["go-oidc 3"].trusts_until) == (Ends.RESTART, None)
    assert "until another key of the set" in found["go-oidc 3"].words
    assert found["PyJWT 2.15"].ends is Ends.EXPIRY


def test_without_a_successor_no_verifier_learns_a_key() -> None:
    found = rows(has_successor=False, successor_visible_since=None)
    assert {row.learns for row in found.values()} == {Learns.NOTHING}


def test_the_summary_names_the_last_limit_and_the_verifiers_without_one() -> None:
    report = exposure.report(case())
    assert exposure.trusted_until(report) == at(43_200 + 300)
    assert set(exposure.unbounded(report)) == {
        *("Authlib", "go-oidc", "aws-jwt-verify", "Spring WebFlux, NimbusReactiveJwtDecoder"),
        *("fast-jwt with get-jwks", "python-jose", "AWS Application Load Balancer"),
    }


def test_every_row_has_words_for_both_questions() -> None:
    for changes in ({}, {"successor_visible_since": at(-1)}, {"has_successor": False, "successor_visible_since": None}):
        for row in exposure.report(case(**changes)):
            assert row.words.endswith(".")
            assert row.verifier.unknown_kid in UnknownKid
