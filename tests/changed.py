"""The test files for `./dev test --changed`: `python -m tests.changed` prints them, and says on standard error what it
left out.

Changed are the files that differ from the merge base with main, or from HEAD on main itself, and the untracked ones. A
test file concerns them when it is one of them, or when it imports one, at whatever remove, by the imports that the
source code states; for a changed file that is not Python, when its text holds that file's name. Nearest first, until
the time is used up. Tests that start processes (integration, interop, faults, bench) import little of what they test:
they are taken only when they were changed themselves.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 90.0
"""Of test time, which two pytest processes share."""
USUAL_SECONDS = {"unit": 1.0, "simulation": 3.0, "vectors": 4.0, "model": 6.0, "contract": 6.0, "service": 6.0}
"""For a file that has not run here yet, by its folder; 15 s in others."""
WITH_PROCESSES = frozenset({"integration", "interop", "faults", "bench"})
TIMES = "kms-jwks/seconds"
"""Where pytest's cache keeps how long each test file took; tests/conftest.py writes it."""


def changed_files() -> set[str]:
    """Paths below the root."""
    base = _git("merge-base", "HEAD", "main", check=False) or ["HEAD"]
    tracked = _git("diff", "--name-only", "--no-renames", base[0])
    return {*tracked, *_git("ls-files", "--others", "--exclude-standard")}


def _git(*words: str, check: bool = True) -> list[str]:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        sys.exit(f"dev: error: git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def import_graph() -> dict[str, set[str]]:
    """For each Python file of the package and of the tests, the files that it imports; conftest.py counts as one."""
    paths = [path for folder in ("kms_jwks", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    modules = {_module(path): _name(path) for path in paths}
    graph = {}
    for path in paths:
        found = {modules[name] for name in _imports(path) if name in modules}
        if path.name.startswith("test_"):
            found |= {_name(up / "conftest.py") for up in path.parents if (up / "conftest.py").exists()}
        graph[_name(path)] = found
    return graph


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path) -> Iterator[str]:
    """Dotted names; those that only a type checker imports are left out."""
    package = _module(path).split(".") if path.name == "__init__.py" else _module(path).split(".")[:-1]
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes += ast.iter_child_nodes(node)


def distances(changed: set[str], graph: Mapping[str, set[str]]) -> dict[str, int]:
    """For each file that imports a changed one, over how many others; 0 for a changed file itself."""
    importers: dict[str, set[str]] = {}
    for path, imported in graph.items():
        for each in imported:
            importers.setdefault(each, set()).add(path)
    found = dict.fromkeys(changed & graph.keys(), 0)
    edge = list(found)
    while edge:
        nearer, edge = edge, []
        for path in nearer:
            for importer in importers.get(path, set()) - found.keys():
                found[importer] = found[path] + 1
                edge.append(importer)
    others = {Path(path).name for path in changed if not path.endswith(".py")}
    for path in graph:
        if _is_test(path) and any(name in (ROOT / path).read_text(encoding="utf-8") for name in others):
            found[path] = min(found.get(path, 1), 1)
    return found


def _is_test(path: str) -> bool:
    return path.startswith("tests/") and Path(path).name.startswith("test_")


def chosen(found: Mapping[str, int], seconds: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """The test files to run, and those that there is no time for."""
    tests = [path for path in found if _is_test(path)]
    tests = [path for path in tests if found[path] == 0 or path.split("/")[1] not in WITH_PROCESSES]
    run, left, used = [], [], 0.0
    expected = {path: seconds.get(path, USUAL_SECONDS.get(path.split("/")[1], 15.0)) for path in tests}
    for path in sorted(tests, key=lambda path: (found[path], expected[path], path)):
        took = expected[path]
        if found[path] == 0 or used + took <= SECONDS:
            run.append(path)
            used += took
        else:
            left.append(path)
    return run, left


def main() -> None:
    """Print the files to run, one a line."""
    changed = changed_files()
    found = distances(changed, import_graph())
    cache = ROOT / ".pytest_cache" / "v" / TIMES
    run, left = chosen(found, json.loads(cache.read_text()) if cache.exists() else {})
    aside = sum(_is_test(path) and path.split("/")[1] in WITH_PROCESSES and path not in run for path in found)
    print(f"dev: {len(changed)} files changed, {len(run)} test files run", file=sys.stderr)
    if left or aside:
        print(
            f"dev: left out: {aside} test files that start processes, {len(left)} for lack of time"
            f"{': ' * bool(left)}{' '.join(sorted(path.removeprefix('tests/') for path in left))}",
            file=sys.stderr,
        )
    print("\n".join(run))


if __name__ == "__main__":
    main()
