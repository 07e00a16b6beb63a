"""The face for training code: `import propeller.paddle as propeller`.

Names are loaded when they are first used, so flags can be parsed before Paddle is imported.
Unlike any other import of the project this one sets environment variables, because Paddle reads them
only while it is loaded: see `propeller.paddle.runtime`.
"""

from typing import TYPE_CHECKING

from propeller.lazy import attach

if TYPE_CHECKING:
    from propeller import data as data
    from propeller import metrics as metrics
    from propeller.bundle import ArraySpec as ArraySpec
    from propeller.config import ArgumentParser as ArgumentParser
    from propeller.config import parse_config as parse_config
    from propeller.config import parse_hparam as parse_hparam
    from propeller.config import parse_runconfig as parse_runconfig
    from propeller.paddle import distributed as distributed
    from propeller.paddle import inference as inference
    from propeller.paddle import losses as losses
    from propeller.paddle import optimization as optimization
    from propeller.paddle import summary as summary
    from propeller.paddle import train as train
    from propeller.paddle.inference import Predictor as Predictor
    from propeller.paddle.train.adversarial import Fgm as Fgm
    from propeller.paddle.train.exporter import BestExporter as BestExporter
    from propeller.paddle.train.exporter import BestInferenceModelExporter as BestInferenceModelExporter
    from propeller.paddle.train.exporter import Exporter as Exporter
    from propeller.paddle.train.hooks import EarlyStopping as EarlyStopping
    from propeller.paddle.train.hooks import Hook as Hook
    from propeller.paddle.train.hooks import StepResult as StepResult
    from propeller.paddle.train.learner import Learner as Learner
    from propeller.paddle.train.learner import train_and_eval as train_and_eval
    from propeller.paddle.train.model import Model as Model
    from propeller.paddle.train.step import Step as Step
    from propeller.paddle.train.step import plain_step as plain_step
    from propeller.types import HParams as HParams
    from propeller.types import RunConfig as RunConfig
    from propeller.types import RunMode as RunMode
    from propeller.types import RunState as RunState
    from propeller.types import WarmStartSetting as WarmStartSetting

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "propeller.config": ["ArgumentParser", "parse_config", "parse_hparam", "parse_runconfig"],
        "propeller.types": ["HParams", "RunConfig", "RunMode", "RunState", "WarmStartSetting"],
        "propeller.bundle": ["ArraySpec"],
        "propeller.paddle.inference": ["Predictor"],
        "propeller.paddle.train.adversarial": ["Fgm"],
        "propeller.paddle.train.exporter": ["BestExporter", "BestInferenceModelExporter", "Exporter"],
        "propeller.paddle.train.hooks": ["EarlyStopping", "Hook", "StepResult"],
        "propeller.paddle.train.learner": ["Learner", "train_and_eval"],
        "propeller.paddle.train.model": ["Model"],
        "propeller.paddle.train.step": ["Step", "plain_step"],
    },
    modules={
        "data": "propeller.data",
        "metrics": "propeller.metrics",
        "distributed": "propeller.paddle.distributed",
        "inference": "propeller.paddle.inference",
        "losses": "propeller.paddle.losses",
        "optimization": "propeller.paddle.optimization",
        "summary": "propeller.paddle.summary",
        "train": "propeller.paddle.train",
    },
)
