#!/usr/bin/env bash
# The tests, with all their own set-up. Arguments go to pytest: bash launch/test.sh tests/diffusion -x
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare_environment "[test]"
python -m pytest -q --durations=8 "${@:-tests}"
