"""What every backend must do, written once. A backend adopts it in a class of its own that says how it is made:

    class TestMine(BackendContract):
        @pytest.fixture(scope="class")
        @classmethod
        def factory(cls) -> Factory:
            return functools.partial(make_my_backend, ...)

`factory` is picklable, and each call makes a new backend on the same module, in this process or in another.
Signatures are verified by cryptography directly and by joserfc (ML-DSA: dilithium-py), never by the code under test.
What a module cannot do, and what an adopter leaves out with a reason, is not collected (conftest.py); nothing is
skipped.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from dilithium_py.ml_dsa import ML_DSA_44, ML_DSA_65, ML_DSA_87
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joserfc import jws
from joserfc.errors import SecurityWarning
from joserfc.jwk import ECKey, OKPKey, RSAKey

from kms_jwks.algorithms import ALGORITHMS, Algorithm, Family
from kms_jwks.backends.base import Backend, Digest, GeneratedKey, KeyRef, Message
from kms_jwks.errors import (
    BackendError,
    BackendKeyNotFound,
    BackendRefused,
    BackendTimeout,
    BackendUnavailable,
    KeyExists,
    UnsupportedAlgorithm,
)
from kms_jwks.jose import b64u_decode, b64u_encode, public_key
from tests.children import fresh_processes

Factory: TypeAlias = Callable[[], Backend]
Case: TypeAlias = tuple[str, int | None]

CASES: list[Case] = [(name, bits) for name, alg in ALGORITHMS.items() for bits in alg.rsa_bits or (None,)]
QUICK: list[Case] = [("RS256", 2048), ("PS256", 2048), ("ES256", None), ("EdDSA", None)]
ML_DSA: list[Case] = [case for case in CASES if ALGORITHMS[case[0]].family is Family.ML_DSA]
_HASHES = {"sha256": hashes.SHA256(), "sha384": hashes.SHA384(), "sha512": hashes.SHA512()}
_DILITHIUM: dict[str, Any] = {"ML-DSA-44": ML_DSA_44, "ML-DSA-65": ML_DSA_65, "ML-DSA-87": ML_DSA_87}
_JOSERFC: dict[str, type[RSAKey] | type[ECKey] | type[OKPKey]] = {"RSA": RSAKey, "EC": ECKey, "OKP": OKPKey}


def case_id(case: Case) -> str:
    """For pytest: RS256-2048, ES256."""
    return "-".join(str(part) for part in case if part is not None)


def soon(seconds: float = 10.0) -> float:
    """A deadline."""
    return time.monotonic() + seconds


def new_label() -> str:
    """Like those of the service: random, 40 bytes at most."""
    return f"kj-contract-{uuid.uuid4().hex[:20]}"


def verify(alg: Algorithm, jwk: dict[str, str], what: Message | Digest, signature: bytes) -> None:
    """By cryptography alone. Raises InvalidSignature."""
    key = public_key(jwk)
    data = what.data if isinstance(what, Message) else what.value
    if isinstance(
        key, ed25519.Ed25519PublicKey | mldsa.MLDSA44PublicKey | mldsa.MLDSA65PublicKey | mldsa.MLDSA87PublicKey
    ):
        key.verify(signature, data)
        return
    hash_ = _HASHES[alg.hash or ""]
    algorithm = hash_ if isinstance(what, Message) else Prehashed(hash_)
    if isinstance(key, ec.EllipticCurvePublicKey):
        assert len(signature) == 2 * alg.coordinate
        halves = signature[: alg.coordinate], signature[alg.coordinate :]
        r, s = (int.from_bytes(half, "big") for half in halves)
        key.verify(encode_dss_signature(r, s), data, ec.ECDSA(algorithm))
        return
    assert isinstance(key, rsa.RSAPublicKey)
    assert len(signature) == key.key_size // 8
    if alg.family is Family.RSA_PSS:
        salted = padding.PSS(padding.MGF1(hash_), hash_.digest_size)
        key.verify(signature, data, salted, algorithm)
    else:
        key.verify(signature, data, padding.PKCS1v15(), algorithm)


def verify_as_jws(alg: Algorithm, jwk: dict[str, str], sign: Callable[[bytes], bytes]) -> None:
    """A compact JWS whose signature the backend makes, verified by a library. Raises joserfc's BadSignatureError."""
    header, payload = (b64u_encode(part) for part in (b'{"alg":"%s"}' % alg.name.encode(), b'{"sub":"somebody"}'))
    signing_input = f"{header}.{payload}"
    signature = sign(signing_input.encode())
    if alg.family is Family.ML_DSA:
        library = _DILITHIUM[alg.name]
        assert library.verify(b64u_decode(jwk["pub"]), signing_input.encode(), signature)
        assert not library.verify(b64u_decode(jwk["pub"]), signing_input.encode() + b".", signature)
        return
    token = f"{signing_input}.{b64u_encode(signature)}"
    key = _JOSERFC[alg.kty].import_key(dict(jwk))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)  # RFC 9864 deprecates the name EdDSA
        assert jws.deserialize_compact(token, key, algorithms=[alg.name]).payload == b'{"sub":"somebody"}'


def sign_elsewhere(factory: Factory, ref: KeyRef, alg_name: str, data: bytes) -> bytes:
    """Runs in another process."""
    backend = factory()
    try:
        return backend.sign(ref, ALGORITHMS[alg_name], Message(data), soon())
    finally:
        backend.close()


def destroy_elsewhere(factory: Factory, ref: KeyRef) -> None:
    """Runs in another process."""
    backend = factory()
    try:
        destroy(backend, ref)
    finally:
        backend.close()


def destroy(backend: Backend, ref: KeyRef) -> int:
    """Have a key destroyed; the seconds that the module still takes for it, 0 where it is gone."""
    try:
        backend.destroy(ref)
    except BackendUnavailable as error:
        return error.retry_after or pytest.fail("a module that takes its time says how long")
    return 0


@dataclass(frozen=True)
class VendorError:
    """How to make the vendor raise one of its documented errors, and what must come of it.

    `arrange` is called with the adopter's `vendor` fixture and a key; the next call of the backend meets the error.
    `call` names that call: sign, public_key, attributes, generate, destroy, schedule_destroy, list_keys, ping, adopt.
    """

    arrange: Callable[[Any, GeneratedKey], object]
    becomes: type[BackendError]
    call: str = "sign"
    says: str = ""
    """What the next step must say."""


def _calls(backend: Backend, key: GeneratedKey) -> dict[str, Callable[[], object]]:
    es256 = ALGORITHMS["ES256"]
    return {
        "sign": lambda: backend.sign(key.ref, es256, Message(b"x"), soon(2.0)),
        "public_key": lambda: backend.public_key(key.ref),
        "attributes": lambda: backend.attributes(key.ref),
        "generate": lambda: backend.generate(new_label(), es256),
        "destroy": lambda: backend.destroy(key.ref),
        "schedule_destroy": lambda: backend.schedule_destroy(key.ref, 7),
        "list_keys": lambda: backend.list_keys("kj-"),
        "ping": backend.ping,
        "adopt": lambda: backend.adopt("kj-nothing"),
    }


class Keys:
    """Keys that tests share, made when first asked for. RSA keys serve all RSA algorithms: 4096 bits take seconds."""

    def __init__(self, backend: Backend, rsa_keys_shared: bool) -> None:
        self.backend = backend
        self._shared = rsa_keys_shared
        self._made: dict[Case, GeneratedKey] = {}

    def __getitem__(self, case: Case) -> GeneratedKey:
        name, bits = case
        alg = ALGORITHMS[name]
        kind = ("RSA" if alg.is_rsa and self._shared else name, bits)
        if kind not in self._made:
            self._made[kind] = self.backend.generate(new_label(), alg, rsa_bits=bits)
        return self._made[kind]

    def destroy(self) -> None:
        for key in self._made.values():
            destroy(self.backend, key.ref)


class BackendContract:
    """The tests. Adopters override `factory`, and the constants where the module differs."""

    unsupported: frozenset[str] = frozenset()
    """Algorithms this module cannot do; then it must say so."""
    rsa_keys_shared = True
    """False where a key of the module is bound to one algorithm."""
    scheduled_destruction = False
    """True where the module itself destroys keys after some days."""
    lengths: Mapping[str, range] = {}
    """The lengths in bytes of the messages an algorithm signs, where the module has limits; others it must refuse."""
    left_out: Mapping[str, str] = {}
    """Algorithms and tests that are not tried here, each with the reason."""
    vendor_errors: ClassVar[Mapping[str, VendorError]] = {}
    """The vendor's documented errors by name; they need the fixture `vendor`."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "vendor_error" in metafunc.fixturenames:
            metafunc.parametrize("vendor_error", list(self.vendor_errors.values()), ids=list(self.vendor_errors))

    @pytest.fixture(scope="class")
    @classmethod
    def vendor(cls) -> Any:
        """Whatever `vendor_errors` are arranged with; healed after each."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def wait(cls) -> Callable[[int], None]:
        """Lets seconds pass for the module, where destruction takes days."""
        return lambda seconds: None

    @pytest.fixture(scope="class")
    @classmethod
    def factory(cls) -> Factory:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, factory: Factory) -> Iterator[Backend]:
        backend = factory()
        yield backend
        backend.close()

    @pytest.fixture(scope="class")
    @classmethod
    def keys(cls, backend: Backend) -> Iterator[Keys]:
        keys = Keys(backend, cls.rsa_keys_shared)
        yield keys
        keys.destroy()

    def end(self, backend: Backend, ref: KeyRef, wait: Callable[[int], None]) -> None:
        """Destroy a key to the end, whatever the module's waiting period."""
        if seconds := destroy(backend, ref):
            assert self.scheduled_destruction
            wait(seconds + 1)
            backend.destroy(ref)

    # --- algorithms -----------------------------------------------------------------------------------------------

    def test_capabilities_are_the_algorithms_of_the_module(
        self, backend: Backend, record_property: Callable[[str, object], None]
    ) -> None:
        offered = backend.capabilities()
        assert offered == ALGORITHMS.keys() - self.unsupported
        tried = [name for name in ALGORITHMS if name in offered and name not in self.left_out]
        record_property("algorithms", f"{type(self).__name__} ({backend.kind}): {', '.join(tried)}")

    def test_what_is_left_out_is_known_here_and_has_a_reason(self) -> None:
        for name, reason in self.left_out.items():
            assert name in ALGORITHMS or callable(getattr(self, name, None)), name
            assert reason

    def test_what_is_not_offered_is_refused(self, backend: Backend) -> None:
        for name, bits in (case for case in CASES if case[0] in self.unsupported):
            with pytest.raises(UnsupportedAlgorithm):
                backend.generate(new_label(), ALGORITHMS[name], rsa_bits=bits)

    @pytest.mark.parametrize("case", CASES, ids=case_id)
    def test_a_generated_key_is_of_its_algorithm_and_never_leaves_the_module(self, keys: Keys, case: Case) -> None:
        alg, key = ALGORITHMS[case[0]], keys[case]
        assert key.public_jwk["kty"] == alg.kty
        assert key.public_jwk.get("crv") == alg.crv
        assert not {"d", "p", "q", "dp", "dq", "qi"} & key.public_jwk.keys()
        if case[1]:
            public = public_key(key.public_jwk)
            assert isinstance(public, rsa.RSAPublicKey)
            assert (public.key_size, public.public_numbers().e) == (case[1], 65537)
        assert keys.backend.public_key(key.ref) == key.public_jwk
        evidence = keys.backend.attributes(key.ref)
        assert evidence.holds, evidence
        assert evidence.attributes

    @pytest.mark.parametrize("case", CASES, ids=case_id)
    def test_a_message_is_signed(self, keys: Keys, case: Case) -> None:
        alg, key = ALGORITHMS[case[0]], keys[case]
        message = Message(os.urandom(200))
        signature = keys.backend.sign(key.ref, alg, message, soon())
        verify(alg, dict(key.public_jwk), message, signature)
        with pytest.raises(InvalidSignature):
            verify(alg, dict(key.public_jwk), Message(message.data + b"."), signature)

    @pytest.mark.parametrize("case", CASES, ids=case_id)
    def test_a_digest_is_signed_as_its_message_is(self, keys: Keys, case: Case) -> None:
        alg, key = ALGORITHMS[case[0]], keys[case]
        message = os.urandom(300)
        digest = Digest(hashlib.new(alg.hash or "sha256", message).digest())
        if alg.hash is None:
            with pytest.raises(BackendRefused):
                keys.backend.sign(key.ref, alg, digest, soon())
            return
        signature = keys.backend.sign(key.ref, alg, digest, soon())
        verify(alg, dict(key.public_jwk), digest, signature)
        verify(alg, dict(key.public_jwk), Message(message), signature)

    @pytest.mark.parametrize("case", CASES, ids=case_id)
    def test_a_second_library_verifies_the_jws(self, keys: Keys, case: Case) -> None:
        alg, key = ALGORITHMS[case[0]], keys[case]
        verify_as_jws(alg, dict(key.public_jwk), lambda data: keys.backend.sign(key.ref, alg, Message(data), soon()))

    @pytest.mark.parametrize("case", QUICK, ids=case_id)
    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.binary(max_size=3000))
    def test_any_message_is_signed(self, keys: Keys, case: Case, data: bytes) -> None:
        alg, key = ALGORITHMS[case[0]], keys[case]
        if len(data) not in self.lengths.get(alg.name, range(len(data) + 1)):
            with pytest.raises(BackendRefused):
                keys.backend.sign(key.ref, alg, Message(data), soon())
            return
        verify(alg, dict(key.public_jwk), Message(data), keys.backend.sign(key.ref, alg, Message(data), soon()))

    @pytest.mark.parametrize("size", [4095, 4096, 4097, 50_000])
    @pytest.mark.parametrize("case", QUICK + ML_DSA, ids=case_id)
    def test_a_long_message_is_signed_or_clearly_refused(self, keys: Keys, case: Case, size: int) -> None:
        alg, key, message = ALGORITHMS[case[0]], keys[case], Message(os.urandom(size))
        if size not in self.lengths.get(alg.name, range(size + 1)):
            with pytest.raises(BackendRefused, match=str(self.lengths[alg.name][-1])):
                keys.backend.sign(key.ref, alg, message, soon())
            return
        verify(alg, dict(key.public_jwk), message, keys.backend.sign(key.ref, alg, message, soon()))

    @pytest.mark.parametrize("size", [0, 20, 31, 33, 64])
    @pytest.mark.parametrize("case", QUICK, ids=case_id)
    def test_a_digest_of_another_length_is_refused(self, keys: Keys, case: Case, size: int) -> None:
        alg = ALGORITHMS[case[0]]
        with pytest.raises(BackendRefused):
            keys.backend.sign(keys[case].ref, alg, Digest(bytes(size)), soon())

    @pytest.mark.parametrize(
        ("case", "other"), [(("ES256", None), "ES384"), (("ES256", None), "RS256"), (("RS256", 2048), "EdDSA")]
    )
    def test_a_key_does_not_sign_with_the_algorithm_of_another(self, keys: Keys, case: Case, other: str) -> None:
        with pytest.raises((BackendRefused, UnsupportedAlgorithm)):
            keys.backend.sign(keys[case].ref, ALGORITHMS[other], Message(b"x"), soon())

    # --- labels, references, lives --------------------------------------------------------------------------------

    def test_a_label_is_used_once(self, backend: Backend) -> None:
        label, alg = new_label(), ALGORITHMS["ES256"]
        key = backend.generate(label, alg)
        with pytest.raises(KeyExists):
            backend.generate(label, alg)
        message = Message(b"still the first")
        verify(alg, dict(key.public_jwk), message, backend.sign(key.ref, alg, message, soon()))
        destroy(backend, key.ref)

    def test_what_a_key_is_for_may_be_said(self, backend: Backend) -> None:
        purpose = {"key-set": "shop", "key": "main", "version": "1"}
        key = backend.generate(label := new_label(), ALGORITHMS["ES256"], purpose=purpose)
        assert [stored.ref for stored in backend.list_keys(label)] == [key.ref]
        destroy(backend, key.ref)

    @pytest.mark.parametrize("label", ["", "a" * 41, "schlüssel", "line\nbreak"])
    def test_a_label_outside_the_grammar_is_refused(self, backend: Backend, label: str) -> None:
        with pytest.raises(BackendRefused):
            backend.generate(label, ALGORITHMS["ES256"])

    @pytest.mark.parametrize("bits", [512, 1024, 2049, 8192])
    def test_other_rsa_sizes_are_refused(self, backend: Backend, bits: int) -> None:
        label = new_label()
        with pytest.raises(UnsupportedAlgorithm):
            backend.generate(label, ALGORITHMS["RS256"], rsa_bits=bits)
        assert backend.list_keys(label) == []

    def test_a_reference_survives_storage(self, keys: Keys) -> None:
        key, alg = keys["ES256", None], ALGORITHMS["ES256"]
        again = KeyRef.of(**key.ref.as_dict())
        assert again == key.ref
        message = Message(b"stored")
        verify(alg, dict(key.public_jwk), message, keys.backend.sign(again, alg, message, soon()))

    def test_destruction_is_final_and_may_be_repeated(self, backend: Backend, wait: Callable[[int], None]) -> None:
        label, alg = new_label(), ALGORITHMS["ES256"]
        key = backend.generate(label, alg)
        backend.sign(key.ref, alg, Message(b"x"), soon())
        assert [stored.ref for stored in backend.list_keys(label)] == [key.ref]
        self.end(backend, key.ref, wait)
        backend.destroy(key.ref)
        assert backend.list_keys(label) == []
        for use in (
            lambda: backend.sign(key.ref, alg, Message(b"x"), soon()),
            lambda: backend.public_key(key.ref),
            lambda: backend.attributes(key.ref),
        ):
            with pytest.raises(BackendKeyNotFound):
                use()

    def test_scheduled_destruction_is_done_or_declined(self, backend: Backend) -> None:
        key = backend.generate(new_label(), ALGORITHMS["ES256"])
        backend.cancel_destroy(key.ref)
        for days in (7, 30, 30):
            assert backend.schedule_destroy(key.ref, days) is self.scheduled_destruction
        if self.scheduled_destruction:
            seconds = destroy(backend, key.ref)
            assert 29 * 86_400 < seconds <= 30 * 86_400
        backend.cancel_destroy(key.ref)
        backend.cancel_destroy(key.ref)
        backend.sign(key.ref, ALGORITHMS["ES256"], Message(b"x"), soon())
        destroy(backend, key.ref)

    def test_keys_are_listed_by_the_prefix_of_their_label(self, backend: Backend) -> None:
        label = new_label()[:30]
        made = {name: backend.generate(f"{label}-{name}", ALGORITHMS["ES256"]).ref for name in "ab"}
        other = backend.generate(new_label(), ALGORITHMS["ES256"])
        assert {stored.label: stored.ref for stored in backend.list_keys(label)} == {
            f"{label}-{name}": ref for name, ref in made.items()
        }
        for ref in (*made.values(), other.ref):
            destroy(backend, ref)

    def test_a_reference_to_nothing_is_not_found(self, backend: Backend, wait: Callable[[int], None]) -> None:
        key = backend.generate(new_label(), ALGORITHMS["ES256"])
        self.end(backend, key.ref, wait)
        with pytest.raises(BackendKeyNotFound):
            backend.sign(key.ref, ALGORITHMS["ES256"], Message(b"x"), soon())

    @pytest.mark.parametrize("locator", [{}, {"colour": "blue"}, {"id": "zz", "serial": "no hexadecimal"}])
    def test_a_reference_of_another_make_is_refused(self, backend: Backend, locator: dict[str, str]) -> None:
        with pytest.raises((BackendRefused, BackendKeyNotFound)):
            backend.sign(KeyRef.of(**locator), ALGORITHMS["ES256"], Message(b"x"), soon())

    def test_a_key_that_is_there_is_adopted(self, backend: Backend, wait: Callable[[int], None]) -> None:
        alg = ALGORITHMS["ES256"]
        key = backend.generate(label := new_label(), alg)
        adopted = backend.adopt(label)
        assert adopted.public_jwk == key.public_jwk
        message = Message(b"adopted")
        verify(alg, dict(key.public_jwk), message, backend.sign(adopted.ref, alg, message, soon()))
        assert backend.adopt(label, key.public_jwk) == adopted
        with suppress(BackendRefused):  # what is given never stands in for a public half that the module holds
            assert backend.adopt(label, {**key.public_jwk, "x": b64u_encode(os.urandom(32))}) == adopted
        self.end(backend, key.ref, wait)
        with pytest.raises(BackendKeyNotFound):
            backend.adopt(label)

    # --- time, threads, processes ---------------------------------------------------------------------------------

    def test_a_deadline_that_has_passed_is_kept(self, keys: Keys) -> None:
        with pytest.raises(BackendTimeout):
            keys.backend.sign(keys["ES256", None].ref, ALGORITHMS["ES256"], Message(b"x"), time.monotonic() - 0.001)

    def test_a_new_backend_finds_the_key_again(self, keys: Keys, factory: Factory) -> None:
        key, alg = keys["ES256", None], ALGORITHMS["ES256"]
        for _ in range(3):
            again = factory()
            message = Message(b"reopened")
            verify(alg, dict(key.public_jwk), message, again.sign(key.ref, alg, message, soon()))
            again.close()
        verify(alg, dict(key.public_jwk), message, keys.backend.sign(key.ref, alg, message, soon()))

    def test_threads_get_each_their_own_signature(self, keys: Keys) -> None:
        cases = [case for case in QUICK if case[0] not in self.unsupported | self.left_out.keys()]
        made = {case: keys[case] for case in cases}

        def work(thread: int) -> int:
            for turn in range(25):
                name, bits = case = cases[(thread + turn) % len(cases)]
                message = Message(f"{thread} {turn} {name} {bits}".encode())
                signature = keys.backend.sign(made[case].ref, ALGORITHMS[name], message, soon(30))
                verify(ALGORITHMS[name], dict(made[case].public_jwk), message, signature)
            return turn

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(work, range(8))) == [24] * 8

    def test_processes_see_each_others_keys_come_and_go(
        self, backend: Backend, factory: Factory, wait: Callable[[int], None]
    ) -> None:
        alg = ALGORITHMS["ES256"]
        key = backend.generate(new_label(), alg)
        backend.sign(key.ref, alg, Message(b"x"), soon())
        with fresh_processes(1) as others:
            signature = others.submit(sign_elsewhere, factory, key.ref, "ES256", b"elsewhere").result()
            verify(alg, dict(key.public_jwk), Message(b"elsewhere"), signature)
            others.submit(destroy_elsewhere, factory, key.ref).result()
        self.end(backend, key.ref, wait)
        with pytest.raises(BackendKeyNotFound):
            backend.sign(key.ref, alg, Message(b"x"), soon())

    def test_ping_says_which_module_answered(self, backend: Backend) -> None:
        health = backend.ping()
        assert health.description
        assert all(isinstance(fact, str) for pair in health.facts.items() for fact in pair)

    def test_it_says_when_it_opened_the_module(self, factory: Factory) -> None:
        backend = factory()
        before = time.monotonic()
        assert backend.recovered_at == 0.0
        backend.ping()
        assert before <= backend.recovered_at <= time.monotonic()
        backend.close()

    # --- errors ---------------------------------------------------------------------------------------------------

    def test_no_error_of_the_vendor_escapes(self, keys: Keys, vendor: Any, vendor_error: VendorError) -> None:
        case: Case = ("ES256", None)
        if vendor_error.call in ("destroy", "schedule_destroy"):
            key = keys.backend.generate(new_label(), ALGORITHMS["ES256"])
        else:
            key = keys[case]
        keys.backend.sign(key.ref, ALGORITHMS["ES256"], Message(b"before"), soon())
        vendor_error.arrange(vendor, key)
        try:
            with pytest.raises(BackendError) as caught:
                _calls(keys.backend, key)[vendor_error.call]()
        finally:
            vendor.heal()
        assert type(caught.value) is vendor_error.becomes, caught.value.detail
        assert caught.value.detail
        assert vendor_error.says in caught.value.next_step
        if caught.value.retryable:
            assert caught.value.retry_after
        keys.backend.sign(key.ref, ALGORITHMS["ES256"], Message(b"after"), soon())
