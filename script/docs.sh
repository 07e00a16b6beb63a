#!/usr/bin/env bash
# Writes the API reference (HTML, from the docstrings) to docs/api, or to the folder named.
set -euo pipefail
out=${1:-$(dirname "$0")/../docs/api}
mkdir -p -- "$out"
out=$(CDPATH= cd -- "$out" && pwd -P)
cd "$(dirname "$0")/.."
source script/environment.sh
use_environment cpu,docs
"$VENV/bin/python" script/api_reference.py "$out"
echo "wrote $out/index.html"
