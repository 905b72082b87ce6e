"""Imports go one way, and each third party has one home. The map of the house is in CONTRIBUTING.md."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "kms_jwks"

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(layer.split())
    for layer in (
        "errors",
        "algorithms",
        "model",
        "strictjson issuers",
        "times jose",
        "timeline exposure profiles access wire verification",
        "config",
        "backends store audit authn",
        "worker",
        "custodian",
        "service",
        "doctor",
        "http console client",
        "wiring",  # puts everything together, so only what starts a process stands above it
        "cli",
        "__main__",
    )
)
"""A module or folder may import itself and what stands in an earlier line; those of one line know nothing of each
other."""

ONLY = {
    "config": frozenset({"errors", "model", "issuers"}),
    "client": frozenset({"errors", "wire"}),  # issuers use it: it must not draw the service in
}
"""Units that may import less than their layer would allow."""

HOMES = {
    "alembic": ("store",),
    "boto3": ("backends/aws_kms",),
    "botocore": ("backends/aws_kms",),
    "click": ("cli",),
    "flask": ("http", "console"),
    "gunicorn": ("http",),
    "pkcs11": ("backends/pkcs11",),
    "pydantic": ("config.py",),
    "pydantic_settings": ("config.py",),
    "rich": ("cli",),
    "sqlalchemy": ("store",),
    "urllib3": ("client",),
    "werkzeug": ("http", "console"),
}
"""Where in the package a third party may be imported."""

RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}


def imported(tree: ast.AST, module: PurePosixPath) -> Iterator[str]:
    """Every dotted name that a module imports, wherever in it; relative ones made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (PACKAGE, *module.parts)[: -node.level] if node.level else ()
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def violations(source: str, path: str) -> list[str]:
    """What a module at `path` (below the package) imports and must not."""
    module = PurePosixPath(path)
    if path == "__init__.py":
        return [f"{path} imports {name}" for name in imported(ast.parse(source), module)]
    unit = module.parts[0].removesuffix(".py")
    if unit not in RANK:
        return [f"{path}: {unit} has no place in LAYERS"]
    found = []
    for name in imported(ast.parse(source), module):
        top, *rest = name.split(".")
        if top == PACKAGE:
            # `from kms_jwks import __version__` names no module of ours
            target = rest[0] if rest and rest[0] in RANK else unit
            allowed = RANK[target] < RANK[unit] and target in ONLY.get(unit, RANK)
            if target != unit and not allowed:
                found.append(f"{path} imports {name}")
        elif top in HOMES and not any(module.is_relative_to(home) for home in HOMES[top]):
            found.append(f"{path} imports {name}")
    return found


def modules() -> list[str]:
    package = ROOT / PACKAGE
    return sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py"))


@pytest.mark.parametrize("path", modules())
def test_imports_go_one_way(path: str) -> None:
    assert violations((ROOT / PACKAGE / path).read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("errors.py", "from kms_jwks import model"),
        ("model.py", "from kms_jwks.jose import thumbprint"),
        ("timeline/plan.py", "import kms_jwks.profiles"),
        ("config.py", "from kms_jwks.timeline import plan"),
        ("config.py", "from kms_jwks.access import Role"),
        ("store/registry.py", "from kms_jwks.backends import base"),
        ("store/registry.py", "from ..service import keys"),
        ("store/registry.py", "from .. import service"),
        ("service/keys.py", "from kms_jwks.http.app import create_app"),
        ("service/keys.py", "def late():\n    from kms_jwks.cli import main"),
        ("http/app.py", "from kms_jwks.wiring import wsgi"),
        ("http/app.py", "from kms_jwks.client import Client"),
        ("client/__init__.py", "from kms_jwks.jose import b64u_encode"),
        ("service/keys.py", "import flask"),
        ("service/keys.py", "from sqlalchemy.orm import Session"),
        ("backends/base.py", "import pkcs11"),
        ("backends/pkcs11/backend.py", "import boto3"),
        ("http/app.py", "import click"),
        ("helpers.py", ""),
        ("__init__.py", "from kms_jwks import errors"),
    ],
)
def test_a_violation_is_found(path: str, source: str) -> None:
    assert violations(source, path) != []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model.py", "from kms_jwks import errors, algorithms"),
        ("profiles.py", "from kms_jwks.jose import b64u_encode"),
        ("client/api.py", "import urllib3\nfrom kms_jwks import __version__, errors, wire"),
        ("cli/__init__.py", "from kms_jwks.wiring import wsgi\nfrom kms_jwks.client import Client\nimport click"),
        ("store/registry.py", "from . import tables\nfrom ..model import Key\nimport sqlalchemy as sa"),
        ("backends/pkcs11/backend.py", "import pkcs11\nfrom pkcs11.exceptions import PKCS11Error"),
        ("backends/aws_kms/connection.py", "import boto3"),
        ("__main__.py", "from kms_jwks.cli import main"),
    ],
)
def test_what_is_allowed_is_not_called_a_violation(path: str, source: str) -> None:
    assert violations(source, path) == []


# --- circles ----------------------------------------------------------------------------------------------------------


def run_imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements that run: of the module and of its functions, without those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from (found for other in node.orelse for found in run_imports(ast.Module([other], [])))
        else:
            yield from run_imports(node)


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """File → the files of the package that its imports name; paths are relative to the package.

    `from package import name` names the file of `name` where it is a module, and otherwise the package's `__init__.py`.
    """

    def file_of(dotted: str) -> str | None:
        top, *rest = dotted.split(".")
        below = "/".join(rest)
        candidates = (f"{below}.py", f"{below}/__init__.py" if below else "__init__.py")
        return next((path for path in candidates if top == PACKAGE and path in sources), None)

    graph: dict[str, set[str]] = {}
    for path, source in sources.items():
        found = graph[path] = set[str]()
        for node in run_imports(ast.parse(source)):
            if isinstance(node, ast.Import):
                found.update(filter(None, (file_of(alias.name) for alias in node.names)))
                continue
            base = ".".join([PACKAGE, *PurePosixPath(path).parts][: -node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found.update(filter(None, (file_of(f"{module}.{alias.name}") or file_of(module) for alias in node.names)))
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of files of which each reaches every other one by imports, and the files that import themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        queue = list(graph[start])
        while queue:
            path = queue.pop()
            if path not in seen:
                seen.add(path)
                queue.extend(graph[path])
        return seen

    reach = {path: reached(path) for path in graph}
    groups = {
        frozenset(other for other in reach[path] if path in reach[other]) for path in graph if path in reach[path]
    }
    return sorted(sorted(group) for group in groups)


def test_no_files_import_each_other_in_a_circle() -> None:
    package = ROOT / PACKAGE
    graph = import_graph({path: (package / path).read_text(encoding="utf-8") for path in modules()})
    assert circles(graph) == []


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"a.py": "from kms_jwks import b", "b.py": "import kms_jwks.a"}, [["a.py", "b.py"]]),
        ({"a.py": "from kms_jwks.b import x", "b.py": "def late():\n    from kms_jwks.a import y"}, [["a.py", "b.py"]]),
        (
            {"p/a.py": "from . import b", "p/b.py": "from ..c import x", "c.py": "from kms_jwks.p.a import y"},
            [["c.py", "p/a.py", "p/b.py"]],
        ),
        (
            {"p/__init__.py": "from kms_jwks.p.a import X", "p/a.py": "from kms_jwks.p import X"},
            [["p/__init__.py", "p/a.py"]],
        ),
        ({"a.py": "import kms_jwks.a"}, [["a.py"]]),
        ({"a.py": "from kms_jwks import b", "b.py": "if TYPE_CHECKING:\n    from kms_jwks.a import Y"}, []),
        ({"p/__init__.py": "from kms_jwks.p.a import X", "p/a.py": "from kms_jwks.p import b", "p/b.py": ""}, []),
        ({"a.py": "import b\nfrom kms_jwks import c, d", "b.py": "", "c.py": "from kms_jwks import d", "d.py": ""}, []),
    ],
)
def test_circles_are_found_and_nothing_else(sources: dict[str, str], found: list[list[str]]) -> None:
    assert circles(import_graph(sources)) == found


# --- what a serving process loads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["kms_jwks.wiring", "kms_jwks.http.app", "kms_jwks.client"])
def test_a_process_imports_only_what_it_needs(module: str) -> None:
    """Migrations, commands and vendors' modules cost memory and start-up time of every worker and of the custodian."""
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded
    unneeded = {"alembic", "boto3", "botocore", "gunicorn", "pkcs11", "psycopg"}
    unneeded |= {"click"} if "http" not in module else set()  # Flask imports it
    assert unneeded.isdisjoint(loaded)
