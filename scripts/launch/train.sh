#!/usr/bin/env bash
# Trains a recipe on this node, or on this node's part of several nodes.
#
#   scripts/launch/train.sh RECIPE [--option value ...]
#
#   RECIPE               a file, or a name that `cfpo recipes` lists
#   ENGINE=zero3         of recipes/accelerate_configs: ddp (default), fsdp2, zero2, zero3, cpu/ddp, ...
#   GPUS=8               GPUs of this node; default: those in CUDA_VISIBLE_DEVICES, or all that nvidia-smi shows
#   SERVER_GPUS=1        the last of them roll out in a vLLM server that is started and stopped here, the others train
#   NODES=2 NODE_RANK=0 MAIN_ADDRESS=host [MAIN_PORT=29500]    several nodes: the same command on each, with its rank
#   SERVER_SECONDS=900   how long the server may take to start
#   DRY_RUN=1            prints the commands and runs none
set -euo pipefail
# shellcheck source=scripts/launch/serving.sh
source "$(dirname "$0")/serving.sh"

if [[ $# -lt 1 ]]; then
    echo "usage: [ENGINE=...] [SERVER_GPUS=...] scripts/launch/train.sh RECIPE [--option value ...]" >&2
    exit 2
fi
recipe=$1
shift

engine=${ENGINE:-ddp}
nodes=${NODES:-1}
server_gpus=${SERVER_GPUS:-0}
# The GPUs that this shell may use, by their names
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
else
    mapfile -t devices < <(seq 0 "$((${GPUS:-$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)} - 1))")
fi
gpus=${GPUS:-${#devices[@]}}

launch=(cfpo train --engine "$engine")
if ((gpus > 0)); then
    if ((gpus > ${#devices[@]})); then
        echo "GPUS=$gpus, and CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names ${#devices[@]}" >&2
        exit 2
    fi
    if ((server_gpus >= gpus)); then
        echo "SERVER_GPUS=$server_gpus leaves none of $gpus GPUs to train on" >&2
        exit 2
    fi
    trainers=$((gpus - server_gpus))
    launch+=(--num_processes "$((trainers * nodes))")
fi
if ((nodes > 1 && server_gpus > 0)); then
    echo "SERVER_GPUS is for one node; scripts/launch/train.slurm gives the server a node of its own" >&2
    exit 2
fi
if ((nodes > 1)); then
    launch+=(--num_machines "$nodes" --machine_rank "${NODE_RANK:?which of the $nodes nodes is this, from 0}")
    launch+=(--main_process_ip "${MAIN_ADDRESS:?the address of node 0}" --main_process_port "${MAIN_PORT:-29500}")
fi
options=(--config "$recipe" "$@")

if ((server_gpus > 0)); then
    options+=(--use_vllm true --vllm_mode server --vllm_server_host 127.0.0.1)
    serve=(cfpo serve "${options[@]}")
    if ((gpus > 0)); then
        serve=(env "CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${devices[*]:trainers:server_gpus}")" "${serve[@]}")
        launch=(env "CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${devices[*]:0:trainers}")" "${launch[@]}")
    fi
    wait_for_it=(cfpo serve --wait "${SERVER_SECONDS:-900}" "${options[@]}")
    if [[ -n ${DRY_RUN:-} ]]; then
        show "${serve[@]}"
        show "${wait_for_it[@]}"
    else
        start_server serve wait_for_it
    fi
fi
train=("${launch[@]}" "${options[@]}")
if [[ -n ${DRY_RUN:-} ]]; then
    show "${train[@]}"
else
    run_training "${train[@]}" # not exec: the server ends with this script
fi
