# Sourced by data/sample/run.sh and tests/run.sh in the project's folder: makes .venv, where there is none or
# its packages are older than requirements.txt, and puts its python first in PATH.
# PYTHON names another interpreter to make it with.
scripts() { if [ -d .venv/Scripts ]; then echo .venv/Scripts; else echo .venv/bin; fi; }
if [ ! -e .venv/installed ] || [ requirements.txt -nt .venv/installed ]; then
    echo "== .venv: installing packages; torch is large, this takes minutes the first time"
    "${PYTHON:-python3}" -m venv .venv
    "$(scripts)/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    touch .venv/installed
fi
PATH="$PWD/$(scripts):$PATH"
