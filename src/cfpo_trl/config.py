"""CFPOConfig: GRPO's configuration, with what CFPO reads differently, and the check for what it cannot train."""

from dataclasses import dataclass, field

import trl
from packaging.version import Version
from trl import GRPOConfig

from .objective import check_epsilon, check_penalty_slope

CLIPPED_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LIGER_SEAM = Version("1.14")  # from here on TRL computes the loss in _compute_loss also with Liger's kernels


@dataclass
class CFPOConfig(GRPOConfig):
    """Configuration of [`CFPOTrainer`]: every option of TRL's `GRPOConfig`; CFPO itself needs no other.

    `epsilon` and `epsilon_high` have another meaning, because CFPO penalises where GRPO clips:

    Args:
        epsilon (`float`, defaults to `0.2`): Width ε of the trust region; the penalty on the ratio r is
            |A| / (2ε)·(r − 1)² (https://arxiv.org/abs/2601.22801). The objective's optimum is r = 1 ± ε.
        epsilon_high (`float`, *optional*): Width where r > 1, then `epsilon` is the one where r < 1.
            Default: `epsilon` on both sides.
        penalty_slope (`float`, *optional*): Largest slope of the penalty in units of |A|, at least 1: quadratic up to
            |r − 1| = `penalty_slope`·ε, linear beyond. Default: no bound, the paper's CFPO.
        vllm_server_timeout (`float`, defaults to `10.0`): Seconds to wait for the vLLM server at the start; TRL's
            240 make a missing server look like a slow one.
        vllm_sync_dir (`str`, *optional*): Folder that trainer and vLLM server both see, through which the server gets
            new weights. Default: NCCL on GPUs, `<output_dir>/vllm_weights` on a CPU.

    `loss_type` chooses how TRL aggregates the per-token losses, one of grpo, bnpo, dr_grpo, dapo, luspo.
    [`CFPOTrainer`] refuses what has no clip to replace: see [`check_config`].
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
    vllm_server_timeout: float = field(
        default=10.0, metadata={"help": "Seconds to wait for the vLLM server at the start."}
    )
    vllm_sync_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that trainer and vLLM server both see, through which the server gets new weights. "
            "If not specified, NCCL on GPUs and `<output_dir>/vllm_weights` on a CPU."
        },
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
    check_epsilon("epsilon", args.epsilon)
    if args.epsilon_high is not None:
        check_epsilon("epsilon_high", args.epsilon_high)
    if getattr(args, "penalty_slope", None) is not None:  # a plain GRPOConfig has none
        check_penalty_slope(args.penalty_slope)
