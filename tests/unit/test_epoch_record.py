"""The record of the highest confirmed epoch: it survives the process, is never taken back, and fails closed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import structlog.testing

from kms_jwks import errors
from kms_jwks.model import Epoch
from kms_jwks.worker.epoch_record import EpochRecord


def epoch(counter: int, link: str = "ab") -> Epoch:
    return Epoch("incarnation", counter, link)


@pytest.fixture
def record(tmp_path: Path) -> EpochRecord:
    return EpochRecord(tmp_path / "state")


def held(record: EpochRecord) -> Epoch | None:
    """What a process that starts now reads."""
    return EpochRecord(record.file.parent).load()


def test_it_outlives_the_process(record: EpochRecord) -> None:
    assert record.load() is None
    assert record.advance(None, epoch(1))
    assert record.advance(epoch(1), epoch(2, "cd"))
    found = held(record)
    assert found is not None
    assert found.is_same(epoch(2, "cd"))
    assert record.file.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in record.file.parent.iterdir()) == ["epoch.json", "epoch.lock"]


@pytest.mark.parametrize("known", [None, epoch(1), epoch(2, "other"), epoch(3)])
def test_it_moves_only_from_the_epoch_that_was_checked(record: EpochRecord, known: Epoch | None) -> None:
    """Another process has recorded something else meanwhile: the caller reads the registry again."""
    record.advance(None, epoch(2))
    assert not record.advance(known, epoch(5))
    assert held(record) == epoch(2)
    assert record.advance(known, epoch(2)), "what is recorded already needs no second look"


def test_an_operator_may_replace_it(record: EpochRecord) -> None:
    record.advance(None, epoch(9))
    EpochRecord(record.file.parent).replace(epoch(3))
    assert record.load() == epoch(3)


def test_a_file_that_is_removed_is_not_forgotten_by_a_process_that_runs(record: EpochRecord) -> None:
    record.advance(None, epoch(2))
    record.file.unlink()
    assert record.load() == epoch(2)
    assert record.advance(epoch(2), epoch(2))
    assert held(record) == epoch(2)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b'{"incarnation":"a","counter":"1","link":"b"}',
        b'{"counter":1}',
        b'{"incarnation":"\xff","counter":1,"link":"b"}',
    ],
)
def test_a_damaged_file_is_believed_by_nobody(record: EpochRecord, content: bytes) -> None:
    record.advance(None, epoch(2))
    record.file.write_bytes(content)
    for use in (record.load, lambda: held(record), lambda: record.advance(epoch(2), epoch(3))):
        with pytest.raises(errors.StoreUnavailable, match="is damaged") as refused:
            use()
        assert "--accept" in refused.value.next_step
    assert record.file.read_bytes() == content


def test_a_file_that_cannot_be_read_is_no_missing_one(record: EpochRecord) -> None:
    record.file.mkdir(parents=True)
    with pytest.raises(errors.StoreUnavailable, match="cannot be read: Is a directory"):
        record.load()


def test_what_cannot_be_written_is_remembered_and_written_later(record: EpochRecord) -> None:
    record.advance(None, epoch(1))
    lock = record.file.with_suffix(".lock")
    lock.unlink()
    lock.mkdir()
    with structlog.testing.capture_logs() as logs:
        for known, reached in ((1, 2), (2, 3), (3, 3)):
            with pytest.raises(errors.StoreUnavailable, match="cannot be written: Is a directory"):
                record.advance(epoch(known), epoch(reached))
            assert record.unwritten
            assert record.load() == epoch(reached)
            assert held(record) == epoch(1)
        lock.rmdir()
        assert record.advance(epoch(3), epoch(3))
    assert not record.unwritten
    assert held(record) == epoch(3)
    assert [line["event"] for line in logs] == ["epoch_not_recorded", "epoch_recorded_again"]


def test_what_another_process_could_write_counts(record: EpochRecord) -> None:
    record.advance(None, epoch(1))
    lock = record.file.with_suffix(".lock")
    lock.unlink()
    lock.mkdir()
    with pytest.raises(errors.StoreUnavailable):
        record.advance(epoch(1), epoch(2))
    lock.rmdir()
    EpochRecord(record.file.parent).advance(epoch(1), epoch(3))
    assert record.load() == epoch(3)
    assert not record.advance(epoch(2), epoch(2))


def test_processes_that_race_take_nothing_back(record: EpochRecord) -> None:
    record.advance(None, epoch(0))
    moved: list[int] = []

    def race() -> None:
        own = EpochRecord(record.file.parent)
        for _ in range(30):
            known = own.load()
            assert known is not None
            if own.advance(known, epoch(known.counter + 1, threading.current_thread().name)):
                moved.append(known.counter + 1)

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = held(record)
    assert found is not None
    assert sorted(moved) == list(range(1, found.counter + 1)), "each step was made once"
