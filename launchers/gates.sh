#!/usr/bin/env bash
# Run every gate that a change must pass: bash launchers/gates.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/install.sh
ruff check
ruff format --check
mypy
exec bash launchers/run_tests.sh "$@"
