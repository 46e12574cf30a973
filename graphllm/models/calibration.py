"""How large the activations are that each layer multiplies, measured once on a short text.

What a rounding error of a weight costs depends on the input feature that it is multiplied by: a model has
features hundreds of times as large as others, the same ones in every text. A scheme that rounds weights can
heed that, where it knows the mean square of each feature before it does (Lin et al., 2024, arXiv:2306.00978).

The plain model runs once over some hundred tokens, on the CPU and in float32 whatever the device. One layer
at a time is in memory: it is loaded, run and dropped, so a model that needs its weights packed to fit is
measured all the same. Owns this run. What comes of the numbers is the scheme's.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graphllm.arena import Arena
from graphllm.attention.backend import AttentionBucket, AttentionInputs, GroupInputs
from graphllm.attention.paged import PagedAttention
from graphllm.cache.kv_cache import KVCache
from graphllm.errors import CheckpointError
from graphllm.kernels.expert_activation import ExpertActivation
from graphllm.kernels.gated_activation import Activation
from graphllm.kernels.linear import linear_ref
from graphllm.kernels.moe_sum import SharedPart
from graphllm.kernels.moe_tiles import RoutedTokens
from graphllm.layers.linear import Linear
from graphllm.layers.loadable import WeightSlot
from graphllm.layers.moe import ExpertStack
from graphllm.models.config import ModelConfig
from graphllm.models.decoder import Decoder
from graphllm.models.quantization import ModelQuantization
from graphllm.models.stored_names import StoredNames
from graphllm.models.weight_slots import slots_by_stored_name
from graphllm.quant.scheme_source import SchemeSource
from graphllm.quant.unquantized import Unquantized

if TYPE_CHECKING:
    from graphllm.models.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

MAX_TOKENS = 384
_BLOCK_SIZE = 16
_CPU = torch.device("cpu")
TEXT = """\
The harbour of a small town fills with boats before sunrise. By eight o'clock the market is open, and people
buy bread, fish and apples, talk about the weather and go to work. In 1906 a railway reached the coast; since
then the number of visitors has grown by 3.5 % a year.

Question: Why is the sky blue? Answer: Sunlight is made of many colours. Air scatters short waves more
strongly than long ones, so blue light comes to us from every direction, and in the evening, when the way
through the air is long, red remains.

def mean(values: list[float]) -> float:
    # The arithmetic mean of some values.
    if not values:
        raise ValueError("no values")
    return sum(values) / len(values)

1. Heat the oil in a pan. 2. Add two onions, cut small, and a little salt. 3. After ten minutes, add 400 g
of tomatoes.

"Where have you been?" she asked. "I waited for an hour." He smiled: "The last bus left early, so I walked
home through the rain."

Der Zug nach Berlin hat heute zehn Minuten Verspätung. Le musée est ouvert tous les jours sauf le lundi. El
perro duerme debajo de la mesa.

{"id": 17, "name": "lamp", "price": 24.90, "tags": ["home", "light"], "in_stock": true}

Let f(x) = x^2 - 4x + 3. Then f(x) = (x - 1)(x - 3), so the roots are 1 and 3, and the minimum is f(2) = -1.
"""
"""Of several kinds on purpose, and part of no benchmark."""


class MeasuredLinear(Unquantized):
    """Plain weights that are in memory only while their layer runs, and that add up what they multiply.

    sums: of each layer that has run, its inputs' squares [in_features] in float32, and of how many rows.
    """

    def __init__(self) -> None:
        super().__init__(linear_ref)
        self.sums: dict[nn.Module, tuple[Tensor, int]] = {}

    def create_weights(
        self,
        layer: nn.Module,
        *,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().create_weights(
            layer,
            in_features=in_features,
            out_features=out_features,
            bias=bias,
            device=torch.device("meta"),
            dtype=dtype,
        )

    def apply(self, layer: nn.Module, x: Tensor, *, out: Tensor) -> None:
        self._add(layer, x)
        super().apply(layer, x, out=out)

    def apply_gated(self, layer: nn.Module, x: Tensor, activation: Activation, *, out: Tensor) -> bool:
        return False

    def apply_experts_gated(
        self,
        layer: nn.Module,
        x: Tensor,
        routed: RoutedTokens,
        activation: ExpertActivation,
        *,
        out: Tensor,
    ) -> None:
        self._add(layer, x)
        super().apply_experts_gated(layer, x, routed, activation, out=out)

    def apply_experts(
        self,
        layer: nn.Module,
        x: Tensor,
        routed: RoutedTokens,
        shared: SharedPart | None,
        *,
        results: Tensor | None,
        out: Tensor,
    ) -> None:
        self._add(layer, x)
        super().apply_experts(layer, x, routed, shared, results=results, out=out)

    def _add(self, layer: nn.Module, x: Tensor) -> None:
        squares, num_rows = self.sums.get(layer, (torch.zeros(x.shape[1]), 0))
        self.sums[layer] = squares + x.square().sum(0), num_rows + len(x)


def input_mean_squares(
    checkpoint: Checkpoint, config: ModelConfig, *, quantization: ModelQuantization
) -> dict[str, Tensor]:
    """Of each linear layer and stack of experts of the decoder's layers, by its path in the decoder: the mean
    square of its input features [in_features], float32.

    checkpoint: of plain weights. quantization: what it is to be stored as.
    """
    began = time.monotonic()
    measured = MeasuredLinear()
    schemes = SchemeSource(MeasuredLinear(), lambda path: measured)  # routers and heads stay plain
    backend = PagedAttention(block_size=_BLOCK_SIZE)
    model = Decoder(config, backend=backend, schemes=schemes, device=_CPU, dtype=torch.float32).eval()
    plain = ModelQuantization(quantization.path, quantization.family)
    stored = StoredNames.of(plain.family, checkpoint.tensor_names())
    of_layers = [
        slots_by_stored_name(model, stored, quantization=plain, within=f"layers.{index}.")
        for index in range(config.num_layers)
    ]
    outside = slots_by_stored_name(model, stored, quantization=plain)
    for unneeded in (*of_layers, slots_by_stored_name(model, stored, quantization=plain, within="head")):
        for name in unneeded:
            del outside[name]
    token_ids = _token_ids(checkpoint, config)
    _run(model, checkpoint, token_ids, outside=outside, of_layers=of_layers)
    logger.info("activations of %d tokens measured in %.1f s", len(token_ids), time.monotonic() - began)
    means = {layer: squares / num_rows for layer, (squares, num_rows) in measured.sums.items()}
    modules = model.named_modules()
    return {path: means[layer] for path, layer in modules if layer in means and path.startswith("layers.")}


def _token_ids(checkpoint: Checkpoint, config: ModelConfig) -> Tensor:
    """The text's tokens; without a tokenizer, some that lie evenly in the vocabulary."""
    max_tokens = min(MAX_TOKENS, config.max_position_embeddings)
    try:
        found = checkpoint.load_tokenizer().encode(TEXT, add_special_tokens=True)[:max_tokens]
    except CheckpointError as error:
        logger.info("activations are measured on tokens at random: %s", error)
        found = []
    token_ids = torch.tensor(found, dtype=torch.int64)
    if len(token_ids) and int(token_ids.max()) < config.vocab_size:
        return token_ids
    return (torch.arange(max_tokens) * 2654435761) % config.vocab_size


@torch.inference_mode()
def _run(
    model: Decoder,
    checkpoint: Checkpoint,
    token_ids: Tensor,
    *,
    outside: dict[str, WeightSlot],
    of_layers: list[dict[str, WeightSlot]],
) -> None:
    """One prompt through the layers, each of which has weights only while it runs."""
    config, num_tokens = model.config, len(token_ids)
    num_blocks = -(-num_tokens // _BLOCK_SIZE)
    shape = config.kv_cache_shape(block_size=_BLOCK_SIZE, dtype=torch.float32)
    kv_cache = KVCache(shape, num_blocks + 1, device=_CPU)
    positions = torch.arange(num_tokens)
    inputs = AttentionInputs(
        row_slots=torch.tensor([0]),
        query_lens=torch.tensor([num_tokens]),
        context_lens=torch.tensor([num_tokens]),
        query_starts=torch.tensor([0, num_tokens]),
        positions=positions,
        groups=(
            GroupInputs(
                slot_mapping=_BLOCK_SIZE + positions,
                block_tables=torch.arange(1, num_blocks + 1, dtype=torch.int32)[None],
            ),
        ),
    )
    metadata = model.backend.plan(inputs, AttentionBucket(num_tokens, 1, 0))
    model.backend.begin_step(metadata)
    outer = [module for path, module in model.named_modules() if not path.startswith(("layers", "head"))]
    _materialize(outer)
    _load(checkpoint, outside)
    steps = model.forward_in_slices(
        token_ids,
        positions,
        layer_caches=kv_cache.layers,
        metadata=metadata,
        arena=Arena(_CPU),
        sampled_tokens=torch.empty(0, dtype=torch.int64),
        logits=torch.empty(0, config.vocab_size),
    )
    for layer, slots in zip(model.layers, of_layers, strict=True):
        modules = [*layer.modules()]
        _materialize(modules)
        _load(checkpoint, slots)
        next(steps)
        for module in modules:
            if isinstance(module, Linear | ExpertStack):
                module.to("meta")


def _materialize(modules: list[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, Linear | ExpertStack):
            module.to_empty(device=_CPU)


def _load(checkpoint: Checkpoint, slots: dict[str, WeightSlot]) -> None:
    for name in checkpoint.tensor_names():
        if name in slots:
            slots[name].load(checkpoint.tensor(name))
