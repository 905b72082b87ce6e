"""What every test shares: unit tests have no network, and tests are marked by the folder they are in."""

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
    lines = [
        f"{report.nodeid.partition('::')[2]}: {value}"
        for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
        for name, value in report.user_properties
        if name == "figure" and report.when == "call"
    ]
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)
