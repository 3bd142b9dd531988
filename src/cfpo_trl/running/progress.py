"""What a terminal shows of a training: one line per log above the bar, in place of a dict of some forty metrics."""

import sys
import time
from datetime import timedelta
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

SHOWN = {  # metric of a log: its name in the line, its format
    "reward": ("reward", ".3f"),
    "mean_reward": ("reward", ".3f"),  # of TRL's RewardTrainer
    "accuracy": ("accuracy", ".3f"),
    "cfpo/tv": ("tv", ".4f"),
    "cfpo/outside": ("outside", ".1%"),
    "kl": ("kl", ".4f"),
    "entropy": ("entropy", ".2f"),
    "completions/mean_length": ("length", ".1f"),
    "completions/clipped_ratio": ("cut off", ".0%"),
    "loss": ("loss", ".4f"),
}
HELD_OUT = "eval_"


def one_line_per_log(trainer: Trainer) -> None:
    """On a terminal, puts [`LogLines`] in the place of the dicts; a file gets them as they are."""
    if sys.stdout.isatty():
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LogLines())


class LogLines(ProgressCallback):
    """`step 40/160  reward 0.830  tv 0.0020  outside 1.0%  length 4.6  eta 0:01:10`, and transformers' bar below."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        if not args.disable_tqdm:
            super().on_train_begin(args, state, *others, **kwargs)
        self.first_step, self.start = state.global_step, time.monotonic()

    def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(*arguments, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        parts = shown(logs or {})
        if not state.is_world_process_zero or not parts:
            return
        done = state.global_step - self.first_step
        if done and not any(name.startswith(HELD_OUT) for name in logs or {}):
            seconds = (time.monotonic() - self.start) / done * (state.max_steps - state.global_step)
            parts.append(f"eta {timedelta(seconds=round(seconds))}")
        line = "  ".join([f"step {state.global_step}/{state.max_steps}", *parts])
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line, flush=True)

    def on_train_end(self, *arguments: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_train_end(*arguments, **kwargs)


def shown(logs: dict[str, Any]) -> list[str]:
    """The parts of a log's line; nothing of a log that has none of these metrics, as the summary at the end."""
    prefix = HELD_OUT if any(name.startswith(HELD_OUT) for name in logs) else ""
    parts = [f"{name} {logs[prefix + key]:{form}}" for key, (name, form) in SHOWN.items() if prefix + key in logs]
    return ["held out:", *parts] if prefix and parts else parts
