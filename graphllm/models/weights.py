"""From a checkpoint's tensors to a decoder's parameters.

Every tensor goes straight into its rows of the final, merged parameter, one at a time: at no moment is
there more in memory than the model and one tensor. Owns the accounting: a tensor that is missing, left
over or of another shape is an error that names it, before anything is read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from graphllm.attention.backend import AttentionBackend
from graphllm.errors import CheckpointError
from graphllm.kernels.linear import LinearProduct, choose_cpu_product, gpu_product, linear_ref
from graphllm.layers.loadable import LoadableModule, WeightSlot
from graphllm.models.config import ModelConfig
from graphllm.models.decoder import Decoder
from graphllm.models.dummy import DummyCheckpoint, fill_random
from graphllm.models.family import Family
from graphllm.models.registry import find_family, read_model_config
from graphllm.quant.unquantized import Unquantized

if TYPE_CHECKING:
    from graphllm.models.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

_MAX_NAMES_SHOWN = 3
_ROWS_COMPARED = 4096
_DUMMY_SEED = 0


def load_model(
    checkpoint: Checkpoint | DummyCheckpoint,
    *,
    backend: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    product: LinearProduct | None = None,
) -> Decoder:
    """Build the checkpoint's decoder on `device` with all weights in `dtype`.

    A dummy checkpoint's weights are drawn at random, always the same.
    progress(tensors loaded, tensors in all) is called after each tensor. product: the library behind the
    linear layers; None measures which is fastest here, in less than half a second, and sets its threads.
    Raises CheckpointError naming the file, and the tensor or configuration key at fault.
    """
    family = find_family(checkpoint)
    config = read_model_config(checkpoint, family)
    if product is None:
        product = choose_product(config, device=device, dtype=dtype)
    model = Decoder(config, backend=backend, scheme=Unquantized(product), device=device, dtype=dtype)
    if isinstance(checkpoint, DummyCheckpoint):
        fill_random(model, seed=_DUMMY_SEED)
    else:
        load_weights(model, checkpoint, family=family, progress=progress)
    return model.eval()


def choose_product(config: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> LinearProduct:
    """The product library for a model of this shape.

    On a card each product takes what was measured to be fastest there. In float32 on a CPU two libraries
    are timed, and the number of their threads is set within torch's present one (`kernels/linear.py`).
    """
    query_size, kv_size = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    shapes = (
        (query_size + 2 * kv_size, config.hidden_size),
        (config.hidden_size, query_size),
        (2 * config.intermediate_size, config.hidden_size),
        (config.hidden_size, config.intermediate_size),
    )
    if device.type == "cuda":
        head = (config.vocab_size, config.hidden_size)
        return gpu_product((*shapes, head), dtype=dtype, device=device)
    if dtype != torch.float32:
        return linear_ref
    choice = choose_cpu_product(shapes, num_threads=torch.get_num_threads())
    logger.info("linear layers by %s (ms at 1 and 16 rows: %s)", choice.name, choice.milliseconds)
    return choice.product


def load_weights(
    model: Decoder,
    checkpoint: Checkpoint,
    *,
    family: Family,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill every parameter of `model` from the checkpoint, or raise CheckpointError."""
    slots = _slots_by_checkpoint_name(model, family)
    names = list(checkpoint.tensor_names())
    _check_names(checkpoint, names, slots=slots, family=family, is_tied=model.config.tie_word_embeddings)
    for name, slot in slots.items():
        if (shape := tuple(checkpoint.tensor_shape(name))) != slot.shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r} has shape {list(shape)}; "
                f"the configuration asks for {list(slot.shape)}."
            )
    wanted = [name for name in names if name in slots]  # in the file's order, to read it once through
    for index, name in enumerate(wanted, 1):
        slots[name].load(_read(checkpoint, name))
        if progress is not None:
            progress(index, len(wanted))
    head = f"{family.weight_names['head']}.weight"
    if model.config.tie_word_embeddings and head in names:
        _check_same_as_embedding(model, checkpoint, head)


def _slots_by_checkpoint_name(model: Decoder, family: Family) -> dict[str, WeightSlot]:
    """Every place for a tensor in the model, under the tensor's name in the checkpoint."""
    slots = {}
    for path, module in model.named_modules():
        if not isinstance(module, LoadableModule):
            continue
        for name, slot in module.weight_slots().items():
            layer_module, _, tensor = f"{path}.{name}".rpartition(".")
            number = re.search(r"(?<=\.)\d+(?=\.)", layer_module)
            pattern = layer_module.replace(f".{number[0]}.", ".{}.", 1) if number else layer_module
            checkpoint_module = family.weight_names[pattern].format(number and number[0])
            slots[f"{checkpoint_module}.{tensor}"] = slot
    return slots


def _check_names(
    checkpoint: Checkpoint,
    names: Collection[str],
    *,
    slots: Mapping[str, WeightSlot],
    family: Family,
    is_tied: bool,
) -> None:
    """Refuse missing tensors, and tensors that nothing here would use."""
    if missing := sorted(slots.keys() - set(names)):
        raise CheckpointError(f"{checkpoint.path}: {_listed(missing)} missing.")
    ignored = [re.escape(name).replace(r"\{\}", r"\d+") for name in family.ignored_weights]
    if is_tied:
        ignored.append(re.escape(f"{family.weight_names['head']}.weight"))
    left_over = [
        name
        for name in names
        if name not in slots and not any(re.fullmatch(pattern, name) for pattern in ignored)
    ]
    if left_over:
        raise CheckpointError(
            f"{checkpoint.path}: {_listed(left_over)} not used by the model that the configuration describes."
        )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MAX_NAMES_SHOWN])
    if len(names) == 1:
        return f"tensor {shown} is"
    more = len(names) - _MAX_NAMES_SHOWN
    return f"tensors {shown}{f' and {more} more' if more > 0 else ''} are"


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    tensor = checkpoint.tensor(name)
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} holds {str(tensor.dtype).removeprefix('torch.')}, "
            "not floating-point numbers."
        )
    return tensor


def _check_same_as_embedding(model: Decoder, checkpoint: Checkpoint, name: str) -> None:
    """A tied head that is stored all the same must say the same as the embedding."""
    weight, tensor = model.embedding.weight, _read(checkpoint, name)
    is_same = tensor.shape == weight.shape and all(
        torch.equal(rows.to(device=weight.device, dtype=weight.dtype), weight_rows)
        for rows, weight_rows in zip(
            torch.split(tensor, _ROWS_COMPARED), torch.split(weight, _ROWS_COMPARED), strict=True
        )
    )
    if not is_same:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} differs from the embedding, "
            "though the configuration says 'tie_word_embeddings'."
        )
