"""The examples of README.md and docs/ run as they stand, against a service made as `./dev run` makes one.

A block whose first line is a comment with a file's name becomes that file; shell blocks run in order, in one shell, in
a folder with `var/` and `.venv/`. Only the address is replaced. A comment before a block says what is special about it:
`<!-- not run -->`, `<!-- refused: TEXT -->` for one that has to fail and say TEXT, `<!-- wait: FOR WHAT -->` for one
that works after a wait. The publish lead is made short there, by name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jwt
import pytest

from tests.integration.conftest import Server
from tests.interop.verifiers import NODE

ROOT = Path(__file__).parents[2]
ADDRESS = "http://127.0.0.1:8080"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)
FILE = re.compile(r"(?:#|//) (?P<name>[\w.-]+\.(?:py|mjs))\n")
SHORT = ("--publish-lead 24h", "--publish-lead 12s --allow-unsafe-publish-lead")
TOOLS = ("curl", "openssl", "pkcs11-tool")
"""What a machine may lack that runs the tests; blocks that need a missing one are left out."""


@dataclass(frozen=True)
class Block:
    mark: str
    language: str
    code: str

    @property
    def file(self) -> str | None:
        found = FILE.match(self.code)
        return found["name"] if found else None

    @property
    def runs(self) -> bool:
        missing = [tool for tool in TOOLS if f"{tool} " in self.code and shutil.which(tool) is None]
        return self.language == "bash" and self.mark != "not run" and not missing


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page that have a language."""
    text = page.read_text(encoding="utf-8")
    return [Block(found["mark"] or "", found["language"], found["code"]) for found in BLOCK.finditer(text)]


def script(found: list[Block], address: str) -> str:
    """One shell script of all blocks, each announced by a line `@@ NUMBER`."""
    lines = ["set -euo pipefail", "exec 2>&1"]
    for number, block in enumerate(found):
        code = block.code.replace(ADDRESS, address).replace(*SHORT)
        lines.append(f"printf '\\n@@ %s\\n' {number}")
        if block.mark.startswith("refused"):
            lines.append(f"if (\n{code}\n); then echo 'it was not refused'; exit 99; fi")
        elif block.mark.startswith("wait"):
            first = code.splitlines()[0]
            lines.append(f"for _ in $(seq 100); do {first} > /dev/null 2>&1 && break; sleep 0.2; done\n{code}")
        else:
            lines.append(code)
    return "\n".join(lines)


@pytest.fixture
def folder(tmp_path: Path, server: Server) -> Path:
    """Looks like a checkout in which `./dev run` runs."""
    (tmp_path / "var").symlink_to(server.folder)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "node_modules").symlink_to(NODE / "node_modules")
    return tmp_path


def run(page: Path, folder: Path, server: Server) -> list[tuple[Block, str]]:
    """Run a page. Every block that ran, with what it printed."""
    everything = blocks(page)
    for block in everything:
        if block.file is not None:
            (folder / block.file).write_text(block.code.replace(ADDRESS, server.url), encoding="utf-8")
    found = [block for block in everything if block.runs]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KMS_JWKS_")}
    done = subprocess.run(
        ["bash", "-c", script(found, server.url)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not_ignored(folder) == []
    said = re.split(r"^@@ \d+\n", done.stdout, flags=re.MULTILINE)[1:]
    assert len(said) == len(found)
    for block, output in zip(found, said, strict=True):
        if block.mark.startswith("refused"):
            assert block.mark.partition(": ")[2] in output, output
    return list(zip(found, said, strict=True))


def not_ignored(folder: Path) -> list[str]:
    """The files that a page's blocks made and that `git status` would show in a checkout."""
    shutil.copyfile(ROOT / ".gitignore", folder / ".gitignore")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    made = sorted(path.name for path in folder.iterdir() if not path.is_symlink() and path.name[:4] != ".git")
    done = subprocess.run(["git", "check-ignore", *made], cwd=folder, capture_output=True, text=True, check=False)
    return sorted({*made} - {*done.stdout.split()})


def answers(ran: list[tuple[Block, str]]) -> list[dict[str, object]]:
    """What curl printed; a problem document is no answer."""
    found = [json.loads(output) for block, output in ran if block.code.startswith("curl")]
    assert not any(str(answer.get("type")).startswith("urn:") for answer in found), found
    return found


def test_the_readme_works_when_it_is_pasted(folder: Path, server: Server) -> None:
    ran = run(ROOT / "README.md", folder, server)
    assert all(answer["token"] for answer in answers(ran))
    assert sum("'sub': 'alice'" in output and "sub: 'alice'" in output for _, output in ran) == 1


def test_the_api_page_works_when_it_is_pasted(folder: Path, server: Server) -> None:
    answers(run(ROOT / "docs" / "api.md", folder, server))
    token = (folder / "token").read_text(encoding="ascii").strip()
    issuer = f"{server.url}/default"
    key = jwt.PyJWKClient(f"{issuer}/.well-known/jwks.json").get_signing_key_from_jwt(token)
    assert jwt.decode(token, key, algorithms=["ES256"], issuer=issuer, audience="shop")["sub"] == "alice"


def test_the_migration_page_works_when_it_is_pasted(folder: Path, server: Server) -> None:
    ran = run(ROOT / "docs" / "migrate.md", folder, server)
    shown = [output.partition("\n{\n")[2] for block, output in ran if "kms-jwks jwks" in block.code]
    documents = [json.loads("{" + text) for text in shown]
    before, after = ({key["kid"] for key in document["keys"]} for document in documents)
    assert before - after == {"pem-2025"}
    token = (folder / "new-token").read_text(encoding="ascii").strip()
    assert jwt.get_unverified_header(token)["kid"] in after
    issuer = "https://id.example.com"
    key = jwt.PyJWKClient(f"{server.url}/login/.well-known/jwks.json").get_signing_key_from_jwt(token)
    assert jwt.decode(token, key, algorithms=["ES256"], issuer=issuer, audience="shop")["sub"] == "alice"


def test_the_page_on_adoption_works_when_it_is_pasted(folder: Path, server: Server) -> None:
    ran = run(ROOT / "docs" / "adopt.md", folder, server)
    assert "Warning: adopted although it may do more than sign." in "".join(output for _, output in ran)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_is_left_out(page: Path) -> None:
    """Pages whose examples have a test above, and pages without any."""
    tested = ("README.md", "adopt.md", "api.md", "migrate.md")
    assert page.name in tested or not any(block.runs for block in blocks(page))


def test_a_block_that_fails_fails_the_test(tmp_path: Path, folder: Path, server: Server) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\nfalse\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError):
        run(page, folder, server)
    page.write_text("<!-- refused: no -->\n```bash\ntrue\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="not refused"):
        run(page, folder, server)
