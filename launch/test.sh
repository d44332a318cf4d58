#!/usr/bin/env bash
# The tests, with all their own set-up. See tests/README.md.
#   bash launch/test.sh                      all: two at a time, then those that must be alone on the machine
#   bash launch/test.sh quick                the files of tests/quick.txt: every package, at most 90 s on two cores
#   bash launch/test.sh gpu                  those that need CUDA; without a GPU each is skipped, with the reason
#   bash launch/test.sh tests/diffusion -x   anything else goes to pytest
# TEST_WORKERS (2): how many tests run at a time, where all do.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare_environment "[test]"
tests=(python -m pytest -q --durations=8)

case "${1:-}" in
    "")
        code=0
        "${tests[@]}" -m "not alone" --numprocesses "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder tests || code=$?
        mapfile -t alone < <(grep -rl --include='test_*.py' 'pytest\.mark\.alone' tests | sort)
        "${tests[@]}" -m alone "${alone[@]}" || code=$?
        exit "$code"
        ;;
    quick)
        mapfile -t quick < <(grep '^tests/' tests/quick.txt)
        "${tests[@]}" "${@:2}" "${quick[@]}"
        ;;
    gpu) MDM_TEST_GPU=1 "${tests[@]}" -m gpu -rs "${@:2}" tests ;;
    *) "${tests[@]}" "$@" ;;
esac
