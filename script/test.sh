#!/usr/bin/env bash
# Checks everything: ruff, mypy, pytest. Arguments go to pytest: `bash script/test.sh -k resume`.
set -euo pipefail
cd "$(dirname "$0")/.."
source script/environment.sh
use_environment cpu,test
"$VENV/bin/ruff" check .
"$VENV/bin/mypy"
"$VENV/bin/python" -m pytest "$@"
