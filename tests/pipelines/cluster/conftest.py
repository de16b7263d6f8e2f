"""What the tests on clusters share."""

from __future__ import annotations

import pytest
from clusters import processes


@pytest.fixture(scope="module")
def client():
    """A client of a cluster of four processes. Nannies start those again that a test kills.

    It ends with the module: dask's settings and idle workers are not for the tests that follow.
    """
    with processes() as client:
        yield client
