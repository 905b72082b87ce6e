"""What an adopter of the backends' suite cannot do, or leaves out with a reason, is not collected."""

from typing import Any

import pytest

from tests.contract.suite import BackendContract


def _left_out(item: pytest.Item) -> bool:
    contract = getattr(item, "cls", None)
    if not (isinstance(item, pytest.Function) and contract is not None and issubclass(contract, BackendContract)):
        return False
    case: Any = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    out = contract.unsupported | contract.left_out.keys()
    if item.originalname == "test_no_error_of_the_vendor_escapes" and not contract.vendor_errors:
        return True
    return item.originalname in out or (case is not None and case[0] in out)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    out = [item for item in items if _left_out(item)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]
