"""`run.json`: with what configuration, versions and ranks a run was last started."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from propeller import atomic
from propeller.errors import ConfigError

log = logging.getLogger("propeller")

RUN_FILE = "run.json"
_COMPARED = ("run_config", "hparams", "versions")


def read_run_file(model_dir: str | Path) -> dict[str, Any] | None:
    """Reads `run.json`; None where there is none.

    Raises:
        ConfigError: it is no JSON object.
    """
    path = Path(model_dir) / RUN_FILE
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is no JSON object any more ({error}). Mend it, or remove it: every start writes it "
            "anew. (A run that then goes on as another number of processes needs the batch_size of a step.)"
        ) from error


def write_run_file(model_dir: str | Path, values: Mapping[str, Any], *, resumed: bool) -> None:
    """Writes `run.json`, and logs the configuration.

    Args:
        model_dir: the run's folder.
        values: `run_config`, `hparams`, `versions`, `device` and `ranks`.
        resumed: the run goes on; what is another than when it was last started is said.
    """
    text = atomic.to_json(values, indent=1)
    now = json.loads(text)
    before = read_run_file(model_dir) if resumed else None
    if before is not None:
        _log_changes(before, now)
    log.info("configuration: %s", atomic.to_json(now))
    atomic.write_text(Path(model_dir) / RUN_FILE, text + "\n")


def _log_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changes = {
        f"{part}.{key}": (before.get(part, {}).get(key), now[part].get(key))
        for part in _COMPARED
        for key in sorted({*before.get(part, {}), *now[part]})
    }
    changes.update({key: (before.get(key), now[key]) for key in ("device", "ranks")})
    for name, (old, new) in changes.items():
        if old != new:
            log.warning("changed since this run was last started: %s: %r -> %r", name, old, new)
