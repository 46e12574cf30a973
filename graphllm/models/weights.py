"""From a checkpoint's tensors to a decoder's parameters.

Every tensor goes straight into its rows of the final, merged parameter, one at a time: at no moment is
there more in memory than the model and one tensor. Owns the accounting: a tensor that is missing, left
over or of another shape is an error that names it, before anything is read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
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
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def load_model(
    checkpoint: Checkpoint | DummyCheckpoint,
    *,
    backend: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    product: LinearProduct | None = None,
    max_model_len: int | None = None,
) -> Decoder:
    """Build the checkpoint's decoder on `device` with all weights in `dtype`.

    A dummy checkpoint's weights are drawn at random, always the same.
    progress(tensors loaded, tensors in all) is called after each tensor. product: the library behind the
    linear layers; None measures which is fastest here, in less than half a second, and sets its threads.
    max_model_len: the longest context that will be served, None for the model's own; LongRoPE depends on it.
    Raises CheckpointError naming the file, and the tensor or configuration key at fault.
    """
    family = find_family(checkpoint)
    config = read_model_config(checkpoint, family)
    if max_model_len is not None:
        longest = min(max_model_len, config.max_position_embeddings)
        config = replace(config, max_position_embeddings=longest)
    if not isinstance(checkpoint, DummyCheckpoint):
        check_sizes(config, checkpoint, family=family, backend=backend)
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
    shapes = (*_attention_shapes(config), *_feed_forward_shapes(config))
    if device.type == "cuda":
        head = (config.vocab_size, config.embedding_size or config.hidden_size)
        return gpu_product((*shapes, head), dtype=dtype, device=device)
    if dtype != torch.float32:
        return linear_ref
    choice = choose_cpu_product(shapes, num_threads=torch.get_num_threads())
    logger.info("linear layers by %s (ms at 1 and 16 rows: %s)", choice.name, choice.milliseconds)
    return choice.product


def _attention_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(out_features, in_features) of an attention layer's products."""
    hidden, latent = config.hidden_size, config.latent
    query_size, kv_size = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    if latent is None:
        return [(query_size + 2 * kv_size, hidden), (hidden, query_size)]
    value_size = config.num_heads * latent.value_dim
    plain_size = query_size - config.num_heads * latent.turned_dim
    return [
        ((latent.query_rank or 0) + latent.key_value_rank + latent.turned_dim, hidden),
        (query_size, latent.query_rank or hidden),
        (plain_size + value_size, latent.key_value_rank),
        (hidden, value_size),
    ]


def _feed_forward_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(out_features, in_features) of all feed-forward layers' products, an expert's among them; each once."""
    hidden, shapes = config.hidden_size, dict[tuple[int, int], None]()
    for moe in dict.fromkeys(layer.moe for layer in config.layers):
        sizes = {config.intermediate_size: 1 + config.is_gated}
        if moe is not None:
            sizes = {moe.expert_intermediate_size: 2, moe.shared_intermediate_size: 2}
            shapes[moe.routing.num_experts + moe.has_shared_gate, hidden] = None
        for size, num_parts in sizes.items():
            if size:
                shapes |= dict.fromkeys(((num_parts * size, hidden), (hidden, size)))
    return list(shapes)


def load_weights(
    model: Decoder,
    checkpoint: Checkpoint,
    *,
    family: Family,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill every parameter of `model` from the checkpoint, or raise CheckpointError."""
    if family.unpack is not None:
        checkpoint = family.unpack(checkpoint)
    slots = _checked_slots(model, checkpoint, family)
    names = checkpoint.tensor_names()
    wanted = [name for name in names if name in slots]  # in the file's order, to read it once through
    for index, name in enumerate(wanted, 1):
        slots[name].load(_read(checkpoint, name))
        if progress is not None:
            progress(index, len(wanted))
    head = f"{family.weight_names['head']}.weight"
    if model.config.tie_word_embeddings and head in names:
        _check_same_as_embedding(model, checkpoint, head)


def _checked_slots(model: Decoder, checkpoint: Checkpoint, family: Family) -> dict[str, WeightSlot]:
    """Every tensor's place by its name, once names and shapes are those that the configuration asks for."""
    names = _without_spare_layers(checkpoint.tensor_names(), family, num_layers=model.config.num_layers)
    prefix = _left_out_prefix(family, names)
    slots = _slots_by_checkpoint_name(model, family, names=set(names), prefix=prefix)
    ignored = [name.removeprefix(prefix) for name in family.ignored_weights]
    if model.config.tie_word_embeddings:
        ignored.append(f"{family.weight_names['head']}.weight")
    _check_names(checkpoint, names, slots=slots, ignored=ignored)
    for name, slot in slots.items():
        if (shape := tuple(checkpoint.tensor_shape(name))) != slot.shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r} has shape {list(shape)}; "
                f"the configuration asks for {list(slot.shape)}."
            )
    return slots


def check_sizes(
    config: ModelConfig, checkpoint: Checkpoint, *, family: Family, backend: AttentionBackend
) -> None:
    """Refuse a configuration whose tensors are not the checkpoint's before memory is taken for them.

    Raises CheckpointError as `load_weights` does.
    """
    if family.unpack is not None:
        checkpoint = family.unpack(checkpoint)
    nowhere = torch.device("meta")
    outline = Decoder(
        config, backend=backend, scheme=Unquantized(linear_ref), device=nowhere, dtype=torch.float32
    )
    _checked_slots(outline, checkpoint, family)


def _slots_by_checkpoint_name(
    model: Decoder, family: Family, *, names: Collection[str], prefix: str
) -> dict[str, WeightSlot]:
    """Every place for a tensor in the model, under the tensor's name in the checkpoint.

    names: the checkpoint's. prefix: what it leaves out of them.
    """
    slots = {}
    for path, module in model.named_modules():
        if not isinstance(module, LoadableModule):
            continue
        for name, slot in _slots_as_stored(path, module, family).items():
            part, _, tensor = f"{path}.{name}".rpartition(".")
            pattern = _without_numbers(part)
            in_full = family.weight_names.get(f"{pattern}.{tensor}")
            stored = f"{family.weight_names[pattern]}.{tensor}" if in_full is None else in_full
            layout = family.layouts.get(pattern)
            place = slot if layout is None else layout(slot, model.config)
            numbers = _NUMBER.findall(part)
            if (other := family.alternative_names.get(pattern)) is not None:
                other = f"{other}.{tensor}"
                stored = other if other.format(*numbers).removeprefix(prefix) in names else stored
            slots[stored.format(*numbers).removeprefix(prefix)] = place
    return slots


def _slots_as_stored(path: str, module: LoadableModule, family: Family) -> dict[str, WeightSlot]:
    """The layer's slots: one for all its parts together where the family names them so."""
    whole, pattern = module.whole_slots(), _without_numbers(path)
    names = {pattern, *(f"{pattern}.{name}" for name in whole)}
    return module.weight_slots() if names.isdisjoint(family.weight_names) else whole


def _without_numbers(path: str) -> str:
    return _NUMBER.sub("{}", path)


def _left_out_prefix(family: Family, names: Collection[str]) -> str:
    """The family's optional prefix where no name of the checkpoint begins with it, else nothing."""
    prefix = family.optional_prefix
    return "" if not prefix or any(name.startswith(prefix) for name in names) else prefix


def _without_spare_layers(names: Collection[str], family: Family, *, num_layers: int) -> list[str]:
    if not family.spare_layers:
        return [*names]
    layer = re.compile(re.escape(family.spare_layers).replace(r"\{\}", r"(\d+)"))
    found = ((name, layer.match(name)) for name in names)
    return [name for name, match in found if match is None or int(match[1]) < num_layers]


def _check_names(
    checkpoint: Checkpoint,
    names: Collection[str],
    *,
    slots: Mapping[str, WeightSlot],
    ignored: Sequence[str],
) -> None:
    """Refuse missing tensors, and tensors that nothing here would use."""
    if missing := sorted(slots.keys() - set(names)):
        raise CheckpointError(f"{checkpoint.path}: {_listed(missing)} missing.")
    patterns = [
        re.escape(name).replace(r"\{\}", r"\d+") + (".*" if name.endswith(".") else "") for name in ignored
    ]
    left_over = [
        name
        for name in names
        if name not in slots and not any(re.fullmatch(pattern, name) for pattern in patterns)
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
