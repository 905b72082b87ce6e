"""What all tests share: unit tests have no network, tests are marked by their folder. The end of a run prints measured
figures, the algorithms of the backends under the contract suite, the slowest tests and the time of each folder."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import structlog

from tests import postgres as servers
from tests.changed import TIMES
from tests.postgres import Postgres

TESTS = Path(__file__).parent
SLOWEST = 15
WORTH_TELLING = 60.0
"""Seconds of tests from which on a run prints its slowest tests and its folders."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder == "unit":
            item.add_marker("disable_socket")
        elif folder == "interop":
            item.add_marker("interop")


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """A command that runs in the test process configures the log; the next test finds it unconfigured."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for all tests of a pytest process. A test that stops a server makes its own."""
    with servers.running() as server:
        yield server


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Records a measured figure for the summary of the run."""
    return lambda text: record_property("figure", text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the tests measured, and how long they took."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    said = [(r, name, value) for r in reports if r.when == "call" for name, value in r.user_properties]
    figures = [f"{r.nodeid.partition('::')[2]}: {value}" for r, name, value in said if name == "figure"]
    algorithms = sorted({str(value) for _, name, value in said if name == "algorithms"})
    for title, lines in (("figures", figures), ("algorithms of the backends under the contract suite", algorithms)):
        if lines:
            terminalreporter.section(title)
            for line in lines:
                terminalreporter.write_line(line)
    _print_times(terminalreporter)


def _print_times(terminalreporter: pytest.TerminalReporter) -> None:
    """The slowest tests, and the sum of each folder; fixtures are counted with the test that made them."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid] += report.duration
    files: defaultdict[str, float] = defaultdict(float)
    for nodeid, took in seconds.items():
        files[nodeid.partition("::")[0]] += took
    _remember(terminalreporter.config, files)
    if sum(seconds.values()) < WORTH_TELLING:
        return
    terminalreporter.section(f"the {SLOWEST} slowest tests")
    for nodeid, took in sorted(seconds.items(), key=lambda item: -item[1])[:SLOWEST]:
        terminalreporter.write_line(f"{took:7.1f} s  {nodeid}")
    folders: defaultdict[str, list[float]] = defaultdict(list)
    for nodeid, took in seconds.items():
        folders["/".join(nodeid.split("/")[:2])].append(took)
    terminalreporter.section("the time of each folder")
    for folder, times in sorted(folders.items(), key=lambda item: -sum(item[1])):
        terminalreporter.write_line(f"{sum(times):7.1f} s  {len(times):5} tests  {folder}")


def _remember(config: pytest.Config, files: Mapping[str, float]) -> None:
    """Keep the seconds that each test file took at its last run, by which `./dev test --changed` chooses."""
    if config.cache is not None:
        config.cache.set(TIMES, config.cache.get(TIMES, {}) | {path: round(took, 2) for path, took in files.items()})
