"""The token of each row, from its chunks' best, to where the next step and the host read it.

    token = id of the largest key; where nothing is left above -inf, the argmax of the model's logits

Owns the last resort and the two places. With `argmax.py` it is the whole of greedy sampling, with
`gumbel_draw.py` the end of the general one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.sampled_rows import SampledRows, line_of
from graphllm.kernels.top_tokens import best_key, id_of_key, value_of_key
from graphllm.kernels.triton_support import launch_options, release_successor, wait_for_predecessor
from graphllm.kernels.vocab_tiles import CHUNK_SIZE, num_chunks, without_nan


@triton.jit(do_not_specialize=["table_width"])
def _chosen_tokens_kernel(
    chunk_keys,
    logits,
    lines,
    slots,
    lengths,
    token_table,
    token_ids,
    table_width,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    HAS_LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    pair = tl.program_id(0)
    line = line_of(lines, pair, HAS_LINES)
    slot = tl.load(slots + pair)
    chunks = tl.arange(0, CHUNKS_PADDED)
    keys = tl.load(chunk_keys + pair * NUM_CHUNKS + chunks, mask=chunks < NUM_CHUNKS, other=-(2**63))
    key = tl.max(keys, 0)
    if value_of_key(key) == float("-inf"):
        # The adjusted row's key, of whichever token, must not outlive this.
        key = tl.full((), -(2**63), tl.int64)
        for start in range(0, VOCAB, CHUNK):
            ids = start + tl.arange(0, CHUNK)
            values = tl.load(logits + line * VOCAB + ids, mask=ids < VOCAB, other=float("-inf"))
            key = tl.maximum(key, best_key(without_nan(values), ids))
    token = id_of_key(key)
    tl.store(token_ids + line, token)
    tl.store(token_table + slot * table_width + tl.load(lengths + slot), token.to(tl.int32))


def chosen_tokens(
    chunk_keys: Tensor, logits: Tensor, *, rows: SampledRows, token_table: Tensor, out: Tensor
) -> Tensor:
    """Write pair i's token to `out[lines[i]]` and to `token_table[slots[i], lengths[slots[i]]]`.

    chunk_keys: [num_pairs, num_chunks] int64, a token key for each chunk. logits: [num_lines, vocab]
    float32, as the model left them. token_table: [num_slots, width] int32. out: [num_lines] int64.
    A kernel only.
    """
    vocab_size = logits.shape[1]
    chunks = num_chunks(vocab_size)
    _chosen_tokens_kernel[(rows.num_pairs,)](
        chunk_keys,
        logits,
        rows.lines_or_any,
        rows.slots,
        rows.lengths,
        token_table,
        out,
        token_table.shape[1],
        VOCAB=vocab_size,
        CHUNK=CHUNK_SIZE,
        NUM_CHUNKS=chunks,
        CHUNKS_PADDED=triton.next_power_of_2(chunks),
        HAS_LINES=rows.lines is not None,
        num_warps=4,
        **launch_options(logits.device),
    )
    return out
