"""From a checkpoint's tensors to a decoder's parameters.

Every tensor goes straight into its rows of the final, merged parameter, one at a time: at no moment is
there more in memory than the model and one tensor. Owns the accounting: a tensor that is missing, left
over or of another shape is an error that names it, before anything is read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from graphllm.attention.backend import AttentionBackend
from graphllm.errors import CheckpointError
from graphllm.kernels.linear import (
    LinearProduct,
    choose_cpu_product,
    give_threads,
    gpu_product,
    linear_ref,
)
from graphllm.layers.linear import Linear
from graphllm.layers.loadable import WeightSlot
from graphllm.layers.moe import ExpertStack
from graphllm.models.calibration import input_mean_squares
from graphllm.models.config import ModelConfig
from graphllm.models.decoder import Decoder
from graphllm.models.dummy import DummyCheckpoint, fill_random
from graphllm.models.family import Family
from graphllm.models.quantization import ModelQuantization, read_quantization
from graphllm.models.registry import find_family, read_model_config
from graphllm.models.stored_names import StoredNames
from graphllm.models.weight_slots import slots_by_stored_name
from graphllm.quant.scheme import PLAIN_DTYPES

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
    max_model_len: int | None = None,
    quantization: str | None = None,
) -> Decoder:
    """Build the checkpoint's decoder on `device`, its plain weights in `dtype`.

    A dummy checkpoint's weights are drawn at random, always the same.
    progress(tensors loaded, tensors in all) is called after each tensor. product: the library behind the
    linear layers; None measures which is fastest here, in less than half a second, and sets its threads.
    max_model_len: the longest context that will be served, None for the model's own; LongRoPE depends on it.
    quantization: `--quantization`; None for what the checkpoint says.
    Raises CheckpointError naming the file, and the tensor or configuration key at fault, and ConfigError
    where the checkpoint contradicts `quantization`.
    """
    family = find_family(checkpoint)
    config = read_model_config(checkpoint, family)
    stored = read_quantization(checkpoint, asked=quantization)
    if max_model_len is not None:
        longest = min(max_model_len, config.max_position_embeddings)
        config = replace(config, max_position_embeddings=longest)
    names = None
    if not isinstance(checkpoint, DummyCheckpoint):
        check_sizes(config, checkpoint, quantization=stored, backend=backend)
        names = stored.source(checkpoint).tensor_names()
    if product is None:
        product = choose_product(config, device=device, dtype=dtype, quantization=stored)
    mean_squares = {}
    if stored.weighs_inputs and not isinstance(checkpoint, DummyCheckpoint):
        mean_squares = input_mean_squares(checkpoint, config, quantization=stored)
    with errors_named(checkpoint, "its configuration"):
        schemes = stored.schemes(config, product, tensors=names)
        model = Decoder(config, backend=backend, schemes=schemes, device=device, dtype=dtype)
    for path, values in mean_squares.items():
        model.get_submodule(path).register_buffer("importance", values, persistent=False)
    if isinstance(checkpoint, DummyCheckpoint):
        fill_random(model, seed=_DUMMY_SEED)
    else:
        load_weights(model, checkpoint, quantization=stored, progress=progress)
    return model.eval()


def choose_product(
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: ModelQuantization | None = None,
) -> LinearProduct:
    """The product library for a model of this shape.

    On a card each product takes what was measured to be fastest there. In float32 on a CPU two libraries
    are timed, and the number of their threads is set within torch's present one (`kernels/linear.py`).
    quantization: how weights are stored; None for plain numbers.
    """
    shapes = (*_attention_shapes(config), *_feed_forward_shapes(config))
    if device.type == "cuda":
        head = (config.vocab_size, config.embedding_size or config.hidden_size)
        return gpu_product((*shapes, head), dtype=dtype, device=device)
    if dtype != torch.float32:
        return linear_ref
    if quantization is not None and quantization.forms:
        # The products of packed weights are torch's, and only one library has more than one thread.
        give_threads(linear_ref, torch.get_num_threads())
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
    return [
        ((latent.query_rank or 0) + latent.width, hidden),
        (query_size, latent.query_rank or hidden),
        (hidden, config.num_heads * latent.value_dim),
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
    quantization: ModelQuantization,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill every parameter of `model` from the checkpoint, or raise CheckpointError."""
    family = quantization.family
    checkpoint = quantization.source(checkpoint)
    slots = _checked_slots(model, checkpoint, quantization)
    names = checkpoint.tensor_names()
    wanted = [name for name in names if name in slots]  # in the file's order, to read it once through
    for index, name in enumerate(wanted, 1):
        with errors_named(checkpoint, f"tensor {name!r}"):
            slots[name].load(_read(checkpoint, name, slots[name]))
        if progress is not None:
            progress(index, len(wanted))
    for module in model.modules():
        if isinstance(module, (Linear, ExpertStack)):
            module.scheme.finish(module)
    head = f"{family.weight_names['head']}.weight"
    if model.config.tie_word_embeddings and head in names:
        _check_same_as_embedding(model, checkpoint, head)


@contextmanager
def errors_named(checkpoint: Checkpoint | DummyCheckpoint, what: str) -> Iterator[None]:
    """Puts the file, and what was done with it, before the word of a scheme, which knows neither."""
    try:
        yield
    except CheckpointError as error:
        if error.message.startswith(str(checkpoint.path)):
            raise
        raise CheckpointError(f"{checkpoint.path}: {what}: {error.message}.") from error


def _checked_slots(
    model: Decoder, checkpoint: Checkpoint, quantization: ModelQuantization
) -> dict[str, WeightSlot]:
    """Every tensor's place by its name, once names and shapes are those that the configuration asks for."""
    family = quantization.family
    names = _without_spare_layers(checkpoint.tensor_names(), family, num_layers=model.config.num_layers)
    stored = StoredNames.of(family, names)
    slots = slots_by_stored_name(model, stored, quantization=quantization)
    slots = {name: slot for name, slot in slots.items() if not slot.is_optional or name in names}
    ignored = [name.removeprefix(stored.prefix) for name in family.ignored_weights]
    if model.config.tie_word_embeddings:
        ignored.append(f"{family.weight_names['head']}.weight")
    _check_names(checkpoint, names, slots=slots, ignored=ignored)
    for name, slot in slots.items():
        if slot.shape is not None and (shape := tuple(checkpoint.tensor_shape(name))) != slot.shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r} has shape {list(shape)}; "
                f"the configuration asks for {list(slot.shape)}."
            )
    return slots


def check_sizes(
    config: ModelConfig,
    checkpoint: Checkpoint,
    *,
    quantization: ModelQuantization,
    backend: AttentionBackend,
) -> None:
    """Refuse a configuration whose tensors are not the checkpoint's before memory is taken for them.

    Raises CheckpointError as `load_weights` does.
    """
    checkpoint = quantization.source(checkpoint)
    names = checkpoint.tensor_names()
    with errors_named(checkpoint, "its configuration"):
        outline = Decoder(
            config,
            backend=backend,
            schemes=quantization.schemes(config, linear_ref, tensors=names),
            device=torch.device("meta"),
            dtype=torch.float32,
        )
        _checked_slots(outline, checkpoint, quantization)


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


def _read(checkpoint: Checkpoint, name: str, slot: WeightSlot) -> torch.Tensor:
    tensor = checkpoint.tensor(name)
    if tensor.dtype not in slot.dtypes:
        found, *wanted = (
            str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *sorted(slot.dtypes, key=str))
        )
        understood = "floating-point numbers" if slot.dtypes == PLAIN_DTYPES else " or ".join(wanted)
        raise CheckpointError(f"{checkpoint.path}: tensor {name!r} holds {found}, not {understood}.")
    return tensor


def _check_same_as_embedding(model: Decoder, checkpoint: Checkpoint, name: str) -> None:
    """A tied head that is stored all the same must say the same as the embedding."""
    weight, tensor = model.embedding.weight, checkpoint.tensor(name)
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
