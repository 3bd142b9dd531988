"""What ends a run early without losing it: Ctrl-C and SIGTERM, and rollouts or rewards that failed."""

import os
import random
import signal
import time
from typing import Any

import numpy
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

REPEATS = 5.0  # seconds in which a signal counts once: a launcher passes on what its processes got themselves
SHUTDOWN_SECONDS = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # after so many torch's launcher kills what it has sent SIGTERM
SHUTDOWN_DEFAULT = 30.0


class AlreadyTrained(Exception):
    """The checkpoint that training would go on from is the last one."""


class StopAtTheEnd(TrainerCallback):
    """Raises [`AlreadyTrained`] before the step that transformers would take beyond the last one."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise AlreadyTrained


class SaveOnSignal(TrainerCallback):
    """Saves and stops after SIGINT or SIGTERM to any process; one more, some seconds later, ends at once.

    It stops at the end of a batch of rollouts, from where a resumed run is exact, if that comes in half of the time
    that the launcher gives, and else at the end of the step. A context manager: it catches the signals within its
    `with` block alone. `received` is the signal's number, or 0; `exact` is whether a batch of rollouts had ended.

    Args:
        cycle: Optimizer steps that share a batch of rollouts.
    """

    def __init__(self, cycle: int = 1) -> None:
        self.cycle = cycle
        self.received, self.at, self.exact = 0, 0.0, True
        self.patience = float(os.environ.get(SHUTDOWN_SECONDS, SHUTDOWN_DEFAULT)) / 2

    def __enter__(self) -> "SaveOnSignal":
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if not self.received:
            self.received, self.at = number, now
            # Not print: the signal may have come within one.
            os.write(
                2, f"\n{name}: saving a checkpoint soon; again in {REPEATS:g} s or later to stop at once.\n".encode()
            )
        elif now - self.at > REPEATS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def received_by_any(self) -> int:
        """The number of a signal that any process received, the same on all of them, or 0."""
        (received,) = of_all(self.received)
        return self.received or int(bool(received) and signal.SIGTERM)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        self.first = state.global_step  # where a batch of rollouts begins

    def on_step_begin(self, *others: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        now = time.monotonic()
        late = self.received and now + (now - self.began) > self.at + self.patience
        signals, lateness = of_all(self.received, late)
        self.exact = (state.global_step - self.first) % self.cycle == 0
        if signals and (self.exact or lateness):  # the processes stop together
            self.received = self.received or int(signal.SIGTERM)
            control.should_save = control.should_training_stop = True
        return control


def of_all(*numbers: float) -> list[float]:
    """The sum over all processes of each number."""
    return reduce(torch.tensor(numbers, dtype=torch.float, device=PartialState().device), "sum").tolist()


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
