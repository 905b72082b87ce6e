"""What every test shares: unit tests have no network, tests are marked by the folder they are in, and the contract
suite's backends are listed at the end with their algorithms."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder == "unit":
            item.add_marker("disable_socket")
        elif folder == "interop":
            item.add_marker("interop")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lists = {
        str(value)
        for report in terminalreporter.stats.get("passed", [])
        for name, value in getattr(report, "user_properties", [])
        if name == "algorithms"
    }
    if lists:
        terminalreporter.section("algorithms of the backends under the contract suite")
        for line in sorted(lists):
            terminalreporter.write_line(line)
