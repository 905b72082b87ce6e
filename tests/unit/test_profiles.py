"""What a key signs: the claims the server sets, those it takes, those it refuses; and signing inputs, likewise."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms_jwks import jose, strictjson, timeline
from kms_jwks.errors import ClaimsRefused, SigningInputRefused
from kms_jwks.model import SECOND, Instant, Policy, VersionState
from kms_jwks.profiles import REGISTERED, CheckedInput, IssueRules, check_signing_input, issue
from tests.unit.builders import version

NOW = 1_800_000_000
ISSUER = "https://issuer.example/default"
RULES = IssueRules(issuer=ISSUER, typ="JWT", default_lifetime=300, max_token_ttl=3600, clock_skew=300)
AT_JWT = IssueRules(issuer=ISSUER, typ="at+jwt", default_lifetime=300, max_token_ttl=3600, clock_skew=300)
ACCESS = {"sub": "user", "aud": "api", "client_id": "app"}


def issued(claims: dict[str, Any], expires_in: int | None = None, rules: IssueRules = RULES) -> dict[str, Any]:
    result = issue(rules, claims, now=NOW, expires_in=expires_in)
    complete: dict[str, Any] = json.loads(result.payload)
    assert (complete["jti"], complete["exp"]) == (result.jti, result.expires_at)
    return complete


# --- what the server sets ---------------------------------------------------------------------------------------------


def test_the_server_sets_iss_iat_exp_and_jti() -> None:
    claims = issued({})
    assert list(claims) == ["iss", "iat", "exp", "jti"]
    assert (claims["iss"], claims["iat"], claims["exp"]) == (ISSUER, NOW, NOW + 300)
    assert len(jose.b64u_decode(claims["jti"])) == 16


def test_every_token_has_a_jti_of_its_own() -> None:
    assert len({issued({})["jti"] for _ in range(1000)}) == 1000


def test_the_callers_claims_follow_in_their_order() -> None:
    claims = issued({"zeta": 1, "sub": "u", "exp": NOW + 60, "alpha": {"b": 1, "a": 2}})
    assert list(claims) == ["iss", "iat", "exp", "jti", "zeta", "sub", "alpha"]
    assert list(claims["alpha"]) == ["b", "a"]


def test_the_payload_is_compact_utf8() -> None:
    payload = issue(RULES, {"name": "Zoë 😀"}, now=NOW, expires_in=None).payload
    assert payload.startswith(f'{{"iss":"{ISSUER}","iat":{NOW},"exp":{NOW + 300},"jti":"'.encode())
    assert payload.endswith('","name":"Zoë 😀"}'.encode())


def test_the_callers_mapping_is_left_alone() -> None:
    claims = {"sub": "u"}
    issue(RULES, claims, now=NOW, expires_in=5)
    assert claims == {"sub": "u"}


@pytest.mark.parametrize(
    ("default", "limit", "lifetime"), [(300, 3600, 300), (300, 60, 60), (300, 300, 300), (1, 1, 1), (7200, 3600, 3600)]
)
def test_the_default_lifetime_never_exceeds_the_limit(default: int, limit: int, lifetime: int) -> None:
    rules = IssueRules(ISSUER, "JWT", default_lifetime=default, max_token_ttl=limit, clock_skew=0)
    assert issued({}, rules=rules)["exp"] == NOW + lifetime


# --- what it takes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": ISSUER},
        {"sub": "user"},
        {"sub": ""},
        {"aud": "api"},
        {"aud": ["api"]},
        {"aud": ["api", "other"]},
        {"exp": NOW + 1},
        {"exp": NOW + 3600},
        {"nbf": 0},
        {"nbf": -1},
        {"nbf": NOW + 300},
        {"nbf": NOW + 3600, "exp": NOW + 3600},
        {"iat": NOW},
        {"iat": NOW - 300},
        {"iat": NOW + 300},
        {"jti": "x"},
        {"jti": "x" * 255},
        {"alg": "none", "kid": "x", "typ": "y", "jwk": {}},  # names of headers are ordinary claims
        {"client_id": 7},  # only at+jwt has rules for it
        {"": ""},
        {"n": None, "b": True, "f": 1.5, "neg": -0.0, "tiny": 5e-324},
        {"big": 2**53, "small": -(2**53)},
        {"deep": [[[{"a": [1, {"b": [2.5, None, "x"]}]}]]]},
        {"text": "\x00\u2028 \\ud800"},
        {"big_float": 1e300},
    ],
    ids=str,
)
def test_claims_that_are_taken_as_given(claims: dict[str, Any]) -> None:
    complete = issued(claims)
    assert {name: complete[name] for name in claims} == claims


@pytest.mark.parametrize("expires_in", [1, 300, 3600])
def test_expires_in(expires_in: int) -> None:
    assert issued({}, expires_in)["exp"] == NOW + expires_in


def test_an_old_iat_does_not_lengthen_the_life() -> None:
    assert issued({"iat": NOW - 300}, 3600)["exp"] == NOW + 3600


@pytest.mark.parametrize(
    ("claims", "expires_in", "exp"),
    [
        ({"iat": NOW + 3, "exp": NOW + 3603}, None, NOW + 3603),  # an issuer whose clock is 3 s ahead
        ({"iat": NOW + 300, "exp": NOW + 3900}, None, NOW + 3900),
        ({"iat": NOW + 3}, 3600, NOW + 3603),
        ({"iat": NOW + 3}, None, NOW + 303),
        ({"iat": NOW - 60, "exp": NOW + 3600}, None, NOW + 3600),  # an issuer that dates its tokens back
    ],
)
def test_a_lifetime_counts_from_an_iat_that_is_ahead(claims: dict[str, Any], expires_in: int | None, exp: int) -> None:
    assert issued(claims, expires_in)["exp"] == exp
    if "exp" in claims:
        assert check(HEADER, CLAIMS | claims).expires_at == exp


@pytest.mark.parametrize("skew", [60, 300, 3600])
def test_no_token_outlives_what_the_retirement_of_its_key_waits_for(skew: int) -> None:
    """I2 counts clock_skew once, and an iat that is ahead uses it: the latest exp is the sum exactly."""
    rules = IssueRules(ISSUER, "JWT", default_lifetime=300, max_token_ttl=3600, clock_skew=skew)
    policy = Policy(max_token_ttl=3600, clock_skew=skew, handover=0)
    stopped = version(
        1,
        VersionState.RETIRING,
        deactivated_at=Instant(NOW * SECOND),
        bounds=timeline.bounds(policy, lease=0, cache_lifetime=300),
    )
    iat = NOW + skew
    exp = issue(rules, {"iat": iat, "exp": iat + 3600}, now=NOW, expires_in=None).expires_at
    assert exp * SECOND == timeline.retirable_at(stopped)
    for later in ({"iat": iat, "exp": iat + 3601}, {"iat": iat + 1, "exp": iat + 3601}):
        with pytest.raises(ClaimsRefused):
            issue(rules, later, now=NOW, expires_in=None)


# --- what it refuses --------------------------------------------------------------------------------------------------

# claims, expires_in, what the detail says
REFUSED: list[tuple[dict[str, Any], Any, str]] = [
    ({"iss": "https://other.example"}, None, "iss is not the key set's issuer"),
    ({"iss": ISSUER + "/"}, None, "iss is not"),
    ({"iss": ISSUER.upper()}, None, "iss is not"),
    ({"iss": None}, None, "iss is not"),
    ({"iss": [ISSUER]}, None, "iss is not"),
    ({"sub": 7}, None, "sub is not a string"),
    ({"sub": None}, None, "sub is not a string"),
    ({"sub": ["u"]}, None, "sub is not a string"),
    ({"aud": ""}, None, "aud is neither"),
    ({"aud": []}, None, "aud is neither"),
    ({"aud": [""]}, None, "aud is neither"),
    ({"aud": ["a", 1]}, None, "aud is neither"),
    ({"aud": ["a", ["b"]]}, None, "aud is neither"),
    ({"aud": None}, None, "aud is neither"),
    ({"aud": {"a": 1}}, None, "aud is neither"),
    ({"aud": 1}, None, "aud is neither"),
    ({"aud": True}, None, "aud is neither"),
    ({"exp": NOW}, None, f"exp {NOW} is not in the future; it is {NOW}"),
    ({"exp": NOW - 1}, None, "not in the future"),
    ({"exp": 0}, None, "not in the future"),
    ({"exp": -1}, None, "not in the future"),
    ({"exp": NOW + 3601}, None, "lifetime of 3601 s; this key signs at most 3600 s"),
    ({"exp": 2**53}, None, "at most 3600 s"),
    ({"exp": NOW * 1000}, None, "at most 3600 s"),  # milliseconds
    ({"exp": NOW + 60.0}, None, "exp is not an integer"),
    ({"exp": str(NOW + 60)}, None, "exp is not an integer"),
    ({"exp": True}, None, "exp is not an integer"),
    ({"exp": None}, None, "exp is not an integer"),
    ({"exp": [NOW + 60]}, None, "exp is not an integer"),
    ({"exp": NOW + 60}, 60, "exp and expires_in"),
    ({"exp": NOW + 60}, 61, "exp and expires_in"),
    ({}, 0, "expires_in is not an integer of at least 1"),
    ({}, -5, "expires_in is not an integer of at least 1"),
    ({}, True, "expires_in is not an integer"),
    ({}, 60.0, "expires_in is not an integer"),
    ({}, "60", "expires_in is not an integer"),
    ({}, 3601, "lifetime of 3601 s; this key signs at most 3600 s"),
    ({}, 10**400, "more than 2^53 s"),
    ({"nbf": NOW + 301}, None, f"nbf {NOW + 301} is after exp {NOW + 300}"),
    ({"nbf": NOW + 61}, 60, "is after exp"),
    ({"nbf": NOW + 61, "exp": NOW + 60}, None, "is after exp"),
    ({"nbf": 1.5}, None, "nbf is not an integer"),
    ({"nbf": False}, None, "nbf is not an integer"),
    ({"nbf": "0"}, None, "nbf is not an integer"),
    ({"iat": NOW - 301}, None, f"iat {NOW - 301} is 301 s from now, {NOW}; 300 s are allowed"),
    ({"iat": NOW + 301}, None, "301 s from now"),
    ({"iat": 0}, None, "s from now"),
    ({"iat": float(NOW)}, None, "iat is not an integer"),
    ({"iat": None}, None, "iat is not an integer"),
    ({"iat": True}, None, "iat is not an integer"),
    ({"iat": NOW + 3, "exp": NOW + 3604}, None, "lifetime of 3601 s; this key signs at most 3600 s"),
    ({"iat": NOW - 3, "exp": NOW + 3601}, None, "lifetime of 3601 s; this key signs at most 3600 s"),
    ({"iat": NOW + 301, "exp": NOW + 3901}, None, "iat 1800000301 is 301 s from now"),
    ({"iat": NOW + 60, "exp": NOW + 60}, None, f"exp {NOW + 60} is not after iat {NOW + 60}"),
    ({"iat": NOW + 60, "exp": NOW + 30}, None, f"exp {NOW + 30} is not after iat {NOW + 60}"),
    ({"jti": ""}, None, "jti is not a string of 1 to 255"),
    ({"jti": "x" * 256}, None, "jti is not a string of 1 to 255"),
    ({"jti": 7}, None, "jti is not a string"),
    ({"jti": None}, None, "jti is not a string"),
    ({"n": 2**53 + 1}, None, "'n' holds an integer beyond"),
    ({"n": -(2**53) - 1}, None, "'n' holds an integer beyond"),
    ({"exp": 2**53 + 1}, None, "'exp' holds an integer beyond"),
    ({"iat": 10**300}, None, "'iat' holds an integer beyond"),
    ({"n": [1, [2**53 + 1]]}, None, "'n' holds an integer beyond"),
    ({"n": {"a": {"b": [10**100]}}}, None, "'n' holds an integer beyond"),
    ({"n": math.nan}, None, "JSON cannot hold"),
    ({"n": [math.inf]}, None, "JSON cannot hold"),
    ({"n": {"a": -math.inf}}, None, "JSON cannot hold"),
    ({"n": b"bytes"}, None, "JSON cannot hold"),
    ({"n": ("a",)}, None, "JSON cannot hold"),
    ({"n": [object()]}, None, "JSON cannot hold"),
    ({"n": "\ud800"}, None, "cannot be written"),
]


@pytest.mark.parametrize(("claims", "expires_in", "detail"), REFUSED, ids=range(len(REFUSED)))
def test_claims_that_are_refused(claims: dict[str, Any], expires_in: Any, detail: str) -> None:
    with pytest.raises(ClaimsRefused) as caught:
        issue(RULES, claims, now=NOW, expires_in=expires_in)
    assert detail in caught.value.detail
    assert len(caught.value.detail) < 200
    assert all(isinstance(value, str | int) for value in caught.value.fields.values())


def test_a_refusal_gives_the_numbers_to_programs() -> None:
    with pytest.raises(ClaimsRefused) as caught:
        issue(RULES, {}, now=NOW, expires_in=7200)
    assert caught.value.fields == {"claim": "expires_in", "given": 7200, "limit": 3600}


def test_a_refusal_never_echoes_a_long_value_or_name() -> None:
    for claims in ({"iss": "x" * 5000}, {"x" * 5000: 2**60}, {"x" * 5000: [b""]}):
        with pytest.raises(ClaimsRefused) as caught:
            issue(RULES, claims, now=NOW, expires_in=None)
        assert len(repr((caught.value.detail, caught.value.fields))) < 400


def test_nesting_has_an_end() -> None:
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    with pytest.raises(ClaimsRefused, match="nested more than 32"):
        issue(RULES, {"n": deep}, now=NOW, expires_in=None)
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ClaimsRefused, match="nested more than 32"):
        issue(RULES, {"n": loop}, now=NOW, expires_in=None)


# --- names that some decoder takes for another ------------------------------------------------------------------------

FOLDED = [
    # name, what a tolerant decoder reads
    ("EXP", "exp"),
    ("Exp", "exp"),
    ("eXp", "exp"),
    ("ISS", "iss"),
    ("I\u017fS", "iss"),  # U+017F, which Go takes for s
    ("\u017fub", "sub"),
    ("Sub", "sub"),
    ("AUD", "aud"),
    ("Nbf", "nbf"),
    ("IAT", "iat"),
    ("JTI", "jti"),
    ("Client_ID", "client_id"),
    ("\uff45\uff58\uff50", "exp"),  # full-width letters
    ("\u24d4\u24e7\u24df", "exp"),  # circled letters
    ("\U0001d41e\U0001d431\U0001d429", "exp"),  # mathematical bold letters
    ("client\uff3fid", "client_id"),
    ("\u0130ss", "iss"),  # İ and U+0131, which Java's equalsIgnoreCase takes for i
    ("\u0131at", "iat"),
    ("exp\u0301", "exp"),
    ("e\u200bxp", "exp"),  # characters that are not shown
    ("\ufeffexp", "exp"),
    ("exp\ufe0f", "exp"),
    ("exp\u115f", "exp"),
    ("exp\u3164", "exp"),
    ("\u202eexp", "exp"),
    ("exp" + "\u200b" * 1000, "exp"),
    (" exp", "exp"),
    ("exp ", "exp"),
    ("e X P", "exp"),
    ("exp\u00a0", "exp"),
]
CONTROLLED = ["exp\0", "\0exp", "a\tb", "a\nb", "\x1b[2J", "\x7f", "a\x85", "\x9b"]


@pytest.mark.parametrize(("name", "read_as"), FOLDED, ids=lambda value: value[:12].encode("unicode_escape").decode())
def test_a_name_that_folds_to_a_registered_claim_is_refused(name: str, read_as: str) -> None:
    with pytest.raises(ClaimsRefused, match=f"Some decoders read the claim .* as {read_as} ") as caught:
        issue(RULES, {"sub": "alice", name: 32_503_680_000}, now=NOW, expires_in=5)
    assert caught.value.fields == {"claim": name[:64], "read_as": read_as}
    assert caught.value.detail.isprintable()
    with pytest.raises(SigningInputRefused, match=f"Some decoders read the claim .* as {read_as} "):
        check(HEADER, CLAIMS | {name: 1})


@pytest.mark.parametrize("name", CONTROLLED, ids=ascii)
@pytest.mark.parametrize("wrap", [lambda name: {name: 1}, lambda name: {"a": [{"b": {name: 1}}]}], ids=["top", "deep"])
def test_a_name_with_a_control_character_is_refused_at_any_depth(
    name: str, wrap: Callable[[str], dict[str, Any]]
) -> None:
    with pytest.raises(ClaimsRefused, match="holds a control character") as caught:
        issue(RULES, wrap(name), now=NOW, expires_in=None)
    assert caught.value.detail.isprintable()
    with pytest.raises(SigningInputRefused, match="holds a control character"):
        check(HEADER, CLAIMS | wrap(name))


@pytest.mark.parametrize(
    "name",
    ["scope", "SCOPE", "Email", "expires", "EXPIRY", "issuer", "iss2", "au", "subs", "exp_", "client-id", "clientId",
     "\u0435\u0445\u0440", "größe", "名前", "https://claims.example/exp",
     "\u0646\u200c\u0645", "\u200b", "x" * 5000, "é" * 5000],
)  # fmt: skip
def test_names_that_no_decoder_takes_for_another_are_signed(name: str) -> None:
    """U+0435 U+0445 U+0440 is Cyrillic: it looks like exp to people, not to decoders."""
    assert issued({name: 1, "nested": {"EXP": 1}})[name] == 1
    check(HEADER, CLAIMS | {name: 1, "nested": {"EXP": 1}})


def test_exact_names_stand_beside_refused_ones() -> None:
    for name in REGISTERED - {"client_id"}:
        with pytest.raises(ClaimsRefused, match=f"as {name} "):
            issue(RULES, {"exp": NOW + 5, "aud": "a", name.upper(): 1}, now=NOW, expires_in=None)


# --- at+jwt (RFC 9068) ------------------------------------------------------------------------------------------------


def test_an_access_token_has_what_rfc_9068_requires() -> None:
    claims = issued(ACCESS, rules=AT_JWT)
    assert {"iss", "exp", "aud", "sub", "client_id", "iat", "jti"} <= set(claims)


@pytest.mark.parametrize("name", list(ACCESS))
def test_an_access_token_without_one_of_them_is_refused(name: str) -> None:
    claims = {key: value for key, value in ACCESS.items() if key != name}
    with pytest.raises(ClaimsRefused, match=f"^{name} is missing; typ at.jwt requires it"):
        issue(AT_JWT, claims, now=NOW, expires_in=None)
    issue(RULES, claims, now=NOW, expires_in=None)


@pytest.mark.parametrize("client_id", [7, None, ["app"], True])
def test_an_access_tokens_client_id_is_a_string(client_id: object) -> None:
    with pytest.raises(ClaimsRefused, match="client_id is not a string"):
        issue(AT_JWT, {**ACCESS, "client_id": client_id}, now=NOW, expires_in=None)


# --- signing inputs ---------------------------------------------------------------------------------------------------

KID = "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"
HEADER = {"alg": "ES256", "kid": KID, "typ": "JWT"}
CLAIMS: dict[str, Any] = {"iss": ISSUER, "exp": NOW + 300}


def encoded(value: object) -> str:
    return jose.b64u_encode(json.dumps(value).encode() if not isinstance(value, bytes) else value)


def check(header: object, claims: object, rules: IssueRules = RULES) -> CheckedInput:
    return check_signing_input(rules, f"{encoded(header)}.{encoded(claims)}", alg="ES256", kid=KID, now=NOW)


@pytest.mark.parametrize(
    ("header", "claims", "jti"),
    [
        (HEADER, CLAIMS, None),
        (HEADER, CLAIMS | {"jti": "mine"}, "mine"),
        ({"typ": "JWT", "kid": KID, "alg": "ES256"}, CLAIMS, None),
        (json.dumps(HEADER, indent=2).encode(), json.dumps(CLAIMS, indent=2).encode(), None),
        (HEADER, CLAIMS | {"iat": NOW, "nbf": NOW - 5, "aud": ["a"], "sub": "u", "x": [1.5, None]}, None),
        (HEADER, CLAIMS | {"exp": NOW + 3600}, None),
    ],
)
def test_a_signing_input_that_keeps_the_rules_is_not_changed(header: object, claims: Any, jti: str | None) -> None:
    text = f"{encoded(header)}.{encoded(claims)}"
    checked = check_signing_input(RULES, text, alg="ES256", kid=KID, now=NOW)
    exp = claims["exp"] if isinstance(claims, dict) else CLAIMS["exp"]
    assert checked == CheckedInput(data=text.encode(), jti=jti, expires_at=exp)


def test_a_header_may_leave_typ_out_where_it_is_jwt() -> None:
    assert check(without(HEADER, "typ"), CLAIMS).expires_at == NOW + 300
    with pytest.raises(SigningInputRefused, match=r"header has no typ; it must be 'at\+jwt'"):
        check(without(HEADER, "typ"), CLAIMS | ACCESS | {"iat": NOW, "jti": "x"}, AT_JWT)


def test_what_issue_makes_passes() -> None:
    made = issue(RULES, {"sub": "u"}, now=NOW, expires_in=None)
    data = jose.signing_input(jose.header_segment(alg="ES256", kid=KID, typ="JWT"), made.payload)
    assert check_signing_input(RULES, data.decode(), alg="ES256", kid=KID, now=NOW) == CheckedInput(
        data, made.jti, made.expires_at
    )


def without(mapping: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}


@pytest.mark.parametrize(
    ("header", "detail"),
    [
        (without(HEADER, "alg"), "header has no alg"),
        (without(HEADER, "kid"), "header has no kid"),
        (HEADER | {"alg": "none"}, "header's alg is not 'ES256'"),
        (HEADER | {"ALG": "none"}, "header holds 'ALG'"),
        (HEADER | {"\u212aid": "mine"}, "header holds"),  # the Kelvin sign, which Go takes for k
        (HEADER | {"Typ": "at+jwt"}, "header holds 'Typ'"),
        (without(HEADER, "typ") | {"TYP": "JWT"}, "header holds 'TYP'"),
        (HEADER | {"alg\0": "none"}, "header holds 'alg\\x00'"),
        (without(HEADER, "typ") | {"typ": None}, "header's typ is not 'JWT'"),
        (HEADER | {"alg": "es256"}, "header's alg is not"),
        (HEADER | {"alg": ["ES256"]}, "header's alg is not"),
        (HEADER | {"kid": "other"}, "header's kid is not"),
        (HEADER | {"kid": None}, "header's kid is not"),
        (HEADER | {"typ": "jwt"}, "header's typ is not 'JWT'"),
        (HEADER | {"typ": "at+jwt"}, "header's typ is not"),
        (HEADER | {"typ": "application/JWT"}, "header's typ is not"),
        (HEADER | {"crit": ["exp"]}, "header holds 'crit'"),
        (HEADER | {"jwk": {}}, "header holds 'jwk'"),
        (HEADER | {"b64": False}, "header holds 'b64'"),
        (HEADER | {"cty": "JWT"}, "header holds 'cty'"),
        (HEADER | {"x" * 900: 1}, "header holds 'xxx"),
        (HEADER | {"x": "y" * 5000}, "4096 are read at most"),
        (b"", "The header: There is no JSON"),
        (b"[]", "The header: The JSON is an array"),
        (b"{", "The header: The JSON is truncated"),
        (b'{"alg":"ES256","alg":"none","kid":"x","typ":"JWT"}', "The header: The name 'alg' appears twice"),
        (b"\xff", "The header: The JSON is not UTF-8"),
        (b"[" * 2000, "The header:"),
    ],
)
def test_a_header_that_is_not_exactly_the_pinned_versions(header: object, detail: str) -> None:
    with pytest.raises(SigningInputRefused) as caught:
        check(header, CLAIMS)
    assert detail in caught.value.detail
    assert len(caught.value.detail) < 200


@pytest.mark.parametrize(
    ("claims", "detail"),
    [
        (without(CLAIMS, "iss"), "iss is missing"),
        (without(CLAIMS, "exp"), "exp is missing"),
        ({}, "iss is missing"),
        (b"", "The payload: There is no JSON"),
        (b"foo", "The payload: The JSON is malformed"),
        (b"[]", "The payload: The JSON is an array"),
        (b'"x"', "The payload: The JSON is a string"),
        (b"{}{}", "The payload: Something follows"),
        (f'{{"iss":"{ISSUER}","exp":{NOW + 60},"exp":{NOW + 9999}}}'.encode(), "'exp' appears twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":"\\ud800"}', "surrogate"),
        (b"[" * 3000, "The payload:"),
        (CLAIMS | {"jti": ""}, "jti is not a string"),
    ],
)
def test_a_payload_that_is_no_good(claims: object, detail: str) -> None:
    with pytest.raises(SigningInputRefused) as caught:
        check(HEADER, claims)
    assert detail in caught.value.detail


WRITABLE = [(claims, detail) for claims, expires_in, detail in REFUSED if expires_in is None and "JSON" not in detail]


@pytest.mark.parametrize(("claims", "detail"), WRITABLE, ids=range(len(WRITABLE)))
def test_whatever_issue_refuses_is_refused_here(claims: dict[str, Any], detail: str) -> None:
    if detail == "cannot be written":
        detail = "surrogate"
    with pytest.raises(SigningInputRefused) as caught:
        check(HEADER, CLAIMS | claims)
    assert detail in caught.value.detail


def test_an_access_token_needs_all_seven_claims() -> None:
    header = HEADER | {"typ": "at+jwt"}
    claims = CLAIMS | ACCESS | {"iat": NOW, "jti": "x"}
    assert check(header, claims, AT_JWT).jti == "x"
    for name in claims:
        with pytest.raises(SigningInputRefused, match=f"^{name} is missing"):
            check(header, without(claims, name), AT_JWT)


GOOD = f"{encoded(HEADER)}.{encoded(CLAIMS)}"


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("", "two base64url segments"),
        (".", "The header"),
        (encoded(HEADER), "two base64url segments"),
        (f"{encoded(HEADER)}.", "The payload"),
        (f".{encoded(CLAIMS)}", "The header"),
        (GOOD + ".", "two base64url segments"),
        (GOOD + ".AAAA", "two base64url segments"),
        ("." + GOOD, "two base64url segments"),
        (GOOD.replace(".", ".."), "two base64url segments"),
        (GOOD + "\n", "The payload: "),
        (" " + GOOD, "The header: "),
        (GOOD + "=", "The payload: "),
        (GOOD.replace(".", "=."), "The header: "),
        (GOOD[:-1] + "/", "The payload: "),
        (GOOD[:-1] + "é", "The payload: "),
        (GOOD + "A" * (-len(encoded(CLAIMS)) % 4 + 1), "The payload: "),
        ("\ud800.\ud800", "The header: "),
    ],
)
def test_what_is_no_signing_input(text: str, detail: str) -> None:
    with pytest.raises(SigningInputRefused) as caught:
        check_signing_input(RULES, text, alg="ES256", kid=KID, now=NOW)
    assert detail in caught.value.detail


def test_a_header_seen_before_is_held_to_each_version_anew() -> None:
    check(HEADER, CLAIMS)
    for alg, kid, rules in (("ES384", KID, RULES), ("ES256", "other", RULES), ("ES256", KID, AT_JWT)):
        with pytest.raises(SigningInputRefused):
            check_signing_input(rules, GOOD, alg=alg, kid=kid, now=NOW)


# --- properties -------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["iss", "sub", "aud", "exp", "nbf", "iat", "jti", "client_id", "x"]) | st.text(max_size=5)
near = st.integers(NOW - 400, NOW + 4000)
any_claims = st.dictionaries(names, values | near | st.just(ISSUER), max_size=6)


@settings(deadline=None)
@given(any_claims, st.none() | st.integers(-2, 4000), st.sampled_from([RULES, AT_JWT]))
def test_what_is_issued_keeps_the_promises(claims: dict[str, Any], expires_in: int | None, rules: IssueRules) -> None:
    try:
        result = issue(rules, claims, now=NOW, expires_in=expires_in)
    except ClaimsRefused:
        return
    complete: dict[str, Any] = strictjson.loads_object(result.payload)
    assert complete["iss"] == ISSUER
    assert complete["exp"] == result.expires_at
    assert 1 <= result.expires_at - max(NOW, complete["iat"]) <= rules.max_token_ttl
    assert result.expires_at <= NOW + rules.clock_skew + rules.max_token_ttl
    assert complete["jti"] == result.jti
    assert 1 <= len(result.jti) <= 255
    assert all(complete[name] == value for name, value in claims.items())
    # and the same bytes pass as a signing input
    data = jose.signing_input(jose.header_segment(alg="ES256", kid=KID, typ=rules.typ), result.payload).decode()
    assert check_signing_input(rules, data, alg="ES256", kid=KID, now=NOW).expires_at == result.expires_at


heads, bodies = st.just(HEADER) | st.binary(max_size=30), st.binary(max_size=30)
near_inputs = st.builds(lambda head, body: f"{encoded(head)}.{encoded(body)}", heads, bodies)


@settings(deadline=None)
@given(st.text(max_size=60) | near_inputs)
def test_nothing_but_signing_input_refused_ever_leaves(text: str) -> None:
    with pytest.raises(SigningInputRefused):
        check_signing_input(RULES, text, alg="ES256", kid=KID, now=NOW)
