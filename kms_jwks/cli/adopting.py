"""The options that adopt a key pair, shared by `key create` and `version create`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from kms_jwks.cli.values import content, json_object

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

F = TypeVar("F", bound="Callable[..., Any]")

_NEEDED = ("kid", "accept", "public_key")


def adopt_options(function: F) -> F:
    """The options --adopt, --kid, --accept and --public-key."""
    for option in (
        click.option(
            "--public-key",
            metavar="@FILE|-",
            help="Its public key, PEM or JWK, where the module holds the private one alone. Needs --accept.",
        ),
        click.option(
            "--accept",
            is_flag=True,
            default=None,
            help="Adopt it although it is extractable, may do more than sign, or was not made in the module.",
        ),
        click.option("--kid", metavar="KID", help="The kid that verifiers know it by. [default: its thumbprint]"),
        click.option(
            "--adopt",
            metavar="LOCATOR",
            help="A key pair in the module: LABEL, id=HEX or pkcs11:…; in AWS KMS a key id, ARN or alias.",
        ),
    ):
        function = option(function)
    return function


def adoption(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Options with those of an adoption gathered under `adopt`, as the API has them."""
    rest = dict(fields)
    locator = rest.pop("adopt", None)
    asked = {name: rest.pop(name) for name in _NEEDED if name in rest}
    if locator is None:
        if asked:
            raise click.UsageError("--kid, --accept and --public-key go with --adopt.")
        return rest
    if "public_key" in asked:
        asked["public_key"] = _public_key(asked["public_key"])
    return {**rest, "adopt": {"locator": locator, **asked}}


def _public_key(value: str) -> str | dict[str, Any]:
    text = content(value, "--public-key")
    return json_object(text, "--public-key") if text.lstrip().startswith("{") else text
