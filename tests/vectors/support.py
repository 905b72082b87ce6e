"""Where the published test vectors are. They are not part of this repository."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).resolve().parents[2]
VECTORS = Path(os.environ.get("KMS_JWKS_VECTORS") or _ROOT.parent / "shared" / "vectors")

needs_vectors = pytest.mark.skipif(
    not VECTORS.is_dir(), reason="no test vectors: set KMS_JWKS_VECTORS, or put them in ../shared/vectors"
)


def load(name: str) -> Any:
    """A vector file's JSON. Called by tests that `needs_vectors` lets run."""
    return json.loads((VECTORS / name).read_text(encoding="utf-8"))
