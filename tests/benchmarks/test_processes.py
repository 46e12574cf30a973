"""The processes of a benchmark: answers, and a clear error for one that does not start or ends early."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.processes import JsonLineProcess, ProcessError, graphllm_server

ECHO = "tests.benchmarks.echo_process"


@pytest.fixture
def echo() -> Iterator[JsonLineProcess]:
    process = JsonLineProcess(ECHO, ["--threads", "2"])
    yield process
    process.close()


def test_a_helper_says_that_it_is_ready_and_answers_line_by_line(echo: JsonLineProcess) -> None:
    assert echo.ready == {"arguments": ["--threads", "2"]}
    assert echo.ask({"text": "a\nb é"}) == {"asked": {"text": "a\nb é"}}
    assert echo.ask(2) == {"asked": 2}


def test_a_helper_that_ends_early_is_an_error(echo: JsonLineProcess) -> None:
    with pytest.raises(ProcessError, match="ended with code 3"):
        echo.ask("end")
    with pytest.raises(ProcessError, match="ended"):
        echo.ask("anything")


def test_a_helper_that_does_not_start_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProcessError, match="ended with code 1"):
        JsonLineProcess("tests.benchmarks.no_such_module", [])
    assert "No module named" in capfd.readouterr().err


def test_a_server_that_does_not_start_is_an_error_with_the_end_of_its_log() -> None:
    with (
        pytest.raises(ProcessError, match="unrecognized arguments: --no-such-flag"),
        graphllm_server(["--no-such-flag"], ready_timeout=60),
    ):
        pytest.fail("it did start")
