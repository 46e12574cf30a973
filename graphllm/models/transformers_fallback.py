"""Models without a declaration of ours, computed by transformers' own modules with our paged attention.

Owns which models can be served so, how their weights are loaded, and the shape in which the runner sees
them (`ServedModel`). What attention does is `transformers_attention.py`'s. transformers is imported when it
is needed and not before: it takes seconds, and is an optional dependency.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from graphllm.arena import Arena
from graphllm.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionSpec,
    LatentCache,
    LayerCache,
)
from graphllm.errors import CheckpointError, ConfigError
from graphllm.kernels.embedding import embedding
from graphllm.layers.norm import NormConfig
from graphllm.models import transformers_attention
from graphllm.models.checkpoint import Checkpoint
from graphllm.models.config import LayerConfig, ModelConfig
from graphllm.models.dummy import DummyCheckpoint
from graphllm.models.fallback_capture import find_obstacle
from graphllm.models.fallback_choice import (
    fallback_architecture,
    is_known_to_transformers,
    refuse_without_weights,
)
from graphllm.models.fallback_weights import load_weights, match_weights
from graphllm.models.hf_config import MAX_NUM_LAYERS
from graphllm.models.safetensors_folder import FolderCheckpoint
from graphllm.models.transformers_attention import (
    OUTLINE,
    SERVING,
    AbsentAttention,
    AttentionOutline,
    PagedAttentionStep,
    UnservableAttention,
)

logger = logging.getLogger(__name__)

_OUTLINE_TOKENS = 7
_OUTLINE_WINDOW = 3
# Ways of turning that depend on the longest position of the batch: a request's text would on its neighbours.
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Fallback:
    """A checkpoint that transformers' module will compute: found to be servable, not yet loaded.

    config: what memory planning and the runner read; what only our own decoder reads is neutral.
    """

    checkpoint: Checkpoint
    hf_config: Any
    model_class: Any
    config: ModelConfig
    specs: tuple[AttentionSpec, ...]

    def load(
        self,
        *,
        backend: AttentionBackend,
        device: torch.device,
        dtype: torch.dtype,
        progress: Callable[[int, int], None] | None = None,
    ) -> FallbackDecoder:
        """Build the module on `device` and fill it from the checkpoint.

        Raises CheckpointError for tensors that are missing, left over or of another shape, by name.
        """
        parts = match_weights(_build(self, device=torch.device("meta"), dtype=dtype), self.checkpoint)
        module = _build(self, device=device, dtype=dtype)
        for number, _ in enumerate(load_weights(module, parts, self.checkpoint), 1):
            if progress is not None:
                progress(number, len(parts))
        decoder = FallbackDecoder(module, self, backend=backend, dtype=dtype)
        if (difference := decoder.find_difference()) is not None:
            raise _unservable(self.checkpoint, type(module).__name__, difference)
        return decoder


def find_fallback(
    checkpoint: Checkpoint | DummyCheckpoint, *, model_impl: str, trust_remote_code: bool
) -> Fallback | None:
    """The fallback for a checkpoint, None where our own decoder computes it.

    model_impl: `--model-impl`: "auto" falls back where no family answers to the architecture, "graphllm"
    never and "transformers" always. Raises CheckpointError that names the architecture and why it cannot be
    served, and ConfigError where transformers is not installed.
    """
    architecture = fallback_architecture(checkpoint, model_impl=model_impl)
    if architecture is None:
        return None
    if isinstance(checkpoint, DummyCheckpoint):
        refuse_without_weights(checkpoint, model_impl=model_impl, what="--load-format dummy draws weights of")
        return None
    if not isinstance(checkpoint, FolderCheckpoint):
        if model_impl == "auto":
            return None
        raise ConfigError("--model-impl transformers serves folders with safetensors only.")
    hf_config, model_class = _find_class(checkpoint, architecture, trust_remote_code=trust_remote_code)
    try:
        specs, hidden_size, vocab_size = _outline(hf_config, model_class)
    except UnservableAttention as error:
        raise _unservable(checkpoint, architecture, str(error)) from error
    logger.warning("%s runs through transformers' own module: slower than a declared family", architecture)
    config = _model_config(checkpoint, hf_config, specs, hidden_size=hidden_size, vocab_size=vocab_size)
    return Fallback(checkpoint, hf_config, model_class, config, specs)


def _find_class(checkpoint: Checkpoint, architecture: str, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """The configuration object and the class of the whole model."""
    try:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        raise ConfigError(
            f"No family of graphllm answers to architecture {architecture!r}, and the fallback needs "
            "transformers: pip install transformers."
        ) from error
    values = checkpoint.hf_config
    model_type = values.get("model_type")
    try:
        if is_known_to_transformers(architecture, model_type):
            return CONFIG_MAPPING[model_type].from_dict(values), getattr(transformers, architecture)
        if "auto_map" in values and trust_remote_code:
            path = str(checkpoint.path)
            hf_config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
            return hf_config, transformers.dynamic_module_utils.get_class_from_dynamic_module(
                values["auto_map"]["AutoModelForCausalLM"], path
            )
    except Exception as error:  # whatever the configuration's class, or the repository's code, trips over
        raise _unservable(checkpoint, architecture, f"its configuration is refused: {error}") from error
    if "auto_map" in values:
        raise _unservable(
            checkpoint,
            architecture,
            "it brings code of its own, which runs with --trust-remote-code only: read it first",
        )
    if architecture.endswith("ForConditionalGeneration"):
        raise _unservable(checkpoint, architecture, "it is no decoder-only model of text")
    raise _unservable(
        checkpoint,
        architecture,
        f"neither graphllm nor transformers {transformers.__version__} has a language model of that name",
    )


def _unservable(checkpoint: Checkpoint, architecture: str, reason: str) -> CheckpointError:
    text = " ".join(reason.split())
    return CheckpointError(f"{checkpoint.path}: architecture {architecture!r} is not supported: {text}.")


def _outline(hf_config: Any, model_class: Any) -> tuple[tuple[AttentionSpec, ...], int, int]:
    """Each layer's attention, the width of hidden states and the number of logits, without any memory.

    A second outline, with windows of few tokens, shows that masks are what attention is told of them.
    Raises UnservableAttention.
    """
    if getattr(hf_config, "is_encoder_decoder", False):
        raise UnservableAttention("it has an encoder")
    num_layers = getattr(hf_config, "num_hidden_layers", None)
    if not isinstance(num_layers, int) or not 0 < num_layers <= MAX_NUM_LAYERS:
        raise UnservableAttention(f"it has {num_layers} layers")
    if types := _rope_types(hf_config) & _BATCH_DEPENDENT_ROPE:
        raise UnservableAttention(f"rotary type {min(types)!r} depends on what else is in the batch")
    specs, hidden_size, vocab_size = _run_outline(hf_config, model_class)
    narrow = copy.deepcopy(hf_config)
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(narrow, name, None) is not None:
            setattr(narrow, name, _OUTLINE_WINDOW)
    _run_outline(narrow, model_class)
    return specs, hidden_size, vocab_size


def _rope_types(hf_config: Any) -> set[str]:
    parameters = getattr(hf_config, "rope_parameters", None) or {}
    sections = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    return {str(part["rope_type"]) for part in sections if "rope_type" in part}


def _run_outline(hf_config: Any, model_class: Any) -> tuple[tuple[AttentionSpec, ...], int, int]:
    transformers_attention.register()
    outline = AttentionOutline()
    nowhere = torch.device("meta")
    try:
        with torch.device(nowhere), torch.inference_mode(), transformers_attention.single_sequences():
            # bfloat16, because the product of experts has no outline in other formats.
            model = model_class._from_config(
                copy.deepcopy(hf_config), dtype=torch.bfloat16, attn_implementation=OUTLINE
            ).eval()
            transformers_attention.attach(model, outline)
            tokens = torch.arange(_OUTLINE_TOKENS)[None]
            base = _Base.of(model)
            hidden = base(tokens, positions=tokens)
            base.given = hidden
            logits = model(input_ids=tokens, use_cache=False).logits
    except UnservableAttention:
        raise
    except Exception as error:  # a module's code may fail in any way where it is not made for this
        raise UnservableAttention(
            f"its module does not run with another attention ({type(error).__name__}: {error})"
        ) from error
    num_layers: int = hf_config.num_hidden_layers
    layers = [layer for layer, _ in outline.specs]
    if layers != [*range(num_layers)]:
        raise UnservableAttention(
            f"{len(layers)} of its {num_layers} layers call transformers' attention interface; the others "
            "have attention code or states of their own"
        )
    specs = tuple(spec for _, spec in outline.specs)
    if len({(spec.num_kv_heads, spec.head_dim) for spec in specs}) > 1:
        raise UnservableAttention("its layers have keys and values of different sizes")
    return specs, int(hidden.shape[-1]), int(logits.shape[-1])


def _model_config(
    checkpoint: Checkpoint,
    hf_config: Any,
    specs: Sequence[AttentionSpec],
    *,
    hidden_size: int,
    vocab_size: int,
) -> ModelConfig:
    context = getattr(hf_config, "max_position_embeddings", None)
    if not isinstance(context, int) or context < 1:
        raise CheckpointError(
            f"{checkpoint.path}: configuration key 'max_position_embeddings' is {context!r}, "
            "not a number of tokens."
        )
    dtype = checkpoint.hf_config.get("dtype") or checkpoint.hf_config.get("torch_dtype")
    intermediate_size = getattr(hf_config, "intermediate_size", None)
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size if isinstance(intermediate_size, int) else 4 * hidden_size,
        layers=tuple(LayerConfig(rotary=None, sliding_window=spec.sliding_window) for spec in specs),
        num_heads=specs[0].num_heads,
        num_kv_heads=specs[0].num_kv_heads,
        head_dim=specs[0].head_dim,
        max_position_embeddings=context,
        norm=NormConfig(eps=1e-6),
        attention_scale=specs[0].scale,
        activation="silu",
        tie_word_embeddings=bool(getattr(hf_config, "tie_word_embeddings", False)),
        dtype=_DTYPES.get(str(dtype).removeprefix("torch.")),
    )


def _build(fallback: Fallback, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The module with uninitialized weights."""
    from transformers.initialization import no_init_weights

    transformers_attention.register()
    with torch.device(device), no_init_weights():
        module = fallback.model_class._from_config(
            copy.deepcopy(fallback.hf_config), dtype=dtype, attn_implementation=SERVING
        )
    module.tie_weights()
    return module.eval().requires_grad_(False)


class _Base(nn.Module):
    """The part of a model below its head, which can also stand in for itself with hidden states given.

    So the head's own code, with whatever it does to logits, runs on rows that are chosen later.
    """

    @classmethod
    def of(cls, model: Any) -> _Base:
        """Take the place of `model`'s base."""
        base = cls(getattr(model, model.base_model_prefix))
        setattr(model, model.base_model_prefix, base)
        return base

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.given: torch.Tensor | None = None

    def forward(self, input_ids: torch.Tensor, *, positions: torch.Tensor | None = None, **rest: Any) -> Any:
        """[1, num_tokens, hidden_size]; where hidden states are given, those, as the head expects them."""
        if self.given is not None:
            return _GivenOutput(self.given)
        return self.base(input_ids=input_ids, position_ids=positions, use_cache=False).last_hidden_state


class _GivenOutput:
    """What a head expects of its model: hidden states, and nothing of all else that some models report."""

    def __init__(self, last_hidden_state: torch.Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class FallbackDecoder:
    """Implements `ServedModel` over a module of transformers, a whole step in one slice."""

    def __init__(
        self, module: Any, fallback: Fallback, *, backend: AttentionBackend, dtype: torch.dtype
    ) -> None:
        self.config = fallback.config
        self.backend = backend
        self.dtype = dtype
        self._step = PagedAttentionStep(backend, fallback.specs)
        transformers_attention.attach(module, self._step)
        self._module = module
        self._base = _Base.of(module)

    def forward_in_slices(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        *,
        layer_caches: Sequence[LayerCache | LatentCache],
        metadata: AttentionMetadata,
        arena: Arena,
        sampled_tokens: torch.Tensor,
        logits: torch.Tensor,
    ) -> Iterator[None]:
        """See `Decoder.forward_in_slices`."""
        step = self._step
        # Modules of transformers cache whole heads, whatever their keys and values came out of.
        step.layer_caches = cast("Sequence[LayerCache]", layer_caches)
        step.metadata, step.arena = metadata, arena
        hidden = self._base(input_ids[None], positions=positions[None])[0]
        arena.take("residual", *hidden.shape, dtype=self.dtype).copy_(hidden)
        yield
        if len(sampled_tokens):
            rows = self.final_hidden(sampled_tokens, num_tokens=len(input_ids), arena=arena)
            self.project(rows, arena=arena, out=logits)

    def find_capture_obstacle(self) -> str | None:
        """What keeps steps of the module out of captured graphs, None where nothing was found.

        Attention is ours and is left out, as are the tokens between its rows: see `fallback_capture.py`.
        """

        def step(input_ids: torch.Tensor, positions: torch.Tensor) -> object:
            hidden = self._base(input_ids[None], positions=positions[None])
            self._base.given = hidden
            try:
                return self._module(input_ids=input_ids[None, :1], use_cache=False).logits
            finally:
                self._base.given = None

        transformers_attention.attach(self._module, AbsentAttention())
        try:
            device = next(self._module.parameters()).device
            return find_obstacle(step, vocab_size=self.config.vocab_size, device=device)
        finally:
            transformers_attention.attach(self._module, self._step)

    def find_difference(self) -> str | None:
        """What the module does that steps of the paged attention would not, None where nothing was found.

        Looked for where attention lets nothing through: a token's hidden state must not depend on others
        before it, or the module has states beside keys and values, as convolutions and recurrences have; and
        positions that count from 0 must be those that the module takes by itself.
        """
        device = next(self._module.parameters()).device
        positions = torch.arange(_OUTLINE_TOKENS, device=device)[None]
        tokens = (positions + 3) % self.config.vocab_size
        others = torch.cat(((tokens[:, :-1] + 1) % self.config.vocab_size, tokens[:, -1:]), dim=1)
        transformers_attention.attach(self._module, AbsentAttention())
        try:
            with torch.inference_mode():
                hidden, behind_others, by_itself = (
                    self._base(ids, positions=given)[0, -1].float()
                    for ids, given in ((tokens, positions), (others, positions), (tokens, None))
                )
        except UnservableAttention as error:
            return str(error)
        finally:
            transformers_attention.attach(self._module, self._step)
        # A product's rows may be rounded otherwise beside other rows; what is looked for shows in more.
        allowed = 1e-2 * hidden.abs().max()
        if (behind_others - hidden).abs().max() > allowed:
            return "its layers carry more from token to token than attention does"
        if (by_itself - hidden).abs().max() > allowed:
            return "its positions do not count from 0"
        return None

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, **step: Any) -> None:
        """One step in one go; arguments as of `forward_in_slices`."""
        for _ in self.forward_in_slices(input_ids, positions, **step):
            pass

    def final_hidden(self, tokens: torch.Tensor, *, num_tokens: int, arena: Arena) -> torch.Tensor:
        """See `Decoder.final_hidden`; the module's own norm is in them already."""
        hidden = arena.take("residual", num_tokens, self.config.hidden_size, dtype=self.dtype)
        out = arena.take("normed", len(tokens), self.config.hidden_size, dtype=self.dtype)
        return embedding(tokens, hidden, out=out)

    def project(self, hidden: torch.Tensor, *, arena: Arena, out: torch.Tensor) -> None:
        """See `Decoder.project`."""
        self._base.given = hidden[None]
        try:
            out.copy_(
                self._module(input_ids=hidden.new_zeros(1, 1, dtype=torch.int64), use_cache=False).logits[0]
            )
        finally:
            self._base.given = None
