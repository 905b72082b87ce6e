"""Backends of other packages: an unusable one is an error that names it, and its own exceptions are translated."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog.testing

from kms_jwks import errors
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends import make_backend
from kms_jwks.backends.base import CallTimeouts, KeyRef, Message, stuck_in, timeouts_of
from kms_jwks.backends.third_party import make_third_party
from kms_jwks.config import BACKEND_TYPES, ThirdPartyBackend, load_settings

SECRET = "hunter2"
GOOD = """
import os
from tests.memory_backend import MemoryBackend

made = []

def make(name, options, state_dir, management):
    made.append((name, options, state_dir, management))
    return MemoryBackend("its own name")
"""
FAILING = """
from tests.memory_backend import MemoryBackend

def fail(call):
    raise ERROR

def make(*_):
    backend = MemoryBackend()
    backend.before = fail
    return backend
"""
RUDE = """
from tests.memory_backend import MemoryBackend

class Rude(MemoryBackend):
    def bind(self, ref):
        raise ValueError

    distrust = bind

    def close(self):
        raise ValueError

def make(*_):
    return Rude()
"""
ODD = """
from tests.memory_backend import MemoryBackend

class Odd(MemoryBackend):
    def sign(self, *_):
        return ANSWER

def make(*_):
    return Odd()
"""
BARBED = """
from tests.memory_backend import MemoryBackend

class Barbed(MemoryBackend):
    loaded = False

    @property
    def recovered_at(self):
        if self.loaded:
            raise ERROR
        return 0.0

    @recovered_at.setter
    def recovered_at(self, at):
        pass

    stuck = timeouts = public_key = distrust = recovered_at

    def list_keys(self, prefix):
        yield from ()
        raise ERROR

def make(*_):
    return Barbed()
"""
Installer = Callable[..., None]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installer:
    """Put a package with one entry point on the path, as pip would install it."""

    def put(source: str, *, kind: str = "toy", package: str = "toys", target: str | None = None) -> None:
        site = tmp_path / package
        info = site / f"{package}-1.5.dist-info"
        info.mkdir(parents=True)
        (site / f"{package}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[kms_jwks.backends]\n{kind} = {target or f'{package}:make'}\n")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, package, raising=False)

    return put


def made(kind: str = "toy", *, custodian: bool = False, **section: Any) -> Any:
    settings = ThirdPartyBackend.model_validate({"type": kind, **section})
    assert SECRET not in repr(settings)
    return make_backend("mine", settings, Path("/state"), management=custodian)


def test_the_factory_gets_what_is_its_own(installed: Installer) -> None:
    installed(GOOD)
    backend = made(colour="blue", depth={"of": 3}, sign_timeout_ms=70, management={"key": SECRET})
    calls = sys.modules["toys"].made
    assert calls.pop() == ("mine", {"colour": "blue", "depth": {"of": 3}}, Path("/state"), None), "a worker"
    assert (backend.name, backend.kind, backend.sign_in_place) == ("mine", "toy", False)
    made(management={"key": SECRET}, custodian=True)
    assert calls.pop() == ("mine", {}, Path("/state"), {"key": SECRET})
    made(custodian=True)
    assert calls.pop()[3] is None
    assert made(sign_in_place=True).sign_in_place


def test_it_is_a_backend(installed: Installer) -> None:
    installed(GOOD)
    backend, alg = made(), ALGORITHMS["ES256"]
    key = backend.generate("label", alg)
    assert len(backend.sign(key.ref, alg, Message(b"x"), time.monotonic() + 60)) == 64
    assert backend.public_key(key.ref) == key.public_jwk
    assert 0.0 < backend.recovered_at <= time.monotonic()
    with pytest.raises(errors.BackendKeyNotFound):
        backend.public_key(KeyRef.of(id="none", label="none"))
    backend.bind(key.ref)
    backend.distrust(key.ref)
    backend.close()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import nothing_of_that_name", "nothing_of_that_name"),
        (f"raise RuntimeError('{SECRET}')", "RuntimeError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("make = 3", "TypeError"),
        ("other = 3", "AttributeError"),
        ("def make(name): pass", "TypeError"),
        (f"def make(*_): raise ValueError('{SECRET}')", "ValueError"),
        ("def make(*_): return None", "is no backend"),
        ("def make(*_): return object()", "has no adopt, attributes, bind"),
        (
            "from kms_jwks import errors\ndef make(*_): raise errors.ConfigurationError('colour: too loud.')",
            "backends.mine: colour: too loud.",
        ),
    ],
)
def test_what_cannot_be_used_is_named(installed: Installer, source: str, said: str) -> None:
    installed(source)
    with pytest.raises(errors.ConfigurationError) as refused:
        made(password=SECRET)
    assert said in refused.value.detail
    assert "backends.mine" in refused.value.detail
    assert SECRET not in refused.value.detail
    if "too loud" not in said:
        assert "toys 1.5" in refused.value.detail


def test_what_is_not_installed_is_named_and_nothing_takes_its_place(installed: Installer) -> None:
    installed(GOOD)
    with pytest.raises(errors.ConfigurationError) as refused:
        made("toys")
    assert "'toys'" in refused.value.detail
    assert "aws-kms, pkcs11, toy" in refused.value.detail


def test_two_packages_with_one_type_are_refused(installed: Installer) -> None:
    installed(GOOD)
    installed(GOOD, package="others")
    with pytest.raises(errors.ConfigurationError, match=r"claimed by others 1\.5 and toys 1\.5"):
        made()


def test_one_package_that_is_found_twice_is_one(installed: Installer, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(GOOD)
    sys.path.append(sys.path[0])
    try:
        assert made().kind == "toy"
    finally:
        sys.path.pop()


@pytest.mark.parametrize("kind", sorted(BACKEND_TYPES))
def test_the_types_that_come_with_the_package_are_never_a_third_partys(installed: Installer, kind: str) -> None:
    installed(f"def make(*_): raise AssertionError('{kind}')", kind=kind)
    with pytest.raises(errors.ConfigurationError, match="comes with kms-jwks alone"):
        make_third_party("mine", ThirdPartyBackend.model_construct(type=kind), Path("/state"), False)


@pytest.mark.parametrize("error", ["ValueError", "KeyError", "SystemExit", "NotImplementedError"])
def test_foreign_errors_do_not_leave_it(installed: Installer, error: str) -> None:
    installed(FAILING.replace("ERROR", f"{error}('{SECRET}')"))
    backend, alg = made(), ALGORITHMS["ES256"]
    ref = KeyRef.of(id="x")
    calls = {
        "sign": lambda: backend.sign(ref, alg, Message(b"x"), time.monotonic() + 60),
        "generate": lambda: backend.generate("label", alg),
        "public_key": lambda: backend.public_key(ref),
        "ping": backend.ping,
        "capabilities": backend.capabilities,
    }
    for name, call in calls.items():
        with structlog.testing.capture_logs() as logs, pytest.raises(errors.BackendRefused) as refused:
            call()
        assert f"{error} in {name}" in refused.value.detail
        assert SECRET not in refused.value.detail + str(refused.value.next_step) + str(logs)
        (line,) = (line for line in logs if line["event"] == "foreign_error")
        assert "toys.py:" in line["place"]


@pytest.mark.parametrize("error", ["ValueError", "AttributeError", "SystemExit"])
def test_foreign_errors_on_the_way_to_an_answer_do_not_leave_it_either(installed: Installer, error: str) -> None:
    """Exceptions of properties, and of a generator."""
    installed(BARBED.replace("ERROR", f"{error}('{SECRET}')"))
    backend = made()
    sys.modules["toys"].Barbed.loaded = True
    calls: dict[str, Callable[[], object]] = {
        "recovered_at": lambda: backend.recovered_at,
        "public_key": lambda: backend.public_key(KeyRef.of(id="x")),
        "list_keys": lambda: backend.list_keys(""),
    }
    for name, call in calls.items():
        with pytest.raises(errors.BackendRefused) as refused:
            call()
        assert f"{error} in {name}" in refused.value.detail
        assert SECRET not in refused.value.detail + str(refused.value.next_step)
    backend.distrust(KeyRef.of(id="x"))
    assert stuck_in(backend) == 0
    assert timeouts_of(backend) == CallTimeouts()
    assert not hasattr(backend, "what the contract does not ask for")


def test_a_property_that_raises_at_the_start_is_named(installed: Installer) -> None:
    installed(BARBED.replace("ERROR", f"ValueError('{SECRET}')").replace("loaded = False", "loaded = True"))
    with pytest.raises(errors.ConfigurationError, match=r"toys 1\.5 cannot be made \(ValueError\)"):
        made()


def test_what_may_not_raise_does_not(installed: Installer) -> None:
    installed(RUDE)
    backend = made()
    backend.bind(KeyRef.of(id="x"))
    backend.distrust(KeyRef.of(id="x"))
    backend.close()


@pytest.mark.parametrize("answer", ["None", "'text'", "bytearray(64)", "3"])
def test_a_signature_that_is_none_is_refused(installed: Installer, answer: str) -> None:
    installed(ODD.replace("ANSWER", answer))
    with pytest.raises(errors.BackendRefused):
        made().sign(KeyRef.of(id="x"), ALGORITHMS["ES256"], Message(b"x"), 0.0)


def test_its_settings_come_from_the_environment_too(
    installed: Installer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.toml"
    config.write_text('[backends.mine]\ntype = "toy"\ncolour = "blue"\nwaiting = 3\n')
    monkeypatch.setenv("KMS_JWKS_BACKENDS__MINE__COLOUR", "red")
    monkeypatch.setenv("KMS_JWKS_BACKENDS__MINE__TONE", "high")
    settings = load_settings(config).backends["mine"]
    assert isinstance(settings, ThirdPartyBackend)
    assert (settings.options, settings.waiting) == ({"colour": "red", "tone": "high"}, 3)
