"""Errors as problem documents: every class has a status, every answer what its status asks for."""

import json

import pytest

from kms_jwks import errors
from kms_jwks.http import problems
from kms_jwks.http.exchange import Response

EXPECTED = {
    "malformed_body": 400,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "length_mismatch": 400,
    "claims_refused": 400,
    "invalid_batch": 400,
    "token_expired": 422,
    "token_key_revoked": 422,
    "credentials_missing": 401,
    "forbidden": 403,
    "route_not_found": 404,
    "not_published": 404,
    "method_not_allowed": 405,
    "kid_not_active": 409,
    "limit_reached": 409,
    "revision_mismatch": 412,
    "revision_required": 428,
    "registry_stale": 503,
    "backend_unavailable": 503,
    "backend_throttled": 503,
    "backend_timeout": 504,
    "backend_refused": 502,
    "backend_key_not_found": 502,
    "internal_error": 500,
}


@pytest.mark.parametrize("code", sorted(errors.BY_CODE))
def test_every_problem_type_has_a_row_or_an_ancestor_with_one(code: str) -> None:
    cls = errors.BY_CODE[code]
    assert any(ancestor in problems.STATUS for ancestor in cls.__mro__)
    if code in EXPECTED:
        assert problems.status_of(cls) == EXPECTED[code]


def body(response: Response) -> dict[str, object]:
    document: dict[str, object] = json.loads(response.body)
    return document


def test_a_problem_has_the_members_of_rfc_9457_and_what_to_do_next() -> None:
    error = errors.KidNotActive("Pinned to yesterday.", fields={"active_kid": "abc", "status": 200, "type": "x"})
    response = problems.response(error, "r-1")
    assert response.status == 409
    assert dict(response.headers)["Content-Type"] == "application/problem+json"
    assert dict(response.headers)["Cache-Control"] == "no-store"
    assert body(response) == {
        "type": "urn:kms-jwks:problem:kid_not_active",
        "title": errors.KidNotActive.title,
        "status": 409,
        "detail": "Pinned to yesterday.",
        "request_id": "r-1",
        "next_step": errors.KidNotActive.next_step,
        "active_kid": "abc",
    }


@pytest.mark.parametrize(
    ("error", "header", "value"),
    [
        (errors.CredentialsMissing(), "WWW-Authenticate", "Bearer"),
        (errors.BackendUnavailable(retry_after=7), "Retry-After", "7"),
        (errors.BackendUnavailable(), "Retry-After", "2"),
        (errors.RegistryStale(), "Retry-After", "2"),
        (errors.NotYetUsable(retry_after=60), "Retry-After", "60"),
    ],
)
def test_headers_that_a_status_asks_for(error: errors.Error, header: str, value: str) -> None:
    assert dict(problems.response(error, "r").headers)[header] == value


def test_a_405_names_the_methods() -> None:
    assert (
        dict(problems.response(errors.MethodNotAllowed(), "r", allow=("GET", "HEAD")).headers)["Allow"] == "GET, HEAD"
    )


@pytest.mark.parametrize("error", [errors.ConfigurationError("pin_file: /secret/place"), errors.ClientError("x")])
def test_what_only_an_operator_may_read_stays_in_the_log(error: errors.Error) -> None:
    response = problems.response(error, "r")
    assert response.status == 500
    assert body(response)["type"] == "urn:kms-jwks:problem:internal_error"
    assert b"secret" not in response.body
