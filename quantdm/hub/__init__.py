"""At home in diffusers and transformers: apply, save, load."""

from quantdm.hub.apply import apply_recipe, register
from quantdm.hub.config import QuantDMConfig
from quantdm.hub.diffusers_plugin import QuantDMQuantizer
from quantdm.hub.transformers_plugin import QuantDMHfQuantizer

__all__ = ["QuantDMConfig", "QuantDMHfQuantizer", "QuantDMQuantizer", "apply_recipe", "register"]

register()  # whoever has imported this has imported diffusers and transformers
