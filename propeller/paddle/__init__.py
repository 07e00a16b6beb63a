"""The face for training code: `import propeller.paddle as propeller`.

Names are loaded when they are first used, so flags can be parsed before Paddle is imported.
Unlike any other import of the project this one sets environment variables, because Paddle reads them
only while it is loaded: see `propeller.paddle.runtime`.
"""

from propeller.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "propeller.config": ["ArgumentParser", "parse_config", "parse_hparam", "parse_runconfig"],
        "propeller.types": ["HParams", "RunConfig", "RunMode", "RunState", "WarmStartSetting"],
        "propeller.bundle": ["ArraySpec"],
        "propeller.paddle.inference": ["Predictor"],
        "propeller.paddle.train.exporter": ["BestExporter", "BestInferenceModelExporter", "Exporter"],
        "propeller.paddle.train.hooks": ["EarlyStopping", "Hook", "StepResult"],
        "propeller.paddle.train.learner": ["Learner", "train_and_eval"],
        "propeller.paddle.train.model": ["Model"],
    },
    modules={
        "data": "propeller.data",
        "metrics": "propeller.metrics",
        "inference": "propeller.paddle.inference",
        "optimization": "propeller.paddle.optimization",
        "summary": "propeller.paddle.summary",
        "train": "propeller.paddle.train",
    },
)
