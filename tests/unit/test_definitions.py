"""Which backend makes the keys of a definition that names none."""

from types import SimpleNamespace
from typing import Any

import pytest

from kms_jwks import errors, wire
from kms_jwks.service.definitions import choose_backend


def control(*names: str, default: str | None = None) -> Any:
    return SimpleNamespace(backends=SimpleNamespace(by_name=dict.fromkeys(names), default=default))


def test_the_named_one_or_the_default() -> None:
    assert choose_backend(control("a", "b"), wire.KeyCreate(name="k", alg="ES256", backend="b")) == "b"
    assert choose_backend(control("a", "b", default="a"), wire.KeyCreate(name="k", alg="ES256")) == "a"


@pytest.mark.parametrize(
    ("names", "reason"), [((), "none is configured"), (("a", "b"), "several are configured and none is the default")]
)
def test_without_a_default_the_refusal_says_why(names: tuple[str, ...], reason: str) -> None:
    with pytest.raises(errors.InvalidField, match=reason) as caught:
        choose_backend(control(*names), wire.KeyCreate(name="k", alg="ES256"))
    assert caught.value.fields == {"field": "backend"}
    assert ("[backends.NAME]" in caught.value.next_step) is (not names)


def test_an_unknown_one() -> None:
    with pytest.raises(errors.BackendUnknown, match="'c'"):
        choose_backend(control("a"), wire.KeyCreate(name="k", alg="ES256", backend="c"))
