"""Mistakes in the configuration, the module or the token: each is an error with its cause and the next step."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.pkcs11 import PinSource, Pkcs11Backend
from kms_jwks.errors import BackendError, BackendRefused, BackendUnavailable, UnsupportedAlgorithm
from tests.children import in_child
from tests.faults.harness import Faults
from tests.softhsm import SoftHsm, make_token

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.softhsm

LIBM = subprocess.run(["cc", "-print-file-name=libm.so.6"], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def hsm(tmp_path: Path) -> SoftHsm:
    return make_token(tmp_path / "softhsm")


def ping(backend: Pkcs11Backend) -> None:
    backend.ping()


def _missing(hsm: SoftHsm) -> Mapping[str, Any]:
    return {"module": hsm.directory / "no-such.so"}


def _text(hsm: SoftHsm) -> Mapping[str, Any]:
    file = hsm.directory / "text.so"
    file.write_text("not a shared object")
    return {"module": file}


def _libm(_: SoftHsm) -> Mapping[str, Any]:
    return {"module": Path(LIBM)}


def _folder(hsm: SoftHsm) -> Mapping[str, Any]:
    return {"module": hsm.directory}


def _no_function_list(hsm: SoftHsm) -> Mapping[str, Any]:
    """A module whose C_GetFunctionList fails: the fault-injecting module without its control file."""
    faults = Faults.make(hsm.directory / "faults", hsm.module)
    faults.module.with_name("faults.so.control").unlink()
    return {"module": faults.module}


def _nobody(_: SoftHsm) -> Mapping[str, Any]:
    return {"token_label": "nobody"}


def _two(hsm: SoftHsm) -> Mapping[str, Any]:
    other = make_token(hsm.directory / "other")
    for folder in other.tokens.iterdir():
        shutil.copytree(folder, hsm.tokens / folder.name)
    return {}


def _uninitialised(hsm: SoftHsm) -> Mapping[str, Any]:
    """SoftHSM shows an uninitialised token in its last slot, whose number is the count of the others."""
    return {"token_label": None, "slot": len(list(hsm.tokens.iterdir()))}


def _wrong_pin(hsm: SoftHsm) -> Mapping[str, Any]:
    file = hsm.directory / "other-pin"
    file.write_text("wrong-1234")
    return {"pin": PinSource.from_file(file)}


def _faulty_login(code: int) -> Callable[[SoftHsm], Mapping[str, Any]]:
    def prepare(hsm: SoftHsm) -> Mapping[str, Any]:
        faults = Faults.make(hsm.directory / "faults", hsm.module)
        faults.answer("C_Login", code)
        return {"module": faults.module}

    return prepare


def _other_serial(_: SoftHsm) -> Mapping[str, Any]:
    return {"expected_serial": "0123456789abcdef"}


CASES: dict[str, tuple[Callable[[SoftHsm], Mapping[str, Any]], type[BackendError], str, str]] = {
    "wrong-path": (_missing, BackendUnavailable, "no-such.so cannot be loaded", "path of the vendor's PKCS#11 library"),
    "text-file": (_text, BackendUnavailable, "text.so cannot be loaded", "path of the vendor's PKCS#11 library"),
    "folder": (_folder, BackendUnavailable, "cannot be loaded", "path of the vendor's PKCS#11 library"),
    "libm": (_libm, BackendUnavailable, "is no PKCS#11 module", "path of the vendor's PKCS#11 library"),
    "no-function-list": (_no_function_list, BackendUnavailable, "is no PKCS#11 module", "PKCS#11 library"),
    "no-such-token": (_nobody, BackendUnavailable, "no token with label 'nobody'", "labelled 'kms-jwks-test'"),
    "two-tokens": (_two, BackendRefused, "2 tokens with label 'kms-jwks-test'", "token_serial"),
    "uninitialised": (_uninitialised, BackendUnavailable, "slot 1", "nitialise it with the vendor's tool"),
    "wrong-pin": (_wrong_pin, BackendRefused, "refused the PIN from the file", "Put the right PIN into"),
    "locked-pin": (_faulty_login(0xA4), BackendRefused, "CKR_PIN_LOCKED", "security officer unlock the PIN"),
    "expired-pin": (_faulty_login(0xA3), BackendRefused, "CKR_PIN_EXPIRED", "Set a new PIN"),
    "pin-not-set": (_faulty_login(0x102), BackendUnavailable, "CKR_USER_PIN_NOT_INITIALIZED", "C_InitPIN"),
    "another-token": (_other_serial, BackendRefused, "has serial", "Put the right token back"),
}


def told(hsm: SoftHsm, options: Mapping[str, Any], kind: type[BackendError], detail: str, step: str) -> None:
    backend = hsm.backend(**options)
    for _ in range(2):  # the second time the first failure is raised again
        with pytest.raises(kind) as caught:
            backend.ping()
        assert detail in caught.value.detail, caught.value.detail
        assert step in caught.value.next_step, caught.value.next_step
        assert "wrong-1234" not in caught.value.detail + caught.value.next_step


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said_with_what_to_do(hsm: SoftHsm, case: str) -> None:
    prepare, kind, detail, step = CASES[case]
    in_child(told, hsm, prepare(hsm), kind, detail, step)


def unsupported(hsm: SoftHsm) -> None:
    backend = hsm.backend()
    for alg, bits, words in (("RS256", 1024, "2048 or 3072 or 4096 bits"), ("ML-DSA-44", None, "ML-DSA-44")):
        with pytest.raises(UnsupportedAlgorithm, match=words):
            backend.generate("no", ALGORITHMS[alg], rsa_bits=bits)
    with pytest.raises(BackendRefused, match="no RSA modulus"):
        backend.generate("no", ALGORITHMS["ES256"], rsa_bits=2048)
    assert backend.list_keys("no") == []


def test_algorithms_and_sizes_that_are_not_offered_are_refused(hsm: SoftHsm) -> None:
    in_child(unsupported, hsm)
