"""Options of a test run."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases", type=int, default=30, help="generated requests for each route, right and wrong"
    )
