"""Modules that differ from SoftHSM, imitated by SoftHSM with one answer changed; and the table of return values."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pkcs11
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pkcs11 import Attribute, Mechanism

from kms_jwks import jose
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import Digest, Evidence, Message
from kms_jwks.backends.pkcs11 import Pkcs11Backend, generation, mechanisms, objects
from kms_jwks.backends.pkcs11.connection import Connection
from kms_jwks.backends.pkcs11.error_map import CODES, Code, Meaning, code_of, describe_error, meaning_of
from kms_jwks.backends.pkcs11.mechanisms import prepare
from kms_jwks.backends.pkcs11.module import CKR_CANT_LOCK, Cryptoki
from kms_jwks.backends.pkcs11.objects import read_jwk
from kms_jwks.errors import BackendRefused, BackendUnavailable, UnsupportedAlgorithm
from tests.children import in_child
from tests.contract.suite import verify
from tests.softhsm import SoftHsm, make_token, sessions_in_module

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.softhsm

ES256 = ALGORITHMS["ES256"]
SOMETHING = Message(b"something")
SPOKEN = {
    0x103: "User type invalid. Should never see this.",
    0x150: "Buffer was too small. Should never see this.",
    0xB4: "Parallel not supported. Should never see this.",
    0x190: "Initialisation error (not initialized). Should never see this.",
    0x191: "Initialisation error (already initialized). Should never see this.",
}
"""python-pkcs11's words for return values for which it has neither a class nor the number."""


@pytest.fixture
def hsm(tmp_path: Path) -> SoftHsm:
    return make_token(tmp_path / "softhsm")


def sign(backend: Pkcs11Backend, key: Any, alg: str = "ES256", what: Message | Digest = SOMETHING) -> None:
    signature = backend.sign(key.ref, ALGORITHMS[alg], what, time.monotonic() + 5)
    verify(ALGORITHMS[alg], dict(key.public_jwk), what, signature)


# --- what a module offers ---------------------------------------------------------------------------------------------


def hashing_only(hsm: SoftHsm) -> None:
    backend = hsm.backend()
    made = {
        name: backend.generate(f"k-{name}", ALGORITHMS[name], rsa_bits=2048)
        for name in ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
    }
    connection = backend._connection().current
    assert connection is not None
    connection.mechanisms -= {Mechanism.RSA_PKCS, Mechanism.RSA_PKCS_PSS}
    assert made.keys() <= backend.capabilities()
    for name, key in made.items():
        sign(backend, key, name, Message(os.urandom(500)))
        with pytest.raises(UnsupportedAlgorithm):
            sign(backend, key, name, Digest(hashlib.new(ALGORITHMS[name].hash or "", b"x").digest()))
    connection.mechanisms -= {Mechanism.ECDSA, Mechanism.RSA_PKCS_KEY_PAIR_GEN, Mechanism.EDDSA}
    assert backend.capabilities() == frozenset()
    with pytest.raises(UnsupportedAlgorithm):
        backend.generate("no", ALGORITHMS["RS256"])


def test_a_module_without_plain_rsa_hashes_for_itself(hsm: SoftHsm) -> None:
    in_child(hashing_only, hsm)


def cannot_lock(hsm: SoftHsm) -> None:
    initialize = Cryptoki.initialize

    def without_locking(self: Cryptoki, *, os_locking: bool) -> int:
        return CKR_CANT_LOCK if os_locking else initialize(self, os_locking=False)

    Cryptoki.initialize = without_locking  # type: ignore[method-assign]
    backend = hsm.backend(sessions=4)
    key = backend.generate("here", ES256)
    assert backend.ping().facts["locking"] == "process"
    with ThreadPoolExecutor(8) as threads:  # without the lock SoftHSM crashes here within seconds
        for done in [threads.submit(sign, backend, key) for _ in range(1000)]:
            done.result()


def test_a_module_that_cannot_lock_gets_one_call_at_a_time(hsm: SoftHsm) -> None:
    in_child(cannot_lock, hsm)


def initialised_by_others(hsm: SoftHsm) -> None:
    os.environ.update(hsm.environment)
    theirs = pkcs11.lib(str(hsm.module)).get_token(token_label=hsm.label).open()
    backend = hsm.backend(sessions=4)
    key = backend.generate("here", ES256)
    assert backend.ping().facts["locking"] == "process"
    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(sign, backend, key) for _ in range(200)]:
            done.result()
    theirs.close()


def test_a_module_that_other_code_initialised_gets_one_call_at_a_time(hsm: SoftHsm) -> None:
    in_child(initialised_by_others, hsm)


# --- what a module makes ----------------------------------------------------------------------------------------------


def weak_keys(hsm: SoftHsm) -> None:
    backend = hsm.backend()
    backend.ping()
    patch = pytest.MonkeyPatch()
    for weak in ("generated_in_module", "non_extractable", "sign_only"):
        judged = {"generated_in_module": True, "non_extractable": True, "sign_only": True, weak: False}

        def judge(_: object, judged: dict[str, bool] = judged) -> Evidence:
            return Evidence({}, **judged)

        patch.setattr(generation, "read_evidence", judge)
        with pytest.raises(BackendRefused, match="attributes of the new key"):
            backend.generate("weak", ES256)
    patch.undo()
    assert hsm_objects(backend) == 0
    # A failure in the middle leaves no object either, and the label stays free.
    for failure in (pkcs11.GeneralError(), pkcs11.AttributeTypeInvalid(), pkcs11.SessionHandleInvalid()):
        patch.setattr(generation, "read_jwk", fail_once(read_jwk, failure))
        try:
            backend.destroy(backend.generate("weak", ES256).ref)
        except BackendRefused:
            assert isinstance(failure, pkcs11.AttributeTypeInvalid)
        assert hsm_objects(backend) == 0
    assert sessions_in_module(backend) == int(backend.ping().facts["sessions_of_process"])


def fail_once(function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    failed = False

    def wrapper(*arguments: Any) -> Any:
        nonlocal failed
        if not failed:
            failed = True
            raise error
        return function(*arguments)

    return wrapper


def hsm_objects(backend: Pkcs11Backend) -> int:
    connection = backend._connection().current
    assert connection is not None
    return len(list(connection.login_session.get_objects({Attribute.TOKEN: True})))


def test_a_key_that_is_not_as_asked_for_is_destroyed_and_refused(hsm: SoftHsm) -> None:
    in_child(weak_keys, hsm)


def failing_signatures(hsm: SoftHsm) -> None:
    """Each return value once: the call recovers or is refused, and no session is lost."""
    backend = hsm.backend(sessions=2)
    key = backend.generate("here", ES256)
    sign(backend, key)
    patch = pytest.MonkeyPatch()
    for row in CODES.values():
        if row.vendor is None:
            continue
        connection = backend._connection().current
        assert connection is not None
        connection.opened_at = 0.0  # long ago: an answer that speaks of a lost token is believed again
        patch.setattr(objects, "prepare", fail_once(prepare, row.vendor()))
        if row.meaning.is_final:
            with pytest.raises(row.meaning.ends_as):
                sign(backend, key)
        else:
            sign(backend, key)
        sign(backend, key)
    patch.setattr(objects, "prepare", fail_once(prepare, ValueError("odd")))
    sign(backend, key)
    for final in (pkcs11.FunctionRejected(), pkcs11.PKCS11Error("Unmapped error code 0x68")):
        patch.setattr(objects, "prepare", fail_once(prepare, final))
        with pytest.raises(BackendRefused):
            sign(backend, key)

    def always(*_: object) -> tuple[bytes, Mechanism]:
        raise pkcs11.DeviceError

    patch.setattr(objects, "prepare", always)
    with pytest.raises(BackendUnavailable) as caught:
        sign(backend, key)
    assert caught.value.retry_after
    patch.undo()
    sign(backend, key)
    assert sessions_in_module(backend) == int(backend.ping().facts["sessions_of_process"]) <= 4


def test_each_return_value_is_mended_or_said_and_loses_no_session(hsm: SoftHsm) -> None:
    in_child(failing_signatures, hsm)


def lost_for_a_moment(hsm: SoftHsm) -> None:
    backend = hsm.backend()
    key = backend.generate("here", ES256)
    sign(backend, key)
    patch = pytest.MonkeyPatch()
    patch.setattr(Connection, "is_healthy", lambda self: False)
    recovering = backend._connection()
    assert recovering.current is not None
    with recovering.module.lock.shared(time.monotonic() + 1):
        recovering._discard(recovering.current)
    for use in (lambda: sign(backend, key), lambda: backend.destroy(key.ref), lambda: backend.public_key(key.ref)):
        with pytest.raises(BackendUnavailable):
            use()
        time.sleep(0.3)
    patch.undo()
    mended = time.monotonic() + 8
    while True:
        try:
            sign(backend, key)
            return
        except BackendUnavailable:
            assert time.monotonic() < mended
            time.sleep(0.1)


def test_nothing_is_said_about_keys_while_the_token_is_not_well(hsm: SoftHsm) -> None:
    in_child(lost_for_a_moment, hsm)


# --- tables and encodings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "row"), CODES.items(), ids=[row.name for row in CODES.values()])
def test_each_return_value_is_recognised_in_what_python_pkcs11_raises(code: int, row: Code) -> None:
    error = row.vendor() if row.vendor else pkcs11.PKCS11Error(SPOKEN.get(code, f"Unmapped error code {code:#x}"))
    assert code_of(error) == code
    assert meaning_of(error) is meaning_of(code) is row.meaning
    assert describe_error(error) == row.name


def test_answers_that_no_specification_has_are_doubtful() -> None:
    for error in (pkcs11.PKCS11Error("Unmapped error code 0x80000001"), pkcs11.PKCS11Error("?"), pkcs11.NoSuchKey()):
        assert meaning_of(error) is Meaning.DOUBTFUL
    assert describe_error(pkcs11.PKCS11Error("Unmapped error code 0x80000001")) == "0x80000001"


def test_every_class_of_python_pkcs11_that_a_module_can_cause_has_its_row() -> None:
    own = {pkcs11.NoSuchKey, pkcs11.NoSuchToken, pkcs11.MultipleObjectsReturned, pkcs11.MultipleTokensReturned}
    classes = set(pkcs11.PKCS11Error.__subclasses__()) - own
    assert classes == {row.vendor for row in CODES.values() if row.vendor}


@pytest.mark.parametrize(("crv", "curve"), [(crv, row.curve) for crv, row in mechanisms.CURVES.items()])
def test_public_points_are_read_bare_and_wrapped(crv: str, curve: ec.EllipticCurve | None) -> None:
    if curve is None:
        public: Any = ed25519.Ed25519PrivateKey.generate().public_key()
        point = public.public_bytes_raw()
    else:
        public = ec.generate_private_key(curve).public_key()
        point = public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)

    def der(tag: int, content: bytes) -> bytes:
        length = bytes([len(content)]) if len(content) < 128 else bytes([0x81, len(content)])
        return bytes([tag]) + length + content

    for form in (point, der(4, point), der(3, b"\0" + point)):
        assert mechanisms.ec_jwk(crv, form) == jose.public_jwk(public)
    for broken in (point[:-1], point + b"\0", b"\4\1" + point, b"", der(4, point)[:-1]):
        with pytest.raises(BackendRefused):
            mechanisms.ec_jwk(crv, broken)


def test_curves_that_jose_does_not_know_are_unsupported() -> None:
    with pytest.raises(UnsupportedAlgorithm):
        mechanisms.crv_of(bytes.fromhex("06092b2403030208010107"))  # brainpoolP256r1
