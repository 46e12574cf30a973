"""Config dataclasses: frozen, checked, and every field documented for the command line."""

from __future__ import annotations

import dataclasses

import pytest

from graphllm.config import EngineConfig, ServerConfig, parse_bytes
from graphllm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1073741824", 2**30),
        ("1", 1),
        ("512b", 512),
        ("800MB", 800_000_000),
        ("800m", 800_000_000),
        ("2GiB", 2 * 2**30),
        ("2gib", 2 * 2**30),
        ("2G", 2_000_000_000),
        ("1.5 KiB", 1536),
        (" 3 tb ", 3 * 10**12),
        ("1TiB", 2**40),
    ],
)
def test_sizes_are_read_with_decimal_and_binary_suffixes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "2 cows", "1.2.3", "1 0", "nan", "inf"])
def test_what_is_not_a_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size") as caught:
        parse_bytes(text)
    assert repr(text) in caught.value.message


@pytest.mark.parametrize("config", [EngineConfig, ServerConfig])
def test_configs_are_frozen(config: type[EngineConfig] | type[ServerConfig]) -> None:
    built = config()
    field = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(built, field, "changed")
    assert not hasattr(built, "__dict__")


@pytest.mark.parametrize("config", [EngineConfig, ServerConfig])
def test_every_field_says_what_it_is(config: type[EngineConfig] | type[ServerConfig]) -> None:
    for field in dataclasses.fields(config):
        assert field.metadata["help"].endswith("."), field.name


@pytest.mark.parametrize(
    "name",
    [
        "max_num_seqs",
        "block_size",
        "max_model_len",
        "max_num_batched_tokens",
        "kv_cache_memory_bytes",
        "cpu_threads",
    ],
)
@pytest.mark.parametrize("value", [0, -1])
def test_a_count_below_one_is_refused_by_its_flag(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} must be at least 1, not {value}"):
        EngineConfig(**{name: value})


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match=f"--port must be between 0 and 65535, not {port}"):
        ServerConfig(port=port)


@pytest.mark.parametrize("port", [0, 1, 65535])
def test_a_port_in_range_is_kept(port: int) -> None:
    assert ServerConfig(port=port).port == port


def test_a_body_limit_below_one_byte_is_refused() -> None:
    with pytest.raises(ConfigError, match="--max-body-bytes must be at least 1, not 0"):
        ServerConfig(max_body_bytes=0)


def test_optional_limits_may_stay_open() -> None:
    config = EngineConfig(max_model_len=None, max_num_batched_tokens=None, kv_cache_memory_bytes=None)
    assert config == EngineConfig()
