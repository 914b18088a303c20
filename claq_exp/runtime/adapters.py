"""Makes PEFT put LoRA adapters on packed layers by itself, once this is imported."""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

from claq_exp.errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig

STARTS = (True, False, "gaussian", "orthogonal")  # of an adapter; others take the weight apart


@cache
def packed_lora() -> type[Any]:
    """Return PEFT's layer for linear ones, for a base that is packed.

    It is made when it is asked for: PEFT may be on its way in.
    """
    from peft.tuners.lora.layer import Linear

    class PackedLora(Linear):
        """Adapters beside a packed layer: what they learn stays beside it."""

        def __init__(self, base_layer: Any, adapter_name: str, config: LoraConfig, **others: Any):
            start = config.init_lora_weights
            if config.use_dora or start not in STARTS:
                what = "use_dora=True" if config.use_dora else f"init_lora_weights={start!r}"
                raise ConfigError(
                    f"LoRA on packed layers does not know {what}, which changes or divides the "
                    f"weight; take one of init_lora_weights={', '.join(map(repr, STARTS))}"
                )
            with warnings.catch_warnings():  # PEFT says that it does not know the layer
                warnings.filterwarnings("ignore", message="Unsupported layer type")
                super().__init__(base_layer, adapter_name, config=config, **others)

        def merge(self, *_: Any, **__: Any) -> None:
            """Raise ConfigError: codes cannot take up an update."""
            raise ConfigError(
                "adapters cannot be merged into packed weights; write dense ones with "
                "claq-exp export, and merge there"
            )

    return PackedLora


def _register() -> None:
    """Have every LoraConfig know packed layers, by PEFT's entry for custom modules."""
    from peft.tuners.lora.config import LoraConfig

    complete = LoraConfig.__post_init__

    def complete_and_register(config: LoraConfig) -> None:
        from claq_exp.runtime.linear import QuantizedLinear

        complete(config)
        config._register_custom_module({QuantizedLinear: packed_lora()})

    LoraConfig.__post_init__ = complete_and_register  # type: ignore[method-assign]


_register()
