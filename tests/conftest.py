"""What every test shares: unit tests have no network, tests are marked by their folder; figures, and the algorithms of
the backends under the contract suite, come at the end."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import postgres as servers
from tests.postgres import Postgres

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder == "unit":
            item.add_marker("disable_socket")
        elif folder == "interop":
            item.add_marker("interop")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for all tests of a pytest process; whoever stops it has one of their own."""
    with servers.running() as server:
        yield server


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Says a measured figure, which stands in the summary of the whole run."""
    return lambda text: record_property("figure", text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests measured, and the algorithms of the backends under the contract suite."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    said = [(r, name, value) for r in reports if r.when == "call" for name, value in r.user_properties]
    figures = [f"{r.nodeid.partition('::')[2]}: {value}" for r, name, value in said if name == "figure"]
    algorithms = sorted({str(value) for _, name, value in said if name == "algorithms"})
    for title, lines in (("figures", figures), ("algorithms of the backends under the contract suite", algorithms)):
        if lines:
            terminalreporter.section(title)
            for line in lines:
                terminalreporter.write_line(line)
