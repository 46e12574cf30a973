"""Our paged attention behind transformers' attention interface.

Owns the function that transformers' attention modules call, in two forms: while serving it writes keys and
values to the paged cache and attends by the backend; for an outline on the meta device it notes what every
layer asks for. A module's layer finds its step by an attribute of the module, so models don't share any.
https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from graphllm.arena import Arena
from graphllm.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec, LayerCache
from graphllm.kernels.rotary_cache_write import rotary_cache_write

SERVING = "graphllm"
OUTLINE = "graphllm_outline"

_STEP = "graphllm_step"
# Arguments of an attention call that are read, and those that say nothing about its result.
_READ = frozenset({"scaling", "sliding_window", "softcap", "s_aux", "is_causal"})
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "dropout",
        "layer_idx",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


class UnservableAttention(Exception):
    """The module wants of attention what the paged one does not do; the text says what."""


class AttentionCall(Protocol):
    """What answers a module's call: [1, heads, tokens, head_dim] each, to [1, tokens, heads, head_dim]."""

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor: ...


def register() -> None:
    """Make both forms known to transformers, under SERVING and OUTLINE. Again does nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for name in (SERVING, OUTLINE):
        AttentionInterface.register(name, _attention)
    # The serving one has no masks: transformers then makes none, and none is needed.
    AttentionMaskInterface.register(OUTLINE, _outline_mask)


@contextmanager
def single_sequences() -> Iterator[None]:
    """Let transformers take positions for those of one sequence, without looking at them.

    Its search for packed sequences reads positions on the host, which tensors on the meta device don't have.
    """
    from transformers import masking_utils

    search = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search


def attach(model: nn.Module, call: AttentionCall) -> None:
    """Let `call` answer for the attention of every layer of `model`."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, _STEP, call)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    call: AttentionCall | None = getattr(module, _STEP, None)
    if call is None:
        raise UnservableAttention(f"{type(module).__name__} has attention outside of numbered layers")
    return call.attend(module, query, key, value, mask=attention_mask, arguments=arguments), None


def _outline_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any],
    **rest: Any,
) -> torch.Tensor:
    """Who sees whom, [1, 1, queries, keys] bool on the CPU, as the module's own rule says."""
    with torch.device("cpu"):
        queries, keys = torch.arange(q_length) + q_offset, torch.arange(kv_length) + kv_offset
        zero = torch.zeros((), dtype=torch.int64)
        rows = [[bool(mask_function(zero, zero, query, key)) for key in keys] for query in queries]
        return torch.tensor(rows)[None, None]


@dataclass(slots=True)
class AttentionOutline:
    """What each layer asks for, in the order of the calls: (layer, spec)."""

    specs: list[tuple[int, AttentionSpec]] = field(default_factory=list)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        """Note the call. Raises UnservableAttention for what the paged attention would compute otherwise."""
        unknown = {name for name, argument in arguments.items() if argument is not None}
        if unknown := unknown - _READ - _WITHOUT_EFFECT:
            raise UnservableAttention(f"attention takes {', '.join(sorted(unknown))}")
        if arguments.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise UnservableAttention("attention is not causal")
        if key.shape[:3] != value.shape[:3]:
            raise UnservableAttention("there are not as many keys as values")
        if key.shape[2] != query.shape[2] or query.shape[0] != 1:
            raise UnservableAttention("queries and keys are not of the same tokens")
        scale, softcap = arguments.get("scaling"), arguments.get("softcap")
        window = arguments.get("sliding_window")
        if any(isinstance(number, torch.Tensor) for number in (scale, softcap, window)):
            raise UnservableAttention("attention's scale, cap or window is computed in every step")
        spec = AttentionSpec(
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=max(key.shape[3], value.shape[3]),
            scale=query.shape[3] ** -0.5 if scale is None else float(scale),
            sliding_window=None if window is None else int(window),
            softcap=None if softcap is None else float(softcap),
        )
        if mask is not None and not torch.equal(mask[0, 0], _paged_mask(query.shape[2], spec.sliding_window)):
            raise UnservableAttention(
                "its mask is neither causal nor the sliding window that attention is told"
            )
        self.specs.append((int(module.layer_idx), spec))  # type: ignore[arg-type]
        return _as_wide(query, value.shape[3]).transpose(1, 2).contiguous()


def _as_wide(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Heads of so many dimensions: with zeros behind them, which change no score and no sum, or cut.

    Heads that come out of a latent have keys and values of different widths, and the cache has one.
    """
    missing = head_dim - heads.shape[-1]
    return nn.functional.pad(heads, (0, missing)) if missing else heads


def _paged_mask(num_tokens: int, window: int | None) -> torch.Tensor:
    """What the paged attention lets each token see, [num_tokens, num_tokens] bool."""
    places = torch.arange(num_tokens, device="cpu")
    distance = places[:, None] - places
    return (distance >= 0) & (distance < (num_tokens if window is None else window))


@dataclass(slots=True)
class PagedAttentionStep:
    """The attention of one model's steps. The last three fields are the step's own."""

    backend: AttentionBackend
    specs: Sequence[AttentionSpec]
    layer_caches: Sequence[LayerCache] = ()
    metadata: AttentionMetadata | None = None
    arena: Arena | None = None

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        """Keys and values to the cache, and attention over all that it has of each row."""
        assert self.metadata is not None and self.arena is not None
        _refuse_mask(mask)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        spec, layer_cache, num_tokens = self.specs[layer], self.layer_caches[layer], query.shape[2]
        num_heads = spec.num_heads + 2 * spec.num_kv_heads
        heads = self.arena.take("wide", num_tokens, num_heads, spec.head_dim, dtype=query.dtype)
        parts = [_as_wide(part[0], spec.head_dim) for part in (query, key, value)]
        torch.cat(parts, out=heads.transpose(0, 1))
        rotary_cache_write(
            heads.view(num_tokens, -1),
            None,  # the module has turned them
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            slot_mapping=self.metadata.inputs.groups[layer_cache.group].slot_mapping,
            key_cache=layer_cache.key,
            value_cache=layer_cache.value,
            key_scale=layer_cache.key_scale,
            value_scale=layer_cache.value_scale,
        )
        attended = self.arena.take("inner", num_tokens, spec.num_heads, spec.head_dim, dtype=query.dtype)
        sinks = arguments.get("s_aux")
        self.backend.forward(
            heads[:, : spec.num_heads],
            layer_cache=layer_cache,
            spec=spec,
            metadata=self.metadata,
            sinks=None if sinks is None else sinks.float(),
            out=attended,
        )
        return attended[None, ..., : value.shape[3]]


def _refuse_mask(mask: torch.Tensor | None) -> None:
    """transformers makes none for us, so it would be the module's own: of keys that it has chosen."""
    if mask is not None:
        raise UnservableAttention("its layers choose by themselves what a token sees")


class AbsentAttention:
    """Attention that returns its queries, for looking at what a module does around it."""

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        _refuse_mask(mask)
        return _as_wide(query, value.shape[3]).transpose(1, 2).contiguous()
