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
    pip() { "$(scripts)/python" -m pip install --quiet --disable-pip-version-check "$@"; }
    # without an NVIDIA GPU, torch for CPUs alone, of a tenth of the size, from PyTorch's own index; what
    # is there then stays when the rest is installed, and where it cannot be reached the usual torch comes
    if [ "$(uname)" != Darwin ] && ! command -v nvidia-smi > /dev/null; then
        grep '^torch' requirements.txt > .venv/torch.txt
        pip --retries 0 --timeout 5 --index-url https://download.pytorch.org/whl/cpu -r .venv/torch.txt 2> /dev/null ||
            echo "== PyTorch's index of builds for CPUs cannot be reached: the usual build is installed"
    fi
    pip -r requirements.txt
    unset -f pip
    touch .venv/installed
fi
PATH="$PWD/$(scripts):$PATH"
