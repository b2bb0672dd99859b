"""Build the parts of a training from a configuration. No other module builds anything from a configuration.

A function `x_of(config, ...)` builds one part. `training.build_trainer` combines all parts.
"""
