"""What ends a run early without losing it: Ctrl-C and SIGTERM, and rollouts or rewards that failed."""

import random
import signal
from typing import Any

import numpy
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class SaveOnSignal(TrainerCallback):
    """Saves and stops at the end of the step in which any process got SIGINT or SIGTERM; a second one ends at once.

    A context manager: it catches the signals within its `with` block alone. `received` is the signal's number, or 0.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> "SaveOnSignal":
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)
        print(f"\n{signal.Signals(number).name}: saving a checkpoint at the end of this step; again to stop at once.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        noted = torch.tensor(self.received, device=PartialState().device)
        if reduce(noted, "sum") > 0:  # the processes stop together
            self.received = self.received or int(signal.SIGTERM)
            control.should_save = control.should_training_stop = True
        return control


class RandomStateAtStep(TrainerCallback):
    """Keeps the random state in which a step began: a step whose rollouts fail has drawn from it already.

    Restored before the checkpoint, it makes the resumed run draw the same completions as an uninterrupted one.
    """

    step: int | None = None  # how many steps were done

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        self.step = state.global_step
        self.python, self.numpy, self.cpu = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self, step: int) -> None:
        """If the state is that of the step that follows `step`, not of one that an evaluation follows."""
        if self.step != step:
            return
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
