"""Making a method known to PEFT under a name that its own list of methods does not hold.

`peft.register_peft_method` only takes names of the `PeftType` enumeration. The mappings behind it take any string, and
everything else (`get_peft_model`, `save_pretrained`, `PeftModel.from_pretrained`) goes through the mappings.
"""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner


def register(name: str, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Let PEFT find `config` and `tuner` by `name` (upper case); nothing when PEFT has a method of that name."""
    mappings: tuple[tuple[dict[Any, Any], Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, tuner.prefix),
    )
    if name in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    for mapping, value in mappings:
        mapping[name] = value
