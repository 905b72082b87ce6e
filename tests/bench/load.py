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
    """What to send, byte for byte, and what has to come back. An answer that holds `never` counts as failed."""

    port: int
    request: bytes
    status: int = 200
    never: bytes = b'"error"'


@dataclass
class Load:
    """What one run measured. Latencies in seconds, sorted; `busy` is the generators' own CPU time over wall time."""

    seconds: float
    requests: int
    failed: int
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
    """Send for `seconds` over `connections` in each of `processes`. Raises RuntimeError when nothing good came back."""
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
    load = Load(
        seconds=sum(part.seconds for part in parts) / len(parts),
        requests=sum(len(part.latencies) for part in parts),
        failed=sum(part.failed for part in parts),
        latencies=sorted(latency for part in parts for latency in part.latencies),
        samples=[sample for part in parts for sample in part.samples],
        busy=sum(part.cpu for part in parts) / sum(part.seconds for part in parts),
    )
    if load.failed or not load.requests:
        said = next((part.complaint for part in parts if part.complaint), b"no answer")
        raise RuntimeError(f"{load.failed} of {load.failed + load.requests} answers were not good: {said[:500]!r}")
    return load


# --- one generator ----------------------------------------------------------------------------------------------------


@dataclass
class _Part:
    seconds: float
    cpu: float
    failed: int
    complaint: bytes
    latencies: array[float]
    samples: list[bytes]


@dataclass
class _Line:
    """One connection and what it has received of the answer it waits for."""

    socket: socket.socket
    sent: float = 0.0
    received: bytearray = field(default_factory=bytearray)
    wanted: int = 0
    """Length of the whole answer once its head is there, else 0."""
    body: bytes = b""


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
    status = f"HTTP/1.1 {target.status} ".encode("ascii")
    latencies: array[float] = array("d")
    failed, complaint = 0, b""
    for line in lines:
        line.sent = clock()
        line.socket.sendall(target.request)
    begin, end = clock() + WARM_UP, clock() + WARM_UP + seconds
    cpu = time.process_time()
    now = clock()
    try:
        while now < end and len(latencies) + failed < MOST_REQUESTS:
            ready = selector.select(PATIENCE)
            if not ready:
                raise TimeoutError(f"no answer came within {PATIENCE:.0f} s")
            for key, _ in ready:
                line = key.data
                if not _take(line):
                    continue
                now = clock()
                if not line.received.startswith(status) or target.never in line.received:
                    failed, complaint = failed + 1, bytes(line.received)
                elif now >= begin:
                    latencies.append(now - line.sent)
                line.received.clear()
                line.wanted = 0
                if now < end:
                    line.sent = now
                    line.socket.sendall(target.request)
            now = clock()
    except OSError as error:
        failed, complaint = failed + 1, str(error).encode()
    return _Part(
        seconds=max(now - begin, 1e-9),
        cpu=time.process_time() - cpu,
        failed=failed,
        complaint=complaint,
        latencies=latencies,
        samples=[line.body for line in lines if line.body],
    )


def _take(line: _Line) -> bool:
    """Read what is there; whether the answer is whole."""
    chunk = line.socket.recv(262_144)
    if not chunk:
        raise ConnectionError("the service closed a connection")
    line.received += chunk
    if not line.wanted:
        head = line.received.find(b"\r\n\r\n")
        if head < 0:
            return False
        line.wanted = head + 4 + _content_length(bytes(line.received[:head]))
    if len(line.received) < line.wanted:
        return False
    line.body = bytes(line.received[line.received.find(b"\r\n\r\n") + 4 :])
    return True


def _content_length(head: bytes) -> int:
    if head.startswith((b"HTTP/1.1 304", b"HTTP/1.1 204")):
        return 0
    lower = head.lower()
    found = lower.find(b"\r\ncontent-length:")
    if found < 0:
        raise RuntimeError(f"an answer without a length: {head!r}")
    return int(lower[found + 17 :].split(b"\r\n", 1)[0])
