"""CFPOTrainer: what it refuses, what it equals, what it logs, and that its seam fails loudly."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
import trl
from packaging.version import Version
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from cfpo_trl import CFPOConfig, CFPOTrainer
from cfpo_trl.config import uses_rollouts_once
from cfpo_trl.seam import METRICS
from cfpo_trl.tiny.model import build_model
from conftest import early_letters

REFUSED = [
    ({"loss_type": "cispo"}, "loss_type='cispo' has no clip to replace; use one of grpo, bnpo, dr_grpo, dapo, luspo"),
    ({"loss_type": "sapo"}, "loss_type='sapo' has no clip to replace"),
    ({"loss_type": "vespo"}, "loss_type='vespo' has no clip to replace"),
    ({"delta": 2.0}, "delta=2.0 clips the ratio a second time .* remove it"),
    ({"epsilon": 0.0}, "epsilon=0.0 is no trust-region width: it must be finite and above 0; the default is 0.2"),
    ({"epsilon": -0.1}, "epsilon=-0.1 is no trust-region width"),
    ({"epsilon": math.nan}, "epsilon=nan is no trust-region width"),
    ({"epsilon_high": math.inf}, "epsilon_high=inf is no trust-region width"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
@pytest.mark.parametrize("config_class", [GRPOConfig, CFPOConfig])
def test_refused_before_any_model_is_loaded(options, message, config_class, tmp_path):
    args = config_class(str(tmp_path), report_to="none", use_cpu=True, bf16=False, **options)
    with pytest.raises(ValueError, match=message):
        CFPOTrainer("no/such-model", early_letters, args)


@pytest.mark.parametrize("slope", [0.5, math.nan])
def test_refused_penalty_slope(slope, tmp_path):
    args = CFPOConfig(str(tmp_path), use_cpu=True, bf16=False, penalty_slope=slope)
    with pytest.raises(ValueError, match=f"penalty_slope={slope} bounds .* leave it out for the paper's CFPO"):
        CFPOTrainer("no/such-model", early_letters, args)


def test_refused_liger_kernel_on_old_trl(tmp_path, monkeypatch):
    args = GRPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    args.use_liger_kernel = True  # set late: TRL's own check wants the kernels installed
    if Version(trl.__version__) >= Version("1.14"):
        monkeypatch.setattr(trl, "__version__", "1.13.0")
    with pytest.raises(ValueError, match=r"use_liger_kernel=True computes a clipped loss .* upgrade to trl>=1.14"):
        CFPOTrainer("no/such-model", early_letters, args)


class Recorder(TrainerCallback):
    """Keeps the policy's loss gradient norms and logs of each step."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append({key: logs[key] for key in logs if key in {"loss", "reward", "grad_norm", "entropy"}})


def train(build_trainer, trainer_class, **options):
    recorder = Recorder()
    trainer = build_trainer(trainer_class, callbacks=[recorder], **options)
    trainer.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return trainer, recorder.logs, weights


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
def test_one_update_per_batch_is_grpo_number_for_number(build_trainer, loss_type):
    options = {"num_iterations": 1, "loss_type": loss_type, "gradient_accumulation_steps": 2}
    _, cfpo_logs, cfpo_weights = train(build_trainer, CFPOTrainer, **options)
    _, grpo_logs, grpo_weights = train(build_trainer, GRPOTrainer, **options)
    assert len(cfpo_logs) == 6
    assert cfpo_logs == grpo_logs
    assert torch.equal(cfpo_weights, grpo_weights)


def test_several_updates_per_batch_are_not_grpo(build_trainer):
    options = {"num_iterations": 4, "max_steps": 8, "learning_rate": 1e-2}
    _, cfpo_logs, cfpo_weights = train(build_trainer, CFPOTrainer, **options)
    _, grpo_logs, grpo_weights = train(build_trainer, GRPOTrainer, **options)
    assert cfpo_logs[0] == grpo_logs[0]  # the first update of a batch has ratio 1
    assert cfpo_logs[1] != grpo_logs[1]
    assert not torch.equal(cfpo_weights, grpo_weights)


def one_batch(trainer, log_ratio: float, advantage: float) -> dict[str, torch.Tensor]:
    """A batch of two completions whose every token has this log-ratio and this advantage."""
    batch = {
        "prompt_ids": torch.tensor([[2, 3], [4, 5]]),
        "prompt_mask": torch.ones(2, 2, dtype=torch.long),
        "completion_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "advantages": torch.tensor([advantage, advantage]),
        "num_items_in_batch": torch.tensor(5),
    }
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logps, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 3)
    trainer.current_gradient_accumulation_steps = 1
    return {**batch, "old_per_token_logps": logps - log_ratio}


@pytest.mark.parametrize(("ratio", "advantage"), [(1.5, 1.0), (0.5, -1.0)])
def test_the_gradient_is_nonzero_exactly_where_the_clip_is_flat(build_trainer, ratio, advantage):
    norms = {}
    for trainer_class in (CFPOTrainer, GRPOTrainer):
        trainer = build_trainer(trainer_class, num_iterations=4, loss_type="grpo")
        batch = one_batch(trainer, math.log(ratio), advantage)
        trainer.compute_loss(trainer.model, batch).backward()
        gradients = [p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]
        norms[trainer_class] = torch.stack(gradients).norm().item()
    assert norms[GRPOTrainer] == 0
    assert norms[CFPOTrainer] > 1e-3


@pytest.mark.parametrize(("slope", "objective"), [(None, 0.875), (1.25, 1.03125), (1.0, 1.1)])
def test_penalty_slope_reaches_the_loss(build_trainer, slope, objective):
    """At r = 1.5 with A = 1 and ε = 0.2: 1.5 − 0.25/0.4; 1.5 − 0.25²/0.4 − 1.25·0.25; 1.5 − 0.2²/0.4 − 0.3."""
    trainer = build_trainer(config_class=CFPOConfig, penalty_slope=slope, num_iterations=4, loss_type="grpo")
    loss = trainer.compute_loss(trainer.model, one_batch(trainer, math.log(1.5), 1.0))
    assert loss.item() == pytest.approx(-objective, rel=1e-5)


def logged(trainer: CFPOTrainer) -> dict[str, float]:
    """What the trainer logs now, without the prefix of evaluation."""
    trainer.log({})
    return {name.removeprefix("eval_"): value for name, value in trainer.state.log_history[-1].items()}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_metrics_against_their_definitions(build_trainer, mode):
    trainer = build_trainer(loss_type="grpo", epsilon=0.2, epsilon_high=0.3, num_iterations=2)
    trainer.model.train(mode == "train")
    batch = one_batch(trainer, 0.0, 0.0)
    ratio = torch.tensor([[0.5, 1.0, 1.25], [1.31, 0.85, 99.0]])  # the 99 is padding
    batch["old_per_token_logps"] -= ratio.log()
    batch["advantages"] = torch.tensor([2.0, -1.0])
    trainer.compute_loss(trainer.model, batch)
    metrics = logged(trainer)
    assert metrics["cfpo/tv"] == pytest.approx((0.5 + 0 + 0.25 + 0.31 + 0.15) / 5 / 2, rel=1e-5)
    penalties = [2 * 0.5**2 / 0.4, 0, 2 * 0.25**2 / 0.6, 0.31**2 / 0.6, 0.15**2 / 0.4]
    assert metrics["cfpo/penalty"] == pytest.approx(sum(penalties) / 5, rel=1e-5)
    assert metrics["cfpo/outside"] == pytest.approx(2 / 5)  # 0.5 and 1.31
    counted = [0.5, 1.0, 1.25, 1.31, 0.85]
    assert metrics["cfpo/ess"] == pytest.approx(sum(counted) ** 2 / (5 * sum(r**2 for r in counted)), rel=1e-5)
    assert metrics["cfpo/ratio_min"] == pytest.approx(0.5, rel=1e-5)
    assert metrics["cfpo/ratio_max"] == pytest.approx(1.31, rel=1e-5)
    # TRL's metrics keep their GRPO meaning: 0.5 has A > 0 and 1.31 has A < 0, where the clip does not bind.
    assert metrics["clip_ratio/region_mean"] == 0
    assert "cfpo/tv" not in logged(trainer)  # each loss counts in one log


def test_metrics_do_not_depend_on_how_tokens_are_split(build_trainer):
    trainer = build_trainer(loss_type="grpo", num_iterations=2)
    batch = one_batch(trainer, 0.0, 1.0)
    batch["old_per_token_logps"] -= torch.tensor([[0.5, 0.8, 1.25], [1.3, 0.9, 99.0]]).log()
    trainer.compute_loss(trainer.model, batch)
    together = logged(trainer)
    for row in ([0], [1]):  # three tokens, then two
        trainer.compute_loss(trainer.model, {k: v[row] if v.dim() else v for k, v in batch.items()})
    apart = logged(trainer)
    for name in METRICS:
        assert apart[name] == pytest.approx(together[name], rel=1e-6), name
    assert together["cfpo/ratio_min"] == pytest.approx(0.5, rel=1e-5)


def test_metrics_skip_batches_without_a_real_token(build_trainer):
    trainer = build_trainer(loss_type="grpo")
    batch = one_batch(trainer, 0.1, 1.0)
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == 0
    assert "cfpo/tv" not in logged(trainer)


def test_metrics_of_sequence_level_ratios_count_sequences(build_trainer):
    trainer = build_trainer(loss_type="grpo", importance_sampling_level="sequence")
    batch = one_batch(trainer, 0.0, 1.0)
    batch["old_per_token_logps"] -= torch.tensor([[math.log(1.5)] * 3, [0.0] * 3])
    trainer.compute_loss(trainer.model, batch)
    metrics = logged(trainer)
    assert metrics["cfpo/tv"] == pytest.approx(0.125, rel=1e-5)
    assert metrics["cfpo/outside"] == 0.5


def test_metrics_of_sequence_level_ratios_leave_out_masked_sequences(build_trainer):
    trainer = build_trainer(loss_type="grpo", importance_sampling_level="sequence")
    batch = one_batch(trainer, 0.0, 1.0)
    batch["old_per_token_logps"] -= math.log(1.5)
    batch["completion_mask"][1] = 0  # cut off, with mask_truncated_completions
    trainer.compute_loss(trainer.model, batch)
    assert logged(trainer)["cfpo/tv"] == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize(
    ("per_generation", "accumulation", "iterations", "once"),
    [(4, 4, 1, True), (2, 4, 1, True), (2, 3, 1, False), (4, 2, 1, False), (2, 4, 2, True), (4, 4, 2, False)],
)
def test_which_rollouts_are_used_once(per_generation, accumulation, iterations, once):
    args = SimpleNamespace(
        num_iterations=iterations, steps_per_generation=per_generation, gradient_accumulation_steps=accumulation
    )
    assert uses_rollouts_once(args) == once


def test_padding_cannot_make_the_loss_nan(build_trainer):
    trainer = build_trainer(loss_type="grpo")
    batch = one_batch(trainer, 0.1, 1.0)
    batch["old_per_token_logps"][1, 2] = -60.0  # a padded position, where (r - 1)² overflows in fp32
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in trainer.model.parameters() if p.grad is not None)


def test_eval_logs_the_metrics(build_trainer, prompts):
    trainer = build_trainer(eval_dataset=prompts.select(range(8)), per_device_eval_batch_size=8, num_iterations=2)
    logs = trainer.evaluate()
    for name in METRICS:
        assert f"eval_{name}" in {**logs, **trainer.state.log_history[-1]}


def test_no_state_survives_the_loss_also_when_it_raises(build_trainer, monkeypatch):
    trainer = build_trainer(epsilon=0.2, epsilon_high=0.3)
    batch = one_batch(trainer, 0.1, 1.0)
    trainer.compute_loss(trainer.model, batch)
    assert (type(trainer.epsilon_low), type(trainer.epsilon_high)) == (float, float)
    monkeypatch.delitem(batch, "num_items_in_batch")
    monkeypatch.delitem(batch, "prompt_ids")
    with pytest.raises(KeyError):
        trainer.compute_loss(trainer.model, batch)
    assert (type(trainer.epsilon_low), type(trainer.epsilon_high)) == (float, float)
    assert (trainer.epsilon_low, trainer.epsilon_high) == (0.2, 0.3)


def clip_by_minimum_and_maximum(self, model, inputs):
    """A loss as another TRL might write it: the same clip, not by `torch.clamp`."""
    ratio = torch.ones(2, 3, requires_grad=True)
    clipped = torch.maximum(torch.minimum(ratio, torch.tensor(1 + self.epsilon_high)), torch.tensor(0.8))
    return -torch.min(ratio, clipped).mean()


def clip_by_keyword(self, model, inputs):
    ratio = torch.ones(2, 3, requires_grad=True)
    return -torch.clamp(ratio, min=1 - self.epsilon_low, max=1 + self.epsilon_high).mean()


def clip_twice(self, model, inputs):
    ratio = torch.ones(inputs["completion_ids"].shape, requires_grad=True)
    for _ in range(2):
        ratio = torch.clamp(ratio, 1 - self.epsilon_low, 1 + self.epsilon_high)
    return -ratio.mean()


@pytest.mark.parametrize(("loss", "times"), [(clip_by_minimum_and_maximum, 0), (clip_by_keyword, 0), (clip_twice, 2)])
def test_an_unsupported_trl_fails_at_the_first_loss(build_trainer, monkeypatch, loss, times):
    trainer = build_trainer()
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", loss)
    with pytest.raises(RuntimeError, match=rf"ran CFPO's soft clip {times} times .* Install a TRL version"):
        trainer.train()


def test_lora(build_trainer):
    from peft import LoraConfig

    trainer = build_trainer(peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), num_iterations=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora" in name for name in changed)


def test_default_arguments_and_model_card(build_trainer, tokenizer, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cfpo_trl.trainer.CFPOConfig", functools.partial(CFPOConfig, use_cpu=True, bf16=False))
    model = build_model(tokenizer, hidden_size=32, layers=1)
    model.config._name_or_path = "someone/tiny"
    trainer = CFPOTrainer(model, early_letters, train_dataset=prompts, processing_class=tokenizer)
    assert isinstance(trainer.args, CFPOConfig)
    assert trainer.args.output_dir == "tiny-CFPO"
    assert trainer.args.report_to == []
    assert not trainer.args.push_to_hub
    trainer.create_model_card("tiny-CFPO")
    card = (tmp_path / "tiny-CFPO" / "README.md").read_text()
    assert "CFPO" in card
    assert "2601.22801" in card
    assert "- cfpo" in card
    assert "- grpo" not in card
