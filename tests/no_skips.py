"""pytest -p tests.no_skips: a test that skips fails, but for what another machine is for. `.ci/run` loads it."""

import pytest

ALLOWED = (  # the last words of a reason
    "torch sees no CUDA device on this machine",
    "with a GPU, bf16 is welcome",
    "recorded speech is not fetched",
    "found before there are workers, or as noise.wav is",  # a pair of parameters that says nothing new
)


def fail_if_skipped(report) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr  # file, line, reason
        if not reason.endswith(ALLOWED):
            report.outcome, report.longrepr = "failed", f"may not skip here: {reason}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport():
    report = yield
    fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report():
    report = yield
    fail_if_skipped(report)
    return report
