#!/usr/bin/env bash
# Run the whole test suite: bash launchers/run_tests.sh [pytest arguments]
# For everyday work, in a few minutes: bash launchers/run_tests.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/install.sh
# The tests bring their own models and data; no test may contact a hub.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# For the tests' tiny models one thread is faster than two that synchronise.
export OMP_NUM_THREADS=1
# Three workers keep two cores busy, because launched processes wait for each other. Tests of a file share their setup,
# so a file stays on one worker. Files run in folder order: long ones first, so that the workers finish together.
exec python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
