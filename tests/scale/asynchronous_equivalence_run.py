"""One process of an asynchronous training whose samples are a fixed function of their number: only training differs.

python asynchronous_equivalence_run.py MODEL REWARD_MODEL OUTPUT PER_DEVICE_BATCH ACCUMULATION
"""

import json
import os
import queue
import random
import sys
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from cfpo_trl import AsyncCFPOConfig, AsyncCFPOTrainer
from cfpo_trl.together import leave_together
from equivalence_run import LETTERS, ON_CPU, allow_fsdp_on_cpu

FAILS = os.environ.get("FAILS")  # `transfer` or `samples`: what stops in the middle
AGE = 2  # versions; one more passes while Accelerate holds the micro-batch


class Worker:
    """Makes each sample when it is asked for."""

    def __init__(self):
        self.rollout_buffer, self.metrics_queue = self, queue.Queue()
        self.number = self.version = 0

    def get(self, timeout: float) -> RolloutSample:
        if FAILS == "samples" and self.number == 56:  # three updates of 16, and half of one more
            raise queue.Empty
        rng = random.Random(self.number)
        ids = np.array(rng.choices(range(2, 2 + len(LETTERS)), k=rng.randint(4, 8)))
        mask = np.array([0, 0, *[1] * (len(ids) - 2)])
        logps = np.array([rng.uniform(-3, -1.5) for _ in ids], dtype=np.float32)
        self.number += 1
        version = max(self.version - AGE, 1)
        return RolloutSample([], [], ids, mask, logps, rng.choice([-1.0, 0.5, 2.0]), version, self.number // 4, {})

    def qsize(self) -> int:
        return 0

    def update_model_version(self, version: int) -> None:
        self.version = version

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def check_health(self, stale_after_s: float) -> None:
        raise RuntimeError("no samples")


class NoTransfer:
    pauses = 0

    def init_weight_transfer(self) -> None: ...

    def pause(self) -> None:
        self.pauses += 1
        if FAILS == "transfer" and self.pauses == 4:  # the start's, and one behind each of three updates
            raise ConnectionError("the server is gone")

    def send_weights(self, iterator) -> None: ...

    def resume(self) -> None: ...

    def destroy(self) -> None: ...


def reward(completions, **kwargs):
    return [0.0] * len(completions)


def main(model: str, output: Path, batch: int, accumulation: int) -> None:
    args = AsyncCFPOConfig(
        str(output),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        token_budget=0,
        penalty_slope=1.25,
        learning_rate=1e-3,
        max_steps=8,
        **ON_CPU,
    )
    data = Dataset.from_list([{"prompt": letter} for letter in LETTERS])
    trainer = AsyncCFPOTrainer(model, reward, args, data, rollout_worker=Worker(), weight_transfer=NoTransfer())
    trainer.train()
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        facts = {"log": trainer.state.log_history, "processes": trainer.accelerator.num_processes}
        (output / "run.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpu()
    model, _, output, batch, accumulation = sys.argv[1:]
    main(model, Path(output), int(batch), int(accumulation))
    PartialState()
    leave_together()
