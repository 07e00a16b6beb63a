#!/usr/bin/env bash
# Runs script/test.sh under each Python from 3.10 to 3.13 that is on PATH, or under those that PYTHONS names,
# each in an environment of its own (.venv-3.10, ...). Arguments go to pytest:
#     PYTHONS="python3.10 /opt/python3.13/bin/python" bash script/test_pythons.sh -k resume
set -euo pipefail
root=$(dirname "$0")/..
passed=() failed=()
for name in ${PYTHONS:-python3.10 python3.11 python3.12 python3.13}; do
    # Run, not only looked up: a version manager puts names on PATH for versions that it does not have.
    if ! python=$("$name" -c 'import sys; print(sys.executable)' 2> /dev/null); then
        echo "== $name does not run here"
        if [ -n "${PYTHONS:-}" ]; then failed+=("$name"); fi
        continue
    fi
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "== Python $version: $python"
    if PYTHON=$python VENV=.venv-$version bash "$root/script/test.sh" "$@"; then
        passed+=("$version")
    else
        failed+=("$version")
    fi
done
echo "== passed: ${passed[*]:-none}; failed: ${failed[*]:-none}"
[ ${#passed[@]} -gt 0 ] && [ ${#failed[@]} -eq 0 ]
