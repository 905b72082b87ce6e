"""The documented backend of a third party, installed by its entry point, through the contract suite."""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kms_jwks import errors
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends import make_backend
from kms_jwks.backends.base import Message
from kms_jwks.config import ThirdPartyBackend
from tests.contract.keyholder import holder, install, shown
from tests.contract.suite import BackendContract, Factory, new_label, soon


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThirdPartyBackend]:
    """The backend of a running holder; its package is on the path of this process and of its children."""
    site = install(tmp_path_factory.mktemp("keyholder"))
    sys.path.append(str(site))
    with tempfile.TemporaryDirectory(prefix="kj-") as short:  # a socket's path is at most 107 bytes
        sockets = Path(short) / "s"
        with holder(site, sockets):
            yield ThirdPartyBackend.model_validate(
                {
                    "type": "keyholder",
                    "socket": str(sockets / "sign"),
                    "management": {"socket": str(sockets / "manage")},
                }
            )
    sys.path.remove(str(site))
    sys.modules.pop("keyholder", None)


class TestKeyholder(BackendContract):
    unsupported = frozenset(ALGORITHMS) - {"ES256"}

    @pytest.fixture(scope="class")
    @classmethod
    def factory(cls, settings: ThirdPartyBackend) -> Factory:
        return functools.partial(make_backend, "toy", settings, Path("/nowhere"), management=True)


def test_workers_cannot_do_what_is_the_custodians(settings: ThirdPartyBackend) -> None:
    custodian = make_backend("toy", settings, Path("/nowhere"), management=True)
    worker = make_backend("toy", settings, Path("/nowhere"))
    alg = ALGORITHMS["ES256"]
    with pytest.raises(errors.BackendRefused):
        worker.generate(new_label(), alg)
    key = custodian.generate(new_label(), alg)
    assert len(worker.sign(key.ref, alg, Message(b"x"), soon())) == 64
    with pytest.raises(errors.BackendRefused):
        worker.destroy(key.ref)
    assert worker.public_key(key.ref) == key.public_jwk
    custodian.destroy(key.ref)


def test_a_module_that_is_away_is_unavailable(settings: ThirdPartyBackend) -> None:
    away = make_backend("toy", ThirdPartyBackend.model_validate({"type": "keyholder", "socket": "/no/such"}), Path("/"))
    for call in (away.ping, lambda: away.list_keys("kj-")):
        with pytest.raises(errors.BackendUnavailable):
            call()


def test_the_example_is_short() -> None:
    assert sum(bool(line.strip()) for line in shown("keyholder.py").splitlines()) < 100
