# shellcheck shell=bash
# What train.sh and train.slurm share: a server beside the training, a training that ends well, and the dry run.

# Torch's launcher kills what has not ended so many seconds after SIGTERM; a step may take long.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

# Prints a command as one could type it.
show() {
    printf '%q ' "$@"
    echo
}

# start_server SERVE WAIT: runs the command of the array named SERVE until this script ends, and returns when that of
# the array named WAIT says that it is healthy; exits where the server ends before.
start_server() {
    local -n serve_command=$1 wait_command=$2
    set -m # in a process group of its own: Ctrl-C is not the server's
    "${serve_command[@]}" &
    server=$!
    set +m
    trap 'kill -- "-$server" 2>/dev/null && wait "$server"' EXIT
    "${wait_command[@]}" &
    local waiting=$!
    wait -n "$server" "$waiting" || { echo "the vLLM server did not start" >&2; kill "$waiting" 2>/dev/null; exit 1; }
    kill -0 "$server"
}

# run_training COMMAND...: runs it, passes SIGTERM and SIGINT on to all of its processes, and returns its status when
# the last of them has ended: Accelerate's launcher of one process dies of the signal, and the training still saves.
run_training() {
    set -m
    "$@" &
    training=$!
    set +m
    trap 'kill -TERM -- "-$training" 2>/dev/null' TERM
    trap 'kill -INT -- "-$training" 2>/dev/null' INT
    local status=0 more
    wait "$training" || status=$? # a signal ends it early
    while kill -0 -- "-$training" 2>/dev/null; do
        sleep 0.2 || true
        more=0
        wait "$training" 2>/dev/null || more=$?
        ((more == 127)) || status=$more # 127: it has been waited for
    done
    trap - TERM INT
    return "$status"
}
