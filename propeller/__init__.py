"""propeller: an estimator framework on PaddlePaddle.

`import propeller.paddle as propeller` is the face for training code; this one, which needs no Paddle,
has configuration, types, errors, metrics, data and bundles. Names are loaded when they are first used.
"""

from propeller.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "propeller.config": ["ArgumentParser", "parse_config", "parse_hparam", "parse_runconfig"],
        "propeller.errors": [
            "CheckpointError",
            "ConfigError",
            "DataError",
            "ExportError",
            "Interrupted",
            "NonFiniteLossError",
            "PropellerError",
        ],
        "propeller.processor": ["Processor", "find_processor", "register_processor"],
        "propeller.types": ["HParams", "RunConfig", "RunMode", "RunState", "WarmStartSetting"],
        "propeller.version": ["__version__"],
    },
    modules={"data": "propeller.data", "metrics": "propeller.metrics"},
)
