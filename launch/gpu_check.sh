#!/usr/bin/env bash
# The first thing to run on a new kind of GPU: ten checks and the speed of two models, on one GPU, in at most ten minutes.
#   bash launch/gpu_check.sh                          all; writes gpu_check.json, ends with 1 where a check failed
#   bash launch/gpu_check.sh varlen head              some
#   bash launch/gpu_check.sh --device cpu --quick     a trial of the program without a GPU; its figures mean little
# Nothing is installed: it runs in the active environment, else in .venv, and needs what `pip install .` brings.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
activate_environment
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec python -m tools.gpu_check "$@"
