#!/usr/bin/env bash
# Set everything up and run the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. data/sample/venv.sh
exec python -m pytest tests "$@"
