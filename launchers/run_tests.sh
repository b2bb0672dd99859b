#!/usr/bin/env bash
# The whole test suite: bash launchers/run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/install.sh
# The tests bring their own models and data: nothing may wait for a hub.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python -m pytest "$@"
