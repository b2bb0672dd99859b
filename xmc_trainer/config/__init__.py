"""The configuration of a run: typed and checked sections, loaded from YAML files and `key=value` words."""

from xmc_trainer.config.fields import names_of_parameters
from xmc_trainer.config.load import load_config, saved_settings, shipped_configs, stated_settings
from xmc_trainer.config.model_card import changed_card, model_card
from xmc_trainer.config.schema import Config
from xmc_trainer.config.write import flatten, portable, portable_yaml, to_yaml

# Parameter -> setting of the same name, for `errors.naming`.
SETTINGS = names_of_parameters(Config)

__all__ = [
    "SETTINGS",
    "Config",
    "changed_card",
    "flatten",
    "load_config",
    "model_card",
    "portable",
    "portable_yaml",
    "saved_settings",
    "shipped_configs",
    "stated_settings",
    "to_yaml",
]
