"""From a configuration to the parts of a training. No other module reads the configuration to build something.

A function `x_of(config, ...)` builds one part; `training.build_trainer` puts all of them together.
"""
