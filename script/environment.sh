# Sourced by the scripts. `use_environment EXTRA` makes the virtual environment $VENV if needed (default: .venv
# in the repository) and installs the package into it, with Paddle $PADDLE_VERSION if that is set.
VENV=${VENV:-.venv}

use_environment() {
    local extra=$1 python=${PYTHON:-python3} wanted mark how=(--quiet) packages
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || {
        echo "Python 3.10 to 3.13 is needed; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/one." >&2
        exit 2
    }
    # Installing is skipped while neither the project's metadata nor the extra has changed.
    wanted="$(cat pyproject.toml propeller/version.py | cksum)${PADDLE_VERSION:+ with Paddle $PADDLE_VERSION}"
    packages=(--editable ".[$extra]" ${PADDLE_VERSION:+"paddlepaddle==$PADDLE_VERSION"})
    mark="$VENV/.installed-$extra"
    mkdir -p "$VENV"
    {
        # Two installations at once would break each other. Where there is no flock, start one script at a time.
        if command -v flock > /dev/null && ! flock -n 9; then
            echo "waiting for another script that installs into $VENV"
            flock 9
        fi
        # One whose making was interrupted has no pip. Only what is an environment is ever cleared.
        if ! "$VENV/bin/python" -m pip --version > /dev/null 2>&1; then
            if [ -f "$VENV/pyvenv.cfg" ]; then "$python" -m venv --clear "$VENV"; else "$python" -m venv "$VENV"; fi
        fi
        if [ ! -f "$mark" ] || [ "$(cat "$mark")" != "$wanted" ]; then
            echo "installing ernie-propeller[$extra] into $VENV: once, a minute or two, mostly to download Paddle"
            if [ -t 1 ]; then how=(--progress-bar on); fi
            "$VENV/bin/python" -m pip install "${how[@]}" --disable-pip-version-check "${packages[@]}"
            echo "$wanted" > "$mark"
        fi
    } 9< "$VENV"
}
