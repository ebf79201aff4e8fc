#!/usr/bin/env bash
# Set everything up and run the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. data/sample/venv.sh
# for the tests of net.py --export and of HEIC photos, which are skipped where these are not to be had
python -c "import onnx, onnxruntime, pillow_heif" 2>/dev/null ||
    python -m pip install --quiet --disable-pip-version-check onnx onnxruntime pillow-heif || true
exec python -m pytest tests "$@"
