"""What a model's purpose does to the limits of its steps and texts.

Owns the longest text of a model for vectors and scores, the sizes that vectors may be cut to, and that a
model whose queries see the whole text computes it in one step, from nothing that is cached. Plans no memory.
"""

from __future__ import annotations

from dataclasses import replace

from graphllm.config import EngineConfig
from graphllm.errors import ConfigError
from graphllm.models.config import ModelConfig
from graphllm.models.pooling import PoolingConfig
from graphllm.runner.memory_plan import plan_limits


def limits_of_purpose(
    config: EngineConfig, model: ModelConfig, pooling: PoolingConfig, *, device_type: str
) -> tuple[ModelConfig, EngineConfig]:
    """The model with the context that it was published with, and the configuration that holds for it.

    A step of a model without causality must hold the longest text: where no flag bounds it the step grows to
    the context, and where --max-num-batched-tokens does, texts are no longer than that. Raises ConfigError
    for flags that contradict each other or what the model can do.
    """
    was_asked = config.max_model_len
    if pooling.max_tokens is not None and pooling.max_tokens < model.max_position_embeddings:
        model = replace(model, max_position_embeddings=pooling.max_tokens)
        config = replace(config, max_model_len=config.max_model_len or pooling.max_tokens)
    if model.is_causal:
        return model, config
    if config.pin_prefix or config.kv_offloading_size:
        flag = "--pin-prefix" if config.pin_prefix else "--kv-offloading-size"
        raise ConfigError(
            f"{flag} keeps prefixes, which a model has none of whose queries see the whole text."
        )
    context = model.max_position_embeddings
    usual = plan_limits(config, model_context=context, device_type=device_type).max_num_batched_tokens
    step = config.max_num_batched_tokens
    length = was_asked or (context if step is None else min(step, context))
    if step is not None and length > step:
        raise ConfigError(
            f"--max-model-len {length} is above --max-num-batched-tokens {step}: this model's queries see "
            "the whole text, so that it is computed in one step. Raise the one or lower the other."
        )
    return model, replace(
        config,
        max_model_len=length,
        max_num_batched_tokens=step or max(length, usual),
        enable_prefix_caching=False,
    )


def with_sizes(pooling: PoolingConfig, sizes: tuple[int, ...] | None) -> PoolingConfig:
    """The pooling with what `--matryoshka-dimensions` says; raises ConfigError where it has no meaning."""
    if sizes is None:
        return pooling
    if pooling.purpose != "embed":
        raise ConfigError("--matryoshka-dimensions is for models that were published for embeddings.")
    for size in sizes:
        if not 1 <= size <= pooling.output_size:
            raise ConfigError(
                f"--matryoshka-dimensions must lie between 1 and {pooling.output_size}, not {size}."
            )
    return replace(pooling, can_be_cut=True, sizes=sizes)
