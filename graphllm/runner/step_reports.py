"""What a step reports beside its sampled tokens: logprobs of prompt tokens.

Owns the memory for them on either side, and how prompt tokens are scored: a slice of lines at a time, in the
memory of the step's logits, when these are no longer needed. All of it runs behind the step, outside its
graph, on what the forward has left in the arena.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, fields
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from graphllm.arena import Arena
from graphllm.batch import ScheduledBatch, ScoredSpan
from graphllm.kernels.logprobs import logprobs_ref, write_logprobs
from graphllm.kernels.sampled_rows import SampledRows
from graphllm.kernels.token_ranks import token_ranks
from graphllm.kernels.triton_support import runs_triton
from graphllm.kernels.vocab_tiles import num_chunks
from graphllm.outputs import PromptScores
from graphllm.sampling_params import MAX_LOGPROBS


@dataclass(frozen=True, slots=True)
class ScoreLines:
    """A line for each prompt token that a step scores, on the device or in its staging memory.

    Into the step: tokens [num_lines] int64, which of the step's tokens predicts the scored one; targets
    [num_lines] int64, the scored token's id. Out of it: logprobs [num_lines] float32, ranks [num_lines]
    int32, top_ids [num_lines, 20] int64 and top_logprobs [num_lines, 20] float32, most likely first.
    """

    tokens: Tensor
    targets: Tensor
    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    @classmethod
    def allocate(cls, num_lines: int, empty: Callable[..., Tensor]) -> ScoreLines:
        """empty(*size, dtype=...) gives the memory."""
        return cls(
            tokens=empty(num_lines, dtype=torch.int64),
            targets=empty(num_lines, dtype=torch.int64),
            logprobs=empty(num_lines, dtype=torch.float32),
            ranks=empty(num_lines, dtype=torch.int32),
            top_ids=empty(num_lines, MAX_LOGPROBS, dtype=torch.int64),
            top_logprobs=empty(num_lines, MAX_LOGPROBS, dtype=torch.float32),
        )

    def part(self, lines: slice) -> ScoreLines:
        """The same memory, these lines alone."""
        return ScoreLines(*(getattr(self, field.name)[lines] for field in fields(self)))


def stage_spans(batch: ScheduledBatch, scores: ScoreLines, *, num_slice_lines: int) -> int:
    """Write what of its prompts `batch` scores into host memory; returns the number of lines.

    The last slice of `num_slice_lines` is filled up with the step's first token.
    """
    if not batch.spans:
        return 0
    first_tokens = list(accumulate((row.num_tokens for row in batch.rows), initial=0))
    tokens, targets = scores.tokens.numpy(), scores.targets.numpy()
    num_lines = 0
    for span in batch.spans:
        first, end = first_tokens[span.row] + span.offset, num_lines + span.num_tokens
        tokens[num_lines:end] = np.arange(first, first + span.num_tokens)
        prompt = span.sequence.group.prompt_token_ids
        targets[num_lines:end] = prompt[span.position : span.position + span.num_tokens]
        num_lines = end
    padded = -(-num_lines // num_slice_lines) * num_slice_lines
    tokens[num_lines:padded] = targets[num_lines:padded] = 0
    return num_lines


def upload_scores(host: ScoreLines, device: ScoreLines) -> None:
    """Which tokens to score; runs on the device. All lines: a part of them would save nothing."""
    device.tokens.copy_(host.tokens, non_blocking=True)
    device.targets.copy_(host.targets, non_blocking=True)


def download_scores(device: ScoreLines, host: ScoreLines, *, num_lines: int) -> None:
    """Copy the scores to the host, in stream order."""
    for name in ("logprobs", "ranks", "top_ids", "top_logprobs"):
        source, target = getattr(device, name), getattr(host, name)
        target[:num_lines].copy_(source[:num_lines], non_blocking=True)


def score_lines(logits: Tensor, scores: ScoreLines, *, rows: SampledRows, arena: Arena, num_top: int) -> None:
    """Fill in logprobs, ranks and the `num_top` best alternatives (at most 20) of all lines of `scores`.

    logits: [num_lines, vocab] float32, contiguous; `rows` has as many pairs, without lines. Kernels always
    write 20 alternatives, as the sampler's does: one for each number would be compiled while serving. Their
    scratch is `arena`'s, under the sampler's names.
    """
    token_ranks(logits, scores.targets, out=scores.ranks)
    if not runs_triton(logits):
        _score_lines_by_reference(logits, scores, num_top=num_top)
        return
    size = len(logits), num_chunks(logits.shape[1])
    write_logprobs(
        logits,
        rows,
        chunk_top_keys=arena.take("sampler_top_keys", *size, MAX_LOGPROBS, dtype=torch.int64),
        chunk_masses=arena.take("sampler_masses", *size, dtype=torch.float32),
        token_ids=scores.targets,
        out=(scores.logprobs, scores.top_ids, scores.top_logprobs),
    )


def _score_lines_by_reference(logits: Tensor, scores: ScoreLines, *, num_top: int) -> None:
    largest = torch.finfo(torch.float32).max
    logits = logits.nan_to_num(nan=float("-inf"), posinf=largest, neginf=float("-inf"))
    found = logprobs_ref(logits, num_top)
    scores.logprobs.copy_(found.of(logits.gather(1, scores.targets[:, None]))[:, 0])
    # A vocabulary of fewer tokens leaves the last columns without one.
    width = found.top_ids.shape[1]
    scores.top_ids[:, :width] = found.top_ids
    scores.top_logprobs[:, :width] = found.top_logprobs
    scores.top_ids[:, width:] = 0
    scores.top_logprobs[:, width:] = float("-inf")


def read_scores(spans: SequenceOf[ScoredSpan], host: ScoreLines) -> list[PromptScores]:
    """The scores of each span, out of memory that the next step will use again."""
    logprobs, ranks = host.logprobs.numpy(), host.ranks.numpy()
    top_ids, top_logprobs = host.top_ids.numpy(), host.top_logprobs.numpy()
    found, end = [], 0
    for span in spans:
        lines = slice(end, end + span.num_tokens)
        end = lines.stop
        num_top = span.sequence.params.prompt_logprobs
        found.append(
            PromptScores(
                array("f", logprobs[lines].tobytes()),
                array("i", ranks[lines].tobytes()),
                array("i", top_ids[lines, :num_top].astype(np.int32).tobytes()),
                array("f", top_logprobs[lines, :num_top].tobytes()),
            )
        )
    return found
