# shellcheck shell=bash
# What train.sh and train.slurm share: a server beside the training, signals, and the dry run.

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

# run_training COMMAND...: runs it, passes SIGTERM and SIGINT on to it, and returns its status when it has ended.
run_training() {
    "$@" &
    local training=$! status=0
    # shellcheck disable=SC2064  # this training, now
    trap "kill -TERM $training" TERM INT
    wait "$training" || status=$? # a signal ends the wait early
    while kill -0 "$training" 2>/dev/null; do
        status=0
        wait "$training" || status=$?
    done
    trap - TERM INT
    return "$status"
}
