"""The main job on a laptop: a tiny model learns to spell words backward by CFPO, and by GRPO; a table and a plot.

python scripts/demo/demo.py     (or `make demo`)
"""

import argparse
import json
import random
import shutil
import time
from pathlib import Path

import matplotlib.pyplot as plt
import reasoning_gym
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer

from cfpo_trl import grpo
from cfpo_trl.studies.objectives import trainer_of
from cfpo_trl.tiny.model import build_model, build_tokenizer
from cfpo_trl.tiny.warm_start import write_splits

RUN = Path("runs/demo")
RECIPES = {name: f"recipes/demo/config_{name}.yaml" for name in ("cfpo", "grpo")}
COLORS = {"cfpo": "#0072B2", "grpo": "#D55E00"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
HELD_OUT = 1000  # words that neither the warm start nor the training sees
NOISE = 0.65  # share of warm-start labels with one wrong letter


def make_words() -> list[dict]:
    """All three- and four-letter words of reasoning-gym's spell_backward that it draws, each once."""
    drawn = reasoning_gym.create_dataset("spell_backward", size=12_000, seed=0, min_word_len=3, max_word_len=4)
    words = sorted({entry["metadata"]["word"].lower() for entry in drawn})
    return [{"prompt": f"{word}>", "solution": word[::-1]} for word in words]


def add_noise(row: dict, rng: random.Random) -> dict:
    """The row as a warm-start example: in a share `NOISE` of them one letter is drawn anew."""
    answer = list(row["solution"])
    if rng.random() < NOISE:
        answer[rng.randrange(len(answer))] = rng.choice(LETTERS)
    return {"prompt": row["prompt"], "completion": "".join(answer)}


def warm_start(rows: list[dict]) -> None:
    """Teaches the rule, blurred by noise: greedy answers are mostly right, sampled ones mostly wrong."""
    rng = random.Random(0)
    tokenizer = build_tokenizer(LETTERS + ">")
    trainer = SFTTrainer(
        build_model(tokenizer),
        SFTConfig(
            str(RUN / "start"),
            max_steps=260,
            per_device_train_batch_size=256,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=40,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list([add_noise(row, rng) for _ in range(16) for row in rows]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


@torch.no_grad()
def accuracy(checkpoint: Path, rows: list[dict], sample: bool) -> float:
    """Share of held-out words that the checkpoint spells right, sampled at temperature 1 or greedily."""
    set_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    output = model.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        max_new_tokens=6,
        do_sample=sample,
        **({"top_k": 0} if sample else {}),
    )
    answers = tokenizer.batch_decode(output[:, prompts.input_ids.size(1) :], skip_special_tokens=True)
    return sum(answer == row["solution"] for answer, row in zip(answers, rows, strict=True)) / len(rows)


def plot(path: Path) -> None:
    """Reward, and total variation between the updated and the sampling policy, over the optimizer's steps."""
    states = {name: json.loads((RUN / name / "trainer_state.json").read_text()) for name in RECIPES}
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    for axis, metric, label in (
        (top, "reward", "mean reward of the rollouts"),
        (bottom, "cfpo/tv", "total variation ½·E|r − 1|"),
    ):
        for name, color in COLORS.items():
            log = states[name]["log_history"]
            points = [(entry["step"], entry[metric]) for entry in log if metric in entry]
            axis.plot(*zip(*points, strict=True), color=color, label=name.upper())
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    top.legend()
    top.set_title("A character-level Qwen2 learns to spell words backward")
    bottom.set_xlabel("optimizer step")
    figure.savefig(path, dpi=150)


def prepare() -> list[dict]:
    """Makes the words and the warm-started model; returns the held-out words."""
    train, held_out = write_splits(make_words(), HELD_OUT, RUN / "words")
    print(f"1/3  Warm start on {len(train)} words, {NOISE:.0%} of the labels with one letter drawn anew", flush=True)
    warm_start(train)
    return held_out


def prepare_if_missing() -> None:
    if not (RUN / "start" / "model.safetensors").exists():
        prepare()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    only = "make the words and the warm-started model, if they are missing, and stop"
    parser.add_argument("--prepare", action="store_true", help=only)
    if parser.parse_args().prepare:
        prepare_if_missing()
        return

    start = time.perf_counter()
    held_out = prepare()
    for name, recipe in RECIPES.items():
        shutil.rmtree(RUN / name, ignore_errors=True)  # a finished run would stay as it is
        print(f"2/3  {name.upper()}: accelerate launch src/cfpo_trl/grpo.py --config {recipe}", flush=True)
        grpo.main(["--config", recipe], trainer_class=trainer_of(name))  # GRPO's clip, which logs its TV, too
    print(f"3/3  Accuracy on {len(held_out)} held-out words, which training never saw", flush=True)

    disable_progress_bar()  # of loading, within the table
    plot(RUN / "cfpo" / "training.png")
    print(f"\n{'held-out accuracy':<22}{'before':>8}{'CFPO':>8}{'GRPO':>8}")
    for name, sample in (("sampled (T = 1)", True), ("greedy", False)):
        scores = [accuracy(RUN / folder, held_out, sample) for folder in ("start", *RECIPES)]
        print(f"{name:<22}" + "".join(f"{score:>8.3f}" for score in scores))
    print(f"\ncheckpoint, log and plot: {RUN}/cfpo/ (model.safetensors, trainer_state.json, training.png)")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
