"""AlignmentTrainer: TRL's GRPOTrainer, its clip included, with what RLHF adds to the advantages and to the log."""

import inspect
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from .advantages import KL_BOUND, approximate_kl, leave_one_out, mean_centred, reward_to_go
from .config import CFPOConfig, check_alignment, is_shaped
from .lengths import length_metrics
from .signatures import like


class AlignmentTrainer(GRPOTrainer):
    """A `GRPOTrainer` with RLOO advantages, KL in the reward, a clip of the reward, and length metrics.

    Each is off by default, and the training is then TRL's to the bit. Takes a [`CFPOConfig`], whose
    `advantage_estimator`, `kl_in_reward` and `reward_clip_range` say what the advantages are:

    - `kl_in_reward_level="sequence"`, as TRL's `RLOOTrainer`: R′ = clip(R) − β·Σ_t kl_t, and the advantage is R′ minus
      the baseline of R′; the KL is not clipped.
    - `kl_in_reward_level="token"`, as OpenRLHF: A_t = clip(R − baseline) − β·Σ_{s≥t} clip(kl_s, ±10).

    [`CFPOTrainer`] adds the soft clip; this class is its baseline, with which everything but the clip is matched.

    Raises:
        ValueError: before any model is loaded, where these options contradict each other or TRL's; see
            [`~cfpo_trl.config.check_alignment`].
    """

    @like(GRPOTrainer.__init__)
    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *positional: Any,
        **keywords: Any,
    ):
        if isinstance(args, CFPOConfig):
            check_alignment(args)
        self._shaped = is_shaped(args)
        self._scored: dict[str, list[Tensor]] = defaultdict(list)
        if not isinstance(args, CFPOConfig) or not self._shaped:
            super().__init__(model, reward_funcs, args, *positional, **keywords)
            return
        beta = args.beta
        args.beta = beta or args.kl_in_reward  # TRL loads the reference where beta is not 0
        try:
            super().__init__(model, reward_funcs, args, *positional, **keywords)
        finally:
            args.beta = beta
        self.beta = beta

    def _generate(self, prompts: list) -> tuple:
        """TRL's completions; notes which of their tokens are the policy's own, and how many turns it took."""
        generated = super()._generate(prompts)
        completion_ids, tool_masks = generated[1:3]
        self._own_lengths = [len(ids) for ids in completion_ids]
        if tool_masks is not None:
            self._own_lengths = [sum(mask) for mask in tool_masks]
            mine = [[turns(mask), len(ids) - sum(mask)] for ids, mask in zip(completion_ids, tool_masks, strict=True)]
            means = self.accelerator.gather(torch.tensor(mine, dtype=torch.float, device=self.accelerator.device))
            metrics = self._metrics["train" if self.model.training else "eval"]
            for name, value in zip(("tools/turns", "tools/tokens"), means.mean(dim=0).tolist(), strict=True):
                metrics[name].append(value)
        return generated

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's rewards of all processes, `(N, F)`; keeps them, their weighted sum, and the lengths."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        total[rewards.isnan().all(dim=1)] = torch.nan  # no reward applied: no part of any baseline
        lengths = torch.tensor(self._own_lengths, dtype=torch.float, device=rewards.device)
        lengths = self.accelerator.gather(lengths)
        mode = "train" if self.model.training else "eval"
        self._scored[mode].append(torch.stack([lengths, total, *rewards.unbind(dim=1)], dim=1))
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, with the advantages as `args` has them: `(B,)`, or `(B, T)` with KL per token."""
        if not self._shaped:
            return super()._generate_and_score_completions(inputs)
        beta = self.beta
        self.beta = beta or self.args.kl_in_reward  # TRL scores with the reference where beta is not 0
        try:
            batch = super()._generate_and_score_completions(inputs)
        finally:
            self.beta = beta
        mode = "train" if self.model.training else "eval"
        kl = self._kl_in_reward(batch, mode) if self.args.kl_in_reward else None
        batch["advantages"] = self._advantages(batch, kl, mode)
        if not beta:
            batch.pop("ref_per_token_logps", None)  # the loss has no use for it
        return batch

    def _advantages(self, batch: dict[str, Any], kl: Tensor | None, mode: str) -> Tensor:
        """The class's formulas, from the rewards of the batch and its masked KL `(B, T)`."""
        args, by_token = self.args, self.args.kl_in_reward_level == "token"
        rewards = self._scored[mode][-1][:, 1]  # of all processes, as the baselines need
        if by_token:
            advantages = clip(self._minus_baseline(rewards, mode), args.reward_clip_range)
        else:
            penalty = 0.0 if kl is None else args.kl_in_reward * self.accelerator.gather(kl.sum(dim=1))
            advantages = self._minus_baseline(clip(rewards, args.reward_clip_range) - penalty, mode)
        advantages = advantages.nan_to_num(0.0)  # what no reward scored moves nothing
        for _ in range(min(len(advantages), len(self._logs["advantages"]))):
            self._logs["advantages"].pop()  # TRL's, of the same completions
        self._logs["advantages"].extend(advantages.tolist())

        count = len(batch["completion_ids"])
        mine = slice(self.accelerator.process_index * count, (self.accelerator.process_index + 1) * count)
        if kl is None or not by_token:
            return advantages[mine]
        per_token = advantages[mine].unsqueeze(1) - args.kl_in_reward * reward_to_go(kl)
        return per_token * loss_mask(batch) * ~rewards[mine].isnan().unsqueeze(1)

    def _minus_baseline(self, rewards: Tensor, mode: str) -> Tensor:
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        if num_generations == 1:  # in evaluation, where TRL has no baseline either
            return torch.zeros_like(rewards)
        if self.args.advantage_estimator == "rloo":
            return leave_one_out(rewards, num_generations)
        return mean_centred(rewards, num_generations, self.args.scale_rewards)

    def _kl_in_reward(self, batch: dict[str, Any], mode: str) -> Tensor:
        """The masked estimate per token, `(B, T)`, of the policy that made the rollouts."""
        logps = batch.get("old_per_token_logps")
        logps = self._policy_logps(batch, mode) if logps is None else logps
        kl = approximate_kl(logps, batch["ref_per_token_logps"], self.args.kl_in_reward_estimator)
        if self.args.kl_in_reward_level == "token":
            kl = kl.clamp(-KL_BOUND, KL_BOUND)
        kl = kl.masked_fill(loss_mask(batch) == 0, 0.0)  # padding's may be infinite
        self._metrics[mode]["kl_in_reward/mean"].append(self.accelerator.gather(kl.sum(dim=1)).mean().item())
        return kl

    @torch.no_grad()
    def _policy_logps(self, batch: dict[str, Any], mode: str) -> Tensor:
        """Log-probs of the completions, `(B, T)`, which TRL leaves out where its loss needs none."""
        accepted = inspect.signature(self._get_per_token_logps_and_entropies).parameters
        logps, *_ = self._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].size(1),
            batch_size=getattr(self.args, f"per_device_{mode}_batch_size"),
            **{name: value for name, value in batch.items() if name in accepted},  # images
        )
        return logps

    def log(self, *args: Any, **kwargs: Any) -> None:
        """TRL's log, with the lengths of all completions since the last one, however they were split."""
        mode = "train" if self.model.training else "eval"
        if scored := self._scored.pop(mode, []):
            metrics = length_metrics(torch.cat(scored), self.reward_func_names)
            self._metrics[mode].update({name: [value] for name, value in metrics.items()})
        super().log(*args, **kwargs)


def turns(tool_mask: list[int]) -> int:
    """How often the policy wrote, by a completion's mask: 1 where it did, 0 where a tool did."""
    return sum(mine > before for before, mine in zip([0, *tool_mask], tool_mask, strict=False))


def loss_mask(batch: dict[str, Any]) -> Tensor:
    """`(B, T)`, nonzero at the tokens that the loss counts: the policy's own."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


def clip(values: Tensor, bounds: list[float] | None) -> Tensor:
    return values if bounds is None else values.clamp(*bounds)
