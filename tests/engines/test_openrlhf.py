"""CFPO in OpenRLHF's real PolicyLoss: against objective.py, in Ray's workers, and by its real entry."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import ray
import torch

from cfpo_trl.integrations import openrlhf as integration
from cfpo_trl.objective import cfpo_objective

integration.install()

from openrlhf.models import PolicyLoss, loss  # noqa: E402  after the hook, as in the workers

from conftest import STUBS  # noqa: E402

UPSTREAM = PolicyLoss.__mro__[1]
CORRECTIONS = [
    {},
    {"is_correction_level": "token", "is_correction_mode": "mask"},
    {"is_correction_level": "token", "is_correction_mode": "clip"},
    {"is_correction_level": "seq", "is_correction_mode": "mask"},
    {"is_correction_level": "token", "is_correction_gating": "binary_kl", "is_correction_threshold": (0.0, 0.01)},
    {"is_correction_level": "seq", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.1)},
]
TOTALS = [{}, {"dp_size": 2, "batch_num_tokens": 40.0, "global_batch_size": 12.0}]


def arguments(batch):
    return batch["log_prob"], batch["old_log_prob"], batch["advantages"], batch["mask"], batch["rollout_log_prob"]


def reference(batch, token_level, totals, options):
    """The loss with CFPO's objective and OpenRLHF's corrections and aggregation, written out."""
    mask, old, rollout = batch["mask"].double(), batch["old_log_prob"], batch["rollout_log_prob"]
    losses = -cfpo_objective((batch["log_prob"] - old).exp(), batch["advantages"], 0.2, 0.3)
    counts = mask.sum(dim=1, keepdim=True)
    if options:
        low, high = options.get("is_correction_threshold", (0.5, 5.0))
        ratio, p, q = (old - rollout).exp(), rollout.exp(), old.exp()
        gating = options.get("is_correction_gating", "ratio")
        statistic = {
            "ratio": old - rollout,
            "binary_kl": p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log(),
            "tv": (p - q).abs(),
        }[gating]
        if options["is_correction_level"] == "seq":
            statistic = (statistic * mask).sum(dim=1, keepdim=True) / counts
        if gating == "ratio":
            statistic = statistic.exp()
        kept = (statistic >= low) & (statistic <= high)
        clips = options.get("is_correction_mode") == "clip"
        losses = losses * (ratio.clamp(low, high) if clips else torch.where(kept, ratio, 0.0))
    if token_level:
        return (losses * mask).sum() / totals.get("batch_num_tokens", mask.sum()) * totals.get("dp_size", 1)
    means = ((losses * mask).sum(dim=1) / counts.squeeze(1))[counts.squeeze(1) > 0]
    return means.sum() / totals.get("global_batch_size", len(means)) * totals.get("dp_size", 1)


@pytest.mark.parametrize("options", CORRECTIONS, ids=lambda options: "-".join(map(str, options.values())) or "off")
@pytest.mark.parametrize("totals", TOTALS, ids=["local", "global"])
@pytest.mark.parametrize("token_level", [True, False])
def test_value_and_gradient_against_the_objective(batch, token_level, totals, options):
    batch = {name: tensor[:4] for name, tensor in batch.items()}  # the empty completion is 0/0 in OpenRLHF, too
    log_prob = batch["log_prob"].requires_grad_()
    policy_loss = PolicyLoss(0.2, 0.3, token_level_loss=token_level, policy_loss_type="cfpo", **options)
    value = policy_loss(*arguments(batch), **totals)[0]
    expected = reference(batch, token_level, totals, options)
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=0)
    (gradient,), (expected_gradient,) = (torch.autograd.grad(v, log_prob) for v in (value, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-12)
    assert gradient.norm() > 1e-3


def test_value_and_gradient_in_fp32(batch):
    single = {name: tensor[:4].float() for name, tensor in batch.items()}
    log_prob = single["log_prob"].requires_grad_()
    value = PolicyLoss(0.2, 0.3, policy_loss_type="cfpo")(*arguments(single))[0]
    expected = reference(single, True, {}, {})
    torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=0)
    (gradient,), (expected_gradient,) = (torch.autograd.grad(v, log_prob) for v in (value, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", CORRECTIONS)
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_its_own_losses_are_unchanged_and_so_are_the_other_return_values(batch, kind, options):
    batch = {name: tensor[:4] for name, tensor in batch.items()}
    upstream = UPSTREAM(0.2, 0.3, policy_loss_type=kind, **options)(*arguments(batch))
    ours = PolicyLoss(0.2, 0.3, policy_loss_type=kind, **options)(*arguments(batch))
    cfpo = PolicyLoss(0.2, 0.3, policy_loss_type="cfpo", **options)(*arguments(batch))
    for index, expected in enumerate(upstream):
        assert ours[index] is expected is None or torch.equal(ours[index], expected)
        if kind == "ppo" and index > 1:  # KL, KL to the rollouts, share filtered
            assert cfpo[index] is expected is None or torch.equal(cfpo[index], expected)
    assert cfpo[1] == 0  # nothing is clipped


@pytest.mark.parametrize("log_ratio", [-1000.0, -19.0, 19.0, 1000.0])
def test_large_log_ratios_stay_finite(log_ratio):
    log_probs = torch.full((2, 3), log_ratio, requires_grad=True)
    advantages = torch.tensor([[1.0], [-1.0]]).expand(2, 3)
    value = PolicyLoss(policy_loss_type="cfpo")(log_probs, torch.zeros(2, 3), advantages, torch.ones(2, 3))[0]
    value.backward()
    assert value.isfinite()
    assert log_probs.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dual_clip": 3.0}, "dual_clip=3.0 clips a second time, and CFPO has no clip; leave it out"),
        ({"clip_eps_low": 0.0}, "clip_eps_low=0.0 is no trust-region width"),
        ({"clip_eps_high": -1.0}, "clip_eps_high=-1.0 is no trust-region width"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PolicyLoss(policy_loss_type="cfpo", **options)


class Moved(UPSTREAM):
    """As another version might be: it reads its bounds when it is built."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bounds = 1 - self.clip_eps_low, 1 + self.clip_eps_high

    def forward(self, log_probs, old_log_probs, advantages, action_mask, *args, **kwargs):
        ratio = (log_probs - old_log_probs).exp()
        return (-torch.min(ratio * advantages, ratio.clamp(*self.bounds) * advantages).mean(),)


def test_a_seam_that_moved_is_refused(monkeypatch):
    with pytest.raises(
        RuntimeError, match=r"OpenRLHF 0.11.\d is not supported \(its loss is .*\); install openrlhf>=0.11.0"
    ):
        integration.check_seam(integration.with_cfpo(SimpleNamespace(PolicyLoss=Moved)))
    monkeypatch.setattr(integration, "version", lambda package: "0.12.0")
    with pytest.raises(RuntimeError, match=r"OpenRLHF 0.12.0 is not supported \(not tested\)"):
        integration.check_seam(loss.PolicyLoss)


def test_a_ray_worker_that_openrlhf_starts_has_the_loss_and_the_others_import_nothing(monkeypatch):
    monkeypatch.setattr(ray, "init", ray.init)  # undone after the test
    integration.hook_workers()
    # as openrlhf.cli.train_ppo_ray.train does
    ray.init(runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "true", "NCCL_DEBUG": "WARN"}}, num_cpus=2)
    try:

        @ray.remote(num_cpus=1)
        class PolicyWorker:
            def loss(self):
                from openrlhf.models import PolicyLoss

                ratio, ones = torch.tensor([[1.5]]), torch.ones(1, 1)
                losses = (PolicyLoss(policy_loss_type=kind) for kind in ("cfpo", "ppo"))
                return [loss(ratio.log(), ones * 0, ones, ones)[0].item() for loss in losses], os.environ["NCCL_DEBUG"]

        @ray.remote(num_cpus=1)
        class RolloutWorker:
            def imported(self):
                return sorted({"openrlhf", "cfpo_trl.objective"} & set(sys.modules))

        values, variable = ray.get(PolicyWorker.remote().loss.remote())
        assert values == pytest.approx([-(1.5 - 0.5**2 / 0.4), -1.2])
        assert variable == "WARN"
        assert ray.get(RolloutWorker.remote().imported.remote()) == []
    finally:
        ray.shutdown()


ENTRY = """
import json, sys
import ray
def init(**options):
    print(json.dumps(options))
    sys.exit(7)
ray.init = init
from cfpo_trl.integrations import openrlhf
openrlhf.main()
"""


@pytest.mark.parametrize("kind", ["cfpo", "cfpo_sequence", "ppo", "nonsense"])
def test_the_entry_takes_openrlhfs_options_and_cfpo(kind):
    """Its own parser and checks run, up to where it starts Ray."""
    options = [
        "--actor.policy_loss_type",
        kind,
        "--actor.model_name_or_path",
        "model",
        "--reward.remote_url",
        "http://x",
    ]
    options += ["--algo.advantage.estimator", "rloo", "--rollout.n_samples_per_prompt", "4"]
    environment = os.environ | {"PYTHONPATH": f"{STUBS.parent / 'entry_stubs'}:{os.environ['PYTHONPATH']}"}
    command = [sys.executable, "-c", ENTRY, *options]
    run = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
    if kind == "nonsense":
        assert run.returncode == 2
        assert "invalid choice: 'nonsense' (choose from" in run.stderr
        assert "'cfpo'" in run.stderr
        return
    assert run.returncode == 7, run.stderr[-2000:]
    assert '"worker_process_setup_hook": "cfpo_trl.integrations.openrlhf.install"' in run.stdout
    assert "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS" in run.stdout  # OpenRLHF's own environment stays


def test_the_hook_imports_nothing():
    code = "from cfpo_trl.integrations.openrlhf import install; import sys; install(); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd="/").strip() == "False"
