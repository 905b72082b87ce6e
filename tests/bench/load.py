"""A load generator that costs little: one thread a process, many keep-alive connections, one fixed request.

Closed loop: a connection sends its next request when it has the answer to the last. Bounded in time and in number.
"""

from __future__ import annotations

import multiprocessing
import selectors
import socket
import time
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.synchronize import Barrier

WARM_UP = 0.3
"""Seconds before the counting begins."""
PATIENCE = 10.0
"""Seconds an answer may take, and a generator may need to start, before the run is given up."""
MOST_REQUESTS = 2_000_000


@dataclass(frozen=True)
class Target:
    """What to send, byte for byte, and what has to come back. An answer that holds `never` is not good."""

    port: int
    request: bytes
    status: int = 200
    never: bytes = b'"error"'

    def complaint(self, line: _Line) -> bytes:
        """The answer, where it is not the one that has to come; else nothing."""
        good = line.received.startswith(f"HTTP/1.1 {self.status} ".encode("ascii")) and self.never not in line.received
        return b"" if good else bytes(line.received)


@dataclass
class Load:
    """What one run measured. Latencies in seconds, sorted; `busy` is the generators' own CPU time over wall time."""

    seconds: float
    requests: int
    latencies: list[float]
    samples: list[bytes]
    """The last answer's body of every connection."""
    busy: float

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return self.requests / self.seconds

    def percentile(self, share: float) -> float:
        """Milliseconds within which `share` of the answers came."""
        return self.latencies[min(int(len(self.latencies) * share), len(self.latencies) - 1)] * 1000


def request(method: str, path: str, port: int, headers: dict[str, str], body: bytes = b"") -> bytes:
    """A whole HTTP/1.1 request."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", *(f"{k}: {v}" for k, v in headers.items())]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body


def run(target: Target, *, seconds: float, processes: int, connections: int) -> Load:
    """Send for `seconds` over `connections` in each of `processes`. Raises RuntimeError at a bad answer."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes + 1)
    pipes = [context.Pipe(duplex=False) for _ in range(processes)]
    workers = [
        context.Process(target=_generate, args=(target, seconds, connections, barrier, writer), daemon=True)
        for _, writer in pipes
    ]
    for worker in workers:
        worker.start()
    for _, writer in pipes:
        writer.close()
    try:
        barrier.wait(PATIENCE * 3)
        parts: list[_Part] = [_receive(reader, seconds) for reader, _ in pipes]
    finally:
        for worker in workers:
            worker.join(PATIENCE)
            if worker.is_alive():
                worker.kill()
    complaint = next((part.complaint for part in parts if part.complaint), None)
    if complaint is not None:
        raise RuntimeError(f"the load was broken off: {complaint[:500]!r}")
    return Load(
        seconds=sum(part.seconds for part in parts) / len(parts),
        requests=sum(len(part.latencies) for part in parts),
        latencies=sorted(latency for part in parts for latency in part.latencies),
        samples=[sample for part in parts for sample in part.samples],
        busy=sum(part.cpu for part in parts) / sum(part.seconds for part in parts),
    )


# --- one generator ----------------------------------------------------------------------------------------------------


@dataclass
class _Part:
    seconds: float
    cpu: float
    complaint: bytes
    latencies: array[float]
    samples: list[bytes]


@dataclass
class _Line:
    """One connection, and what it has received of the answer it waits for."""

    socket: socket.socket
    sent: float = 0.0
    received: bytearray = field(default_factory=bytearray)
    head: int = 0
    """Length of the head, blank line included, once it is there."""
    wanted: int = 0
    """Length of the whole answer once its head is there."""

    @property
    def body(self) -> bytes:
        return bytes(self.received[self.head :])

    def send(self, request: bytes) -> None:
        self.received.clear()
        self.head = self.wanted = 0
        self.sent = time.perf_counter()
        self.socket.sendall(request)

    def take(self) -> bool:
        """Read what is there; whether the answer is whole."""
        chunk = self.socket.recv(262_144)
        if not chunk:
            raise ConnectionError("the service closed a connection")
        self.received += chunk
        if not self.wanted:
            end = self.received.find(b"\r\n\r\n")
            if end < 0:
                return False
            self.head = end + 4
            self.wanted = self.head + _content_length(bytes(self.received[:end]))
        return len(self.received) >= self.wanted


def _receive(reader: Connection, seconds: float) -> _Part:
    if not reader.poll(seconds + PATIENCE * 2):
        raise RuntimeError("a load generator did not finish")
    try:
        part: _Part = reader.recv()
    except EOFError:
        raise RuntimeError("a load generator died; its last words are above") from None
    return part


def _generate(target: Target, seconds: float, connections: int, barrier: Barrier, out: Connection) -> None:
    lines = [_Line(socket.create_connection(("127.0.0.1", target.port), PATIENCE)) for _ in range(connections)]
    with selectors.DefaultSelector() as selector:
        for line in lines:
            line.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(line.socket, selectors.EVENT_READ, line)
        barrier.wait(PATIENCE * 3)
        out.send(_loop(target, seconds, lines, selector))
    for line in lines:
        line.socket.close()
    out.close()


def _loop(target: Target, seconds: float, lines: list[_Line], selector: selectors.BaseSelector) -> _Part:
    clock = time.perf_counter
    latencies: array[float] = array("d")
    cpu, begin = time.process_time(), clock() + WARM_UP
    end, counted, waiting, complaint = begin + seconds, 0.0, len(lines), b""
    samples: list[bytes] = []
    try:
        for line in lines:
            line.send(target.request)
        # At least one answer is counted, and the last ones are waited for: they are no load for what comes next.
        while waiting and not complaint:
            ready = selector.select(PATIENCE)
            if not ready:
                complaint = b"no answer came in time"
            for key, _ in ready:
                line = key.data
                if not line.take():
                    continue
                now = clock()
                complaint = complaint or target.complaint(line)
                if now >= begin and (now < end or not latencies):
                    latencies.append(now - line.sent)
                    counted = now
                if now < end and len(latencies) < MOST_REQUESTS:
                    line.send(target.request)
                else:
                    waiting -= 1
                    samples.append(line.body)
    except OSError as error:
        complaint = str(error).encode()
    return _Part(max(end, counted) - begin, time.process_time() - cpu, complaint, latencies, samples)


def _content_length(head: bytes) -> int:
    if head.startswith((b"HTTP/1.1 304", b"HTTP/1.1 204")):
        return 0
    lower = head.lower()
    found = lower.find(b"\r\ncontent-length:")
    if found < 0:
        raise ConnectionError(f"an answer without a length: {head!r}")
    return int(lower[found + 17 :].split(b"\r\n", 1)[0])
