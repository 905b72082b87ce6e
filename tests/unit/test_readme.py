"""What README.md and docs/ name is there: commands, options, files, headings. What they show runs in tests/interop."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kms_jwks.cli.app import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """Every `kms-jwks …` line of the shell blocks, and every `kms-jwks …` in running text."""
    found: list[str] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            found += re.findall(
                r"^(?:\S+=\S+ )*(?:\.venv/bin/)?(kms-jwks .*)$", block.replace("\\\n", " "), re.MULTILINE
            )
        found += re.findall(r"`(kms-jwks [^`\n]+)`", text)
    return found


def words(line: str) -> list[str]:
    """The command's words, without what the shell does with its output."""
    return shlex.split(re.split(r" [<>|] ", line)[0], comments=True)[1:]


def test_there_is_something_to_check() -> None:
    assert len(commands()) > 10


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_every_command_and_option_exists(line: str) -> None:
    command: click.Command = cli
    path: list[str] = []
    rest = words(line)
    while isinstance(command, click.Group):
        assert rest, f"{line}: a command is missing"
        assert rest[0] in command.commands, f"{line}: there is no command {rest[0]}"
        path.append(rest[0])
        command = command.commands[rest.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    used = {word.partition("=")[0] for word in rest if word.startswith("-") and word != "-"}
    assert used <= known, f"{line}: {sorted(used - known)}"
    assert CliRunner().invoke(cli, [*path, "--help"]).exit_code == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_have_the_names_that_the_program_reads(page: Path) -> None:
    from kms_jwks.config import NOT_SETTINGS, Settings

    settings = {f"KMS_JWKS_{name.upper()}" for name in Settings.model_fields}
    more = {"KMS_JWKS_TOKEN_FILE"}
    for name in re.findall(r"KMS_JWKS_[A-Z_]*[A-Z]", page.read_text(encoding="utf-8")):
        assert name.split("__")[0] in settings | NOT_SETTINGS | more, name
