"""The same tiny batch gives the same gradient in TRL, verl and OpenRLHF, up to what each documents to divide by."""

import pytest
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import get_policy_loss_fn

from cfpo_trl import CFPOConfig, CFPOTrainer
from cfpo_trl.integrations import openrlhf as integration
from cfpo_trl.integrations.forms import FORMS
from cfpo_trl.tiny.model import build_model, build_tokenizer

integration.install()

from openrlhf.models import PolicyLoss  # noqa: E402

# TRL's aggregation, verl's, and whether OpenRLHF's is of tokens: one mean over tokens, one over sequences
PAIRS = [("bnpo", "token-mean", True), ("grpo", "seq-mean-token-mean", False)]


@pytest.fixture
def trainer(tmp_path):
    tokenizer = build_tokenizer("abc")
    args = CFPOConfig(str(tmp_path), epsilon=0.2, epsilon_high=0.3, use_cpu=True, bf16=False, report_to="none")
    prompts = Dataset.from_list([{"prompt": "a"}] * 8)
    return CFPOTrainer(
        build_model(tokenizer, hidden_size=16, layers=1), lambda **_: [0.0], args, prompts, processing_class=tokenizer
    )


def gradient(loss, log_prob):
    return torch.autograd.grad(loss, log_prob)[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("trl_type", "verl_mode", "token_level"), PAIRS)
def test_same_gradient(trainer, batch, monkeypatch, trl_type, verl_mode, token_level, form):
    batch = {name: tensor[:4] for name, tensor in batch.items()}  # none is empty
    log_prob, old, mask = batch["log_prob"].requires_grad_(), batch["old_log_prob"], batch["mask"]

    config = OmegaConf.create(
        {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.3, "global_batch_info": {}}
    )
    verl_loss, _ = get_policy_loss_fn(form)(old, log_prob, batch["advantages"], mask, verl_mode, config)
    policy_loss = PolicyLoss(0.2, 0.3, token_level_loss=token_level, policy_loss_type=form)
    openrlhf_loss = policy_loss(log_prob, old, batch["advantages"], mask)[0]

    trainer.args.penalty_slope = FORMS[form].penalty_slope
    trainer.importance_sampling_level = "sequence" if FORMS[form].sequence else "token"
    trainer.loss_type, trainer.current_gradient_accumulation_steps = trl_type, 1
    scores = log_prob, torch.zeros_like(log_prob), None
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: scores)
    ids = torch.ones_like(mask)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": batch["advantages"],
        "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
    }
    trl_loss = trainer.compute_loss(trainer.model, inputs)
    expected = gradient(trl_loss, log_prob)
    assert expected.norm() > 0.01
    torch.testing.assert_close(gradient(verl_loss, log_prob), expected, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(gradient(openrlhf_loss, log_prob), expected, rtol=1e-7, atol=1e-12)
