"""CFPOConfig: GRPO's configuration, with what CFPO and RLHF add, and the checks for what cannot be trained."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import trl
from packaging.version import Version
from trl import GRPOConfig

from .advantages import KL_ESTIMATORS
from .objective import check_epsilon, check_penalty_slope

CLIPPED_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LIGER_SEAM = Version("1.14")  # from here on TRL computes the loss in _compute_loss also with Liger's kernels
LUSPO_BY_TOKEN = Version("1.12")  # from here on luspo leaves padding out where the loss is one per token
ADVANTAGE_ESTIMATORS = ("group", "rloo")
KL_LEVELS = ("sequence", "token")


@dataclass
class TrustRegionConfig:
    """What CFPO penalises, for the configuration of any TRL trainer that clips.

    `epsilon` and `epsilon_high` have another meaning than TRL's, because CFPO penalises where GRPO clips:

    Args:
        epsilon (`float`, defaults to `0.2`): Width ε of the trust region; the penalty on the ratio r is
            |A| / (2ε)·(r − 1)² (https://arxiv.org/abs/2601.22801). The objective's optimum is r = 1 ± ε.
        epsilon_high (`float`, *optional*): Width where r > 1, then `epsilon` is the one where r < 1.
            Default: `epsilon` on both sides.
        penalty_slope (`float`, *optional*): Largest slope of the penalty in units of |A|, at least 1: quadratic up to
            |r − 1| = `penalty_slope`·ε, linear beyond. Default: no bound, the paper's CFPO.
        vllm_sync_dir (`str`, *optional*): Folder that trainer and vLLM server both see, through which the server gets
            new weights. Default: NCCL on GPUs, `<output_dir>/vllm_weights` on a CPU.
    """

    epsilon: float = field(
        default=0.2,
        metadata={"help": "Width of CFPO's trust region: the penalty on the ratio r is |A| / (2 epsilon) (r - 1)^2."},
    )
    epsilon_high: float | None = field(
        default=None,
        metadata={
            "help": "Width of CFPO's trust region where the ratio is above 1; `epsilon` is then the width below 1. "
            "If not specified, `epsilon` holds on both sides."
        },
    )
    penalty_slope: float | None = field(
        default=None,
        metadata={
            "help": "Largest slope of CFPO's penalty in units of |A|, at least 1; beyond |r - 1| = penalty_slope * "
            "epsilon the penalty is linear. If not specified, there is no bound, as in the paper."
        },
    )
    vllm_sync_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that trainer and vLLM server both see, through which the server gets new weights. "
            "If not specified, NCCL on GPUs and `<output_dir>/vllm_weights` on a CPU."
        },
    )


@dataclass
class CFPOConfig(TrustRegionConfig, GRPOConfig):
    """Configuration of [`CFPOTrainer`]: every option of TRL's `GRPOConfig`, and those of [`TrustRegionConfig`].

    Args:
        advantage_estimator (`str`, defaults to `"group"`): `group`: GRPO's, reward minus the mean of its prompt's,
            divided as `scale_rewards` says. `rloo`: reward minus the mean of the prompt's other rewards, not divided
            (https://arxiv.org/abs/2402.14740); `scale_rewards` is then `"none"`.
        kl_in_reward (`float`, defaults to `0.0`): Coefficient of the KL to the reference in the reward. The loss's
            own KL term stays `beta`.
        kl_in_reward_estimator (`str`, defaults to `"k1"`): `k1`, `k2` or `k3`, see
            [`~cfpo_trl.advantages.approximate_kl`].
        kl_in_reward_level (`str`, defaults to `"sequence"`): `sequence`: one number per completion, which enters the
            baseline, as in TRL's `RLOOTrainer`. `token`: reward-to-go, an advantage per token, as in OpenRLHF. The
            formulas: [`~cfpo_trl.alignment.AlignmentTrainer`].
        reward_clip_range (`list[float]`, *optional*): Bounds `[low, high]` of the weighted reward, before KL and
            baseline; with `kl_in_reward_level="token"` of the reward minus its baseline.
        vllm_server_timeout (`float`, defaults to `10.0`): Seconds to wait for the vLLM server at the start; TRL's
            240 make a missing server look like a slow one.

    `loss_type` chooses how TRL aggregates the per-token losses, one of grpo, bnpo, dr_grpo, dapo, luspo.
    [`CFPOTrainer`] refuses what has no clip to replace: see [`check_config`].
    """

    advantage_estimator: Literal["group", "rloo"] = field(
        default="group",
        metadata={"help": "`group`: reward minus its group's mean; `rloo`: minus the mean of the others, undivided."},
    )
    kl_in_reward: float = field(
        default=0.0, metadata={"help": "Coefficient of the KL to the reference in the reward."}
    )
    kl_in_reward_estimator: Literal["k1", "k2", "k3"] = field(
        default="k1", metadata={"help": "Estimator of the KL in the reward: log-ratio, half its square, or unbiased."}
    )
    kl_in_reward_level: Literal["sequence", "token"] = field(
        default="sequence",
        metadata={"help": "`sequence`: one number that enters the baseline; `token`: reward-to-go."},
    )
    reward_clip_range: list[float] | None = field(
        default=None, metadata={"help": "Bounds of the weighted reward, low and high."}
    )
    vllm_server_timeout: float = field(
        default=10.0, metadata={"help": "Seconds to wait for the vLLM server at the start."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advantage_estimator == "rloo" and self.scale_rewards == "group":  # type: ignore[has-type]  # TRL's default
            self.scale_rewards = "none"


def uses_rollouts_once(args: GRPOConfig) -> bool:
    """Whether each batch of rollouts is used for one update, so that every ratio is 1."""
    return args.gradient_accumulation_steps % (args.num_iterations * args.steps_per_generation) == 0


def is_shaped(args: GRPOConfig | None) -> bool:
    """Whether the advantages are to be others than TRL's own."""
    return isinstance(args, CFPOConfig) and bool(
        args.advantage_estimator != "group" or args.kl_in_reward or args.reward_clip_range
    )


def check_alignment(args: CFPOConfig) -> None:
    """Raises a `ValueError` that names the value, the rule and the fix for advantages that cannot be.

    Refused: an unknown `advantage_estimator`, `kl_in_reward_estimator` or `kl_in_reward_level`; a `kl_in_reward` that
    is negative or not finite; a `reward_clip_range` that is no range; rewards that are scaled by the batch or each on
    its own; KL in the reward with Liger's kernel on TRL < 1.14, and per token with `luspo` on TRL < 1.12.
    """
    for name, choices in (
        ("advantage_estimator", ADVANTAGE_ESTIMATORS),
        ("kl_in_reward_estimator", KL_ESTIMATORS),
        ("kl_in_reward_level", KL_LEVELS),
    ):
        if getattr(args, name) not in choices:
            raise ValueError(f"{name}={getattr(args, name)!r} is unknown; use one of {', '.join(choices)}.")
    if not (args.kl_in_reward >= 0 and math.isfinite(args.kl_in_reward)):
        raise ValueError(f"kl_in_reward={args.kl_in_reward} must be finite and at least 0; 0 leaves the KL out.")
    if args.reward_clip_range is not None:
        bounds = list(args.reward_clip_range)
        if len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise ValueError(f"reward_clip_range={bounds} is no range; give two numbers, such as [-10, 10].")
    if not is_shaped(args):
        return
    if args.multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            f"multi_objective_aggregation={args.multi_objective_aggregation!r} scales every reward on its own, and "
            "RLOO, KL in the reward and reward_clip_range need their sum; use 'sum_then_normalize'."
        )
    if args.advantage_estimator == "rloo" and args.scale_rewards != "none":
        raise ValueError(f"scale_rewards={args.scale_rewards!r}: RLOO divides by nothing; use 'none'.")
    installed = Version(trl.__version__)
    if args.kl_in_reward and args.use_liger_kernel and installed < LIGER_SEAM:
        raise ValueError(
            f"kl_in_reward={args.kl_in_reward} with use_liger_kernel=True: on TRL {installed} Liger's kernel would "
            f"have it in the loss, too; upgrade to trl>={LIGER_SEAM}, or set use_liger_kernel=False."
        )
    by_token = args.kl_in_reward and args.kl_in_reward_level == "token"
    if by_token and args.loss_type == "luspo" and installed < LUSPO_BY_TOKEN:
        raise ValueError(
            f"kl_in_reward_level='token' with loss_type='luspo' averages padding on TRL {installed}; use another "
            f"loss_type, kl_in_reward_level='sequence', or trl>={LUSPO_BY_TOKEN}."
        )


def check_config(args: GRPOConfig) -> None:
    """Raises a `ValueError` that names the value, the rule and the fix for what CFPO cannot train with.

    Refused: a `loss_type` without a clip (cispo, sapo, vespo), two-sided clipping (`delta`), `use_liger_kernel` on
    TRL < 1.14, whose fused loss clips inside the kernel, an epsilon that is not finite or not above 0, and a
    `penalty_slope` that is not finite or below 1.
    """
    if args.loss_type not in CLIPPED_LOSS_TYPES:
        raise ValueError(
            f"loss_type={args.loss_type!r} has no clip to replace; use one of {', '.join(CLIPPED_LOSS_TYPES)}."
        )
    if args.delta is not None:
        raise ValueError(
            f"delta={args.delta} clips the ratio a second time (two-sided clipping), and CFPO has no clip; remove it: "
            "the penalty bounds the objective on both sides already."
        )
    if args.use_liger_kernel and Version(trl.__version__) < LIGER_SEAM:
        raise ValueError(
            f"use_liger_kernel=True computes a clipped loss inside Liger's kernel on TRL {trl.__version__}; "
            f"upgrade to trl>={LIGER_SEAM}, or set use_liger_kernel=False."
        )
    check_trust_region(args)


def check_trust_region(args: Any) -> None:
    """Raises a `ValueError` for an epsilon that is not finite or not above 0, or a slope that is none or below 1."""
    check_epsilon("epsilon", args.epsilon)
    if args.epsilon_high is not None:
        check_epsilon("epsilon_high", args.epsilon_high)
    if getattr(args, "penalty_slope", None) is not None:  # a plain GRPOConfig has none
        check_penalty_slope(args.penalty_slope)
