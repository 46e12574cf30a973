"""The names that flags take for a model's formats are those that there are."""

from __future__ import annotations

import pytest

from graphllm.cli import parse_configs
from graphllm.config import REASONING_PARSERS, TOOL_CALL_PARSERS, ServerConfig
from graphllm.output_formats import FORMAT_NAMES, REASONING_NAMES
from graphllm.server.generation.served_model import ServedModel
from tests.fakes import FakeEngine
from tests.server.posting import RICH_TEMPLATE, byte_tokenizer


def served(tool_call_parser: str, reasoning_parser: str) -> ServedModel:
    engine = FakeEngine(tokenizer=byte_tokenizer(RICH_TEMPLATE))  # type: ignore[arg-type]
    return ServedModel(
        engine,  # type: ignore[arg-type]
        "m",
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
    )


def test_flags_know_every_format_and_no_other() -> None:
    assert set(TOOL_CALL_PARSERS) == {"auto", *FORMAT_NAMES}
    assert set(REASONING_PARSERS) == {"auto", *REASONING_NAMES}


@pytest.mark.parametrize("name", TOOL_CALL_PARSERS)
def test_every_tool_call_parser_can_be_served(name: str) -> None:
    found = served(name, "auto").output_format
    # What the model reasons with is guessed still, unless its replies are messages that say so.
    assert found.messages is not None or found.reasoning is not None


@pytest.mark.parametrize("name", REASONING_PARSERS)
def test_every_reasoning_parser_can_be_served(name: str) -> None:
    found = served("auto", name).output_format
    assert found.name == "hermes" and (found.reasoning is None) == (name == "none")


def test_flags_reach_the_configuration() -> None:
    argv = ["--tool-call-parser", "mistral", "--reasoning-parser", "none", "--lenient"]
    _, config = parse_configs(argv)
    assert (config.tool_call_parser, config.reasoning_parser, config.lenient) == ("mistral", "none", True)
    assert (ServerConfig().tool_call_parser, ServerConfig().lenient) == ("auto", False)
