"""docs/backends.md: every block of settings is one that the program takes, and what it says of defaults is so."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from kms_jwks.backends import calling
from kms_jwks.backends.pkcs11 import backend
from kms_jwks.config import BackendSettings, Settings, load_settings
from kms_jwks.custodian import leader_lease
from kms_jwks.worker import restart_limit

PAGE = Path(__file__).parents[2] / "docs" / "backends.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = [
    block
    for block in re.findall(r"^```toml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    if "build-system" not in block
]
MODULES = ("SoftHSM 2", "YubiHSM 2", "AWS CloudHSM", "Thales Luna", "libkmsp11", "Nitrokey NetHSM", "AWS KMS")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "-".join(tomllib.loads(block)["backends"]))
def test_a_block_of_settings_is_taken_as_it_stands(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "kms-jwks.toml"
    config.write_text(block, encoding="utf-8")
    settings = load_settings(config)
    assert settings.backends.keys() == tomllib.loads(block)["backends"].keys()
    assert settings.default_backend in settings.backends


def sections() -> dict[str, str]:
    """The text below each heading of the third level."""
    parts = re.split(r"^###? (.+)$", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("module", MODULES)
def test_each_module_has_its_settings_and_says_what_was_not_tried(module: str) -> None:
    (found,) = (text for heading, text in sections().items() if module in heading)
    assert "```toml\n[backends." in found
    if module != "AWS KMS":  # a page of its own
        assert "*Known" in found
        assert "*Not tried:*" in found


def test_the_numbers_are_those_of_the_program() -> None:
    plain, text = BackendSettings(), re.sub(r"\s+", " ", TEXT)
    assert f"`sign_timeout_ms` ({plain.sign_timeout_ms // 1000} s)" in text
    assert f"`check_signatures` ({plain.check_signatures};" in text
    assert calling.PATIENCE_IN_PLACE == 3
    assert "when one call is 3 s past its deadline" in text
    assert f"when it is {calling.PATIENCE_ASKING:g} s past its deadline" in text
    assert (leader_lease.LONG_STEP, leader_lease.LONGEST_STEP) == (30, 300)
    assert "logged every 30 s" in text
    assert "after 5 minutes the custodian" in text
    assert (backend._READING, backend._MUTATING) == (10, 60)
    assert "given up on after 60 s" in text
    assert "(10 s, 60 s to make or destroy a key)" in text
    assert (restart_limit.FIRST_PAUSE, restart_limit.SECOND_ROUND, restart_limit.LONGEST_PAUSE) == (1, 10, 300)
    assert "from 10 s to 5 minutes" in text
    assert Settings.model_fields["threads"].default == 8
