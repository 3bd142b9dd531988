"""CFPO in verl's real registry: against objective.py, in Ray's workers, and as its real configuration composes."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import ray
import torch
import verl
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl.trainer.constants_ppo import get_ppo_ray_runtime_env
from verl.trainer.ppo import rollout_corr_helper
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass, validate_config

from cfpo_trl.integrations.verl import widths
from cfpo_trl.objective import cfpo_objective

ROOT = Path(__file__).parent.parent.parent
CONFIG = Path(verl.__file__).parent / "trainer" / "config"
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
GLOBAL = [{}, {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 12, "loss_scale_factor": 9}]


def actor_config(*overrides):
    """The actor's part of verl's real configuration, as its workers get it."""
    with initialize_config_dir(str(CONFIG), version_base=None):
        config = compose("ppo_trainer", overrides=list(overrides))
    config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu = 1
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor)


@pytest.fixture(scope="module")
def config():
    return actor_config("actor_rollout_ref.actor.clip_ratio_low=0.2", "actor_rollout_ref.actor.clip_ratio_high=0.3")


def aggregated(losses, mask, mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None):
    """The modes as verl documents them, written out."""
    mask = mask.double()
    sums, counts = (losses * mask).sum(dim=1), mask.sum(dim=1)
    sequences = global_batch_size or (counts > 0).sum()
    total = {
        "token-mean": (losses * mask).sum() / (batch_num_tokens or mask.sum()),
        "token-sum": (losses * mask).sum(),
        "seq-mean-token-sum": sums.sum() / sequences,
        "seq-mean-token-sum-norm": sums.sum() / sequences / (loss_scale_factor or mask.size(1)),
        "seq-mean-token-mean": (sums / counts.clamp(min=1)).sum() / sequences,
    }[mode]
    return total * dp_size


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("totals", GLOBAL, ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
def test_value_and_gradient_against_the_objective(config, batch, mode, totals, weighted):
    config.global_batch_info.clear()
    config.global_batch_info.update(totals)
    log_prob = batch["log_prob"].requires_grad_()
    weights = batch["weights"] if weighted else None
    loss, metrics = get_policy_loss_fn("cfpo")(
        batch["old_log_prob"], log_prob, batch["advantages"], batch["mask"].bool(), mode, config, weights
    )
    ratio = (log_prob - batch["old_log_prob"]).exp()
    losses = -cfpo_objective(ratio, batch["advantages"], 0.2, 0.3) * (batch["weights"] if weighted else 1)
    expected = aggregated(losses, batch["mask"], mode, **totals)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)  # verl adds 1e-8 to a length
    (gradient,), (expected_gradient,) = (torch.autograd.grad(value, log_prob) for value in (loss, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-12)
    assert gradient.norm() > 0.01
    assert all(type(value) is float for value in metrics.values())


def test_metrics_against_their_definitions(config, batch):
    config.global_batch_info.clear()
    arguments = [batch[name] for name in ("old_log_prob", "log_prob", "advantages", "mask")]
    _, metrics = get_policy_loss_fn("cfpo")(*arguments, "token-mean", config)
    counted = batch["mask"].bool()
    x, a = (batch["log_prob"] - batch["old_log_prob"])[counted], batch["advantages"][counted]
    width = torch.where(x < 0, 0.2, 0.3)
    r = x.exp()
    assert metrics == {
        "actor/ppo_kl": pytest.approx(-x.mean().item()),
        "actor/cfpo_tv": pytest.approx((r - 1).abs().mean().item() / 2),
        "actor/cfpo_penalty": pytest.approx((a.abs() / (2 * width) * (r - 1) ** 2).mean().item()),
        "actor/cfpo_outside": pytest.approx(((r < 0.8) | (r > 1.3)).double().mean().item()),
    }
    assert get_policy_loss_fn("vanilla")(*arguments, "token-mean", config)[1]["actor/ppo_kl"] == pytest.approx(
        metrics["actor/ppo_kl"]
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["cfpo_bounded", "cfpo_sequence"])
def test_the_other_forms_against_their_definitions(config, batch, name, mode):
    config.global_batch_info.clear()
    log_prob, mask, a = batch["log_prob"].requires_grad_(), batch["mask"].bool(), batch["advantages"]
    loss, metrics = get_policy_loss_fn(name)(batch["old_log_prob"], log_prob, a, mask, mode, config)
    x = log_prob - batch["old_log_prob"]
    if name == "cfpo_sequence":
        x = torch.stack([row[kept].mean().expand(7) for row, kept in zip(x[:4], mask, strict=False)] + [0 * x[4]])
    r, width = x.exp(), torch.full_like(x, 0.2).masked_fill(x > 0, 0.3)
    inside, beyond = (r - 1) ** 2 / (2 * width), (r - 1).abs() - width / 2  # the penalty's two pieces
    losses = a.abs() * torch.where((r - 1).abs() <= width, inside, beyond) - r * a
    expected = aggregated(losses, batch["mask"], mode)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    (gradient,), (expected_gradient,) = (torch.autograd.grad(value, log_prob) for value in (loss, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-12)
    assert gradient.norm() > 0.01
    assert metrics["actor/ppo_kl"] == pytest.approx(-x[mask].mean().item())
    assert metrics["actor/cfpo_tv"] == pytest.approx((r[mask] - 1).abs().mean().item() / 2)


@pytest.mark.parametrize("log_ratio", [-1000.0, -19.0, 19.0, 1000.0])
def test_large_log_ratios_stay_finite(config, log_ratio):
    config.global_batch_info.clear()
    log_prob = torch.full((2, 3), log_ratio, requires_grad=True)
    advantages = torch.tensor([[1.0], [-1.0]]).expand(2, 3)
    mask = torch.tensor([[True, True, False]] * 2)
    loss, metrics = get_policy_loss_fn("cfpo")(torch.zeros(2, 3), log_prob, advantages, mask, "token-mean", config)
    loss.backward()
    assert loss.isfinite()
    assert log_prob.grad.isfinite().all()
    assert all(abs(value) < float("inf") for value in metrics.values())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((0.2, 0.2, 0.2), (0.2, 0.2)),
        ((0.2, 0.1, 0.3), (0.1, 0.3)),
        ((0.1, 0.1, 0.28), (0.1, 0.28)),
        ((0.1, None, None), (0.1, 0.1)),
    ],
)
def test_widths(given, expected):
    names = ("clip_ratio", "clip_ratio_low", "clip_ratio_high")
    assert widths(OmegaConf.create(dict(zip(names, given, strict=True)))) == expected


def test_a_clip_ratio_that_verl_would_ignore_is_refused(batch):
    config = actor_config("actor_rollout_ref.actor.clip_ratio=0.1")
    arguments = [batch[name] for name in ("old_log_prob", "log_prob", "advantages", "mask")]
    with pytest.raises(ValueError, match="clip_ratio=0.1 contradicts clip_ratio_low=0.2 and clip_ratio_high=0.2"):
        get_policy_loss_fn("cfpo")(*arguments, "token-mean", config)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, cwd="/"
    )


VANILLA = """
import torch, verl
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as registry
from types import SimpleNamespace
config = SimpleNamespace(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.3, global_batch_info={})
config.get = lambda name, default: default
generator = torch.Generator().manual_seed(0)
old, new, a = torch.randn(3, 4, 6, generator=generator)
others = sorted(name for name in registry if not name.startswith("cfpo"))
print(others, registry["vanilla"](old, new, a, torch.ones(4, 6), "token-mean", config))
print("cfpo" in registry)
"""


def test_other_losses_are_unchanged_and_the_plug_in_can_be_left_out():
    with_it, without = run_python(VANILLA), run_python(VANILLA, VERL_USE_EXTERNAL_PLUGINS="none")
    assert with_it.stdout.splitlines()[-1] == "True", with_it.stderr
    assert without.stdout.splitlines()[-1] == "False"
    assert with_it.stdout.splitlines()[-2] == without.stdout.splitlines()[-2]
    named = run_python(
        VANILLA, VERL_USE_EXTERNAL_PLUGINS="none", VERL_USE_EXTERNAL_MODULES="cfpo_trl.integrations.verl"
    )
    assert named.stdout.splitlines()[-1] == "True", named.stderr


def test_the_check_for_users():
    command = [sys.executable, "-m", "cfpo_trl.integrations.verl"]
    good = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert good.returncode == 0
    assert "loss_mode=cfpo is registered on this machine, by cfpo_trl.integrations.verl." in good.stdout
    assert f"verl {verl.__version__}" in good.stdout
    environment = os.environ | {"VERL_USE_EXTERNAL_PLUGINS": "none"}
    bad = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
    assert bad.returncode == 1
    assert "loss_mode=cfpo is not registered in a process that imports verl" in bad.stderr


def test_bypass_mode_warns(batch):
    class Batch:
        def __init__(self):
            self.batch = {"rollout_log_probs": batch["rollout_log_prob"]}

    for mode in ("cfpo", "cfpo_sequence", "vanilla"):
        loss_config = OmegaConf.create({"loss_mode": mode})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rollout_corr_helper.apply_bypass_mode(Batch(), {}, policy_loss_config=loss_config)
        assert loss_config.loss_mode == "bypass_mode"  # as verl has it
        assert [str(w.message)[:50] for w in caught if "CFPO" in str(w.message)] == (
            ["algorithm.rollout_correction.bypass_mode=True: verl"[:50]] if mode != "vanilla" else []
        )


def test_a_ray_worker_that_verl_starts_has_the_loss():
    """With the runtime environment that verl's own entry gives Ray, in a worker group of verl's."""
    from verl.single_controller.base import Worker
    from verl.single_controller.base.decorator import Dispatch, register
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

    class LossWorker(Worker):
        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def registered(self):
            from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

            return POLICY_LOSS_REGISTRY["cfpo"].__module__

    ray.init(runtime_env=OmegaConf.to_container(OmegaConf.create(get_ppo_ray_runtime_env())), num_cpus=2)
    try:
        group = RayWorkerGroup(
            RayResourcePool([1], use_gpu=False, max_colocate_count=1),
            RayClassWithInitArgs(ray.remote(LossWorker)),
            device_name="cpu",
        )
        assert group.registered() == ["cfpo_trl.integrations.verl"]
    finally:
        ray.shutdown()


@pytest.mark.parametrize("objective", ["cfpo", "vanilla"])
def test_the_launch_scripts_overrides_compose(objective):
    script = ROOT / "scripts" / "launch" / "verl_math.sh"
    environment = os.environ | {"DRY_RUN": "1", "OBJECTIVE": objective, "EPSILON": "0.1"}
    command = subprocess.run([script], capture_output=True, text=True, env=environment, check=True).stdout.splitlines()
    assert command[1:3] == ["-m", "verl.trainer.main_ppo"]
    with initialize_config_dir(str(CONFIG), version_base=None):
        config = compose("ppo_trainer", overrides=command[3:])  # an override that verl does not have is an error
    validate_config(config, use_reference_policy=False, use_critic=False)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert actor.policy_loss.loss_mode == objective
    assert widths(actor) == (0.1, 0.1)
    assert config.trainer.logger == ["console"]
