#!/usr/bin/env bash
# The whole test suite: bash launchers/run_tests.sh [pytest arguments]
# Every day, in a few minutes: bash launchers/run_tests.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/install.sh
# The tests bring their own models and data: nothing may wait for a hub.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# The tests' models are tiny: one thread each is faster than two that wait for each other.
export OMP_NUM_THREADS=1
# Three files at a time, for two cores: launched processes wait for each other. A file's tests share what it costs to set them up.
# In order of their folders: the long ones come first, and the short ones even out the end.
exec python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
