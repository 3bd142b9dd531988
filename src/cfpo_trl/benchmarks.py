"""A recipe's `benchmarks:`: `make evaluate` on every saved checkpoint, beside the training, which goes on."""

import logging
import shlex
import subprocess
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .launcher import environment_without_launcher

logger = logging.getLogger("cfpo_trl")

ROOT = Path(__file__).parent.parent.parent  # of the repository, which has the Makefile
ENVIRONMENT = ".venvs/evaluate/installed"
LOCK = ".venvs/evaluate.lock"
VARIABLES = (
    *("TASK", "BACKEND", "SERVER", "SAMPLES", "TEMPERATURE", "TOP_P", "MAX_NEW_TOKENS", "METRIC", "SYSTEM_PROMPT"),
    *("BATCH_SIZE", "LIMIT", "SEED", "NUM_GPUS", "PARALLEL", "VLLM_PYTHON", "LAUNCH"),
)


def check_benchmarks(variables: dict[str, Any]) -> None:
    """Raises a `ValueError` that names the variable and the choices, where `make evaluate` would not take them."""
    unknown = variables.keys() - set(VARIABLES)
    if unknown:
        raise ValueError(f"benchmarks has {', '.join(sorted(unknown))}; its variables are {', '.join(VARIABLES)}.")
    if "TASK" not in variables:
        raise ValueError("benchmarks has no TASK; name one or more tasks of `make evaluate`, by commas.")
    if not (ROOT / "Makefile").exists():
        raise ValueError(f"benchmarks needs the Makefile of the repository, and there is none in {ROOT}.")


class EvaluateCheckpoints(TrainerCallback):
    """Starts `make evaluate` for each checkpoint when it is saved; results lie in `<output_dir>/benchmarks/`.

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
        model = output / checkpoint if checkpoint else output
        out = output / "benchmarks" / (checkpoint or "final")
        out.mkdir(parents=True, exist_ok=True)
        (ROOT / LOCK).parent.mkdir(exist_ok=True)
        variables = [f"MODEL={model}", f"OUT={out}", *(f"{name}={value}" for name, value in self.variables.items())]
        # The first one makes the environment, and the others wait for it: the training waits for none.
        script = f"flock {shlex.quote(LOCK)} make {ENVIRONMENT} && {shlex.join(['make', 'evaluate', *variables])}"
        command = [script] if self.launch[-1:] == ["--wrap"] else ["bash", "-c", script]
        with (out / "log.txt").open("w") as log:
            process = subprocess.Popen(
                [*self.launch, *command],
                cwd=ROOT,
                env=environment_without_launcher(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a signal that stops the training does not stop it
            )
        self.running.append((process, out))
        logger.info("Benchmarks of %s: %s", model, out)

    def wait(self) -> None:
        """Waits for what still runs, and says what failed; a launcher such as sbatch has long returned."""
        for process, out in self.running:
            if process.wait():
                logger.warning("Benchmarks failed with status %d: see %s", process.returncode, out / "log.txt")
