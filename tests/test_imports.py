"""Who may import whom, and what an import does: nothing.

Read from the sources, so that an import within a function counts as well.
"""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("propeller", "ernie")

# Modules that a machine without Paddle can use.
PADDLE_FREE = (
    "propeller",
    "propeller.*",
    "ernie",
    "ernie.config",
    "ernie.crf",
    "ernie.tokenizing",
    "ernie.service.client",
    "ernie.service.encoder_server",
    "ernie.datasets",
    "ernie.tasks",
    "ernie.tasks.*",
)
PADDLE = (
    "propeller.paddle.*",
    "propeller.service.worker",
    "ernie.modeling",
    "ernie.tasks.encoder",
    "ernie.tasks.evaluating",
    "ernie.tasks.features",
    "ernie.tasks.finetuning",
    "ernie.tasks.models",
    "ernie.tasks.mrc_predictions",
    "ernie.tasks.predicting",
    "ernie.tasks.*_model",
)
NOBODY_IMPORTS = ("example", "distill", "script", "inference", "tests")

# In `propeller/paddle/train`: a module imports from lines above it only.
TRAIN_LAYERS = (
    ("model", "hooks", "averaging", "precision", "profiling"),
    ("checkpoint", "evaluation", "exporter", "reporting", "step", "warm_start"),
    ("adversarial", "job"),
    ("lr_finder", "saving"),
    ("loop",),
    ("learner",),
)
ERNIE_ORDER = ("ernie.convert", "ernie.pretrained", "ernie.modeling")


def module_files():
    """Every module of the packages -> its file."""
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = module_files()


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports_of(name, *, everywhere=True):
    """Names that a module imports: project modules as such, others as they stand there.

    Args:
        name: the module.
        everywhere: also within functions; else only what runs when the module is imported.
    """
    found = set()
    pending = [ast.parse(MODULES[name].read_text("utf-8"))]
    while pending:
        node = pending.pop()
        if is_type_checking(node):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not everywhere:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
        pending.extend(ast.iter_child_nodes(node))
    return found


IMPORTS = {name: imports_of(name) for name in MODULES}


def matches(name, patterns):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_paddle_free(name):
    return matches(name, PADDLE_FREE) and not matches(name, PADDLE)


def needs_paddle(name):
    """Whether an import is one of Paddle itself, or of something that loads it."""
    top = name.split(".")[0]
    return top in ("paddle", "paddlenlp", "visualdl") or name == "safetensors.paddle"


def reached(name, *, seen=None):
    """All project modules that importing `name` loads."""
    seen = set() if seen is None else seen
    for target in imports_of(name, everywhere=False):
        if target in MODULES and target not in seen:
            seen.add(target)
            reached(target, seen=seen)
    return seen


def test_the_modules_were_found():
    assert {"propeller.types", "propeller.paddle.runtime", "propeller.paddle.train.loop"} <= MODULES.keys()
    assert "propeller.errors" in IMPORTS["propeller.types"]
    assert "propeller.paddle.runtime" in reached("propeller.paddle.train.learner")
    assert sum(map(is_paddle_free, MODULES)) > 20


@pytest.mark.parametrize("name", [name for name in MODULES if is_paddle_free(name)])
def test_paddle_free_modules(name):
    loaded = {name, *reached(name)}
    direct = {(module, target) for module in loaded for target in IMPORTS[module] if needs_paddle(target)}
    assert not direct, f"{name} loads Paddle"
    assert not any(matches(module, PADDLE) for module in loaded), f"{name} loads a module that needs Paddle"
    later = {target for target in IMPORTS[name] if matches(target, PADDLE)}
    assert not later, f"{name} imports {later} within a function"


def test_paddle_comes_from_one_place():
    users = {name for name in MODULES if any(target.split(".")[0] == "paddle" for target in IMPORTS[name])}
    assert users == {"propeller.paddle.runtime"}


def test_propeller_knows_nothing_of_ernie():
    for name, targets in IMPORTS.items():
        if name.split(".")[0] == "propeller":
            assert not [target for target in targets if target.split(".")[0] == "ernie"], name


def test_data_is_used_by_its_face():
    """What tasks and examples need of it, a user's own code may need as well."""
    for file in (file for folder in ("ernie", "example") for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("propeller.data"):
                parts = [name.name for name in node.names if f"propeller.data.{name.name}" in MODULES]
                assert node.module == "propeller.data" and not parts, file
            assert not (isinstance(node, ast.Attribute) and node.attr == "_node"), file
    assert "propeller.launch" not in reached("propeller.data.readers"), "data starts no processes"


def test_nothing_imports_scripts_or_tests():
    for name, targets in IMPORTS.items():
        assert not [target for target in targets if target.split(".")[0] in NOBODY_IMPORTS], name


def test_no_import_cycles():
    graph = {name: imports_of(name, everywhere=False) & MODULES.keys() - {name} for name in MODULES}
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"modules import one another: {' -> '.join(error.args[1])}")
    assert order.index("propeller.errors") < order.index("propeller.types")


def test_the_layers_of_training():
    package = "propeller.paddle.train"
    level = {f"{package}.{name}": number for number, names in enumerate(TRAIN_LAYERS) for name in names}
    assert {name for name in MODULES if name.startswith(f"{package}.")} == level.keys(), "give it a layer"
    for name, own in level.items():
        for target in IMPORTS[name] & level.keys():
            assert level[target] < own, f"{name} imports {target}"
    outside = {name for name in MODULES if name.startswith("propeller.") and name not in level} - {package}
    for name in outside - {"propeller.paddle"}:
        assert not IMPORTS[name] & level.keys(), f"{name} imports the training"


def test_the_order_within_ernie():
    def rank(name):
        return next(
            (i for i, top in enumerate(ERNIE_ORDER) if name == top or name.startswith(f"{top}.")), None
        )

    for name in MODULES:
        for target in IMPORTS[name] & MODULES.keys():
            if None not in (rank(name), rank(target)):
                assert rank(target) <= rank(name), f"{name} imports {target}"
        if rank(name) is not None or name in ("ernie.config", "ernie.tokenizing"):
            assert not [target for target in IMPORTS[name] if target.startswith("ernie.tasks")], name


def run_python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


WATCH = """
import json, logging, os, signal, sys
def look():
    loggers = [logging.root, *map(logging.getLogger, ("propeller", "ernie"))]
    return {
        "environment": dict(os.environ),
        "handlers": [[repr(handler) for handler in logger.handlers] for logger in loggers],
        "levels": [logger.level for logger in loggers],
        "signals": [repr(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "folder": os.getcwd(),
    }
before, found = look(), {}
for name in NAMES:
    __import__(name)
    found[name] = {
        "paddle": sorted({module.split(".")[0] for module in sys.modules} & {"paddle"}),
        "numpy": "numpy" in sys.modules,
        "changed": [key for key, value in look().items() if value != before[key]],
    }
print(json.dumps(found))
"""


def test_importing_does_nothing():
    names = ["propeller", "propeller.paddle", "ernie", "ernie.tasks", "propeller.config", "propeller.cli"]
    names += ["propeller.service", "propeller.service.wire", "propeller.service.host"]
    names += ["propeller.service.client", "propeller.service.server"]
    names += ["propeller.launch", "propeller.cores", "propeller.channel"]
    names += ["propeller.data", "propeller.bundle", "propeller.processor", "ernie.config", "ernie.tokenizing"]
    names += ["ernie.tasks.classification", "ernie.tasks.report", "propeller.tools.ckpt_inspector"]
    found = run_python(f"NAMES = {[name for name in names if name in MODULES]!r}\n{WATCH}")
    assert {"propeller", "propeller.paddle", "propeller.data"} <= found.keys()
    for name, what in found.items():
        assert what["paddle"] == [], name
        assert what["changed"] == [], name
    assert not found["propeller.paddle"]["numpy"], "the faces must stay cheap"


WITHOUT_PADDLE = """
import importlib, importlib.abc, json, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "paddle" or name.startswith("paddle."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
found = {}
for name in NAMES:
    try:
        importlib.import_module(name)
        found[name] = None
    except ModuleNotFoundError as error:
        found[name] = [type(error).__name__, error.name, str(error)]
print(json.dumps(found))
"""


def test_without_paddle():
    """What needs it names the extra, whichever module comes first; everything else works."""
    found = run_python(f"NAMES = {list(MODULES)!r}\n{WITHOUT_PADDLE}")
    failed = {name: error for name, error in found.items() if error is not None}
    assert {"propeller.paddle.runtime", "propeller.paddle.train.exporter"} <= failed.keys()
    for name, (kind, missing, message) in failed.items():
        assert (kind, missing) == ("ModuleNotFoundError", "paddle"), f"{name}: {message}"
        assert "pip install 'ernie-propeller[cpu]'" in message, name
        assert not is_paddle_free(name), name
