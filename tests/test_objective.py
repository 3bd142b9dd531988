"""The equation: its value, its slope, its optimum, its limits, its precision."""

import math

import pytest
import torch

from cfpo_trl import cfpo_objective, soft_clip, tv_distance

RATIOS = torch.tensor([0.01, 0.5, 0.8, 0.95, 1.0, 1.05, 1.28, 2.0, 30.0], dtype=torch.float64)
EPSILONS = [(0.2, None), (0.2, 0.28), (0.5, 0.1)]
ADVANTAGES = [-2.5, -1.0, 1.0, 0.3]


def reference(ratio: float, advantage: float, low: float, high: float | None) -> float:
    """J from the paper, in plain Python."""
    width = low if high is None or ratio < 1 else high
    return ratio * advantage - abs(advantage) / (2 * width) * (ratio - 1) ** 2


@pytest.mark.parametrize(("low", "high"), EPSILONS)
@pytest.mark.parametrize("advantage", [*ADVANTAGES, 0.0])
def test_value_is_the_paper_s_equation(advantage, low, high):
    value = cfpo_objective(RATIOS, torch.tensor(advantage, dtype=torch.float64), low, high)
    expected = [reference(ratio, advantage, low, high) for ratio in RATIOS.tolist()]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("low", "high"), EPSILONS)
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_gradcheck(advantage, low, high):
    ratio = RATIOS[RATIOS != 1].clone().requires_grad_()  # with two widths the curvature jumps at 1
    advantages = torch.full_like(ratio, advantage)
    assert torch.autograd.gradcheck(lambda r: cfpo_objective(r, advantages, low, high), ratio)


@pytest.mark.parametrize(("low", "high"), EPSILONS)
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_slope_is_flat_only_at_the_optimum(advantage, low, high):
    width = low if advantage < 0 or high is None else high
    optimum = 1 + math.copysign(width, advantage)
    ratio = torch.cat([RATIOS, torch.tensor([optimum], dtype=torch.float64)]).requires_grad_()
    (slope,) = torch.autograd.grad(
        cfpo_objective(ratio, torch.tensor(advantage, dtype=torch.float64), low, high).sum(), ratio
    )
    assert slope[-1].abs() < 1e-14
    away = (ratio - optimum).abs() > 1e-9
    assert (slope[away].sign() == (optimum - ratio[away]).sign()).all()  # it rises to the optimum, then falls


def test_at_ratio_1_value_and_gradient_are_the_surrogate_s():
    ratio = torch.ones(4, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([-2.0, -0.5, 0.5, 2.0], dtype=torch.float64)
    value = cfpo_objective(ratio, advantages, 0.2, 0.3)
    assert torch.equal(value, advantages)
    assert torch.equal(torch.autograd.grad(value.sum(), ratio)[0], advantages)


@pytest.mark.parametrize(("low", "high"), EPSILONS)
def test_identities(low, high):
    advantages = torch.tensor([*ADVANTAGES, 0.0], dtype=torch.float64).unsqueeze(1)
    objective = cfpo_objective(RATIOS, advantages, low, high)
    assert (objective <= RATIOS * advantages).all()
    torch.testing.assert_close(soft_clip(RATIOS, advantages, low, high) * advantages, objective)
    torch.testing.assert_close(cfpo_objective(RATIOS, 3 * advantages, low, high), 3 * objective)  # homogeneous
    middle = cfpo_objective((RATIOS[:-1] + RATIOS[1:]) / 2, advantages, low, high)
    assert (middle >= (objective[:, :-1] + objective[:, 1:]) / 2 - 1e-12).all()  # concave


def test_the_wide_region_is_the_unclipped_surrogate():
    advantages = torch.tensor(-1.5, dtype=torch.float64)
    torch.testing.assert_close(cfpo_objective(RATIOS, advantages, 1e12), RATIOS * advantages, rtol=1e-8, atol=1e-8)


def test_advantages_broadcast_over_tokens():
    ratio, advantages = torch.rand(3, 5) + 0.5, torch.tensor([[-1.0], [0.0], [2.0]])
    assert torch.equal(cfpo_objective(ratio, advantages, 0.2), cfpo_objective(ratio, advantages.expand(3, 5), 0.2))


@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_finite_for_log_ratios_of_20(advantage):
    log_ratio = torch.tensor([-20.0, 20.0], requires_grad=True)
    value = cfpo_objective(log_ratio.exp(), torch.tensor(advantage), 0.2)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), log_ratio)[0].isfinite().all()


@pytest.mark.parametrize("ratio", [0.0, 1e30, math.inf])
def test_no_advantage_no_contribution(ratio):
    ratio = torch.tensor([ratio], requires_grad=True)
    value = cfpo_objective(ratio, torch.zeros(1), 0.2)
    assert value.item() == 0
    assert torch.autograd.grad(value, ratio)[0].item() == 0


def test_soft_clip_is_the_ratio_where_the_advantage_is_0():
    ratio = torch.tensor([0.5, 1e30], requires_grad=True)
    clipped = soft_clip(ratio, torch.zeros(2), 0.2)
    assert torch.equal(clipped, ratio)
    assert torch.equal(torch.autograd.grad(clipped.sum(), ratio)[0], torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    ratio = torch.tensor([0.9, 1.0078125, 1.1], dtype=dtype)
    advantages = torch.tensor([1.0, -1.0, 0.5], dtype=dtype)
    value = cfpo_objective(ratio, advantages, 0.2)
    assert value.dtype == torch.float32
    assert torch.equal(value, cfpo_objective(ratio.float(), advantages.float(), 0.2))


def test_the_minimum_of_the_clipped_surrogate_always_takes_the_soft_clip():
    torch.manual_seed(0)
    ratio, advantages = torch.exp(torch.randn(10_000)), torch.randn(10_000)
    soft = soft_clip(ratio, advantages, 0.2, 0.28) * advantages
    assert torch.equal(torch.min(ratio * advantages, soft), soft)


def test_tv_distance():
    ratio = torch.tensor([[0.5, 1.5, math.inf], [1.0, 3.0, 7.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    assert tv_distance(ratio, mask).item() == pytest.approx((0.5 + 0.5 + 0 + 2) / 4 / 2)
    assert tv_distance(ratio[1]).item() == pytest.approx(8 / 3 / 2)
    assert tv_distance(ratio, torch.zeros(2, 3)).item() == 0


def test_tv_distance_estimates_the_total_variation_of_two_distributions():
    torch.manual_seed(0)
    old, new = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.4, 0.35, 0.25])
    sample = torch.multinomial(old, 200_000, replacement=True)
    assert tv_distance((new / old)[sample]).item() == pytest.approx((new - old).abs().sum().item() / 2, abs=2e-3)


@pytest.mark.parametrize("epsilon", [0.0, -0.2, math.nan, math.inf])
def test_invalid_epsilon(epsilon):
    with pytest.raises(ValueError, match=r"epsilon_low=.* must be finite and above 0"):
        cfpo_objective(torch.ones(1), torch.ones(1), epsilon)
    with pytest.raises(ValueError, match=r"epsilon_high=.* must be finite and above 0"):
        soft_clip(torch.ones(1), torch.ones(1), 0.2, epsilon)
