"""The operators that studies compare: the clip, and candidates for a better penalty."""

import pytest
import torch
from trl import GRPOTrainer

from cfpo_trl import CFPOTrainer, soft_clip
from cfpo_trl.studies.objectives import Adaptive, build, clip, operator, quadratic
from cfpo_trl.tiny.model import build_model

NAMES = ["grpo", "cfpo", "bounded-1", "bounded-1.25", "bounded-4", "smooth-1.25", "log", "one_sided", "one_sided-1"]
ADVANTAGES = [-2.0, -0.5, 0.5, 2.0]
RATIOS = torch.tensor([1e-6, 0.3, 0.74, 0.8, 0.9, 1.0, 1.1, 1.26, 3.0, 1e4], dtype=torch.float64)


def slope(name: str, ratio: torch.Tensor, advantage: float) -> torch.Tensor:
    ratio = ratio.clone().requires_grad_()
    advantages = torch.full_like(ratio, advantage)
    clipped = build(name)(ratio, advantages, 0.2, 0.3)
    value = torch.minimum(ratio * advantages, clipped * advantages)
    return torch.autograd.grad(value.sum(), ratio)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_below_the_surrogate_and_equal_to_it_at_ratio_1(name, advantage):
    advantages = torch.full_like(RATIOS, advantage)
    clipped = build(name)(RATIOS, advantages, 0.2, 0.3)
    assert (clipped * advantages <= RATIOS * advantages).all()  # what the seam needs
    assert clipped[RATIOS == 1] == 1
    assert slope(name, torch.ones(1, dtype=torch.float64), advantage).item() == pytest.approx(advantage, rel=1e-14)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_clip_is_torch_clamp_under_the_minimum(advantage):
    ratio = RATIOS.clone().requires_grad_()
    advantages = torch.full_like(ratio, advantage)
    expected = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
    torch.testing.assert_close(
        torch.minimum(ratio * advantages, clip(ratio, advantages, 0.2, 0.3) * advantages), expected, rtol=0, atol=0
    )
    kinks = (RATIOS == 0.8) | (RATIOS == 1.3)
    gradient = torch.autograd.grad(expected.sum(), ratio)[0]
    torch.testing.assert_close(slope("grpo", RATIOS, advantage)[~kinks], gradient[~kinks], rtol=0, atol=0)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_bounded_is_cfpo_inside_and_has_a_bounded_slope(advantage):
    inside = RATIOS[(RATIOS > 1 - 1.25 * 0.2) & (RATIOS < 1 + 1.25 * 0.3)]
    torch.testing.assert_close(slope("bounded-1.25", inside, advantage), slope("cfpo", inside, advantage))
    far = slope("bounded-1.25", RATIOS, advantage)
    assert (far.abs() <= 2.25 * abs(advantage) + 1e-12).all()
    torch.testing.assert_close(slope("bounded-1e9", RATIOS, advantage), slope("cfpo", RATIOS, advantage))
    beyond = RATIOS[RATIOS > 1.3] if advantage > 0 else RATIOS[RATIOS < 0.8]
    assert slope("bounded-1", beyond, advantage).abs().max() < 1e-12  # c = 1 is flat there, like a clip
    optimum = torch.tensor([1.3 if advantage > 0 else 0.8], dtype=torch.float64)
    assert slope("bounded-1.25", optimum, advantage).abs() < 1e-12


@pytest.mark.parametrize("name", [name for name in NAMES if name != "grpo"])
def test_gradcheck(name):
    ratio = torch.tensor([0.3, 0.7, 0.93, 1.07, 1.6, 4.0], dtype=torch.float64, requires_grad=True)
    for advantage in ADVANTAGES:
        advantages = torch.full_like(ratio, advantage)
        assert torch.autograd.gradcheck(lambda r: build(name)(r, advantages, 0.2, 0.3), ratio)  # noqa: B023


def test_overflow_where_the_advantage_is_0_stays_finite():
    ratio = torch.tensor([float("inf"), 1.0]).requires_grad_()
    for name in NAMES:
        clipped = build(name)(ratio, torch.zeros(2), 0.2, 0.2)
        assert torch.autograd.grad(clipped.sum(), ratio)[0].isfinite().all(), name


def test_adaptive_width_follows_the_measured_tv():
    adaptive, advantages = Adaptive(0.05), torch.tensor([1.0, -1.0, 0.0])
    torch.testing.assert_close(adaptive(torch.ones(3), advantages, 0.2, 0.2), torch.ones(3))
    assert adaptive.scale == 1  # the first update of a batch says nothing
    far, near = torch.tensor([1.4, 0.6, 9.0]), torch.tensor([1.01, 1.0, 9.0])  # TV 0.2 and 0.0025
    torch.testing.assert_close(adaptive(far, advantages, 0.2, 0.2), soft_clip(far, advantages, 0.2, 0.2))
    assert adaptive.scale == pytest.approx(1 / 1.05)
    narrow = 0.2 / 1.05
    torch.testing.assert_close(adaptive(near, advantages, 0.2, 0.2), soft_clip(near, advantages, narrow, narrow))
    assert adaptive.scale == pytest.approx(1)
    for _ in range(100):
        adaptive(far, advantages, 0.2, 0.2)
    assert adaptive.scale == pytest.approx(0.1)


def test_a_quadratic_of_the_candidates_is_the_soft_clip():
    for advantage in ADVANTAGES:
        advantages = torch.full_like(RATIOS, advantage)
        made = operator(quadratic)(RATIOS, advantages, 0.2, 0.3)
        torch.testing.assert_close(made, soft_clip(RATIOS, advantages, 0.2, 0.3))


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="objective='ppo' is unknown; use one of cfpo, grpo, log"):
        build("ppo")


@pytest.mark.parametrize("options", [{}, {"importance_sampling_level": "sequence"}, {"loss_type": "dapo"}])
def test_grpo_of_a_study_is_trl_s_grpo_number_for_number(build_trainer, options):
    """It logs the trust region, too; all else is that of TRL's own trainer."""
    compared = type("Compared", (CFPOTrainer,), {"soft_clip": staticmethod(clip)})
    options = {"num_iterations": 4, "max_steps": 12, "learning_rate": 3e-3} | options
    theirs = build_trainer(GRPOTrainer, **options)
    theirs.train()
    ours = build_trainer(compared, **options)
    ours.train()
    keys = ("loss", "reward", "grad_norm", "entropy", "clip_ratio/region_mean", "completions/mean_length")
    for mine, other in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
        assert [mine.get(key) for key in keys] == [other.get(key) for key in keys]
    assert ours.state.log_history[-2]["clip_ratio/region_mean"] > 0  # the clip did bind
    assert all(map(torch.equal, ours.model.parameters(), theirs.model.parameters()))


def test_the_studies_beta_logs_the_kl_and_changes_nothing(build_trainer, tokenizer, tmp_path):
    build_model(tokenizer, hidden_size=32, layers=2).save_pretrained(tmp_path / "start")  # TRL loads it as reference
    options = {"num_iterations": 4, "max_steps": 12, "learning_rate": 3e-3, "model": str(tmp_path / "start")}
    without = build_trainer(**options)
    without.train()
    measured = build_trainer(beta=1e-20, **options)
    measured.train()
    assert measured.state.log_history[-2]["kl"] > 1e-3
    for mine, other in zip(measured.state.log_history[:-1], without.state.log_history[:-1], strict=True):
        assert [mine[key] for key in ("loss", "grad_norm")] == [other[key] for key in ("loss", "grad_norm")]
    assert all(map(torch.equal, measured.model.parameters(), without.model.parameters()))
