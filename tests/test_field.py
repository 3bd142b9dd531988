"""The field's objectives, against the papers' gradients written by hand, and TRL's losses where it has them."""

import math

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from cfpo_trl import CFPOConfig, soft_clip
from cfpo_trl.studies import objectives
from cfpo_trl.studies.field import Tokens, below
from cfpo_trl.studies.objectives import build, named, trainer_of
from cfpo_trl.tiny.model import build_model

LOW, HIGH = 0.2, 0.3
SHAPE = 5, 7


def batch(seed: int) -> dict[str, torch.Tensor]:
    """Log-probs before and after, some far apart, advantages of each sign and 0, and completions of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(SHAPE, generator=generator, dtype=torch.float64) * 4 - 0.01
    new = old + 0.4 * torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.5, -0.7, 0.0, 2.0, -1.0], dtype=torch.float64)[:, None]
    mask = (torch.arange(SHAPE[1]) < torch.tensor([7, 5, 6, 3, 7])[:, None]).double()
    return {"old": old, "new": new.requires_grad_(), "advantages": advantages * mask, "mask": mask}


def weights(name: str, data: dict[str, torch.Tensor]) -> torch.Tensor:
    """∂ objective / ∂ log π_θ of each token, summed over tokens, from the papers' formulas, with loops and numbers."""
    out = torch.zeros(SHAPE, dtype=torch.float64)
    kind, _, number = name.partition("-")
    moved = []
    for i in range(SHAPE[0]):
        places = [t for t in range(SHAPE[1]) if data["mask"][i, t]]
        logs = {t: (data["new"][i, t] - data["old"][i, t]).item() for t in places}
        w = math.exp(sum(logs.values()))
        s = math.exp(sum(logs.values()) / len(places))
        for t in places:
            r, a, mu = math.exp(logs[t]), data["advantages"][i, t].item(), math.exp(data["old"][i, t].item())
            if kind == "unclipped":
                out[i, t] = r * a
            elif kind == "negative_clip":
                out[i, t] = 0 if a < 0 and r < 1 - LOW else r * a
            elif kind == "gspo":  # d s / d log π = s / length, for each of the completion's `length` terms
                stopped = (a > 0 and s > 1 + HIGH) or (a < 0 and s < 1 - LOW)
                out[i, t] = 0 if stopped else s * a
            elif kind == "cispo":
                out[i, t] = min(r, float(number)) * a
            elif kind == "sapo":
                tau = 1 if a > 0 else float(number)
                sigma = 1 / (1 + math.exp(-tau * (r - 1)))
                out[i, t] = 4 * sigma * (1 - sigma) * r * a
            elif kind == "vespo":
                k, lam = (2, 3) if a >= 0 else (3, 2)
                out[i, t] = w**k * math.exp(lam * (1 - w)) * a
            elif kind == "drpo":
                out[i, t] = r * (a - abs(a) * mu * (r - 1) / float(number))
            elif kind == "dppo":
                shift = (mu * r - mu) * (1 if a > 0 else -1)
                out[i, t] = 0 if a and shift > float(number) else r * a
            elif kind == "m2po":
                out[i, t] = r * a
                if (r - 1) * a > 0:
                    moved.append((logs[t] ** 2, i, t))
            elif kind == "truncated":  # the penalty's slope in r: 1 inside its width, the bound outside
                x = (r - 1) / (HIGH if r > 1 else LOW) * (1 if a > 0 else -1)
                out[i, t] = min(r, 1.0) * a * (1 - max(-float(number), min(x, 1)))
            elif kind == "topr":
                out[i, t] = a if a >= 0 else min(w, 1.0) * a
    moved.sort(reverse=True)
    while moved and sum(square for square, *_ in moved) > float(number) * len(moved):
        _, i, t = moved.pop(0)
        out[i, t] = 0
    return out


NAMES = ["unclipped", "negative_clip", "gspo", "cispo-1.3", "sapo-1.05", "vespo", "drpo-0.1", "dppo-0.05"]
NAMES += ["m2po-0.04", "m2po-10", "topr", "truncated-0", "truncated-1"]


def surrogate(name: str, data: dict[str, torch.Tensor]) -> torch.Tensor:
    found = named(name, objectives.field.PLAIN, objectives.field.WITH_NUMBER)
    ratio = (data["new"] - data["old"]).exp()
    return found(Tokens(ratio, data["old"], data["advantages"], data["mask"], LOW, HIGH))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_the_paper_s(name, seed):
    data = batch(seed)
    value = (surrogate(name, data) * data["mask"]).sum()
    (gradient,) = torch.autograd.grad(value, data["new"])
    torch.testing.assert_close(gradient, weights(name, data), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_in_the_clip_s_place_the_minimum_takes_its_gradient(name):
    data = batch(7)
    ratio = (data["new"] - data["old"]).exp()
    clipped = below(ratio, data["advantages"], surrogate(name, data))
    counted = data["advantages"] != 0
    assert (clipped * data["advantages"] < ratio * data["advantages"])[counted].all()
    value = torch.minimum(ratio * data["advantages"], clipped * data["advantages"]) * data["mask"]
    (gradient,) = torch.autograd.grad(value.sum(), data["new"])
    torch.testing.assert_close(gradient, weights(name, data), rtol=1e-9, atol=1e-12)


def test_truncated_is_the_bounded_form_but_for_its_weight():
    data = batch(3)
    ratio = (data["new"] - data["old"]).exp()
    clipped = soft_clip(ratio, data["advantages"], LOW, HIGH, penalty_slope=1.0) * data["advantages"]
    value = torch.minimum(ratio * data["advantages"], clipped) * data["mask"]
    (bounded,) = torch.autograd.grad(value.sum(), data["new"])
    torch.testing.assert_close(weights("truncated-1", data), bounded / ratio.detach().clamp(min=1))


def gradient_of(trainer, batch: dict) -> torch.Tensor:
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    return torch.cat([param.grad.flatten() for param in trainer.model.parameters()])


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("cispo-1.3", {"loss_type": "cispo", "epsilon_high": 1.3}, {"loss_type": "dapo"}),
        ("sapo-1.05", {"loss_type": "sapo"}, {"loss_type": "grpo"}),
        ("vespo", {"loss_type": "vespo"}, {"loss_type": "dapo"}),
        ("gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"loss_type": "grpo"}),
    ],
)
def test_the_same_as_trl_s_own_loss(build_trainer, tokenizer, name, theirs, ours):
    """Through the whole trainer in fp64, on rollouts that the policy has drifted from."""
    model = build_model(tokenizer, hidden_size=32, layers=2).double()
    trl = build_trainer(GRPOTrainer, GRPOConfig, model=model, num_iterations=2, **theirs)
    batches = []
    generate = trl._generate_and_score_completions
    trl._generate_and_score_completions = lambda inputs: batches.append(generate(inputs)) or batches[-1]
    trl.model.train()
    trl._prepare_inputs(next(iter(trl.get_train_dataloader())))
    (rollouts,) = batches
    noise = torch.randn(rollouts["old_per_token_logps"].shape, generator=torch.Generator().manual_seed(0))
    rollouts["old_per_token_logps"] = rollouts["old_per_token_logps"].double() + 0.2 * noise
    mine = build_trainer(trainer_of(name), CFPOConfig, model=model, num_iterations=2, **ours)
    torch.testing.assert_close(gradient_of(mine, rollouts), gradient_of(trl, rollouts), rtol=1e-7, atol=1e-10)


def test_a_user_s_own_operator_by_its_path():
    assert build("test_field.build") is build
    with pytest.raises(ValueError, match="objective has 'test_field.nothing', and test_field has no 'nothing'"):
        build("test_field.nothing")
    with pytest.raises(ValueError, match=r"objective='dppo' is unknown; .*dppo-<number>.* or the dotted path"):
        build("dppo")
