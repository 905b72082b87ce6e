"""A TCP proxy of the tests' own before a server: it cuts connections, or lets every byte vanish without a word."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import weakref
from typing import Self

_CHUNK = 65_536


class Proxy:
    """Listens on `port` of the loopback and forwards to `target`. One thread; a context manager."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.requests = 0
        """How often something came from the client's side."""
        self._wake, self._woken = socket.socketpair()
        self._lock = threading.Lock()
        self._peers: dict[socket.socket, socket.socket] = {}
        self._clients: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._forgotten: list[socket.socket] = []
        self._frozen = False
        self._refusing = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closing = True
        self._nudge()
        self._thread.join()
        self._drop([*self._peers, *self._forgotten])
        for each in (self._listener, self._wake, self._woken):
            each.close()

    # --- faults

    def cut(self) -> None:
        """Every connection ends with a reset, and none is made until `mend`."""
        with self._lock:
            self._refusing = True
            cut, self._peers = list(self._peers), {}
        self._drop(cut, reset=True)
        self._nudge()

    def redirect(self, target: int) -> None:
        """Forward to another port, also for those that are connected: their connections end with a reset."""
        self.cut()
        self._target = target
        self.mend()

    def mend(self) -> None:
        """Forward again."""
        with self._lock:
            self._refusing = False

    def freeze(self) -> None:
        """Bytes vanish from now on, in both directions; connections stay, new ones are accepted and never answered."""
        with self._lock:
            self._frozen = True
        self._nudge()

    def thaw(self, *, old_ones: bool = True) -> None:
        """Forward again, also what was held back; without `old_ones`, connections of before stay silent for ever."""
        with self._lock:
            self._frozen = False
            if not old_ones:
                self._forgotten += self._peers
                self._peers = {}
        self._nudge()

    # --- forwarding

    def _nudge(self) -> None:
        with contextlib.suppress(OSError):
            self._wake.send(b".")

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._closing:
                    return
                frozen, peers = self._frozen, dict(self._peers)
            with selectors.DefaultSelector() as selector:
                selector.register(self._woken, selectors.EVENT_READ)
                if not frozen:
                    for end in (self._listener, *peers):
                        with contextlib.suppress(ValueError, KeyError):  # cut meanwhile
                            selector.register(end, selectors.EVENT_READ)
                ready = [key.fileobj for key, _ in selector.select()]
            for each in ready:
                assert isinstance(each, socket.socket)
                if each is self._woken:
                    each.recv(_CHUNK)
                elif each is self._listener:
                    self._accept()
                else:
                    self._forward(each)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        with self._lock:
            refusing = self._refusing
        if refusing:
            self._drop([client], reset=True)
            return
        try:
            server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
        except OSError:
            self._drop([client], reset=True)
            return
        server.settimeout(None)
        with self._lock:
            self._peers |= {client: server, server: client}
            self._clients.add(client)

    def _forward(self, source: socket.socket) -> None:
        with self._lock:
            target = self._peers.get(source)
            if target is None or self._frozen:
                return
            self.requests += source in self._clients
        try:
            data = source.recv(_CHUNK)
            if data:
                target.sendall(data)
                return
        except OSError:
            pass
        with self._lock:
            self._peers.pop(source, None)
            self._peers.pop(target, None)
        self._drop([source, target])

    def _drop(self, sockets: list[socket.socket], *, reset: bool = False) -> None:
        for each in sockets:
            with contextlib.suppress(OSError):
                if reset:
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                each.close()
