"""No connection crosses a fork: SQLite's locks do not, and a child that goes on without them loses commits silently.

The locks of a file belong to a process. A child inherits the memory that says they are held, so the parent's close
finds nobody, deletes the write-ahead log, and what the child commits afterwards is in a file without a name.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Forkable(Protocol):
    """What is told of a fork, both times with GATE held."""

    def before_fork(self) -> None:
        """Close what nobody uses."""
        ...

    def in_child(self) -> None:
        """Let go of what is the parent's, without closing it."""
        ...


GATE = threading.RLock()
"""Held over a fork, and for the moment in which a connection is asked for or given back."""

_told: weakref.WeakSet[Forkable] = weakref.WeakSet()


def tell(thing: Forkable) -> None:
    """Tell `thing` of every fork of this process, for as long as it lives."""
    with GATE:
        _told.add(thing)


def _before() -> None:
    GATE.acquire()
    for thing in _told:
        thing.before_fork()


def _in_child() -> None:
    for thing in _told:
        thing.in_child()
    GATE.release()


os.register_at_fork(before=_before, after_in_parent=GATE.release, after_in_child=_in_child)
