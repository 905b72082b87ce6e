"""`./dev bench`: signatures a second of the module and of the service over HTTP, and their ratios, in one run.

Also what hostile JSON costs (parser.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jwt

from tests.bench import load, module, parser
from tests.bench.service import KEY, make_key_set, throwaway, wait_for_standby
from tests.integration.conftest import Server

BATCH = 64
CLAIMS = {"sub": "alice", "aud": "bench", "scope": "read write"}


@dataclass(frozen=True)
class Row:
    """One kind of key."""

    name: str
    alg: str
    rsa_bits: int | None = None

    @property
    def slug(self) -> str:
        return self.name.lower()


ROWS = (
    Row("ES256", "ES256"),
    Row("RS256-2048", "RS256", 2048),
    Row("RS256-3072", "RS256", 3072),
    Row("EdDSA", "EdDSA"),
)


@dataclass(frozen=True)
class Options:
    """How long and how wide."""

    seconds: float
    rows: tuple[Row, ...]
    workers: int
    processes: int
    connections: int
    say: Callable[[str], None]

    @property
    def batch_connections(self) -> int:
        """Two for each worker: a batch keeps one busy for long enough."""
        return 2 * self.workers


def main(arguments: list[str] | None = None) -> int:
    """The command line. Exit code 0 when every figure could be measured and every checked signature was right."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the service is stopped too
    parsed = _parser().parse_args(arguments)
    seconds = parsed.seconds if parsed.seconds is not None else 0.3 if parsed.quick else 3.0
    processes = max(1, min(4, parsed.workers // 2))
    options = Options(
        seconds=min(max(seconds, 0.1), 30.0),
        rows=chosen_rows(parsed.only),
        workers=parsed.workers,
        processes=processes,
        connections=parsed.connections,
        say=lambda text: print(f"bench: {text}", file=sys.stderr, flush=True),
    )
    report = measure(options)
    print(json.dumps(report, indent=2) if parsed.json else table(report))
    return 0


def chosen_rows(names: list[str] | None) -> tuple[Row, ...]:
    """The kinds of keys with these names; all where none is named."""
    return tuple(row for row in ROWS if names is None or row.name in names)


def _parser() -> argparse.ArgumentParser:
    cpus = os.cpu_count() or 1
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__)
    parser.add_argument("--seconds", type=float, help="seconds for each figure (3; at most 30)")
    parser.add_argument("--workers", type=_positive, default=cpus, help="processes that sign (the number of CPUs)")
    parser.add_argument("--connections", type=_positive, default=16, help="keep-alive connections in all (16)")
    parser.add_argument(
        "--only", action="append", choices=[row.name for row in ROWS], help="this kind of key; repeatable"
    )
    parser.add_argument("--quick", action="store_true", help="0.3 s a figure: whether it works, not how fast")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def _positive(text: str) -> int:
    if not 1 <= (value := int(text)) <= 256:
        raise argparse.ArgumentTypeError("1 to 256")
    return value


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(options: Options) -> dict[str, Any]:
    """Start a service, measure everything, stop it."""
    began, busy = time.monotonic(), os.getloadavg()[0]
    if busy > 0.5:
        options.say(f"this machine is busy already (load {busy:.1f}): expect too little")
    options.say(f"starting a service with {options.workers} workers on a SoftHSM token of its own")
    with throwaway(options.workers) as server:
        token = server.client("signer")
        rows = [_measure_row(server, row, token, options) for row in options.rows]
        jwks = _measure_jwks(server, options.rows[0], options)
    options.say("hostile JSON")
    json_rates = parser.rates()
    return {
        "machine": {
            "cpus": os.cpu_count(),
            "load_before": round(busy, 2),
            "architecture": platform.machine(),
            "python": platform.python_version(),
        },
        "workers": options.workers,
        "seconds_per_figure": options.seconds,
        "load": {
            "processes": options.processes,
            "connections": options.connections,
            "batch_connections": options.batch_connections,
        },
        "algorithms": rows,
        "jwks": jwks,
        "json_ms_per_mib": json_rates,
        "took_seconds": round(time.monotonic() - began, 1),
    }


def _measure_row(server: Server, row: Row, token: str, options: Options) -> dict[str, Any]:
    options.say(f"{row.name}: making keys")
    config, label = server.folder / "kms-jwks.toml", f"bench-{row.slug}"
    make_key_set(server, row.slug, row.alg, token, rsa_bits=row.rsa_bits)
    wait_for_standby(server, row.slug)
    ref = module.make_key(config, label, row.alg, row.rsa_bits)
    raw = {}
    for kind in ("bare", "backend"):
        options.say(f"{row.name}: the module, {kind}")
        raw[kind] = module.rate(config, kind, label, ref, row.alg, processes=options.workers, seconds=options.seconds)
    one = {"claims": CLAIMS}
    many = {"batch": [one] * BATCH}
    options.say(f"{row.name}: HTTP")
    single = _load(options, options.connections, _signing(server, row, token, one))
    options.say(f"{row.name}: HTTP, batches of {BATCH}")
    batch = _load(options, options.batch_connections, _signing(server, row, token, many))
    options.say(f"{row.name}: HTTP, one connection")
    alone = _load(options, 1, _signing(server, row, token, one))
    _check(server, row, [json.loads(sample) for sample in single.samples])
    _check(server, row, [item for sample in batch.samples[:1] for item in json.loads(sample)["batch"]])
    return {
        "name": row.name,
        "raw": {"module_per_second": round(raw["bare"], 1), "backend_per_second": round(raw["backend"], 1)},
        "http": _figures(single),
        "http_one_connection": _figures(alone),
        "http_batch": {"size": BATCH, **_figures(batch, BATCH)},
        "ratios": {
            "backend_to_module": round(raw["backend"] / raw["bare"], 3),
            "http_to_backend": round(single.rate / raw["backend"], 3),
            "http_to_module": round(single.rate / raw["bare"], 3),
            "http_batch_to_backend": round(batch.rate * BATCH / raw["backend"], 3),
            "http_batch_to_module": round(batch.rate * BATCH / raw["bare"], 3),
        },
    }


def _measure_jwks(server: Server, row: Row, options: Options) -> dict[str, Any]:
    path = f"/{row.slug}/.well-known/jwks.json"
    options.say("JWKS")
    full = _load(options, options.connections, load.Target(server.port, load.request("GET", path, server.port, {})))
    etag = server.call("GET", path, token=None).headers["ETag"]
    options.say("JWKS, not modified")
    unchanged = load.Target(server.port, load.request("GET", path, server.port, {"If-None-Match": etag}), status=304)
    return {"full": _figures(full), "not_modified": _figures(_load(options, options.connections, unchanged))}


def _signing(server: Server, row: Row, token: str, body: object) -> load.Target:
    return load.Target(
        server.port,
        load.request(
            "POST",
            f"/v1/key-sets/{row.slug}/keys/{KEY}/jwt",
            server.port,
            {"Authorization": f"Bearer {token}"},
            json.dumps(body).encode(),
        ),
    )


def _load(options: Options, connections: int, target: load.Target) -> load.Load:
    """`connections` in all, over as many generators as that takes; a single one has told its latency in a second."""
    processes = min(options.processes, connections)
    seconds = options.seconds if connections > 1 else min(options.seconds, 1.0)
    return load.run(target, seconds=seconds, processes=processes, connections=connections // processes)


def _figures(measured: load.Load, signatures: int = 1) -> dict[str, float]:
    return {
        "per_second": round(measured.rate * signatures, 1),
        "requests": measured.requests,
        "p50_ms": round(measured.percentile(0.50), 3),
        "p99_ms": round(measured.percentile(0.99), 3),
        "load_generator_cpus": round(measured.busy, 2),
    }


def _check(server: Server, row: Row, answers: list[dict[str, Any]]) -> None:
    """A fast signature that does not verify is worth nothing. Raises where one does not."""
    keys = jwt.PyJWKClient(f"{server.url}/{row.slug}/.well-known/jwks.json")
    assert answers
    for answer in answers:
        token = answer["token"]
        jwt.decode(token, keys.get_signing_key_from_jwt(token), algorithms=[row.alg], audience=CLAIMS["aud"])


# --- showing ----------------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [_HEAD, *(_line(row) for row in report["algorithms"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    shown = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    full, unchanged = report["jwks"]["full"], report["jwks"]["not_modified"]
    slowest, milliseconds = max(report["json_ms_per_mib"].items(), key=lambda rate: rate[1])
    return f"""\
{report["workers"]} workers, {report["load"]["connections"]} connections, {report["seconds_per_figure"]:g} s a figure, \
{report["machine"]["cpus"]} CPUs shared with the load generator; {report["took_seconds"]:.0f} s in all

{shown[0]}
{"-" * len(shown[0])}
{chr(10).join(shown[1:])}

JWKS {full["per_second"]:,.0f}/s (p50 {full["p50_ms"]:.1f} ms, p99 {full["p99_ms"]:.1f} ms), \
not modified {unchanged["per_second"]:,.0f}/s
JSON that was made to take long: at most {milliseconds:.1f} ms of CPU a mebibyte ({slowest})

module    bare python-pkcs11 sessions, as many processes as workers
backend   the same key through kms-jwks' backend, as many processes as workers
HTTP      one JWT a request; "alone" is one connection by itself
batch     {BATCH} JWTs a request; signatures, not requests
÷         against backend"""


_HEAD = ("", "module/s", "backend/s", "HTTP/s", "÷", "p50 ms", "p99 ms", "alone p50", "p99", "batch/s", "÷", "p50 ms")


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    http, alone, batch, ratios = row["http"], row["http_one_connection"], row["http_batch"], row["ratios"]
    return (
        row["name"],
        f"{row['raw']['module_per_second']:,.0f}",
        f"{row['raw']['backend_per_second']:,.0f}",
        f"{http['per_second']:,.0f}",
        f"{ratios['http_to_backend']:.2f}",
        f"{http['p50_ms']:.1f}",
        f"{http['p99_ms']:.1f}",
        f"{alone['p50_ms']:.1f}",
        f"{alone['p99_ms']:.1f}",
        f"{batch['per_second']:,.0f}",
        f"{ratios['http_batch_to_backend']:.2f}",
        f"{batch['p50_ms']:.1f}",
    )
