"""The configuration of a run: typed and checked sections, loaded from YAML files and `key=value` words."""

from xmc_trainer.config.load import load_config, saved_settings, shipped_configs
from xmc_trainer.config.schema import Config, DataConfig, EvaluationConfig, FFIConfig, OptimizationConfig
from xmc_trainer.config.write import flatten, portable, portable_yaml, to_yaml

__all__ = [
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "FFIConfig",
    "OptimizationConfig",
    "flatten",
    "load_config",
    "portable",
    "portable_yaml",
    "saved_settings",
    "shipped_configs",
    "to_yaml",
]
