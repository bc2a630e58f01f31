"""Options of a test run, and what holds for every generated case."""

import signal

import pytest
from hypothesis import settings

# A shell starts what runs in the background with Ctrl-C ignored, and every process that a test
# starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A case may be slow because the machine is busy; what takes for ever meets the test's own limit.
settings.register_profile("perennial", deadline=None)
settings.load_profile("perennial")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases", type=int, default=30, help="generated requests for each route, right and wrong"
    )
