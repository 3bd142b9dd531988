"""A recipe's `benchmarks:`: `cfpo evaluate` on every saved checkpoint, beside the training, which goes on."""

import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .environment import VARIABLES, as_options

logger = logging.getLogger("cfpo_trl")

CHOICES = [name for name in (*VARIABLES, "LAUNCH") if name not in ("MODEL", "OUT")]
# What a launcher (Accelerate, torchrun) tells its processes
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_", "FSDP_")


def check_benchmarks(variables: dict[str, Any]) -> None:
    """Raises a `ValueError` that names the variable and the choices, where `make evaluate` would not take them."""
    if unknown := variables.keys() - set(CHOICES):
        raise ValueError(f"benchmarks has {', '.join(sorted(unknown))}; its variables are {', '.join(CHOICES)}.")
    if "TASK" not in variables:
        raise ValueError("benchmarks has no TASK; name one or more tasks of `cfpo evaluate`, by commas.")


class EvaluateCheckpoints(TrainerCallback):
    """Starts `cfpo evaluate` for each checkpoint when it is saved; results lie in `<output_dir>/benchmarks/`.

    Args:
        variables: Those of `make evaluate`, and `LAUNCH`: a command before it, such as
            `env CUDA_VISIBLE_DEVICES=7`, or `sbatch --gpus=1 --wrap`.
    """

    def __init__(self, variables: dict[str, Any]):
        self.variables = {name: str(value) for name, value in variables.items()}
        self.launch = shlex.split(self.variables.pop("LAUNCH", ""))
        self.running: list[tuple[subprocess.Popen, Path]] = []

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.start(Path(args.output_dir), f"checkpoint-{state.global_step}")

    def start(self, output: Path, checkpoint: str | None = None) -> None:
        """Starts the evaluation of a checkpoint in `output`; default: of the final model, which `output` holds."""
        output = output.absolute()
        out = output / "benchmarks" / (checkpoint or "final")
        out.mkdir(parents=True, exist_ok=True)
        variables = {"MODEL": str(output / checkpoint if checkpoint else output), "OUT": str(out)} | self.variables
        # It makes its environment, if need be.
        command = [sys.executable, "-m", "cfpo_trl.cli", "evaluate", *as_options(variables)]
        with (out / "log.txt").open("w") as log:
            process = subprocess.Popen(
                [*self.launch, shlex.join(command)] if self.launch[-1:] == ["--wrap"] else [*self.launch, *command],
                env=environment_without_launcher(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a signal that stops the training does not stop it
            )
        self.running.append((process, out))
        logger.info("Benchmarks of %s: %s", variables["MODEL"], out)

    def wait(self) -> None:
        """Waits for what still runs, and says what failed; a launcher such as sbatch has long returned."""
        for process, out in self.running:
            if process.wait():
                logger.warning("Benchmarks failed with status %d: see %s", process.returncode, out / "log.txt")


def environment_without_launcher() -> dict[str, str]:
    """The environment for a program that is none of the launcher's processes, and would wait for the others."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OF_LAUNCHERS)}
