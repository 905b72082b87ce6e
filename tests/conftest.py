"""What every test shares: unit tests have no network, and tests are marked by the folder they are in."""

from collections.abc import Iterator
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
