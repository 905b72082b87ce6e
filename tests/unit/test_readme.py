"""What the documents name exists: commands, options, settings, files, headings, problem codes, the import order.

What README.md and docs/ show runs in tests/interop.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections import Counter
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kms_jwks import config
from kms_jwks.cli.app import cli
from kms_jwks.errors import BY_CODE
from kms_jwks.http.problems import status_of
from kms_jwks.store.error_map import CAUSE_NAMES
from tests.unit.test_imports import LAYERS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
EVERY_PAGE = [*PAGES, CONTRIBUTING, ROOT / "CHANGELOG.md"]


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


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
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


# --- paths ------------------------------------------------------------------------------------------------------------

PATH = re.compile(r"(?:[\w.-]+/)+[\w.-]*|[\w.-]+\.(?:md|py|toml|yaml|txt)")
MADE = ("var/", ".venv/", "node/")
"""Folders that `./dev` and the README's commands make."""
FROM = (ROOT, ROOT / "kms_jwks")
"""A document names a file from the checkout's root or from the package."""


def paths(text: str) -> set[str]:
    """The paths in a document: what it says in backticks that looks like one, and pages of docs/ anywhere in it."""
    found = {quoted for quoted in re.findall(r"`([^`\s]+)`", text) if PATH.fullmatch(quoted)}
    found |= set(re.findall(r"(?<![\w/.-])docs/[\w/-]+\.md\b", text))
    return {path for path in found if not path.startswith(MADE)}


def missing(text: str) -> list[str]:
    """Paths of a document that do not exist; a page may also show a file whose name it gives before the block."""
    shown = set(re.findall(r"^`([^`]+)`:\n\n```", text, re.MULTILINE))
    return sorted(path for path in paths(text) - shown if not any((base / path).exists() for base in FROM))


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
def test_every_path_exists(page: Path) -> None:
    assert missing(page.read_text(encoding="utf-8")) == []


def test_a_path_that_does_not_exist_is_found() -> None:
    text = "See `config/kms-jwks.toml`, `wiring.py`, `store/`, `./dev`, `GET /v1/nodes` and `/docs`; docs/api.md too."
    assert paths(text) == {"config/kms-jwks.toml", "wiring.py", "store/", "./dev", "docs/api.md"}
    assert missing(text) == []
    assert missing("`service/shelf.py` and `docs/none.md` and docs/nowhere.md, made in `var/`.") == [
        "docs/none.md",
        "docs/nowhere.md",
        "service/shelf.py",
    ]


def house_map() -> set[str]:
    """Every path of the map in CONTRIBUTING.md."""
    (block,) = re.findall(r"^## The map of the house\n\n((?:    .+\n)+)", CONTRIBUTING.read_text("utf-8"), re.MULTILINE)
    found, folder = set(), ""
    for line in block.splitlines():
        entry = re.match(r"    (  )?([\w.-]+/?)(?:  |$)", line)
        if entry is None:
            continue  # a description goes on
        folder = folder if entry[1] else entry[2]
        found.add(folder + entry[2] if entry[1] else folder)
    return found


def test_the_map_of_the_house_shows_what_there_is() -> None:
    found = house_map()
    assert [path for path in sorted(found) if not (ROOT / path).exists()] == []
    assert all((ROOT / path).is_dir() == path.endswith("/") for path in found)
    for folder in ("kms_jwks", "tests"):
        there = {path for path in (ROOT / folder).iterdir() if path.name[0].isalpha() and path.suffix in ("", ".py")}
        modules = {
            f"{folder}/{path.name}{'/' if path.is_dir() else ''}"
            for path in there
            if (folder == "kms_jwks" and path.is_file()) or (path.is_dir() and any(path.rglob("*.py")))
        }
        assert modules <= found


def test_the_import_order_is_the_one_that_is_enforced() -> None:
    text = CONTRIBUTING.read_text(encoding="utf-8")
    (block,) = re.findall(r"^    errors → .+\n(?:    .+\n)*", text, re.MULTILINE)
    layers = [frozenset(re.findall(r"\w+", layer)) for layer in block.split("→")]
    assert layers == [layer for layer in LAYERS if layer != {"__main__"}]


# --- troubleshooting --------------------------------------------------------------------------------------------------


def test_each_code_of_a_failing_service_has_one_entry() -> None:
    headings = re.findall(r"^### (.+)$", TROUBLESHOOTING.read_text(encoding="utf-8"), re.MULTILINE)
    assert [heading for heading, times in Counter(headings).items() if times > 1] == []
    wanted = {code for code, error in BY_CODE.items() if status_of(error) in (502, 503, 504)}
    assert set(headings) == wanted


def test_each_entry_says_its_status() -> None:
    entries = re.split(r"^##+ (.+)\n", TROUBLESHOOTING.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for heading, text in zip(entries[1::2], entries[2::2], strict=True):
        if heading in BY_CODE:
            assert text.lstrip().startswith(f"Status {status_of(BY_CODE[heading])}"), heading


def log_events() -> set[str]:
    """The events that the package logs."""
    calls = (
        node
        for path in (ROOT / "kms_jwks").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args
    )
    return {
        str(call.args[0].value)
        for call in calls
        if ast.unparse(call.func) in {f"log.{level}" for level in ("info", "warning", "error", "exception")}
        and isinstance(call.args[0], ast.Constant)
    }


def test_every_code_setting_and_log_event_that_it_names_exists() -> None:
    text = re.sub(r"```.*?```", "", TROUBLESHOOTING.read_text(encoding="utf-8"), flags=re.DOTALL)
    settings = {name for found in vars(config).values() for name in getattr(found, "model_fields", ())}
    fields = {"key_set", "next_step", "request_id", "token_id"}
    # PostgreSQL's and PgBouncer's.
    others = {"max_connections", "idle_session_timeout", "default_pool_size", "pool_mode"}
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", text))
    assert named - BY_CODE.keys() - settings - log_events() - fields - others - CAUSE_NAMES == set()
    assert {"backend_lost", "database_lost", "lease_lost"} <= named
