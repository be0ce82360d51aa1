"""Set up the test run: what the ranks' fork server loads beside what all need."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Collect the modules that test files name in ``WARM``; tests/helpers/warm.py loads them before the first fork."""
    wanted = {item.module.WARM for item in session.items if hasattr(getattr(item, "module", None), "WARM")}
    os.environ["PP_TEST_WARM"] = " ".join(sorted(wanted))
