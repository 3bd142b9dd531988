"""AsyncCFPOTrainer: TRL's AsyncGRPOTrainer with the soft clip in place of the clip."""

import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import trl
from torch import Tensor, nn
from transformers import AttentionInterface, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .config import TrustRegionConfig, check_trust_region
from .objective import clip
from .rollouts.health import PatientHealth, RolloutServerError
from .rollouts.sequence_level import LEVELS, of_sequences
from .rollouts.server import sync_folder
from .rollouts.staleness import VersionedCollator, VersionedQueue, ahead, pace, waiting_groups
from .rollouts.transfer import FolderTransfer, WatchedAdapters, WatchedTransfer
from .rollouts.tree_attention import tree_attention
from .seam import SoftClip, SoftClipSeam
from .signatures import like
from .together import decided_by_main
from .trainer import CFPOTrainer

try:
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer
    from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker
    from trl.experimental.async_grpo.packing import TREE_ATTENTION
    from trl.experimental.async_grpo.vllm_client import VLLMClient
except ImportError as error:
    raise ImportError(f"AsyncCFPOTrainer needs trl>=1.16; trl {trl.__version__} is installed.") from error

DONE = "prompts_done.json"  # in a checkpoint: those behind the first that is not, counted from it
NO_BATCH = "Batch does not contain any data"


@dataclass
class AsyncCFPOConfig(TrustRegionConfig, AsyncGRPOConfig):
    """Configuration of [`AsyncCFPOTrainer`]: TRL's `AsyncGRPOConfig`, the options of [`TrustRegionConfig`], and these:

    Args:
        reward_weights (`list[float]`, *optional*): Weight of each reward function in the sum; default 1.
        importance_sampling_level (`str`, defaults to `"token"`): What has a ratio: each token, or with `"sequence"`
            each completion, the geometric mean of its tokens' (https://arxiv.org/abs/2507.18071). The metrics then are
            of that ratio, which counts for each trained token of its completion.
    """

    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function in the sum; default 1."}
    )
    importance_sampling_level: str = field(
        default="token",
        metadata={
            "help": "What has a ratio: each 'token', or with 'sequence' each completion, the geometric mean of its "
            "tokens'.",
            "choices": list(LEVELS),
        },
    )


def check_asynchronous(args: Any) -> None:
    """Raises a `ValueError` that names the value, the rule and the fix for what cannot be trained asynchronously."""
    check_trust_region(args)
    if args.max_staleness < ahead(args):
        raise ValueError(
            f"max_staleness={args.max_staleness} cannot hold: between queue and update a sample ages by up to "
            f"{ahead(args)} versions. Use {ahead(args)} or more."
        )
    level = level_of(args)
    if level not in LEVELS:
        raise ValueError(f"importance_sampling_level={level!r} is unknown; use one of {', '.join(LEVELS)}.")
    weights = getattr(args, "reward_weights", None)  # a plain AsyncGRPOConfig has none
    if 0.0 in (weights or []):
        raise ValueError(f"reward_weights={weights} has a 0, a reward that is not used; leave it out.")
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "Asynchronous training gathers the weights of FSDP2 alone, and ZeRO-3 shards them, too; use FSDP2, DDP or "
            "ZeRO-2."
        )


def level_of(args: Any) -> str:
    """What has a ratio; a plain `AsyncGRPOConfig` has tokens alone."""
    return getattr(args, "importance_sampling_level", "token")


class AsyncCFPOTrainer(SoftClipSeam, AsyncGRPOTrainer):
    """Trains with CFPO while a vLLM server writes rollouts, which arrive some versions of the policy old.

    Takes the arguments of [`~trl.experimental.async_grpo.AsyncGRPOTrainer`], whose loss it keeps, with the clip of the
    ratio replaced by [`~cfpo_trl.soft_clip`]; that trainer is its baseline, too. The ratio is that of the policy as it
    is now to the server's log-probs, so that it corrects for staleness and for the engine's arithmetic at once.

    Logs, over the trained tokens of all processes since the last log: `cfpo/tv`, `cfpo/penalty`, `cfpo/outside`,
    `cfpo/ess`, `cfpo/ratio_min` and `cfpo/ratio_max`; their age in versions of the policy, where they are trained:
    `staleness/mean`, `staleness/max`, `staleness/share_<age>`, and the drift at each, `cfpo/tv_<age>`; the share of
    samples that were too old, `staleness/dropped`; and all of TRL's.

    `max_staleness` holds where a sample is trained, what Accelerate and TRL hold in advance included, and
    [`~cfpo_trl.rollouts.staleness.pace`] sees to it that it costs few samples.

    Without CUDA, and with `vllm_sync_dir`, the weights go through a folder to a server that `cfpo serve` started; TRL
    sends them by NCCL. Without CUDA packed rows have [`~cfpo_trl.rollouts.tree_attention.tree_attention`].

    Raises:
        ValueError: before any model is loaded, see [`check_asynchronous`].
        RolloutServerError: on all processes, where the server takes no weights.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "async-cfpo"]
    _name = "AsyncCFPO"
    _paper = CFPOTrainer._paper

    # TRL's own
    _trained_groups: set[int]
    weight_transfer: Any
    vllm_client: Any
    rollout_queue: Any
    model_version: int

    @like(AsyncGRPOTrainer.__init__)
    def __init__(
        self,
        model: str,
        reward_funcs: Any = None,
        args: AsyncGRPOConfig | None = None,
        *positional: Any,
        rollout_worker: Any = None,
        weight_transfer: Any = None,
        **keywords: Any,
    ):
        if args is None:
            args = AsyncCFPOConfig(f"{model.split('/')[-1]}-AsyncCFPO")
        check_asynchronous(args)
        pace(args)
        folder = sync_folder(args)
        if weight_transfer is None and folder is not None:
            client = VLLMClient(args.vllm_server_base_url, args.vllm_server_timeout)
            weight_transfer = FolderTransfer(client, folder)
        keywords |= {"rollout_worker": rollout_worker, "weight_transfer": weight_transfer}
        with ExitStack() as stack:
            if rollout_worker is None:
                stack.enter_context(own_worker(args))
            if not torch.cuda.is_available():
                stack.enter_context(without_cuda())
            super().__init__(model, reward_funcs, args, *positional, **keywords)
        self._ages: list[Tensor] = []
        self._untrained: deque[set[int]] = deque()
        self.failure: str | None = None
        self._server = PatientHealth(args.vllm_server_base_url)
        self.add_callback(StopTogether(self))
        if self.accelerator.is_main_process:
            url = args.vllm_server_base_url
            self.weight_transfer = self.weight_transfer and WatchedTransfer(self.weight_transfer, url)
            if self._lora_sync:
                self.vllm_client = WatchedAdapters(self.vllm_client, url)
            self.rollout_queue = VersionedQueue(self.rollout_queue)

    def get_train_dataloader(self) -> Any:
        """TRL's, whose batches also say which version of the policy wrote each trained token."""
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # behind Accelerate's
        inner.collate_fn.groups_trained = set()  # TRL's would count what is made in advance, and resume behind it
        inner.collate_fn = VersionedCollator(inner.collate_fn)
        self._untrained = inner.collate_fn.groups
        if self._rollout_dataset is not None:  # on the main process
            self._rollout_dataset.max_staleness = self.args.max_staleness - ahead(self.args)
            self._rollout_dataset.check_health_fn = self._check_health
            inner.dataset.dataset = UntilFailure(inner.dataset.dataset, self)
        return loader

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        """TRL's training; where the server or the rollout process fails, it saves a checkpoint first.

        Raises:
            RolloutServerError: on all processes, some 40 s after the last sample of a server that is gone.
        """
        try:
            result = super().train(*arguments, **keywords)
        except ValueError as error:  # Accelerate's, on all processes, where the samples end before the first batch
            if NO_BATCH not in str(error):
                raise
            self.failure = decided_by_main(lambda: self.failure)
            result = None
        if self.failure is not None:
            raise RolloutServerError(self.failure)
        return result

    def _save_checkpoint(self, *arguments: Any, **keywords: Any) -> None:
        """TRL's, which keeps the first prompt that is not done; and those behind it that are, for stragglers."""
        if self.accelerator.is_main_process:
            folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            first = next(group for group in itertools.count() if group not in self._trained_groups)
            ahead_of_it = sorted(group - first for group in self._trained_groups if group > first)
            (folder / DONE).write_text(json.dumps(ahead_of_it))
        super()._save_checkpoint(*arguments, **keywords)

    def _inner_training_loop(self, *arguments: Any, **keywords: Any) -> Any:
        """TRL's, without the prompts that were done before."""
        checkpoint = keywords.get("resume_from_checkpoint")
        kept = Path(checkpoint, DONE) if checkpoint else None
        done = json.loads(kept.read_text()) if kept is not None and kept.exists() else []
        self._trained_groups.update(done)
        if isinstance(self.rollout_worker, AsyncRolloutWorker):
            self.rollout_worker._loop_kwargs["done"] = done
        return super()._inner_training_loop(*arguments, **keywords)

    def _check_health(self, stale_after_s: float) -> None:
        """Called while no sample comes. Raises a `RuntimeError` where none will."""
        self.rollout_worker.check_health(stale_after_s)
        if isinstance(self.rollout_worker, AsyncRolloutWorker):
            self._server.check()

    def counted_advantages(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The advantages of this process's trained tokens, `(M,)`, and a mask of ones: packing leaves no padding."""
        advantages = inputs["advantages"][inputs["token_index"] >= 0]
        return advantages, torch.ones_like(advantages)

    def _sync_weight(self) -> None:
        """TRL's; where the server takes no weights, the update is logged and saved, and the training stops.

        Raises:
            RolloutServerError: on all processes, before the first update.
        """
        super()._sync_weight()
        # The main process alone counts versions, and knows whether this one arrived.
        self.model_version, failure = decided_by_main(
            lambda: (self.model_version, getattr(self.weight_transfer or self.vllm_client, "failure", None))
        )
        if failure is None:
            return
        if not self._ages:  # nothing was trained yet
            raise RolloutServerError(failure)
        self.failure = failure
        self.control.should_log = self.control.should_save = self.control.should_training_stop = True

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Tensor:
        """The soft clip's loss, see [`SoftClipSeam`]; notes how old its tokens are, and which prompts are done."""
        if self._untrained:  # on the main process
            self._trained_groups.update(self._untrained.popleft(), self.rollout_queue.dropped)
        self._versions = inputs["model_version"][inputs["token_index"] >= 0]
        if level_of(self.args) == "sequence":
            model, inputs = of_sequences(model, inputs)
        return super().compute_loss(model, inputs, *arguments, **keywords)

    @torch.no_grad()
    def _note_trust_region(self, clip: SoftClip) -> None:
        super()._note_trust_region(clip)
        ratio = clip.ratio.double()
        age = (self.model_version - self._versions).long().clamp(0, self.args.max_staleness)
        values = torch.stack([torch.ones_like(ratio), (ratio - 1).abs() / 2], dim=1)
        ages = values.new_zeros(self.args.max_staleness + 1, 2).index_add_(0, age, values)
        self._ages.append(ages)

    def log(self, *arguments: Any, **keywords: Any) -> None:
        """The log of [`SoftClipSeam`], with the age of the trained tokens."""
        if self._ages:
            ages = self.accelerator.reduce(torch.stack(self._ages).sum(dim=0), reduction="sum")
            self._ages.clear()
            tokens, tv = ages.T.tolist()
            total, metrics = sum(tokens), self._metrics["train"]
            metrics["staleness/mean"] = [sum(age * count for age, count in enumerate(tokens)) / total]
            for age, count in enumerate(tokens):
                if count:
                    metrics[f"staleness/share_{age}"] = [count / total]
                    metrics[f"cfpo/tv_{age}"] = [tv[age] / count]
            dropped = sum(metrics.get("sample/dropped_stale_total", []))
            if kept := len(metrics.get("sample/staleness_mean", [])):  # on the main process
                metrics["staleness/dropped"] = [dropped / (dropped + kept)]
            metrics["staleness/max"] = [float(max(age for age, count in enumerate(tokens) if count))]
        super().log(*arguments, **keywords)


class AsyncClipTrainer(AsyncCFPOTrainer):
    """The baseline: TRL's clip, with the pace, the metrics and all else of [`AsyncCFPOTrainer`]."""

    _tag_names: ClassVar[list[str]] = AsyncGRPOTrainer._tag_names
    _name = AsyncGRPOTrainer._name
    _paper = AsyncGRPOTrainer._paper

    def soft_clip(self, ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
        return clip(ratio, advantages, epsilon_low, epsilon_high)


class UntilFailure:
    """A trainer's stream of samples, which ends where it would raise: all processes then stop at the same update.

    Args:
        samples: The stream, on the main process.
        trainer: Whose `failure` says why it ended.
    """

    def __init__(self, samples: Iterable[Any], trainer: AsyncCFPOTrainer):
        self.samples, self.trainer = samples, trainer

    def __iter__(self) -> Iterator[Any]:
        try:
            for sample in self.samples:
                self.trainer.rollout_queue.taken = None
                yield sample
        except RuntimeError as error:  # of the rollout process, or of the server
            self.trainer.failure = f"no more rollouts: {error.__cause__ or error}"


class StopTogether(TrainerCallback):
    """Tells all processes why the samples have ended; they save a checkpoint and stop."""

    def __init__(self, trainer: AsyncCFPOTrainer):
        self.trainer = trainer

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.failure = decided_by_main(lambda: self.trainer.failure)
        if self.trainer.failure is not None and not control.should_training_stop:
            control.should_training_stop = control.should_save = True


@contextmanager
def exchanged(name: str, value: Any) -> Iterator[None]:
    """In this block TRL's module has another value under that name."""
    original = getattr(async_grpo_trainer, name)
    setattr(async_grpo_trainer, name, value)
    try:
        yield
    finally:
        setattr(async_grpo_trainer, name, original)


def own_worker(args: AsyncGRPOConfig) -> AbstractContextManager[None]:
    """An `AsyncGRPOTrainer` built in this block starts our rollout process."""
    from .rollouts.loop import RolloutWorker  # needs aiohttp, as TRL's does

    options = {"score_queue_maxsize": waiting_groups(args), "reward_weights": getattr(args, "reward_weights", None)}
    return exchanged("AsyncRolloutWorker", partial(RolloutWorker, **options))


@contextmanager
def without_cuda() -> Iterator[None]:
    """An `AsyncGRPOTrainer` built in this block asks no GPU for its speed, and its attention is our own."""
    with exchanged("get_peak_flops_per_device", lambda accelerator, dtype: None):
        yield
    AttentionInterface.register(TREE_ATTENTION, tree_attention)
