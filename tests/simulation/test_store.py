"""The registry that simulations use keeps the store's contract, but for what only a database has."""

from __future__ import annotations

import pytest

from kms_jwks.store import Store
from tests.contract.store_suite import StoreContract
from tests.simulation.store import MemoryStore, Registry
from tests.unit.builders import T0


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:  # nothing to close
        return MemoryStore(Registry(lambda: T0))

    # Processes, disks, schemas, references and writers that wait for each other: there are none of them here.
    test_a_row_needs_what_it_refers_to = None  # type: ignore[assignment]
    test_an_upgrade_of_what_is_up_to_date_changes_nothing = None  # type: ignore[assignment]
    test_processes_wait_for_each_other_and_share_no_connection = None  # type: ignore[assignment]
    test_what_was_committed_survives_a_kill_and_what_was_not_leaves_no_half = None  # type: ignore[assignment]
    test_a_writer_that_is_killed_leaves_nothing = None  # type: ignore[assignment]
    test_writers_wait_for_each_other = None  # type: ignore[assignment]
