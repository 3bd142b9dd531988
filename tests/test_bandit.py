"""The synthetic bandit: its closed form, and that the trainer makes the updates that it predicts."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from trl import GRPOConfig

from bandit import EPSILON, OBJECTIVES, group_advantages, inner_optimum, loss, problem, train
from cfpo_trl import CFPOTrainer
from cfpo_trl.studies.objectives import build
from cfpo_trl.tiny.model import build_model, build_tokenizer
from conftest import CPU

LETTERS = "abcdef"
COPIES = 2  # of each token in a batch of rollouts


def test_updates_on_one_batch_converge_to_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    old_policy = torch.randn(5, 4, generator=generator, dtype=torch.float64).softmax(1)
    advantages = group_advantages(old_policy, torch.rand(5, 4, generator=generator, dtype=torch.float64))
    logits = old_policy.log().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=2.0)
    for _ in range(4000):
        optimizer.zero_grad()
        loss(logits, old_policy, advantages, build("cfpo")).backward()
        optimizer.step()
    optimum = inner_optimum(old_policy, advantages, EPSILON)
    torch.testing.assert_close(optimum.sum(1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(logits.softmax(1), optimum, rtol=1e-6, atol=1e-9)


def test_reuse_moves_the_clip_ever_further_and_the_penalty_not():
    """TV to the sampling policy after 4 and after 64 updates on one batch, contexts sharing their weights."""
    tv = {
        name: [train(*problem(8, 0), build(name), 1, updates, 0.2)[-1]["tv"] for updates in (4, 64)]
        for name in OBJECTIVES
    }
    assert tv["grpo"][1] > 2 * tv["grpo"][0] > 0.3
    assert tv["cfpo"][1] < 0.1
    assert tv["bounded-1.25"][1] < 0.1
    assert tv["grpo"][1] > tv["bounded-1"][1] > 2 * tv["bounded-1"][0]  # flat beyond the region, like a clip


def test_one_update_per_batch_is_the_same_for_all():
    histories = [train(*problem(8, 0), build(name), 5, 1, 0.1) for name in OBJECTIVES]
    assert all(history == histories[0] for history in histories)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("learning_rate", [0.01, 0.05])
def test_the_trainer_makes_the_bandit_s_updates(name, learning_rate, tmp_path):
    """With one prompt, one token and a frozen body, the real trainer is a bandit; its rollouts are every token, twice.

    Its logits are W·h with a constant h, so a step of SGD on W is one of size lr·|h|² on the logits.
    """
    tokenizer = build_tokenizer(LETTERS)
    model = build_model(tokenizer, hidden_size=32, layers=1).requires_grad_(False)
    model.config.tie_word_embeddings = False
    model.lm_head = nn.Linear(32, len(tokenizer), bias=False)
    nn.init.zeros_(model.lm_head.weight)
    with torch.no_grad():
        hidden = model.model(torch.tensor([tokenizer("a").input_ids])).last_hidden_state[0, -1].double()

    def every_token(prompts, trainer):
        ids = [[token] for token in range(len(tokenizer)) for _ in range(COPIES)]
        return {
            "prompt_ids": [tokenizer(prompt).input_ids for prompt in prompts],
            "completion_ids": ids,
            "logprobs": ids,
        }

    updates = 12
    arguments = GRPOConfig(
        str(tmp_path),
        per_device_train_batch_size=COPIES * len(tokenizer),
        num_generations=COPIES * len(tokenizer),
        num_iterations=updates,
        max_steps=updates,
        max_completion_length=1,
        epsilon=EPSILON,
        loss_type="grpo",
        optim="sgd",
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        **CPU,
    )
    trainer = type("Compared", (CFPOTrainer,), {"soft_clip": staticmethod(build(name))})(
        model,
        lambda completions, **columns: [float(text == "c") for text in completions],
        arguments,
        Dataset.from_list([{"prompt": "a"}]),
        processing_class=tokenizer,
        rollout_func=every_token,
    )
    trainer.train()

    old_policy = torch.full((1, len(tokenizer)), 1 / len(tokenizer), dtype=torch.float64)
    rewards = nn.functional.one_hot(torch.tensor([tokenizer("c").input_ids[0]]), len(tokenizer)).double()
    spread = rewards.repeat(1, COPIES).std()  # TRL's, of the sample
    advantages = (rewards - rewards.mean()) / (spread + 1e-4)
    logits = torch.zeros_like(old_policy, requires_grad=True)
    for _ in range(updates):
        (gradient,) = torch.autograd.grad(loss(logits, old_policy, advantages, build(name)), logits)
        logits = (logits - learning_rate * hidden.square().sum() * gradient).detach().requires_grad_()
    trained = (model.lm_head.weight.double() @ hidden).softmax(0)
    torch.testing.assert_close(trained, logits.softmax(1)[0], rtol=2e-4, atol=2e-5)
    assert (trained * len(tokenizer) - 1).abs().max() > EPSILON  # it left the trust region
