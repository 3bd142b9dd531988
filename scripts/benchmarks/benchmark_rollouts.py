"""Tokens per second of rollouts by transformers, vLLM colocated and a vLLM server, alternating in one run.

python scripts/benchmarks/benchmark_rollouts.py [--model smollm2]; two processes, by `accelerate launch` in place of
`python`, with --config_file recipes/accelerate_configs/cpu/ddp.yaml
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from reasoning_gym import create_dataset
from transformers import AutoTokenizer

from cfpo_trl import CFPOConfig, CFPOTrainer
from cfpo_trl.evaluation.callback import environment_without_launcher
from cfpo_trl.grpo import rollouts
from cfpo_trl.rollouts.serving import serving
from cfpo_trl.tiny.model import build_model, build_tokenizer

SMOLLM2 = Path(__file__).parents[1] / "studies" / "smollm2.py"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MODES = ("transformers", "colocate", "server")
GENERATIONS = 8
PORT = 8765


def prepare(name: str, folder: Path) -> dict:
    """Writes the model; returns a recipe with its prompts, batch size and completion length."""
    if name == "demo":  # the demo's model, untrained
        tokenizer = build_tokenizer(LETTERS + ">")
        build_model(tokenizer).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        prompts = [f"{first}{second}a>" for first in LETTERS for second in LETTERS]
        size, tokens = 512, 6
    else:
        subprocess.run([sys.executable, SMOLLM2, folder / "model"], check=True)
        questions = create_dataset("chain_sum", size=64, seed=0)
        prompts = [[{"role": "user", "content": entry["question"]}] for entry in questions]
        size, tokens = 32, 96
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p, "solution": "-"}) + "\n" for p in prompts))
    return {
        "model_name_or_path": str(folder / "model"),
        "dtype": "float32",
        "dataset_name": str(folder / "prompts.jsonl"),
        "reward_funcs": ["exact_match"],
        "max_prompt_length": 128,
        "max_completion_length": tokens,
        "per_device_train_batch_size": size,
        "num_generations": GENERATIONS,
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_host": "127.0.0.1",
        "vllm_server_port": PORT,
        "output_dir": str(folder / "run"),
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
    }


def build_trainer(recipe: dict, mode: str, processes: int) -> CFPOTrainer:
    """A trainer that rolls out in this mode."""
    names = ("max_completion_length", "num_generations", "vllm_server_host", "vllm_server_port", "output_dir")
    args = CFPOConfig(
        **{name: recipe[name] for name in names},
        per_device_train_batch_size=recipe["per_device_train_batch_size"] // processes,
        use_vllm=mode != "transformers",
        vllm_mode="server" if mode == "server" else "colocate",
        vllm_max_model_length=recipe["max_prompt_length"] + recipe["max_completion_length"],
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    with rollouts(args):
        return CFPOTrainer(
            recipe["model_name_or_path"],
            lambda completions, **kwargs: [0.0] * len(completions),
            args,
            Dataset.from_json(recipe["dataset_name"]),
            processing_class=AutoTokenizer.from_pretrained(recipe["model_name_or_path"], padding_side="left"),
        )


def roll_out(trainer: CFPOTrainer) -> tuple[float, int]:
    """Seconds and tokens of one batch of rollouts, over all processes."""
    groups = trainer.args.per_device_train_batch_size // GENERATIONS
    first = groups * trainer.accelerator.process_index
    prompts = [trainer.train_dataset[first + i]["prompt"] for i in range(groups) for _ in range(GENERATIONS)]
    trainer.accelerator.wait_for_everyone()
    start = time.perf_counter()
    _, completion_ids, *_ = trainer._generate(prompts)
    trainer.accelerator.wait_for_everyone()
    return time.perf_counter() - start, sum(gather_object([len(ids) for ids in completion_ids]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("demo", "smollm2"), default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    state = PartialState(cpu=True)
    with ExitStack() as stack:
        folder = [stack.enter_context(tempfile.TemporaryDirectory()) if state.is_main_process else None]
        broadcast_object_list(folder)
        folder = Path(folder[0])
        if state.is_main_process:
            (folder / "recipe.yaml").write_text(yaml.safe_dump(prepare(options.model, folder)))
            stack.enter_context(serving(folder / "recipe.yaml", folder / "server.log", environment_without_launcher()))
        state.wait_for_everyone()
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        trainers = {mode: build_trainer(recipe, mode, state.num_processes) for mode in MODES}
        rates = {mode: [] for mode in MODES}
        for current in range(options.rounds + 1):
            for mode, trainer in trainers.items():
                seconds, tokens = roll_out(trainer)
                if current:  # the first round compiles
                    rates[mode].append(tokens / seconds)
                    state.print(f"round {current}: {mode} {tokens} tokens in {seconds:.2f} s", flush=True)
    state.print(f"\n{options.model}, {state.num_processes} process(es), median tokens/s of {options.rounds} rounds")
    baseline = statistics.median(rates["transformers"])
    for mode in MODES:
        low, middle, high = min(rates[mode]), statistics.median(rates[mode]), max(rates[mode])
        state.print(f"{mode:<14}{middle:>8.0f}  [{low:.0f}, {high:.0f}]  {middle / baseline:.2f} x transformers")


if __name__ == "__main__":
    main()
