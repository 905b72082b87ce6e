"""Signatures a second of the module itself, without HTTP: through our backend, and through python-pkcs11 alone.

Every process opens the module for itself, as the service's workers do, and signs on one thread.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import KeyRef, Message

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.synchronize import Barrier
    from multiprocessing.synchronize import Lock as ProcessLock
    from pathlib import Path

PATIENCE = 60.0
DATA = b"x" * 250
"""As long as the signing input of a small JWT."""

Sign = Callable[[], object]


def make_key(config: Path, label: str, alg: str, rsa_bits: int | None) -> KeyRef:
    """A key pair in the service's token, outside its registry. Made in a process of its own: this one opens nothing."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_make, args=(config, label, alg, rsa_bits, writer), daemon=True
    )
    process.start()
    writer.close()
    try:
        return KeyRef(_receive(reader))
    finally:
        _end(process)


def rate(config: Path, kind: str, label: str, ref: KeyRef, alg: str, *, processes: int, seconds: float) -> float:
    """Signatures a second of `processes` together; `kind` is `backend` or `bare`."""
    context = multiprocessing.get_context("spawn")
    barrier, lock = context.Barrier(processes), context.Lock()
    pipes = [context.Pipe(duplex=False) for _ in range(processes)]
    workers = [
        context.Process(
            target=_measure, args=(config, kind, label, ref.locator, alg, seconds, barrier, lock, writer), daemon=True
        )
        for _, writer in pipes
    ]
    for worker in workers:
        worker.start()
    for _, writer in pipes:
        writer.close()
    try:
        return sum(float(_receive(reader)) for reader, _ in pipes)
    finally:
        for worker in workers:
            _end(worker)


def _receive(reader: Connection) -> Any:
    if not reader.poll(PATIENCE):
        raise RuntimeError("the module gave no answer in time")
    try:
        answer = reader.recv()
    except EOFError:
        raise RuntimeError("a signing process died") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _end(process: Any) -> None:
    process.join(10)
    if process.is_alive():
        process.kill()


# --- inside a signing process -----------------------------------------------------------------------------------------


def _make(config: Path, label: str, alg: str, rsa_bits: int | None, out: Connection) -> None:
    try:
        backend = _backend(config)
        out.send(backend.generate(label, ALGORITHMS[alg], rsa_bits=rsa_bits).ref.locator)
        backend.close()
    except Exception as error:  # noqa: BLE001 - the other side raises it
        out.send(RuntimeError(repr(error)))


def _measure(
    config: Path,
    kind: str,
    label: str,
    locator: tuple[tuple[str, str], ...],
    alg: str,
    seconds: float,
    barrier: Barrier,
    lock: ProcessLock,
    out: Connection,
) -> None:
    try:
        if kind == "backend":
            sign = _through_backend(config, KeyRef(locator), alg)
        else:
            with lock:  # parallel logins spoil one another in SoftHSM
                sign = _through_session(config, label, alg)
        sign()
        barrier.wait(PATIENCE)
        count, begin = 0, time.perf_counter()
        end = begin + seconds
        while time.perf_counter() < end:
            sign()
            count += 1
        out.send(count / (time.perf_counter() - begin))
    except Exception as error:  # noqa: BLE001 - the other side raises it
        barrier.abort()
        out.send(RuntimeError(repr(error)))


def _backend(config: Path) -> Any:
    from kms_jwks.backends import make_backend
    from kms_jwks.config import load_settings
    from kms_jwks.http import logs

    settings = load_settings(config)
    assert settings.default_backend is not None
    logs.configure("warning", "console")  # the report alone goes to standard output
    return make_backend(settings.default_backend, settings.backends[settings.default_backend], settings.state_dir)


def _through_backend(config: Path, ref: KeyRef, alg: str) -> Sign:
    backend, algorithm, message = _backend(config), ALGORITHMS[alg], Message(DATA)
    return lambda: backend.sign(ref, algorithm, message, time.monotonic() + 2)


def _through_session(config: Path, label: str, alg: str) -> Sign:
    import pkcs11

    from kms_jwks.config import Pkcs11Options, load_settings

    settings = load_settings(config)
    assert settings.default_backend is not None
    options = settings.backends[settings.default_backend]
    assert isinstance(options, Pkcs11Options)
    assert options.pin_file is not None
    os.environ.update(options.environment)
    token = _patiently(lambda: pkcs11.lib(str(options.module)).get_token(token_label=options.token_label))
    session = token.open(user_pin=options.pin_file.read_text(encoding="ascii").strip())
    key = session.get_key(object_class=pkcs11.ObjectClass.PRIVATE_KEY, label=label)
    mechanism = {
        "ES256": pkcs11.Mechanism.ECDSA,
        "RS256": pkcs11.Mechanism.SHA256_RSA_PKCS,
        "EdDSA": pkcs11.Mechanism.EDDSA,
    }[alg]
    if alg == "ES256":
        return lambda: key.sign(hashlib.sha256(DATA).digest(), mechanism=mechanism)
    return lambda: key.sign(DATA, mechanism=mechanism)


def _patiently(find: Callable[[], Any]) -> Any:
    """SoftHSM's token looks gone or broken while another process logs in."""
    for pause in (0.05, 0.1, 0.2, 0.4, 0.8):
        try:
            return find()
        except Exception:  # noqa: BLE001 - whatever it says, it is not true yet
            time.sleep(pause)
    return find()
