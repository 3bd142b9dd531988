"""What a run finds in its output folder: nothing, a run to go on with, a finished one, or another one."""

import json
import logging
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import ScriptArguments

from ..mistakes import Mistake
from ..together import decided_by_main

logger = logging.getLogger("cfpo_trl")

RECORD = "resolved_recipe.yaml"  # the options that recipe and command line set
FINISHED = "train_results.json"  # written last
OF_THIS_START = ("if_output_exists", "resume_from_checkpoint")
CHOICES = ("resume", "continue", "restart")
# Options that change neither what is trained nor how: a run goes on with others. Beginnings of their names.
NEUTRAL = (
    *("output_dir", "benchmarks", "use_cpu", "disable_tqdm", "log", "report_to", "run_name", "project", "trackio"),
    *("save_", "eval_", "do_eval", "per_device_eval", "num_generations_eval", "dataset_test_split", "push_to_hub"),
    *("hub_", "dataloader_", "vllm_server_", "vllm_sync_dir", "vllm_gpu_memory", "vllm_group_port", "load_best"),
    *("metric_for_best", "greater_is_better", "ddp_", "include_"),
)


@dataclass
class RunArguments(ScriptArguments):
    """What becomes of a run that is in the output folder already.

    Args:
        if_output_exists (`str`, defaults to `"resume"`): `resume` goes on with a run of the same recipe, and refuses
            another; `continue` goes on from its last checkpoint with the recipe as it is now; `restart` begins afresh,
            and keeps the old run under another name.
    """

    if_output_exists: Literal["resume", "continue", "restart"] = field(
        default="resume",
        metadata={"help": "`resume` a run of the same recipe, `continue` with a changed one, or `restart`."},
    )

    def __post_init__(self) -> None:
        if self.if_output_exists not in CHOICES:
            raise ValueError(
                f"if_output_exists={self.if_output_exists!r} is unknown; use one of {', '.join(CHOICES)}."
            )


class FinishedRun(Exception):
    """Nothing is left to do; the message says so."""


@dataclass
class ExistingRun:
    """The output folder of a run that is about to begin; the main process looks and decides for all.

    Args:
        output_dir: The folder.
        if_output_exists: As in [`RunArguments`].
        named: `resume_from_checkpoint`: a checkpoint; true: there must be one; false: as `restart`.
        given: The options that recipe and command line set.
    """

    output_dir: str
    if_output_exists: str
    named: Any
    given: dict[str, Any]

    def __post_init__(self) -> None:
        self.folder = Path(self.output_dir)
        kept = {name: value for name, value in self.given.items() if name not in OF_THIS_START}
        self.recipe: dict[str, Any] = json.loads(json.dumps(kept, default=str))  # as YAML gives it back
        self.afresh = self.if_output_exists == "restart" or means(self.named, "false", "no")

    def checkpoint(self) -> str | None:
        """The checkpoint from which the run goes on, or None where it begins.

        Raises:
            Mistake: another recipe was trained there, a model of unknown origin would be written over, or the named
                checkpoint is none.
            FinishedRun: the run is finished.
        """
        return decided_by_main(self._find_checkpoint)

    def callbacks(self) -> list[TrainerCallback]:
        """What a training that goes on needs, so that the recipe counts, and not what its checkpoint holds."""
        changed = [OptimizerOfTheRecipe()] if self.if_output_exists == "continue" else []
        return [StepsOfTheRecipe(), *changed]

    def begin(self) -> None:
        """Keeps the recipe in the folder; before a fresh start, what is in it is put aside."""
        decided_by_main(self._begin)

    def _find_checkpoint(self) -> str | None:
        if self.afresh:
            return None
        checkpoint = newest_intact(self.folder)
        if self.if_output_exists == "resume":
            self._check_same(has_checkpoint=checkpoint is not None)
            if (self.folder / FINISHED).exists():
                step = json.loads((self.folder / "trainer_state.json").read_text())["global_step"]
                raise FinishedRun(
                    f"{self.folder} holds a finished run of {step} steps with this recipe: nothing is left to do. To "
                    "train anew, choose another output_dir, or set if_output_exists: restart."
                )
        if self.named and not means(self.named, "true", "yes"):
            if not intact(Path(self.named)):
                raise Mistake(f"resume_from_checkpoint={self.named!r} is no folder with a whole checkpoint.")
            checkpoint = Path(self.named)
        elif self.named and checkpoint is None:
            raise Mistake(f"resume_from_checkpoint={self.named!r}, and there is no checkpoint in {self.folder}.")
        if checkpoint:
            logger.info("Going on from %s; for a fresh start: if_output_exists: restart.", checkpoint)
        return str(checkpoint) if checkpoint else None

    def _check_same(self, has_checkpoint: bool) -> None:
        """Raises a `Mistake` that lists the differences, where the folder keeps something of another recipe."""
        record, has_model = self.folder / RECORD, any(self.folder.glob("*.safetensors"))
        before = yaml.safe_load(record.read_text(encoding="utf-8")) if record.exists() else None
        if before is None:  # or empty, as a full disk left it
            if has_model and not has_checkpoint:
                raise Mistake(
                    f"output_dir={self.output_dir!r} holds a model that this run would write over; choose another "
                    "folder, or set if_output_exists: restart, which keeps it under another name."
                )
            return
        changes = [
            f"{name}: {before.get(name, 'default')} -> {self.recipe.get(name, 'default')}"
            for name in sorted(before.keys() | self.recipe.keys())
            if before.get(name) != self.recipe.get(name) and not name.startswith(NEUTRAL)
        ]
        if changes and (has_model or has_checkpoint):
            raise Mistake(
                f"output_dir={self.output_dir!r} holds a run with another recipe ({'; '.join(changes)}). Choose "
                "another folder, or set if_output_exists: continue (from its last checkpoint, with this recipe) or "
                "restart (afresh; the old run is kept under another name)."
            )

    def _begin(self) -> None:
        if self.afresh and self.folder.is_dir() and any(self.folder.iterdir()):
            number = next(n for n in range(1, 10_000) if not self._renamed(n).exists())
            self.folder.rename(self._renamed(number))
            logger.info("What was in %s is now in %s.", self.folder, self._renamed(number))
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / FINISHED).unlink(missing_ok=True)
        whole = self.folder / f"{RECORD}.new"  # on a full disk, the old one stays
        whole.write_text(yaml.safe_dump(self.recipe, allow_unicode=True), encoding="utf-8")
        whole.replace(self.folder / RECORD)

    def _renamed(self, number: int) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{number}")


class StepsOfTheRecipe(TrainerCallback):
    """Sets how often is logged, evaluated and saved: a checkpoint's state has its own numbers."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


class OptimizerOfTheRecipe(TrainerCallback):
    """Sets the recipe's learning rate, weight decay and Adam's numbers: a checkpoint's optimizer has its own."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        for group in optimizer.param_groups:
            adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
            group.update({name: value for name, value in adam.items() if name in group})
        if "weight_decay" in optimizer.param_groups[0]:  # transformers' second group has none
            optimizer.param_groups[0]["weight_decay"] = args.weight_decay
        schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # behind Accelerate's wrapper
        if not isinstance(schedule, LambdaLR):  # reduce_lr_on_plateau has lowered it for its reasons
            return
        schedule.base_lrs = [args.learning_rate] * len(schedule.base_lrs)
        for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["initial_lr"] = args.learning_rate
            group["lr"] = args.learning_rate * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]  # which the log shows


def means(value: Any, *words: str) -> bool:
    return str(value).lower() in words


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint in the folder that was written to its end; a warning names newer ones."""
    numbered = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (step := path.name.rpartition("-")[2]).isdigit():
            numbered[int(step)] = path
    for _, path in sorted(numbered.items(), reverse=True):
        if intact(path):
            return path
        logger.warning("%s is not whole, as after a kill while it was written; it is passed over.", path)
    return None


def intact(checkpoint: Path) -> bool:
    """Whether everything is there: the trainer's state, which is written last, and no file ends early."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    except (OSError, ValueError, KeyError):
        return False
    random_states, processes = len(list(checkpoint.glob("rng_state*.pth"))), int(os.environ.get("WORLD_SIZE", "1"))
    if random_states and random_states != processes:
        logger.warning("%s has the random states of %d processes, not of %d.", checkpoint, random_states, processes)
    return all(ends_well(file) for file in checkpoint.rglob("*") if file.is_file())


def ends_well(file: Path) -> bool:
    """Whether a file of tensors or of JSON has all of its bytes; other files count as whole."""
    if file.suffix == ".safetensors":
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            try:
                header = json.loads(stream.read(length))
            except ValueError:
                return False
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        return file.stat().st_size == 8 + length + max(ends, default=0)
    if file.suffix == ".json":
        try:
            json.loads(file.read_bytes())
        except ValueError:
            return False
    return zipfile.is_zipfile(file) if file.suffix in (".pt", ".pth", ".bin") else True
