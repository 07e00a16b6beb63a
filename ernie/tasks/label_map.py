"""`label_map.json`: the labels of a task, numbered by its data's makers."""

from __future__ import annotations

import json
from pathlib import Path

from propeller.errors import ConfigError


def read_label_map(path: Path) -> list[str]:
    """Reads a JSON object of label to id; returns the labels by id.

    Raises:
        ConfigError: it cannot be read, or does not number the labels from 0 without gaps.
    """
    try:
        ids = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    numbers = list(ids.values()) if isinstance(ids, dict) else []
    if set(map(type, numbers)) != {int} or sorted(numbers) != list(range(len(numbers))):
        raise ConfigError(
            f"{path} must be an object that numbers the labels from 0 without gaps, got {ids!r:.200}."
        )
    return sorted(ids, key=ids.__getitem__)
