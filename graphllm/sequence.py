"""The state of one generation, and of the group of generations that share one prompt.

Owns the counts and the status machine. Does not decide anything: the scheduler moves sequences,
the block manager owns blocks, the engine applies tokens.
"""

from __future__ import annotations

from enum import Enum, auto

from graphllm.adapter import Adapter
from graphllm.constraint import TokenConstraint
from graphllm.outputs import FinishReason, PromptLogprobs
from graphllm.sampling_params import SamplingParams


class SequenceStatus(Enum):
    """WAITING -> RUNNING -> FINISHED, with RUNNING -> WAITING or SWAPPED on preemption.

    A swapped sequence runs again when its blocks are back, or waits to be computed again when they are lost.
    """

    WAITING = auto()
    RUNNING = auto()
    SWAPPED = auto()
    FINISHED = auto()


class Sequence:
    """One generation.

    `token_ids` holds the prompt and every token the host has seen (confirmed). The device may be
    ahead by `num_in_flight_tokens` sampled tokens; `num_computed_tokens` counts the positions whose
    KV is computed or will be by a launched step, so it is an upper bound too.

    block_table: its blocks, column by column (a block's length of tokens), in each column one for each group
        of layers; 0 where a group needs no block any more.
    block_hashes: the chained hashes of its first full columns, as far as anyone has asked.
    num_published_columns: full columns whose blocks were offered to the prefix cache.
    host_blocks: while it is swapped, for each entry of its block table the host block that holds it, or the
        key under which the prefix cache keeps it; None where it needs none.
    transfer_id: the copy between the tiers that it waits for.
    swapped_at_step: the newest step that may have had its rows when it was swapped.
    skips_host_lookup: a copy from the host tier has failed; it computes its prompt instead.
    min_tokens_to_swap: it is not swapped again before this many tokens are computed.
    num_cached_tokens: prompt tokens that were found in the prefix cache when it first started.
    num_unscored_tokens: the prompt's last tokens whose logprobs are wanted and no launched step reports.
    constraint: decides on the host what it may sample, having accepted every confirmed output token; None
        for most. The engine sets it before the sequence is scheduled.
    """

    __slots__ = (
        "block_hashes",
        "block_table",
        "constraint",
        "finish_reason",
        "first_token_time",
        "group",
        "host_blocks",
        "index",
        "last_token_time",
        "min_tokens_to_swap",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_in_flight_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_published_columns",
        "num_swaps",
        "num_unscored_tokens",
        "skips_host_lookup",
        "slot",
        "slot_generation",
        "status",
        "stop_reason",
        "swapped_at_step",
        "token_ids",
        "transfer_id",
    )

    def __init__(self, group: SequenceGroup, index: int) -> None:
        self.group = group
        self.index = index
        self.token_ids: list[int] = list(group.prompt_token_ids)
        self.num_prompt_tokens = len(group.prompt_token_ids)
        self.status = SequenceStatus.WAITING
        self.slot: int | None = None
        self.slot_generation = 0
        self.block_table: list[int] = []
        self.num_computed_tokens = 0
        self.num_in_flight_tokens = 0
        self.num_preemptions = 0
        self.num_swaps = 0
        self.num_cached_tokens = 0
        is_scored = group.prompt_logprobs is not None and index == 0
        self.num_unscored_tokens = self.num_prompt_tokens - 1 if is_scored else 0
        self.block_hashes: list[bytes] = []
        self.num_published_columns = 0
        self.host_blocks: list[int | bytes | None] = []
        self.transfer_id: int | None = None
        self.min_tokens_to_swap = 0
        self.swapped_at_step = 0
        self.skips_host_lookup = False
        self.constraint: TokenConstraint | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None

    @property
    def params(self) -> SamplingParams:
        return self.group.params

    @property
    def num_output_tokens(self) -> int:
        """Confirmed output tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def max_num_tokens(self) -> int:
        """Upper bound of the sequence's length: confirmed tokens and those in flight."""
        return len(self.token_ids) + self.num_in_flight_tokens

    @property
    def num_settled_tokens(self) -> int:
        """Positions that no later step computes again, whatever becomes of the tokens in flight."""
        return min(self.num_computed_tokens, len(self.token_ids) - 1)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens known to the host or the device whose KV no launched step computes yet."""
        return self.max_num_tokens - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def __repr__(self) -> str:
        return (
            f"Sequence({self.group.request_id}/{self.index} {self.status.name} "
            f"tokens={len(self.token_ids)}+{self.num_in_flight_tokens} computed={self.num_computed_tokens})"
        )


class SequenceGroup:
    """A request: one prompt, one set of parameters, `n` sequences.

    `sequences[0]` leads: it computes the prompt, and its siblings join when the prompt is done.
    `seed` is the request's own or one drawn at admission. `max_total_tokens` bounds prompt and
    output together, from `max_tokens` and the context. `cache_salt` keeps its blocks from requests with
    another salt; `skips_prefix_lookup` is for those that need something computed at every position.
    A lower `priority` runs earlier; `order` numbers arrivals, given by the scheduler. With `pooling` what
    becomes of the prompt's hidden states is the answer; `keeps_device_state` while it is computed, beside its
    blocks: a sequence that gives way then begins anew. `in_one_step`: its prompt cannot be computed in parts;
    the limits of a step hold it. `adapter` changes the model for this request, which holds it until `forget`.
    `prompt_logprobs`: where the prompt's logprobs
    are gathered that `params` ask for, which no cached block can give.
    """

    __slots__ = (
        "adapter",
        "arrival_time",
        "cache_salt",
        "in_one_step",
        "keeps_device_state",
        "max_total_tokens",
        "order",
        "params",
        "pooling",
        "priority",
        "prompt_logprobs",
        "prompt_token_ids",
        "request_id",
        "seed",
        "sequences",
        "siblings_joined",
        "skips_prefix_lookup",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        *,
        params: SamplingParams,
        seed: int,
        max_total_tokens: int,
        arrival_time: float = 0.0,
        cache_salt: str | None = None,
        skips_prefix_lookup: bool = False,
        priority: int = 0,
        pooling: bool = False,
        keeps_device_state: bool = False,
        in_one_step: bool = False,
        adapter: Adapter | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.seed = seed
        self.max_total_tokens = max_total_tokens
        self.arrival_time = arrival_time
        self.cache_salt = cache_salt
        self.prompt_logprobs: PromptLogprobs | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = PromptLogprobs(prompt_token_ids, params.prompt_logprobs)
        self.skips_prefix_lookup = skips_prefix_lookup or params.prompt_logprobs is not None
        self.priority = priority
        self.pooling = pooling
        self.keeps_device_state = keeps_device_state
        self.in_one_step = in_one_step
        self.adapter = adapter
        if adapter is not None:
            adapter.retain()
        self.order = 0
        self.siblings_joined = params.n == 1
        self.sequences = [Sequence(self, index) for index in range(params.n)]

    @property
    def place(self) -> tuple[int, int]:
        """Smaller runs earlier, and gives way later."""
        return self.priority, self.order

    @property
    def adapter_load(self) -> int:
        """Which load of an adapter changes the model, 0 for none."""
        return 0 if self.adapter is None else self.adapter.load_id

    @property
    def generates(self) -> bool:
        """False with max_tokens 0: the one token that is drawn, behind the prompt, is dropped and ends it."""
        return self.params.max_tokens != 0

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)

    def forget(self) -> None:
        """Give up what is large, when all have ended and no step will be scheduled for them.

        Group and sequences refer to each other, so what is left of them waits for the garbage collector,
        which a server runs rarely; steps in flight may still name them.
        """
        self.prompt_token_ids = []
        self.prompt_logprobs = None
        if self.adapter is not None:
            self.adapter.release()
            self.adapter = None
        for sequence in self.sequences:
            sequence.token_ids = []
            sequence.block_hashes = []
            sequence.constraint = None
