"""Trains a reward model from preferences with TRL's RewardTrainer, and leaves the scale of its scores in its config.

accelerate launch src/cfpo_trl/reward_training.py --config recipes/Qwen2.5-1.5B-Instruct/reward_model/config.yaml
"""

import os
import sys

if __name__ == "__main__":
    if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        sys.path[0] = os.getcwd()  # modules of the user come first; this folder's are cfpo_trl's alone
    from cfpo_trl.running.parent import end_with_launcher

    end_with_launcher()  # also while the rest is imported, which takes seconds

import json
import logging
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import HfApi
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import DatasetMixtureConfig, ModelConfig, RewardConfig

from cfpo_trl.mistakes import checking, say_mistakes
from cfpo_trl.running.data import DataArguments, load_splits, select_split
from cfpo_trl.running.existing_run import ExistingRun, FinishedRun
from cfpo_trl.running.interrupt import AlreadyTrained, SaveOnSignal, StopAtTheEnd
from cfpo_trl.running.loading import check_model, hide_tied_heads, model_init_kwargs, trusts_remote_code
from cfpo_trl.running.progress import one_line_per_log
from cfpo_trl.running.recipe import RecipeParser
from cfpo_trl.together import leave_together

if TYPE_CHECKING:
    from datasets import Dataset

    from cfpo_trl.rewards.model import RewardModel

logger = logging.getLogger("cfpo_trl")

CALIBRATION_PAIRS = 1000  # that the scale and the printed accuracy are measured on
NEEDED = {"chosen", "rejected"}
ARGUMENTS = (DataArguments, RewardConfig, ModelConfig, DatasetMixtureConfig)


def main(arguments: list[str] | None = None) -> None:
    """Trains, saves, and measures on held-out pairs (on the training pairs where none are held out).

    Raises:
        Mistake: options, data or model do not fit.
        SystemExit: a signal ended the training; a checkpoint was saved.
    """
    with checking():
        # Options
        if not torch.accelerator.is_available():
            os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
        parser = RecipeParser(ARGUMENTS)
        data_args, training_args, model_args, mixture = parser.parse_args_and_config(arguments)
        check_model(model_args.model_name_or_path)
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
        logger.setLevel(logging.INFO if training_args.process_index == 0 else logging.ERROR)
        for note in parser.notes:
            logger.info(note)
        run = ExistingRun(
            training_args.output_dir, data_args.if_output_exists, training_args.resume_from_checkpoint, parser.given
        )
        try:
            checkpoint = run.checkpoint()
        except FinishedRun as finished:
            print(finished)
            return

        # Data
        splits = load_splits(data_args, mixture)
        train_dataset = select_split(splits, data_args.dataset_train_split, "dataset_train_split")
        check_pairs(train_dataset)
        eval_dataset = splits.get(data_args.dataset_test_split)
        if training_args.eval_strategy != "no":
            eval_dataset = select_split(splits, data_args.dataset_test_split, "dataset_test_split")
        if eval_dataset is not None:
            check_pairs(eval_dataset)

        # Trainer, which loads the model
        from trl import RewardTrainer, get_peft_config, get_quantization_config

        from cfpo_trl.rewards.model import RewardModel

        trusting = trusts_remote_code(training_args, model_args)
        training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
        quantization = get_quantization_config(model_args)
        model_args.lora_task_type = "SEQ_CLS"  # PEFT then trains and saves the new output, too
        stop = SaveOnSignal()
        trainer = RewardTrainer(
            model=model_args.model_name_or_path,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset if training_args.eval_strategy != "no" else None,
            callbacks=[stop, StopAtTheEnd(), *run.callbacks()],
            peft_config=get_peft_config(model_args),
            **({"quantization_config": quantization} if quantization else {}),  # TRL 1.0 has no such argument
        )
        one_line_per_log(trainer)
        run.begin()

    # Train
    output = Path(training_args.output_dir)
    metrics = {}
    with stop, hide_tied_heads(trainer.model):
        try:
            metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        except AlreadyTrained:
            logger.info("The checkpoint is the last one.")
    trainer.save_state()
    if stop.received and trainer.state.global_step < trainer.state.max_steps:
        trainer.accelerator.print("Stopped; to go on, run the same command again.")
        leave_together()
        sys.exit(128 + stop.received)

    # Save, and measure what was saved
    trainer.save_model(training_args.output_dir, _internal_call=True)  # internal: nothing is pushed yet
    if trainer.accelerator.is_main_process:
        if model_args.use_peft:
            merge_adapter(output, trusting)
        pairs = train_dataset if eval_dataset is None else eval_dataset
        pairs = pairs.select(range(min(CALIBRATION_PAIRS, len(pairs))))
        model = RewardModel(
            str(output),
            batch_size=training_args.per_device_eval_batch_size,
            max_length=training_args.max_length,
            trust_remote_code=trusting,
        )
        measured = calibrate(model, pairs)
        print("\n".join(f"{name}: {value:.3f}" for name, value in measured.items()))
        print(f"Reward model saved in {output}")
        if training_args.push_to_hub:  # the folder as it is: the trainer would write its own model over it
            HfApi().upload_folder(
                repo_id=trainer.hub_model_id, folder_path=output, ignore_patterns=[f"{PREFIX_CHECKPOINT_DIR}-*"]
            )
    trainer.save_metrics("train", metrics)  # last: it marks the run as finished
    leave_together()


def check_pairs(dataset: "Dataset") -> None:
    """Raises a `ValueError` where the columns of preferences are missing, or a row has an empty side."""
    if missing := NEEDED - set(dataset.column_names):
        raise ValueError(
            f"The dataset has no column {', '.join(sorted(missing))}; it has {', '.join(dataset.column_names)}. "
            "Preferences have `chosen` and `rejected`, and may have `prompt`: "
            "https://huggingface.co/docs/trl/dataset_formats#preference"
        )
    bad = [index for index, row in enumerate(dataset.select_columns(sorted(NEEDED))) if not all(row.values())]
    if bad:
        raise ValueError(f"{len(bad)} of {len(dataset)} rows have no chosen or no rejected text, the first: {bad[0]}.")


def merge_adapter(folder: Path, trust_remote_code: bool) -> None:
    """Puts the whole model in place of the adapter in the folder, so that it loads by its name alone."""
    from peft import AutoPeftModelForSequenceClassification

    from cfpo_trl.rewards.model import unsharded

    with unsharded():
        adapted = AutoPeftModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype="auto", trust_remote_code=trust_remote_code
        )
    adapted.merge_and_unload().save_pretrained(folder)
    for file in folder.glob("adapter_*"):
        file.unlink()


def calibrate(model: "RewardModel", pairs: "Dataset") -> dict[str, float]:
    """Scores the pairs with the saved model; writes `mean` and `std` of the scores into its config.json.

    Pairs with a side over the model's `max_length` are left out, as in training.

    Returns:
        The share of pairs whose chosen side scores higher, and `mean` and `std` of all scores.
    """
    prompts = pairs["prompt"] if "prompt" in pairs.column_names else [type(text)() for text in pairs["chosen"]]
    sides = [list(zip(prompts, pairs[side], strict=True)) for side in ("chosen", "rejected")]
    kept = [
        rows for rows in zip(*sides, strict=True) if all(len(model.tokenize(*r)) <= model.max_length for r in rows)
    ]
    if not kept:
        raise ValueError(
            f"All {len(prompts)} pairs to measure the reward model on are longer than its {model.max_length} tokens; "
            "raise max_length."
        )
    chosen, rejected = (model.score(*zip(*side, strict=True)) for side in zip(*kept, strict=True))
    scale = {"mean": statistics.fmean(chosen + rejected), "std": statistics.pstdev(chosen + rejected)}
    path = Path(model.name) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | scale, indent=2) + "\n")
    right = statistics.fmean(better > worse for better, worse in zip(chosen, rejected, strict=True))
    return {"accuracy": right} | scale


if __name__ == "__main__":
    say_mistakes(main)
