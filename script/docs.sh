#!/usr/bin/env bash
# Writes the API reference (HTML, from the docstrings) to docs/api, or to the folder named.
set -euo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/../docs/api}")
cd "$(dirname "$0")/.."
source script/environment.sh
use_environment cpu,docs
.venv/bin/python -m pdoc --docformat google --output-directory "$out" propeller ernie
echo "wrote $out/index.html"
