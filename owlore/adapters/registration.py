"""Registering a method with PEFT under a name that PEFT's list of methods does not have.

`peft.register_peft_method` only takes names of the `PeftType` enumeration. The mappings behind it take any string, and
everything else (`get_peft_model`, `save_pretrained`, `PeftModel.from_pretrained`) uses the mappings.
"""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner


def register(name: str, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Register a configuration and a tuner with PEFT; do nothing if PEFT has a method of that name.

    Args:
        name: Name of the method, in upper case.
        config: Class of its configurations.
        tuner: Class of its tuners.
    """
    key: Any = name
    if key not in PEFT_TYPE_TO_CONFIG_MAPPING:
        PEFT_TYPE_TO_CONFIG_MAPPING[key] = config
        PEFT_TYPE_TO_TUNER_MAPPING[key] = tuner
        PEFT_TYPE_TO_PREFIX_MAPPING[key] = tuner.prefix
