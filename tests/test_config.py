"""Config dataclasses: frozen, checked, and every field documented for the command line."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from graphllm.config import (
    EngineConfig,
    PlanConfig,
    ServerConfig,
    card_capability,
    parse_bytes,
    parse_card,
    parse_gib,
    parse_path,
    parse_sizes,
)
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
        "max_loras",
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_stored_responses": -1}, "--max-stored-responses must be at least 0, not -1"),
        ({"response_store_size": 0}, "--response-store-size must be at least 1, not 0"),
        ({"response_ttl": 0.0}, "--response-ttl must be a number of seconds above 0, not 0"),
        ({"response_ttl": float("nan")}, "--response-ttl must be a number of seconds above 0, not nan"),
    ],
)
def test_bounds_of_the_response_store_that_cannot_be_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**fields)


def test_optional_limits_may_stay_open() -> None:
    config = EngineConfig(max_model_len=None, max_num_batched_tokens=None, kv_cache_memory_bytes=None)
    assert config == EngineConfig()


@pytest.mark.parametrize("text", ["1,2,8", "1 2 8", " 1, 2 ,8 ", "1\t2 8"])
def test_a_list_of_sizes_is_read_with_commas_or_spaces(text: str) -> None:
    assert parse_sizes(text) == (1, 2, 8)


@pytest.mark.parametrize("text", ["", ",", "one", "1-8", "1.5", "-1", "1;2", "\u0661"])
def test_what_is_not_a_list_of_sizes_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a list of sizes") as caught:
        parse_sizes(text)
    assert repr(text) in caught.value.message


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_a_share_of_the_device_s_memory_is_above_0_and_at_most_1(share: float) -> None:
    assert EngineConfig(gpu_memory_utilization=1.0).gpu_memory_utilization == 1.0
    with pytest.raises(ConfigError, match=f"must be above 0 and at most 1, not {share:g}"):
        EngineConfig(gpu_memory_utilization=share)


def test_capture_sizes_lie_within_the_sequences_of_a_step() -> None:
    assert EngineConfig(max_num_seqs=8, cudagraph_capture_sizes=(8, 1)).cudagraph_capture_sizes == (8, 1)
    for sizes in ((1, 9), (0, 1)):
        with pytest.raises(ConfigError, match="between 1 and --max-num-seqs 8, not"):
            EngineConfig(max_num_seqs=8, cudagraph_capture_sizes=sizes)
    with pytest.raises(ConfigError, match="names a size twice"):
        EngineConfig(cudagraph_capture_sizes=(1, 2, 1))
    with pytest.raises(ConfigError, match="is empty"):
        EngineConfig(cudagraph_capture_sizes=())


@pytest.mark.parametrize("other", [{"eager_capture": True}, {"cudagraph_capture_sizes": (1,)}])
def test_no_graphs_and_a_wish_for_graphs_contradict_each_other(other: dict[str, object]) -> None:
    (name,) = other
    with pytest.raises(ConfigError, match=f"--enforce-eager captures no graphs.*{name.replace('_', '-')}"):
        EngineConfig(enforce_eager=True, **other)


def test_a_card_is_known_by_name_or_by_its_memory() -> None:
    assert parse_card("h100") == int(79.1 * 2**30)
    assert parse_card("RTX 4090") == parse_card("rtx-4090") < parse_card("rtx-5090")
    assert parse_card("24GiB") == 24 * 2**30
    with pytest.raises(ConfigError, match=r"'h1000' is neither a card that is known \(.*h100.*\) nor a size"):
        parse_card("h1000")


def test_a_plan_is_of_a_card() -> None:
    assert PlanConfig(gpu="l4").gpu == "l4"
    with pytest.raises(ConfigError, match="--gpu is missing"):
        PlanConfig()
    with pytest.raises(ConfigError, match="'abacus' is neither a card"):
        PlanConfig(gpu="abacus")


@pytest.mark.parametrize("name", ["swap_space", "kv_offloading_size"])
@pytest.mark.parametrize("gib", [-1.0, float("nan"), float("inf")])
def test_host_memory_is_a_number_of_gib(name: str, gib: float) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} must be a number of GiB"):
        EngineConfig(**{name: gib})
    assert getattr(EngineConfig(**{name: 0.5}), name) == 0.5


@pytest.mark.parametrize("wish", [{"kv_offloading_size": 1.0}, {"pin_prefix": ("a",)}])
def test_what_needs_the_prefix_cache_is_refused_without_it(wish: dict[str, object]) -> None:
    (name,) = wish
    assert EngineConfig(**wish).enable_prefix_caching
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} .* needs --enable-prefix-caching"):
        EngineConfig(enable_prefix_caching=False, **wish)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_pinned_prefixes_may_not_take_everything(share: float) -> None:
    assert EngineConfig(max_pinned_share=0.0).max_pinned_share == 0.0
    with pytest.raises(ConfigError, match=f"at least 0 and below 1, not {share:g}"):
        EngineConfig(max_pinned_share=share)


def test_an_empty_path_is_refused() -> None:
    assert parse_path("a b.txt") == ("a b.txt",)
    with pytest.raises(ConfigError, match="empty path"):
        parse_path("")


@pytest.mark.parametrize("text", ["0GiB", "24", "1MiB"])
def test_a_size_that_no_card_has_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="too little for a card; write for example 24GiB"):
        parse_card(text)


@pytest.mark.parametrize(("text", "gib"), [("4", 4.0), ("0.5", 0.5), ("512MiB", 0.5), ("1GiB", 1.0)])
def test_host_memory_is_a_number_of_gib_or_a_size(text: str, gib: float) -> None:
    assert parse_gib(text) == gib


def test_cards_are_known_by_what_they_calculate_with() -> None:
    assert card_capability("A100 80") == (8, 0)
    assert card_capability("h100") == (9, 0)
    assert card_capability("24GiB") >= (8, 9), "an unknown card is not refused what most have"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"enable_lora": True, "lora_modules": ("a=/a", "a=/b")}, "--lora-modules gives a name twice"),
        ({"enable_lora": True, "lora_modules": ("a",)}, "--lora-modules 'a' is not of the form name=path"),
        ({"enable_lora": True, "lora_modules": ("=/a",)}, "'=/a' is not of the form name=path"),
        ({"max_lora_rank": 7}, "--max-lora-rank must be one of 8, 16, .*, not 7"),
        ({"max_loras": 4, "max_cpu_loras": 3}, "--max-cpu-loras 3 is below --max-loras 4"),
        (
            {
                "enable_lora": True,
                "max_loras": 1,
                "max_cpu_loras": 1,
                "lora_modules": ("a=/a", "b=/b"),
            },
            "--max-cpu-loras 1 is below --max-loras 1, or below the number of --lora-modules, 2",
        ),
    ],
)
def test_adapters_that_cannot_be_served_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**fields)


def test_naming_adapters_switches_them_on() -> None:
    assert EngineConfig(lora_modules=("a=/a",)).serves_lora
    assert EngineConfig(enable_lora=True).serves_lora and not EngineConfig().serves_lora


def test_adapters_may_be_twice_as_many_as_places_or_as_many_as_are_named() -> None:
    modules = tuple(f"a{number}=/a" for number in range(20))
    assert EngineConfig(enable_lora=True, max_loras=3).max_loaded_loras == 6
    assert EngineConfig(enable_lora=True, max_loras=3, lora_modules=modules).max_loaded_loras == 20
    assert EngineConfig(enable_lora=True, max_loras=3, max_cpu_loras=4).max_loaded_loras == 4
