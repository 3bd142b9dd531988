"""An asynchronous training against a real vLLM server: the log, and what the server says after the last update.

python asynchronous_run.py MODEL SERVER OUTPUT STEPS     (again: it goes on from the last checkpoint)
"""

import json
import sys
from pathlib import Path

import requests
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from cfpo_trl import AsyncCFPOConfig, AsyncCFPOTrainer
from equivalence_run import LETTERS, ON_CPU


def share_of_vowels(completions: list[list[dict]], **kwargs) -> list[float]:
    return [sum(letter in "aei" for letter in completion[-1]["content"]) / 6 for completion in completions]


def served(server: str, model: str, ids: list[int]) -> list[float]:
    """The log-probs that the server samples by, of each token but the first."""
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
    answer = requests.post(f"{server}/v1/completions", json=body, timeout=60).json()["choices"][0]
    return [step[str(token)]["logprob"] for token, step in zip(ids[1:], answer["prompt_logprobs"][1:], strict=True)]


def main(model: str, server: str, output: Path, steps: int) -> None:
    args = AsyncCFPOConfig(
        str(output),
        vllm_server_base_url=server,
        per_device_train_batch_size=64,
        token_budget=0,  # by default a row holds one completion of the longest length: too few for an update
        num_generations=8,
        max_completion_length=6,
        max_staleness=4,
        learning_rate=1e-3,
        max_steps=steps,
        **ON_CPU | {"save_strategy": "steps", "save_steps": 10},
    )
    prompts = [[{"role": "user", "content": first + second}] for first in LETTERS for second in LETTERS]
    trainer = AsyncCFPOTrainer(
        model,
        share_of_vowels,
        args,
        Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output) if output.exists() else None)
    trainer.save_model()
    ids = [2, 3, 4, 5, 6, 7]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(output)(torch.tensor([ids])).logits
    logps = logits[0, :-1].log_softmax(-1)
    ours = logps.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    found = {"log": trainer.state.log_history, "ours": ours, "served": served(server, model, ids)}
    (output / "run.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
