"""One process of a training run whose rollouts are a fixed function of prompt, copy and step: only training differs.

python equivalence_run.py MODEL REWARD_MODEL OUTPUT PER_DEVICE_BATCH ACCUMULATION
"""

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import AutoTokenizer

from cfpo_trl import CFPOConfig, CFPOTrainer
from cfpo_trl.rewards import load_reward
from cfpo_trl.rewards.texts import text_of

LETTERS = "abcdefghij"
ON_CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
    "seed": 3,
}
PHASES = {
    "one_update": {"num_iterations": 1, "loss_type": "grpo"},
    "four_updates": {"num_iterations": 4, "loss_type": "dapo"},
    "rlhf": {
        "num_iterations": 2,
        "loss_type": "dr_grpo",
        "advantage_estimator": "rloo",
        "kl_in_reward": 0.5,
        "kl_in_reward_level": "token",
    },
}


def allow_fsdp_on_cpu() -> None:
    """Accelerate turns FSDP on for several GPUs alone: while its state is made, several CPU processes pass for such.

    The device stays the CPU and the backend gloo; parameters are sharded by PyTorch's own `fully_shard`.
    """
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args, **kwargs) -> None:
        PartialState(cpu=True)
        if PartialState().distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    AcceleratorState.__init__ = init


def rollouts(prompts: list[str], trainer: CFPOTrainer) -> dict[str, list]:
    """Completions of 3 to 7 tokens, drawn from a generator seeded with prompt, copy and step."""
    tokenizer, copies = trainer.processing_class, Counter()
    output = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    for prompt in prompts:
        generator = random.Random(f"{prompt} {copies[prompt]} {trainer.state.global_step}")
        copies[prompt] += 1
        letters = "".join(generator.choices(LETTERS, k=generator.randint(2, 6)))
        ids = [*tokenizer(letters)["input_ids"], tokenizer.eos_token_id]
        output["prompt_ids"].append(tokenizer(prompt)["input_ids"])
        output["completion_ids"].append(ids)
        output["logprobs"].append([0.0] * len(ids))  # nothing corrects for them without vLLM
    return output


def share_of_vowels(completions: list, **kwargs) -> list[float]:
    return [sum(letter in "aei" for letter in text_of(completion)) / 6 for completion in completions]


def no_reward(completions: list, **kwargs) -> list[float]:
    raise KeyError("nothing")


def share_held(trainer: CFPOTrainer) -> dict[str, float]:
    """The share of the model's parameters, and of their optimizer's state, that this process holds."""
    params = list(trainer.model.parameters())
    if hasattr(params[0], "ds_tensor"):  # ZeRO-3
        held, total = sum(p.ds_tensor.numel() for p in params), sum(p.ds_numel for p in params)
    elif hasattr(params[0], "to_local"):  # FSDP2
        held, total = sum(p.to_local().numel() for p in params), sum(p.numel() for p in params)
    else:
        held = total = sum(p.numel() for p in params)
    optimizer = trainer.optimizer.optimizer  # behind Accelerate's wrapper
    base = getattr(optimizer, "optimizer", optimizer)  # and DeepSpeed's
    moments = [state["exp_avg"] for state in base.state.values()]
    moments = sum(getattr(m, "to_local", lambda m=m: m)().numel() for m in moments)
    return {"parameters": held / total, "optimizer": moments / total}


def run(model: str, reward: str, output: Path, batch: int, accumulation: int, options: dict) -> None:
    args = CFPOConfig(
        str(output),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **options,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_steps=8,
        logging_steps=1,
        **ON_CPU,
    )
    prompts = Dataset.from_list([{"prompt": first + second} for first in LETTERS for second in LETTERS])
    tokenizer = AutoTokenizer.from_pretrained(model)
    rewards = [share_of_vowels]
    if "kl_in_reward" in options:
        rewards.append(load_reward(reward, {"batch_size": 3}))
    trainer = CFPOTrainer(model, rewards, args, prompts, processing_class=tokenizer, rollout_func=rollouts)
    trainer.train()
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        facts = {"type": str(trainer.accelerator.distributed_type), "processes": trainer.accelerator.num_processes}
        (output / "run.json").write_text(
            json.dumps({"log": trainer.state.log_history, "held": share_held(trainer), **facts})
        )


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpu()
    model, reward, output, batch, accumulation = sys.argv[1:]
    for name, options in PHASES.items():
        run(model, reward, Path(output) / name, int(batch), int(accumulation), options)
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()  # a process that ends while another still talks to it may abort
