"""SMT, DoTA and QDoTA as PEFT adapters; importing this package registers them with PEFT.

    from owlore.adapters import SmtConfig
    model = peft.get_peft_model(model, SmtConfig(target_modules=["q_proj", "v_proj"]))

A saved adapter loads with `PeftModel.from_pretrained` once this package has been imported.
"""

from __future__ import annotations

from torch import nn

from owlore.adapters.dota_config import DotaConfig
from owlore.adapters.dota_model import DotaModel
from owlore.adapters.registration import register
from owlore.adapters.selection import select_blocks
from owlore.adapters.smt_config import SmtConfig
from owlore.adapters.smt_layer import SmtLayer
from owlore.adapters.smt_model import SmtModel

__all__ = ["DotaConfig", "SmtConfig", "refresh", "select_blocks"]

register("SMT", SmtConfig, SmtModel)
register("DOTA", DotaConfig, DotaModel)


def refresh(model: nn.Module) -> None:
    """Write changed SMT deltas into their weights now, for code that changes deltas by hand and then reads weights.

    Forward passes and merges do it themselves, also after an optimizer step that autograd's version counters miss.

    Args:
        model: Any module, such as a PEFT model; every SMT layer in it is refreshed.
    """
    for module in model.modules():
        if isinstance(module, SmtLayer):
            module.refresh(force=True)
