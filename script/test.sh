#!/usr/bin/env bash
# Checks everything: ruff, mypy, pytest in two processes. Arguments go to pytest: `bash script/test.sh -k resume`,
# with `-n 0` in one process.
set -euo pipefail
cd "$(dirname "$0")/.."
source script/environment.sh
use_environment cpu,test
"$VENV/bin/ruff" check .
"$VENV/bin/mypy"
# In the order that tests/conftest.py gives: the longest file first, not the one with most tests.
"$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
