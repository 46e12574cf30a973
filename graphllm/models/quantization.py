"""How a model's weights are stored: what its checkpoint says, and what `--quantization` asks for.

Owns the table of methods, the agreement of both sides, the choice for each layer of the decoder, and the
refusal of devices. How a method's section of config.json is read is `hf_quantization.py`'s; how weights of
a form are loaded and multiplied is `quant/`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphllm.errors import CheckpointError, ConfigError
from graphllm.kernels.linear import LinearProduct
from graphllm.models.config import ModelConfig
from graphllm.models.dummy import DummyCheckpoint
from graphllm.models.family import Family
from graphllm.models.gguf import GGUFCheckpoint
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_keys import QUANTIZATION_FILES, QUANTIZATION_KEYS
from graphllm.models.hf_quantization import READERS, Rules
from graphllm.models.packed_gguf import GgufRules, PackedGGUFCheckpoint
from graphllm.models.registry import Configured, find_family
from graphllm.models.stored_names import StoredNames, without_numbers
from graphllm.quant.mxfp4 import Mxfp4Form
from graphllm.quant.online import ONLINE_FORMS, OnlineForm
from graphllm.quant.scheme import ExpertScheme, WeightForm
from graphllm.quant.scheme_source import SchemeSource
from graphllm.quant.unquantized import Unquantized

if TYPE_CHECKING:
    from graphllm.models.checkpoint import Checkpoint

GGUF = "gguf"
"""`--quantization` that leaves a GGUF file's matrices packed; by default they are expanded."""
_EXPERT_STACKS = ("layers.{}.moe.gate_up", "layers.{}.moe.down")


@dataclass(frozen=True, slots=True)
class ModelQuantization:
    """How the weights of one model are stored.

    path: the checkpoint's, for errors. method: "gptq", "int8", ...; None for plain numbers. rules: what the
    checkpoint's configuration says; None where it says nothing. online: what plain layers are brought into.
    """

    path: str
    family: Family
    method: str | None = None
    rules: Rules | None = None
    online: WeightForm | None = None

    @property
    def description(self) -> str:
        """All that it depends on, for logs, keys and fingerprints; "" for plain numbers."""
        return ", ".join(dict.fromkeys(form.name for form in self.forms))

    @property
    def forms(self) -> tuple[WeightForm, ...]:
        """Every form that a layer may have."""
        return (self.online,) if self.online is not None else () if self.rules is None else self.rules.forms

    @property
    def weighs_inputs(self) -> bool:
        """Whether layers are to know how large their inputs are while they are loaded."""
        return isinstance(self.online, OnlineForm) and self.online.weighs_inputs

    def check_device(self, *, device_type: str, capability: tuple[int, int] | None) -> None:
        """Raises ConfigError where the device cannot run a form: the reason, and the nearest that it can.

        capability: a card's; None on a CPU.
        """
        for form in self.forms:
            form.devices.check(form.name, device_type=device_type, capability=capability)

    def stored_form(self, module: str, tensors: Collection[str] | None) -> WeightForm | None:
        """How the checkpoint stores a module, by the checkpoint's name of it; None for plain numbers."""
        return None if self.rules is None else self.rules.form_of(module, tensors)

    def source(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint as weights are loaded from it: with packed tensors where they stay packed."""
        if not isinstance(self.rules, GgufRules):
            return checkpoint
        assert isinstance(checkpoint, GGUFCheckpoint)
        return PackedGGUFCheckpoint(checkpoint, self.rules)

    def schemes(
        self, config: ModelConfig, product: LinearProduct, *, tensors: Collection[str] | None = None
    ) -> SchemeSource:
        """The schemes of the decoder's layers.

        product: of plain numbers. tensors: the names of the checkpoint's; None for a configuration alone.
        Asked for a layer whose parts are stored differently, it raises CheckpointError naming them.
        """
        plain = Unquantized(product)
        names = StoredNames.of(self.family, tensors)
        made: dict[tuple[WeightForm, int], ExpertScheme] = {}

        def choose(path: str) -> ExpertScheme:
            is_stack = without_numbers(path) in _EXPERT_STACKS
            num_experts = _num_experts(config, path) if is_stack else 0
            form = self._form_at(path, names, num_experts=num_experts)
            if form is None:
                return plain
            if (form, num_experts) not in made:
                made[form, num_experts] = form.make_scheme(product, num_experts=num_experts)
            return made[form, num_experts]

        return SchemeSource(plain, choose)

    def _form_at(self, path: str, names: StoredNames, *, num_experts: int) -> WeightForm | None:
        if self.online is not None:
            return self.online if path.startswith("layers.") else None
        if self.rules is None:
            return None
        modules = names.modules(path, num_experts=num_experts)
        forms = {module: self.stored_form(module, names.tensors) for module in modules}
        first, layout = modules[0], self.family.layouts.get(without_numbers(path))
        if isinstance(self.rules, GgufRules) and (len({*forms.values()}) > 1 or layout is not None):
            return None  # files mix their types as they please: such layers are expanded
        for module, form in forms.items():
            if form != forms[first]:
                raise CheckpointError(
                    f"{self.path}: {first!r} is stored {_described(forms[first])} and {module!r} "
                    f"{_described(form)}; they are parts of one product and have to be stored alike."
                )
        form = forms[first]
        # MXFP4 keeps each row's bytes together, so that layouts of stacks can order them.
        moves_rows = form is not None and (form.is_online or isinstance(form, Mxfp4Form))
        if form is not None and not moves_rows and layout is not None:
            raise CheckpointError(
                f"{self.path}: {first!r} is stored as {form.name}, and in an order of rows that packed "
                "weights cannot be brought out of; serve an unquantized version, with --quantization "
                f"{form.devices.instead} if it is to be smaller."
            )
        return form


def _described(form: WeightForm | None) -> str:
    return "unquantized" if form is None else f"as {form.name}"


def _num_experts(config: ModelConfig, path: str) -> int:
    moe = config.layers[int(path.split(".")[1])].moe
    assert moe is not None
    return moe.routing.num_experts


def read_quantization(
    checkpoint: Configured, *, asked: str | None, family: Family | None = None
) -> ModelQuantization:
    """How the model is to be stored. asked: `--quantization`; None for what the checkpoint says.

    Raises CheckpointError for a configuration that is not understood, and ConfigError where it contradicts
    what is asked for.
    """
    family = family or find_family(checkpoint)
    path = str(checkpoint.path)
    config = HFConfig(checkpoint.hf_config, checkpoint.path)
    section = quantization_section(config)
    if section is None:
        if asked is None:
            return ModelQuantization(path, family)
        if asked == GGUF and (file := gguf_file_of(checkpoint)) is not None:
            return ModelQuantization(path, family, asked, rules=GgufRules.of(file, family))
        if asked not in ONLINE_FORMS:
            raise ConfigError(
                f"--quantization {asked}: {path} is not stored so; plain weights can be brought into "
                f"{', '.join(ONLINE_FORMS)}."
            )
        return ModelQuantization(path, family, asked, online=ONLINE_FORMS[asked])
    method = section.choice("quant_method", {name: name for name in METHODS})
    if asked is not None and asked != method:
        raise ConfigError(
            f"--quantization {asked} contradicts the checkpoint {path}, which is stored as {method}; leave "
            "the flag out, or take an unquantized version."
        )
    rules = METHODS[method](section, config)
    section.check_understood()
    return ModelQuantization(path, family, method, rules=rules)


def gguf_file_of(checkpoint: Configured) -> GGUFCheckpoint | None:
    """The GGUF file behind a checkpoint, or behind its configuration alone; None where there is none."""
    if isinstance(checkpoint, DummyCheckpoint):
        return checkpoint.gguf
    return checkpoint if isinstance(checkpoint, GGUFCheckpoint) else None


def refuse_quantization(checkpoint: Configured, *, asked: str | None) -> None:
    """For modules of transformers, which multiply plain numbers. Raises CheckpointError, ConfigError."""
    config = HFConfig(checkpoint.hf_config, checkpoint.path)
    why = "the model runs through transformers' own module, which serves unquantized weights only"
    if asked is not None:
        raise ConfigError(f"--quantization {asked}: {why}.")
    for key in QUANTIZATION_KEYS:
        if config.get(key) is not None:
            config.refuse(key, f"is there, but {why}")


def quantization_section(config: HFConfig) -> HFConfig | None:
    """What config.json, or a quantizer's own file, says of packed weights; None where nothing does.

    All keys that may say it count as understood. Raises CheckpointError where two contradict each other.
    """
    present = [key for key in QUANTIZATION_KEYS if config.get(key) is not None]
    if not present:
        return None
    first = present[0]
    for key in present[1:]:
        if config.get(key) != config.get(first):
            config.refuse(key, f"contradicts '{first}'")
    method = QUANTIZATION_FILES.get(first)
    return config.section(first, defaults=None if method is None else {"quant_method": method})


METHODS: Mapping[str, Callable[[HFConfig, HFConfig], Rules]] = READERS
"""Every method that a checkpoint may be stored by: `quant_method` to what reads its section, given the
section and the whole of config.json."""
QUANTIZATIONS = (*sorted({*ONLINE_FORMS, *METHODS, GGUF}),)
"""What `--quantization` takes; `config.py`, on a lower floor, has the same list, and a test compares them."""
