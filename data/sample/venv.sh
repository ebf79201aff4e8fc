# Sourced by data/sample/run.sh and tests/run.sh in the project's folder: makes .venv, where there is none or
# its packages are older than requirements.txt, and puts its python first in PATH.
# PYTHON names another interpreter to make it with.
scripts() { if [ -d .venv/Scripts ]; then echo .venv/Scripts; else echo .venv/bin; fi; }
if [ ! -e .venv/installed ] || [ requirements.txt -nt .venv/installed ]; then
    echo "== .venv: installing packages; torch is large, this takes minutes the first time"
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and
        f"error: {sys.executable} is Python {sys.version.split()[0]}; name one of 3.11 or newer: PYTHON=/path/to/python3.11 bash ...")'
    # what another Python left is of no use; what the same one did is kept, torch being large
    "$python" -m venv $([ "$("$(scripts)/python" -V 2>&1)" = "$("$python" -V)" ] || echo --clear) .venv
    "$(scripts)/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    touch .venv/installed
fi
PATH="$PWD/$(scripts):$PATH"
