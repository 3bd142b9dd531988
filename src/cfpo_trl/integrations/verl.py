"""CFPO in verl: `actor_rollout_ref.actor.policy_loss.loss_mode=cfpo`, `cfpo_bounded` or `cfpo_sequence`.

Installed beside verl, the package registers the loss in every process that imports verl (entry points of the group
`verl.plugins`; else VERL_USE_EXTERNAL_MODULES=cfpo_trl.integrations.verl). `python -m cfpo_trl.integrations.verl` says
whether it did.
"""

import functools
import subprocess
import sys
import warnings
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo import rollout_corr_helper
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.utils.torch_functional import masked_mean

from cfpo_trl.integrations.forms import FORMS, Form
from cfpo_trl.objective import cfpo_objective, tv_distance

DEFAULT = 0.2  # of clip_ratio, clip_ratio_low and clip_ratio_high alike


def widths(config: Any) -> tuple[float, float]:
    """ε where the ratio is below 1, and above it, from an actor's `clip_ratio`, `clip_ratio_low`, `clip_ratio_high`.

    verl's losses read the last two, whose defaults are 0.2 whatever `clip_ratio` says.

    Raises:
        ValueError: `clip_ratio` was changed and neither of the others has its value.
    """
    both, low, high = config.clip_ratio, config.clip_ratio_low, config.clip_ratio_high
    low, high = both if low is None else low, both if high is None else high
    if both != DEFAULT and both not in (low, high):
        raise ValueError(
            f"clip_ratio={both} contradicts clip_ratio_low={low} and clip_ratio_high={high}, which verl reads: set "
            "these two to the widths, and clip_ratio to one of them or leave it out."
        )
    return low, high


def compute_policy_loss_cfpo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    form: Form = FORMS["cfpo"],
) -> tuple[Tensor, dict[str, float]]:
    """CFPO's loss with verl's signature, aggregation, global batch information and rollout weights.

    Args:
        old_log_prob: Log-probs of the policy that made the rollouts, `(B, T)`.
        log_prob: Log-probs of the policy, `(B, T)`.
        advantages: `(B, T)`.
        response_mask: `(B, T)`, nonzero at the tokens that count.
        loss_agg_mode: One of verl's.
        config: The actor's, for the widths and `global_batch_info`.
        rollout_is_weights: Weights of verl's rollout correction, `(B, T)`; default none.
        form: Of the objective; each has a loss mode.

    Returns:
        The loss, a scalar, and metrics under `actor/`, means over the counted tokens: `ppo_kl` as in verl's other
        losses, `cfpo_tv` (½·|r − 1|), `cfpo_penalty` (r·A less the objective) and `cfpo_outside` (share beyond ε).

    Raises:
        ValueError: see [`widths`].
    """
    low, high = widths(config)
    log_ratio = form.log_ratio(log_prob - old_log_prob, response_mask)
    ratio = log_ratio.exp()
    objective = cfpo_objective(ratio, advantages, low, high, form.penalty_slope)
    losses = -objective if rollout_is_weights is None else -objective * rollout_is_weights
    loss = agg_loss(loss_mat=losses, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
    with torch.no_grad():
        means = {
            "actor/ppo_kl": -log_ratio,
            "actor/cfpo_penalty": ratio * advantages - objective,
            "actor/cfpo_outside": ((ratio < 1 - low) | (ratio > 1 + high)).float(),
        }
        metrics = {name: masked_mean(values, response_mask).item() for name, values in means.items()}
        metrics["actor/cfpo_tv"] = tv_distance(ratio, response_mask).item()
    return loss, metrics


for mode, form in FORMS.items():
    loss_of_form = functools.partial(compute_policy_loss_cfpo, form=form)
    register_policy_loss(mode)(functools.update_wrapper(loss_of_form, compute_policy_loss_cfpo))


def warn_of_bypass_mode() -> None:
    """Makes bypass mode say what it does silently in verl's older trainers: it writes another loss over this one."""
    original = rollout_corr_helper.apply_bypass_mode

    @functools.wraps(original)
    def apply_bypass_mode(batch: Any, rollout_corr_config: Any = None, policy_loss_config: Any = None) -> None:
        if policy_loss_config is not None and policy_loss_config.get("loss_mode") in FORMS:
            warnings.warn(
                "algorithm.rollout_correction.bypass_mode=True: verl writes loss_mode=bypass_mode, its clipped loss, "
                "over cfpo. Set it to False, or look for actor/cfpo_tv in the log: without it this is no CFPO run.",
                stacklevel=2,
            )
        original(batch, rollout_corr_config, policy_loss_config)

    rollout_corr_helper.apply_bypass_mode = apply_bypass_mode


warn_of_bypass_mode()

CHECK = "import verl; from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as r; print(r['cfpo'].__module__)"


def main() -> None:
    """Says whether a fresh process that imports verl has the loss, and exits with status 1 where it has not."""
    for package in ("cfpo_trl", "verl", "torch", "ray"):
        print(f"{package} {version(package)}")
    found = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    if found.returncode == 0:
        print(f"loss_mode=cfpo is registered on this machine, by {found.stdout.split()[-1]}.")
        return
    sys.exit(
        "loss_mode=cfpo is not registered in a process that imports verl. Install cfpo_trl into verl's environment "
        "(`pip install --no-deps -e .`), do not set VERL_USE_EXTERNAL_PLUGINS to none, or set "
        f"VERL_USE_EXTERNAL_MODULES=cfpo_trl.integrations.verl.\n{found.stderr}"
    )


if __name__ == "__main__":
    main()
