"""Proxies of the tests' own before a server: one cuts connections or lets bytes vanish, one decodes paths."""

from __future__ import annotations

import contextlib
import http.client
import posixpath
import re
import selectors
import socket
import threading
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import quote, unquote

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


class DecodingProxy:
    """An HTTP proxy that decodes the path once, removes dot segments, merges slashes, and forwards what comes out.

    It encodes again only what cannot stand in a request line. A context manager; `url` is its address.
    """

    def __init__(self, target: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                path, mark, query = self.path.partition("?")
                plain = posixpath.normpath(re.sub("/+", "/", unquote(path)))
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                upstream = http.client.HTTPConnection("127.0.0.1", target, timeout=30)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                upstream.request(self.command, quote(plain, safe="/%+=~!$&'()*,;:@") + mark + query, body, headers)
                reply = upstream.getresponse()
                content = reply.read()
                self.send_response(reply.status)
                for name, value in reply.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                upstream.close()

            do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815 - the names of BaseHTTPRequestHandler

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
