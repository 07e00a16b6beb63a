#!/usr/bin/env bash
# Checks everything: ruff, mypy, pytest. Arguments go to pytest: `bash script/test.sh -k resume`.
set -euo pipefail
cd "$(dirname "$0")/.."
source script/environment.sh
use_environment cpu,test
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
