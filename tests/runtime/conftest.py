"""The installed runtime's operations, loaded once."""

import pytest

from tests.runtime.ops import Ops


@pytest.fixture(scope="session")
def ops(needs_runtime) -> Ops:
    return Ops()
