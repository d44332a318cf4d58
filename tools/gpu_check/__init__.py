"""The first hour on a GPU as one command: python -m tools.gpu_check (launch/gpu_check.sh)."""
