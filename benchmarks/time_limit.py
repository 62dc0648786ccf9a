"""A pytest plugin: with ``-p benchmarks.time_limit --time-limit 200`` tests that would begin later are skipped."""

from time import perf_counter

import pytest

REASON = "left out: the time limit was reached"


def pytest_addoption(parser):
    parser.addoption("--time-limit", type=float, default=float("inf"), help="seconds after which no test begins")


def pytest_sessionstart(session):
    session.config._time_limit_end = perf_counter() + session.config.getoption("--time-limit")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if perf_counter() > item.config._time_limit_end:
        pytest.skip(REASON)
