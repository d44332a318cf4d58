# shellcheck shell=bash
# Sourced by the scripts beside it: the interpreter, the GPUs, the children. MDM_PYTHON names another interpreter to make
# .venv with. Defaults of threads and communication are megatron_mdm/parallel/defaults.py's: every rank sets its own.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)


activate_environment() { # the active environment, else .venv where there is one
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -e "$root/.venv/bin/activate" ]; then
        # shellcheck disable=SC1091
        source "$root/.venv/bin/activate"
    fi
}

visible_devices() { # indices of the GPUs that a rank will see, by the rule of torch.cuda.device_count()
    local uuid name index names=() found=() uuids=()
    while read -r uuid; do uuids+=("$uuid"); done < <(nvidia-smi --list-gpus 2>/dev/null |
        sed -nE 's/^GPU [0-9]+:(.*UUID: ([^)]*)\).*)?.*$/\2/p') # lines of MIG instances are indented
    if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
        echo "${!uuids[@]}"
        return
    elif [[ $CUDA_VISIBLE_DEVICES == MIG-* ]]; then # CUDA shows a process one instance, however many are named
        [ "${#uuids[@]}" -gt 0 ] && echo 0
        return
    fi
    while read -r name; do
        if [[ $CUDA_VISIBLE_DEVICES == GPU-* ]]; then # all are UUIDs, or the beginnings of such
            [[ $name == GPU-* ]] || break
        else
            [[ $name =~ ^\+?0*([0-9]+) ]] || break # also "-1"; what follows the digits does not count
            name=${BASH_REMATCH[1]}
        fi
        [[ " ${names[*]} " == *" $name "* ]] && return # one that is named twice empties the list
        names+=("$name")
    done < <(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES")
    for name in "${names[@]}"; do
        index=$(index_of "$name" "${uuids[@]}")
        [ -n "$index" ] || break # there is no such GPU, or there are several
        [[ " ${found[*]} " == *" $index "* ]] && return
        found+=("$index")
    done
    echo "${found[*]}"
}

index_of() { # $1: a number, or the beginning of an UUID; others: the UUIDs of the GPUs
    local name=$1 index matches=()
    shift
    for ((index = 0; index < $#; index++)); do
        [[ $name == "$index" || ($name == GPU-* && ${*:index+1:1} == "$name"*) ]] && matches+=("$index")
    done
    [ "${#matches[@]}" = 1 ] && echo "${matches[0]}"
}

count_devices() { # ranks that a node can take: the GPUs that they will see, or one
    local devices
    read -ra devices <<<"$(visible_devices)"
    echo "$((${#devices[@]} > 0 ? ${#devices[@]} : 1))"
}

# shellcheck disable=SC2034 # the quickstarts use them
read_arguments() { # $@: a quickstart's; sets mode and overrides, for launch/train.py, and run and base, where overrides do
    local argument
    mode=--overwrite
    overrides=()
    for argument in "$@"; do
        case "$argument" in
            --resume) mode=--resume && continue ;;
            checkpoint.directory=*) run=${argument#*=} ;;
            model.init_from=*) base=${argument#*=} ;;
        esac
        overrides+=("$argument")
    done
}

free_port() {
    python -c 'import socket; probe = socket.socket(); probe.bind(("", 0)); print(probe.getsockname()[1])'
}

prepare_environment() { # $1: extras to install, "" or "[test]"; makes .venv, or re-uses it, and works in the root
    local said stamp=".venv/.installed$1"
    cd "$root" || return 1
    if [ ! -x .venv/bin/python ]; then
        echo "making .venv" >&2
        "${MDM_PYTHON:-python3}" -m venv .venv || return 1
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
    if [ ! -e "$stamp" ] || [ setup.py -nt "$stamp" ]; then
        echo "installing megatron-mdm$1 and what it needs (about a minute)" >&2
        said=$(pip install --disable-pip-version-check --editable ".$1" 2>&1) || {
            printf '%s\n' "$said" >&2
            return 1
        }
        touch "$stamp"
    fi
}

await_child() { # $1: a process of this shell; returns its exit code, however often a signal ends the waiting
    local code
    wait "$1"
    code=$?
    while kill -0 "$1" 2>/dev/null; do
        wait "$1"
        code=$?
    done
    return "$code"
}
