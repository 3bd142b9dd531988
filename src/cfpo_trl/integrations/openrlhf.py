"""CFPO in OpenRLHF: `python -m cfpo_trl.integrations.openrlhf … --actor.policy_loss_type cfpo`.

Or `cfpo_bounded`, `cfpo_sequence`, the other forms.

It runs OpenRLHF's own entry, openrlhf.cli.train_ppo_ray. Its Ray workers get a set-up hook that exchanges PolicyLoss
when openrlhf.models.loss is imported, and imports nothing before: vLLM's workers stay as they are.
"""

import argparse
import functools
import importlib.abc
import importlib.machinery
import math
import runpy
import sys
from importlib.metadata import version
from typing import Any

from .forms import FORMS, Form

ENTRY = "openrlhf.cli.train_ppo_ray"
LOSS = "openrlhf.models.loss"
OPTION = "--actor.policy_loss_type"
VERSIONS = "0.11."
PPO = Form()  # its ratio is that of OpenRLHF's surrogate


def with_cfpo(module: Any) -> type:
    """OpenRLHF's PolicyLoss, with the `FORMS` beside its own values of `policy_loss_type`, which stay as they are.

    Its forward runs as for `ppo`, without a clip, on advantages A′ = J / r, so that its surrogate r·A′ is CFPO's
    objective J; aggregation, corrections and return values are OpenRLHF's. Its second value, the share clipped, is 0.

    Args:
        module: `openrlhf.models.loss`.
    """
    import torch

    from cfpo_trl.objective import cfpo_objective, check_epsilon

    upstream = module.PolicyLoss

    class PolicyLoss(upstream):  # type: ignore[valid-type, misc]
        clip_eps_low: float
        clip_eps_high: float

        def __init__(self, *args: Any, policy_loss_type: str = "ppo", **kwargs: Any):
            self.form = FORMS.get(policy_loss_type)
            super().__init__(*args, policy_loss_type="ppo" if self.form else policy_loss_type, **kwargs)
            if not self.form:
                return
            if self.dual_clip is not None:
                raise ValueError(
                    f"dual_clip={self.dual_clip} clips a second time, and CFPO has no clip; leave it out."
                )
            self.epsilons = self.clip_eps_low, self.clip_eps_high
            for name, epsilon in zip(("clip_eps_low", "clip_eps_high"), self.epsilons, strict=True):
                check_epsilon(name, epsilon)
            self.clip_eps_low = self.clip_eps_high = math.inf

        def forward(
            self,
            log_probs: torch.Tensor,
            old_log_probs: torch.Tensor,
            advantages: torch.Tensor,
            action_mask: Any = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if self.form:
                own, ours = (form.log_ratio(log_probs - old_log_probs, action_mask) for form in (PPO, self.form))
                objective = cfpo_objective(ours.exp(), advantages, *self.epsilons, self.form.penalty_slope)
                advantages = objective / own.exp()
            return super().forward(log_probs, old_log_probs, advantages, action_mask, *args, **kwargs)

    return PolicyLoss


def check_seam(policy_loss: type) -> None:
    """Raises a `RuntimeError` unless this OpenRLHF is of a tested version, and its loss is then CFPO's objective."""
    import torch

    from cfpo_trl.objective import cfpo_objective

    log_ratio = torch.tensor([[-1.5, -0.3, 0.0, 0.4, 1.2]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -2.0, 0.5, -1.0, 3.0]], dtype=torch.float64)
    installed = "of unknown version"
    try:
        installed = version("openrlhf")
        loss = policy_loss(0.2, 0.3, policy_loss_type="cfpo")
        value = loss(log_ratio, torch.zeros_like(log_ratio), advantages, torch.ones_like(log_ratio))[0]
        expected = -cfpo_objective(log_ratio.exp(), advantages, 0.2, 0.3).mean()
        moved = None if torch.isclose(value, expected) else f"its loss is {value:.6f}, CFPO's {expected:.6f}"
    except Exception as error:  # whatever another version raises, it is another version
        moved = repr(error)
    if moved or not installed.startswith(VERSIONS):
        raise RuntimeError(
            f"OpenRLHF {installed} is not supported ({moved or 'not tested'}); install openrlhf>={VERSIONS}0,<0.12."
        )


class LossFinder(importlib.abc.MetaPathFinder):
    """Exchanges PolicyLoss when openrlhf.models.loss is imported, before anything has taken it from there."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != LOSS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            policy_loss = with_cfpo(module)
            check_seam(policy_loss)
            module.PolicyLoss = policy_loss

        loader.exec_module = exec_module
        return spec


def install() -> None:
    """The workers' set-up hook: imports nothing, and acts when the loss is imported."""
    if not any(isinstance(finder, LossFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, LossFinder())


def accept_cfpo() -> None:
    """Lets OpenRLHF's parser take the `FORMS` as `--actor.policy_loss_type`."""
    original = argparse.ArgumentParser.add_argument

    @functools.wraps(original)
    def add_argument(self: argparse.ArgumentParser, *names: Any, **options: Any) -> argparse.Action:
        if OPTION in names:
            options["choices"] = [*options["choices"], *FORMS]
        return original(self, *names, **options)

    argparse.ArgumentParser.add_argument = add_argument  # type: ignore[assignment, method-assign]


def hook_workers() -> None:
    """Gives the Ray workers that OpenRLHF starts the set-up hook."""
    import ray

    original = ray.init

    @functools.wraps(original)
    def init(*args: Any, runtime_env: dict[str, Any] | None = None, **options: Any) -> Any:
        hook = f"{install.__module__}.{install.__name__}"
        return original(*args, runtime_env={**(runtime_env or {}), "worker_process_setup_hook": hook}, **options)

    ray.init = init


def main() -> None:
    accept_cfpo()
    hook_workers()
    install()
    runpy.run_module(ENTRY, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    from cfpo_trl.integrations import openrlhf  # the workers find the hook by this name, not as __main__

    openrlhf.main()
