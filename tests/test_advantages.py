"""Advantages and KL estimators against formulas written out, number by number."""

import math
import statistics

import pytest
import torch

from cfpo_trl.advantages import KL_ESTIMATORS, approximate_kl, leave_one_out, mean_centred, reward_to_go

K = 5


@pytest.fixture
def rewards():
    return torch.randn(6 * K, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1


def groups_of(rewards):
    return [rewards[start : start + K].tolist() for start in range(0, len(rewards), K)]


def test_leave_one_out_is_the_centred_reward_times_k_over_k_minus_one(rewards):
    torch.testing.assert_close(
        (K - 1) * leave_one_out(rewards, K), K * mean_centred(rewards, K, "none"), rtol=0, atol=1e-14
    )


def test_leave_one_out_by_hand(rewards):
    expected = [
        reward - statistics.fmean(group[:index] + group[index + 1 :])
        for group in groups_of(rewards)
        for index, reward in enumerate(group)
    ]
    assert leave_one_out(rewards, K).tolist() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_mean_centred_by_hand(rewards, scale):
    whole = statistics.stdev(rewards.tolist())
    expected = []
    for group in groups_of(rewards):
        divisor = {"none": 1.0, "group": statistics.stdev(group) + 1e-4, "batch": whole + 1e-4}[scale]
        expected += [(reward - statistics.fmean(group)) / divisor for reward in group]
    assert mean_centred(rewards, K, scale).tolist() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("advantages", [leave_one_out, lambda rewards, k: mean_centred(rewards, k, "group")])
def test_rewards_that_no_function_gave_count_in_no_baseline(rewards, advantages):
    with_gap = torch.cat([rewards[:2], torch.tensor([math.nan]), rewards[3:]])
    gapped = advantages(with_gap, K)
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(gapped[kept], advantages(rewards[kept], K - 1), rtol=0, atol=1e-14)
    torch.testing.assert_close(gapped[K:], advantages(rewards[K:], K))
    assert gapped[2].isnan()


def test_a_reward_without_another_in_its_group_has_no_advantage():
    assert leave_one_out(torch.tensor([math.nan, 2.0, math.nan]), 3).isnan().all()


def test_equal_rewards_give_no_advantage():
    assert mean_centred(torch.full((4,), 0.25), 2, "group").tolist() == [0, 0, 0, 0]
    assert leave_one_out(torch.full((4,), 0.25), 2).tolist() == [0, 0, 0, 0]


def test_kl_estimators_by_hand():
    x = torch.tensor([[-2.0, -0.5, 0.0, 0.5, 2.0]])
    logps, ref_logps = x - 1.5, torch.full_like(x, -1.5)
    for estimator, formula in (
        ("k1", lambda v: v),
        ("k2", lambda v: v**2 / 2),
        ("k3", lambda v: math.exp(-v) - 1 + v),
    ):
        expected = [formula(v) for v in x[0].tolist()]
        assert approximate_kl(logps, ref_logps, estimator)[0].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_k1_and_k3_are_unbiased_and_k2_and_k3_are_not_negative():
    generator = torch.Generator().manual_seed(1)
    policy, reference = torch.randn(2, 1, 50, generator=generator).log_softmax(dim=-1)
    exact = (policy.exp() * (policy - reference)).sum()
    means = {name: (policy.exp() * approximate_kl(policy, reference, name)).sum() for name in KL_ESTIMATORS}
    assert means["k1"].item() == pytest.approx(exact.item(), rel=1e-5)
    assert means["k3"].item() == pytest.approx(exact.item(), rel=1e-5)
    assert abs(means["k2"].item() - exact.item()) > 1e-3
    assert (approximate_kl(policy, reference, "k2") >= 0).all()
    assert (approximate_kl(policy, reference, "k3") >= 0).all()


def test_reward_to_go():
    assert reward_to_go(torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.0, -1.0]])).tolist() == [[7, 6, 4], [-0.5, -1, -1]]
