#!/usr/bin/env bash
# Runs script/test.sh under the oldest and the newest Paddle that are supported, or under the versions that
# PADDLES names, each in an environment of its own (.venv-paddle-3.2.2, ...). Arguments go to pytest:
#     PADDLES="3.2.2 3.3.1" bash script/test_matrix.sh -k resume
set -euo pipefail
root=$(dirname "$0")/..
passed=() failed=()
for version in ${PADDLES:-3.2.2 3.3.1}; do
    echo "== Paddle $version"
    if PADDLE_VERSION=$version VENV=.venv-paddle-$version bash "$root/script/test.sh" "$@"; then
        passed+=("$version")
    else
        failed+=("$version")
    fi
done
echo "== passed: ${passed[*]:-none}; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
