"""The contract suite against the backend in memory that other tests stand on."""

import functools
from collections.abc import Mapping

import pytest

from tests.contract.suite import BackendContract, Factory
from tests.memory_backend import MemoryBackend


class TestMemory(BackendContract):
    left_out: Mapping[str, str] = {
        "test_processes_see_each_others_keys_come_and_go": "its keys are in the memory of one process",
    }

    @pytest.fixture(scope="class")
    @classmethod
    def factory(cls) -> Factory:
        return functools.partial(MemoryBackend, keys={})


def test_one_thing_is_left_out() -> None:
    assert TestMemory.left_out.keys() == {"test_processes_see_each_others_keys_come_and_go"}
