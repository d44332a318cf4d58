# Sourced by the scripts beside it: makes .venv in the project's root, or re-uses it, and activates it.
# MDM_PYTHON names another interpreter to make it with.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # ranks on one machine must not fight for its cores

prepare_environment() { # $1: extras to install, "" or "[test]"
    local stamp=".venv/.installed$1"
    if [ ! -x .venv/bin/python ]; then
        echo "making .venv" >&2
        "${MDM_PYTHON:-python3}" -m venv .venv || return 1
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
    if [ ! -e "$stamp" ] || [ setup.py -nt "$stamp" ]; then
        echo "installing megatron-mdm$1 and what it needs (about a minute)" >&2
        pip install --quiet --disable-pip-version-check --editable ".$1" || return 1
        touch "$stamp"
    fi
}
