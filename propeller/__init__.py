"""propeller: an estimator framework on PaddlePaddle.

`import propeller.paddle as propeller` is the face for training code; this one, which needs no Paddle,
has configuration, types, errors, metrics, data and bundles. Names are loaded when they are first used.
"""

from typing import TYPE_CHECKING

from propeller.lazy import attach

if TYPE_CHECKING:
    from propeller import data as data
    from propeller import metrics as metrics
    from propeller.config import ArgumentParser as ArgumentParser
    from propeller.config import parse_config as parse_config
    from propeller.config import parse_hparam as parse_hparam
    from propeller.config import parse_runconfig as parse_runconfig
    from propeller.errors import CheckpointError as CheckpointError
    from propeller.errors import ConfigError as ConfigError
    from propeller.errors import DataError as DataError
    from propeller.errors import ExportError as ExportError
    from propeller.errors import Interrupted as Interrupted
    from propeller.errors import NonFiniteLossError as NonFiniteLossError
    from propeller.errors import PropellerError as PropellerError
    from propeller.processor import Processor as Processor
    from propeller.processor import find_processor as find_processor
    from propeller.processor import register_processor as register_processor
    from propeller.types import HParams as HParams
    from propeller.types import RunConfig as RunConfig
    from propeller.types import RunMode as RunMode
    from propeller.types import RunState as RunState
    from propeller.types import WarmStartSetting as WarmStartSetting
    from propeller.version import __version__ as __version__

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
