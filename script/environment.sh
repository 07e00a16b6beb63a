# Sourced by the scripts: `use_environment EXTRA` makes .venv if needed and installs the package into it.

use_environment() {
    local extra=$1 python=${PYTHON:-python3} wanted mark
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || {
        echo "Python 3.10 to 3.13 is needed; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/one." >&2
        exit 2
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # Installing is skipped while neither the project's metadata nor the extra has changed.
    wanted="$(cat pyproject.toml propeller/version.py | cksum)"
    mark=".venv/.installed-$extra"
    if [ ! -f "$mark" ] || [ "$(cat "$mark")" != "$wanted" ]; then
        echo "installing ernie-propeller[$extra] into .venv (once)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extra]"
        echo "$wanted" > "$mark"
    fi
}
