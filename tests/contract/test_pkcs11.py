"""The contract suite against SoftHSM: with the module's own locking, and with one call at a time."""

import functools

import pytest

from tests.contract.suite import BackendContract, Factory
from tests.softhsm import SoftHsm, make_token

pytestmark = pytest.mark.softhsm


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> SoftHsm:
    return make_token(tmp_path_factory.mktemp("softhsm"))


class TestSoftHsm(BackendContract):
    unsupported = frozenset({"ML-DSA-44", "ML-DSA-65", "ML-DSA-87"})  # SoftHSM 2.6 is older than FIPS 204
    rsa_keys_shared = False  # CKA_ALLOWED_MECHANISMS

    @pytest.fixture(scope="class")
    @classmethod
    def factory(cls, hsm: SoftHsm) -> Factory:
        return functools.partial(hsm.backend, sessions=4)
