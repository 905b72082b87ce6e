"""Defaults, limits and lists that a second place states for its readers: held against their one home in the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from kms_jwks import wire
from kms_jwks.access import Role
from kms_jwks.algorithms import ALGORITHMS, DEFAULT_RSA_BITS, RSA_BITS
from kms_jwks.backends import BACKENDS
from kms_jwks.config import BACKEND_TYPES, Settings
from kms_jwks.jose import EC_CURVES
from kms_jwks.model import (
    DEFAULT_API_TOKEN_LIFETIME,
    DEFAULT_CACHE_LIFETIME,
    Access,
    Policy,
    Purpose,
    SigningProfile,
)
from kms_jwks.store.error_map import CAUSE_NAMES

ROOT = Path(__file__).parents[2]
_UNITS = {"s": 1, "min": 60, "minutes": 60, "h": 3600, "hours": 3600, "d": 86_400, "day": 86_400, "days": 86_400}


def seconds(text: str) -> int:
    """`90 days`, `24 h`, `5 min`, `60 s`."""
    number, unit = re.fullmatch(r"(\d+) ?([a-z]+)", text).groups()  # type: ignore[union-attr]
    return int(number) * _UNITS[unit]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# --- documents --------------------------------------------------------------------------------------------------------


def policy_table() -> dict[str, str]:
    """Field → default, as docs/lifecycle.md prints them."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \|$", page("docs/lifecycle.md"), re.MULTILINE)
    return {name: default.strip() for name, default in rows if name in Policy.__slots__}


def test_the_table_in_the_documents_has_every_field_of_the_policy() -> None:
    assert set(policy_table()) == set(Policy.__slots__) - {"allow_unsafe_publish_lead"}


@pytest.mark.parametrize(("name", "shown"), policy_table().items(), ids=policy_table())
def test_the_table_in_the_documents_has_the_defaults_of_the_policy(name: str, shown: str) -> None:
    default = getattr(Policy(), name)
    words: dict[Any, str] = {"": "any time", None: "none"}
    if default in words:
        assert shown == words[default]
    else:
        assert seconds(shown) == default


@pytest.mark.parametrize(
    ("document", "pattern", "default"),
    [
        ("docs/security.md", r"`publish_lead` \((\d+ h)\)", Policy().publish_lead),
        ("docs/migrate.md", r"the publish lead, (\d+ h)", Policy().publish_lead),
        ("docs/migrate.md", r"`--max-token-ttl`, (\d+ h) by default", Policy().max_token_ttl),
    ],
)
def test_running_text_has_the_defaults(document: str, pattern: str, default: int) -> None:
    found = re.findall(pattern, page(document))
    assert found, "the sentence is gone: take its row out of this table"
    assert {seconds(text) for text in found} == {default}


def test_the_batch_limit_in_the_documents() -> None:
    assert re.findall(r"Up to (\d+) at once", page("docs/api.md")) == [str(wire.MAX_BATCH)]


# --- the wire ---------------------------------------------------------------------------------------------------------


def test_a_body_without_optional_fields_has_the_defaults_of_the_model() -> None:
    made = wire.KeySetCreate(name="a")
    assert (made.access, made.purpose) == (Access.PUBLIC, Purpose.JWT)
    assert made.cache_lifetime == DEFAULT_CACHE_LIFETIME
    assert wire.TokenCreate().expires_in == DEFAULT_API_TOKEN_LIFETIME


@pytest.mark.parametrize(
    ("struct", "domain"), [(wire.PolicyFields, Policy), (wire.Policy, Policy), (wire.Profile, SigningProfile)]
)
def test_the_wire_has_every_field_of_the_model(struct: type[msgspec.Struct], domain: type) -> None:
    assert set(struct.__struct_fields__) == set(domain.__slots__)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("struct", "field", "values"),
    [
        (wire.KeySetCreate, "access", set(Access)),
        (wire.KeySetPatch, "access", set(Access)),
        (wire.KeySetCreate, "purpose", set(Purpose)),
        (wire.GrantCreate, "role", set(Role)),
        (wire.KeyCreate, "rsa_bits", set(RSA_BITS)),
    ],
)
def test_the_wire_takes_the_values_of_the_domain(struct: type[msgspec.Struct], field: str, values: set[object]) -> None:
    found = next(f.type for f in msgspec.structs.fields(struct) if f.name == field)
    options = {value for part in (found, *get_args(found)) for value in get_args(part)} | set(get_args(found))
    assert {value for value in options if isinstance(value, str | int)} == values


# --- tables that have a row for each ----------------------------------------------------------------------------------


def test_every_type_of_backend_in_the_settings_has_its_maker() -> None:
    assert set(BACKENDS) == BACKEND_TYPES


def test_every_curve_has_its_class() -> None:
    assert {row.crv for row in ALGORITHMS.values() if row.kty == "EC"} == set(EC_CURVES)
    assert DEFAULT_RSA_BITS in RSA_BITS


def test_a_lease_that_is_not_configured_fits_the_default_policy() -> None:
    """`rotate_every` has to be at least publish_lead + max_token_ttl + clock_skew + lease."""
    policy, lease = Policy(), Settings.model_fields["signing_lease"].default
    assert policy.rotate_every >= policy.publish_lead + policy.max_token_ttl + policy.clock_skew + lease


def test_every_cause_of_an_unusable_database_has_its_row() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kms_jwks" / "store").glob("*.py"))
    assert set(re.findall(r'"cause": "(\w+)"', code)) <= CAUSE_NAMES
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| [^|]+ \| [^|]+ \|$", page("docs/troubleshooting.md"), re.MULTILINE)
    listed = [cause for row in rows for cause in re.findall(r"`(\w+)`", row) if cause != "cause"]
    assert sorted(listed) == sorted(CAUSE_NAMES - {"pooler_mode"})
    assert "its `cause` is `pooler_mode`" in page("docs/troubleshooting.md")
