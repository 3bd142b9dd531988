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


def bounded_reference(ratio: float, advantage: float, low: float, high: float | None, slope: float) -> float:
    """J with a penalty whose slope is bounded, in plain Python: quadratic inside, the tangent outside."""
    width = low if high is None or ratio < 1 else high
    edge = slope * width
    distance = abs(ratio - 1)
    penalty = distance**2 / (2 * width) if distance <= edge else edge**2 / (2 * width) + slope * (distance - edge)
    return ratio * advantage - abs(advantage) * penalty


@pytest.mark.parametrize("slope", [1.0, 1.25, 3.0])
@pytest.mark.parametrize(("low", "high"), EPSILONS)
def test_bounded_penalty(low, high, slope):
    advantages = torch.tensor([*ADVANTAGES, 0.0], dtype=torch.float64).unsqueeze(1)
    ratio = RATIOS[RATIOS != 1].repeat(len(advantages), 1).requires_grad_()
    value = cfpo_objective(ratio, advantages, low, high, penalty_slope=slope)
    expected = [
        [bounded_reference(r, advantage, low, high, slope) for r in row]
        for row, advantage in zip(ratio.tolist(), advantages.flatten().tolist(), strict=True)
    ]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)
    assert (value <= ratio * advantages).all()
    slopes = torch.autograd.grad(value.sum(), ratio)[0]
    assert ((slopes - advantages).abs() <= slope * advantages.abs() + 1e-12).all()
    assert torch.autograd.gradcheck(lambda r: cfpo_objective(r, advantages, low, high, slope), ratio)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_bounded_penalty_keeps_the_optimum_and_is_cfpo_up_to_its_bound(advantage):
    ratio = torch.linspace(1 - 1.25 * 0.2, 1 + 1.25 * 0.3, 50, dtype=torch.float64)
    advantages = torch.tensor(advantage, dtype=torch.float64)
    bounded = cfpo_objective(ratio, advantages, 0.2, 0.3, penalty_slope=1.25)
    torch.testing.assert_close(bounded, cfpo_objective(ratio, advantages, 0.2, 0.3))
    ratio = torch.linspace(0, 5, 5001, dtype=torch.float64)
    best = ratio[cfpo_objective(ratio, advantages, 0.2, 0.3, penalty_slope=1.25).argmax()]
    assert best.item() == pytest.approx(1.3 if advantage > 0 else 0.8, abs=1e-3)


def test_bounded_penalty_of_slope_1_is_flat_beyond_the_region():
    ratio = torch.tensor([1.31, 2.0, 30.0], dtype=torch.float64, requires_grad=True)
    value = cfpo_objective(ratio, torch.tensor(2.0, dtype=torch.float64), 0.3, penalty_slope=1.0)
    assert torch.autograd.grad(value.sum(), ratio)[0].abs().max() < 1e-12


@pytest.mark.parametrize("slope", [0.99, -1.0, math.nan, math.inf])
def test_invalid_penalty_slope(slope):
    with pytest.raises(ValueError, match=r"penalty_slope=.* must be finite and at least 1"):
        soft_clip(torch.ones(1), torch.ones(1), 0.2, penalty_slope=slope)


@pytest.mark.parametrize("epsilon", [0.0, -0.2, math.nan, math.inf])
def test_invalid_epsilon(epsilon):
    with pytest.raises(ValueError, match=r"epsilon_low=.* must be finite and above 0"):
        cfpo_objective(torch.ones(1), torch.ones(1), epsilon)
    with pytest.raises(ValueError, match=r"epsilon_high=.* must be finite and above 0"):
        soft_clip(torch.ones(1), torch.ones(1), 0.2, epsilon)
