#!/usr/bin/env bash
# CFPO or GRPO in verl, matched in all else: Qwen2.5-1.5B-Instruct on MATH, each batch of rollouts in 4 updates.
#   OBJECTIVE=cfpo scripts/launch/verl_math.sh       # on one node; further overrides of verl's follow
#   OBJECTIVE=vanilla scripts/launch/verl_math.sh    # verl's clip, with its dual clip at a ratio of 3
# DRY_RUN=1 prints the command. Needs verl 0.9 and cfpo_trl in one environment: python -m cfpo_trl.integrations.verl
set -euo pipefail

OBJECTIVE=${OBJECTIVE:-cfpo}           # cfpo, or vanilla: verl's clipped loss
EPSILON=${EPSILON:-0.2}                # width of the trust region, or of the clip
MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
DATA=${DATA:-$HOME/data/math}          # train.parquet and test.parquet, as examples/data_preprocess of verl makes them
GPUS=${GPUS:-8}
OUT=${OUT:-runs/verl/math/$OBJECTIVE}

command=(
  "${PYTHON:-python3}" -m verl.trainer.main_ppo
  algorithm.adv_estimator=grpo
  algorithm.use_kl_in_reward=False
  data.train_files="$DATA/train.parquet"
  data.val_files="$DATA/test.parquet"
  data.train_batch_size=256
  data.max_prompt_length=1024
  data.max_response_length=2048
  data.filter_overlong_prompts=True
  actor_rollout_ref.model.path="$MODEL"
  actor_rollout_ref.model.enable_gradient_checkpointing=True
  actor_rollout_ref.actor.policy_loss.loss_mode="$OBJECTIVE"
  actor_rollout_ref.actor.clip_ratio="$EPSILON"
  actor_rollout_ref.actor.clip_ratio_low="$EPSILON"
  actor_rollout_ref.actor.clip_ratio_high="$EPSILON"
  actor_rollout_ref.actor.loss_agg_mode=token-mean
  actor_rollout_ref.actor.optim.lr=1e-6
  actor_rollout_ref.actor.ppo_mini_batch_size=64
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8
  actor_rollout_ref.actor.use_kl_loss=False
  actor_rollout_ref.actor.entropy_coeff=0
  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.n=8
  actor_rollout_ref.rollout.gpu_memory_utilization=0.5
  actor_rollout_ref.rollout.tensor_model_parallel_size=1
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16
  trainer.n_gpus_per_node="$GPUS"
  trainer.nnodes=1
  trainer.total_epochs=5
  trainer.save_freq=50
  trainer.test_freq=10
  trainer.logger='["console"]'
  trainer.project_name=cfpo
  trainer.experiment_name="$OBJECTIVE"
  trainer.default_local_dir="$OUT"
  "$@"
)
if [[ -n "${DRY_RUN:-}" ]]; then
  printf '%s\n' "${command[@]}"
else
  exec "${command[@]}"
fi
