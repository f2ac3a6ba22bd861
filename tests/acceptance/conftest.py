"""What acceptance tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.acceptance.forks import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Starts processes of the service in a moment; for tests that are not about how they start."""
    with Nursery() as found:
        yield found
