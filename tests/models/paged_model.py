"""Runs a decoder over a paged cache the way the runner does, for comparison with a plain forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphllm.arena import Arena
from graphllm.attention.backend import AttentionBackend, AttentionBucket, AttentionInputs, GroupInputs
from graphllm.cache.kv_cache import KVCache, LayerKV
from graphllm.models.decoder import Decoder

BLOCK_SIZE = 4
NUM_BLOCKS = 160
MAX_BLOCKS = 32
NUM_SLOTS = 8


class PagedModel:
    """A decoder with its own cache. Unused slots hold NaN; blocks are handed out in random order.

    So do slots of blocks that lie behind a layer's window: a runner gives these to others.
    """

    def __init__(
        self,
        model: Decoder,
        backend: AttentionBackend,
        *,
        dtype: torch.dtype = torch.float32,
        arena: Arena | None = None,
    ) -> None:
        self.model, self.backend = model, backend
        config = model.config
        shape = config.kv_cache_shape(block_size=BLOCK_SIZE, dtype=dtype)
        cache = KVCache(shape, NUM_BLOCKS, device=torch.device("cpu"))
        for pool in cache.pools.pools:
            pool.fill_(torch.nan)
        self.layers = cache.layers
        order = 1 + torch.randperm(NUM_BLOCKS - 1, generator=torch.Generator().manual_seed(1))
        self._free_blocks = order.tolist()
        self.block_tables = torch.zeros(NUM_SLOTS, MAX_BLOCKS, dtype=torch.int32)
        self.lengths = [0] * NUM_SLOTS
        self._arena = arena or Arena(torch.device("cpu"))

    @torch.inference_mode()
    def step(self, rows: Sequence[tuple[int, Sequence[int]]], *, num_decode_rows: int = 0) -> torch.Tensor:
        """Feed (slot, next token ids) rows in one batch; returns logits [num_tokens, vocab] float32."""
        slots = torch.tensor([slot for slot, _ in rows])
        query_lens = torch.tensor([len(token_ids) for _, token_ids in rows])
        starts = torch.tensor([self.lengths[slot] for slot, _ in rows])
        for slot, token_ids in rows:
            self._extend(slot, len(token_ids))
        token_rows = torch.repeat_interleave(query_lens)
        query_starts = torch.cat((torch.zeros(1, dtype=torch.int64), query_lens.cumsum(0)))
        positions = torch.arange(len(token_rows)) - query_starts[token_rows] + starts[token_rows]
        blocks = self.block_tables[slots[token_rows], positions // BLOCK_SIZE].long()
        inputs = AttentionInputs(
            row_slots=slots,
            query_lens=query_lens,
            context_lens=starts + query_lens,
            query_starts=query_starts,
            positions=positions,
            groups=(
                GroupInputs(
                    slot_mapping=blocks * BLOCK_SIZE + positions % BLOCK_SIZE, block_tables=self.block_tables
                ),
            ),
        )
        bucket = AttentionBucket(len(positions), len(rows), num_decode_rows)
        metadata = self.backend.plan(inputs, bucket)
        self.backend.begin_step(metadata)
        input_ids = torch.tensor([token_id for _, token_ids in rows for token_id in token_ids])
        logits = torch.empty(len(positions), self.model.config.vocab_size)
        self.model(
            input_ids,
            positions,
            layer_caches=self.layers,
            metadata=metadata,
            arena=self._arena,
            sampled_tokens=torch.arange(len(positions)),
            logits=logits,
        )
        for slot in slots.tolist():
            self._spoil_behind_windows(slot)
        return logits

    @torch.inference_mode()
    def hidden(self, num_tokens: int) -> torch.Tensor:
        """The last step's final hidden states, [num_tokens, hidden_size]; it had so many tokens."""
        tokens = torch.arange(num_tokens)
        return self.model.final_hidden(tokens, num_tokens=num_tokens, arena=self._arena).clone()

    def _spoil_behind_windows(self, slot: int) -> None:
        for layer, config in zip(self.layers, self.model.config.layers, strict=True):
            if config.sliding_window is not None:
                num_blocks = max(0, self.lengths[slot] - config.sliding_window + 1) // BLOCK_SIZE
                blocks = self.block_tables[slot, :num_blocks]
                assert isinstance(layer, LayerKV), "latents have no windows"
                for stored in (layer.key, layer.value):
                    stored[blocks] = torch.nan

    def _extend(self, slot: int, num_tokens: int) -> None:
        num_blocks = -(-self.lengths[slot] // BLOCK_SIZE)
        self.lengths[slot] += num_tokens
        while num_blocks * BLOCK_SIZE < self.lengths[slot]:
            self.block_tables[slot, num_blocks] = self._free_blocks.pop()
            num_blocks += 1
