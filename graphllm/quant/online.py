"""What `--quantization` does to plain weights: forms that are made while a checkpoint is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graphllm.kernels.linear import LinearProduct
from graphllm.quant.fp8 import Fp8
from graphllm.quant.int4 import Int4
from graphllm.quant.int8 import Int8
from graphllm.quant.scaled_form import FP8_NEEDS
from graphllm.quant.scheme import DeviceNeeds, ExpertScheme


@dataclass(frozen=True, slots=True)
class OnlineForm:
    """A WeightForm that rows are rounded to as they come.

    make: its scheme, from the plain product. weighs_inputs: layers want to have `importance` while they are
    loaded, see `Int4`.
    """

    name: str
    make: Callable[[LinearProduct], ExpertScheme]
    devices: DeviceNeeds = DeviceNeeds()  # noqa: RUF009 - frozen
    is_online: bool = True
    weighs_inputs: bool = False

    def make_scheme(self, plain: LinearProduct, *, num_experts: int) -> ExpertScheme:
        """See `WeightForm`."""
        return self.make(plain)


ONLINE_FORMS = {
    "fp8": OnlineForm("fp8", Fp8, FP8_NEEDS),
    "int8": OnlineForm("int8", Int8),
    "int4": OnlineForm("int4", Int4, weighs_inputs=True),
}
"""By the name that `--quantization` takes."""
