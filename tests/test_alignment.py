"""RLOO advantages and KL in the reward: against TRL's RLOOTrainer, OpenRLHF's formulas, and REINFORCE."""

import math
from collections import deque

import pytest
import torch
import trl
from packaging.version import Version
from trl import GRPOTrainer, RLOOConfig, RLOOTrainer

from cfpo_trl import AlignmentTrainer, CFPOConfig, CFPOTrainer
from cfpo_trl.config import LUSPO_BY_TOKEN, check_alignment
from cfpo_trl.tiny.model import build_model
from conftest import early_letters

BETA = 0.3
K = 8  # num_generations of build_trainer
REFUSED = [
    ({"advantage_estimator": "gae"}, "advantage_estimator='gae' is unknown; use one of group, rloo"),
    ({"kl_in_reward_estimator": "k4"}, "kl_in_reward_estimator='k4' is unknown; use one of k1, k2, k3"),
    ({"kl_in_reward_level": "word"}, "kl_in_reward_level='word' is unknown; use one of sequence, token"),
    ({"kl_in_reward": -0.1}, "kl_in_reward=-0.1 must be finite and at least 0"),
    ({"kl_in_reward": math.nan}, "kl_in_reward=nan must be finite and at least 0"),
    ({"reward_clip_range": [1.0, 1.0]}, r"reward_clip_range=\[1.0, 1.0\] is no range; give two numbers"),
    ({"reward_clip_range": [1.0]}, r"reward_clip_range=\[1.0\] is no range"),
    ({"advantage_estimator": "rloo", "scale_rewards": "batch"}, "scale_rewards='batch': RLOO divides by nothing"),
    (
        {"advantage_estimator": "rloo", "multi_objective_aggregation": "normalize_then_sum"},
        "multi_objective_aggregation='normalize_then_sum' scales every reward on its own",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
@pytest.mark.parametrize("trainer_class", [CFPOTrainer, AlignmentTrainer])
def test_refused_before_any_model_is_loaded(options, message, trainer_class, tmp_path):
    args = CFPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    with pytest.raises(ValueError, match=message):
        trainer_class("no/such-model", early_letters, args)


@pytest.mark.parametrize(
    ("options", "version", "message"),
    [
        ({"loss_type": "luspo"}, "1.11.0", "'luspo' averages padding on TRL 1.11.0; .* or trl>=1.12"),
        ({"use_liger_kernel": True}, "1.13.0", "on TRL 1.13.0 Liger's kernel would have it in the loss, too"),
    ],
)
def test_refused_on_old_trl(options, version, message, tmp_path, monkeypatch):
    args = CFPOConfig(str(tmp_path), use_cpu=True, bf16=False, kl_in_reward=BETA, kl_in_reward_level="token")
    for name, value in options.items():  # set late: TRL's own check wants the kernels installed
        setattr(args, name, value)
    monkeypatch.setattr("trl.__version__", version)
    with pytest.raises(ValueError, match=message):
        check_alignment(args)


def test_rloo_leaves_the_standard_deviation_out(tmp_path):
    options = {"use_cpu": True, "bf16": False}
    assert CFPOConfig(str(tmp_path), advantage_estimator="rloo", **options).scale_rewards == "none"
    assert CFPOConfig(str(tmp_path), **options).scale_rewards == "group"


def test_off_by_default_and_then_the_training_is_trls(build_trainer):
    """Also the baseline of the comparisons: with the clip and no option, GRPOTrainer's weights to the bit."""
    weights = {}
    for trainer_class in (AlignmentTrainer, GRPOTrainer):
        trainer = build_trainer(trainer_class, CFPOConfig, num_iterations=3, learning_rate=1e-2)
        trainer.train()
        weights[trainer_class] = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    assert torch.equal(weights[AlignmentTrainer], weights[GRPOTrainer])


@pytest.fixture
def start(tokenizer, tmp_path):
    """A saved model: the reference is loaded from its path."""
    build_model(tokenizer, hidden_size=32, layers=2).save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


@pytest.fixture
def roll_out(build_trainer, start, prompts):
    """One batch of 16 completions by a policy that left the reference, and the trainer that scored it."""

    def roll_out(trainer_class=CFPOTrainer, config_class=CFPOConfig, reward=None, mode="train", **options):
        trainer = build_trainer(trainer_class, config_class, model=start, **options)
        if reward:
            trainer.reward_funcs = [reward]
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        trainer.model.train(mode == "train")
        trainer.current_gradient_accumulation_steps = 1
        torch.manual_seed(7)
        rows = [prompts[index // K] for index in range(16)]
        return trainer, trainer._generate_and_score_completions(rows)

    return roll_out


def now_and_then(completions, **kwargs):
    """Rewards some completions do not get; the second group has one alone."""
    scores = early_letters(completions)
    return [None if index in (1, 5) or index > 8 else 4 * score for index, score in enumerate(scores)]


@pytest.mark.parametrize("reward", [early_letters, now_and_then])
@pytest.mark.parametrize("bounds", [None, [0.2, 0.6]])
@pytest.mark.parametrize("coefficient", [0.0, BETA])
def test_advantages_equal_those_of_trls_rloo_trainer(roll_out, coefficient, bounds, reward):
    if reward is now_and_then and Version(trl.__version__) < Version("1.8"):
        pytest.skip("this RLOOTrainer takes the reward that no function gave as 0")
    options = {"reward_clip_range": bounds, "reward": reward}
    ours, batch = roll_out(advantage_estimator="rloo", kl_in_reward=coefficient, **options)
    theirs, expected = roll_out(
        RLOOTrainer, RLOOConfig, beta=coefficient, normalize_advantages=False, num_iterations=1, **options
    )
    assert torch.equal(batch["completion_ids"], expected["completion_ids"])
    torch.testing.assert_close(batch["advantages"], expected["advantages"], rtol=0, atol=1e-6)
    assert expected["advantages"].abs().max() > 0.1
    torch.testing.assert_close(
        torch.tensor(list(ours._logs["advantages"])), torch.tensor(list(theirs._logs["advantages"])), rtol=0, atol=1e-6
    )
    if coefficient:
        (per_sequence,) = ours._metrics["train"]["kl_in_reward/mean"]
        (per_token,) = theirs._metrics["train"]["kl"]  # TRL logs the mean over tokens
        assert per_sequence == pytest.approx(per_token * batch["completion_mask"].sum().item() / 16, rel=1e-5)
        assert abs(per_sequence) > 0.01


def score(model, batch):
    """Log-probs of the completions, `(B, T)`, by the textbook."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, batch["prompt_ids"].size(1) - 1 : -1]
    return logits.log_softmax(dim=-1).gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)


def openrlhf_advantages(rewards, logps, ref_logps, mask, estimator, kl_estimator, bounds):
    """OpenRLHF 0.11.0's make_experience and compute_advantages_and_returns, completion by completion.

    https://github.com/OpenRLHF/OpenRLHF: openrlhf/trainer/ppo_utils/experience_maker.py and openrlhf/models/utils.py
    """
    advantages = torch.zeros_like(logps)
    for index, reward in enumerate(rewards):
        group = rewards[index // K * K : index // K * K + K]
        if estimator == "rloo":
            shaped = reward - (sum(group) - reward) / (K - 1)
        else:
            mean = sum(group) / K
            shaped = (reward - mean) / (math.sqrt(sum((r - mean) ** 2 for r in group) / (K - 1)) + 1e-4)
        if bounds:
            shaped = min(max(shaped, bounds[0]), bounds[1])
        togo, last = 0.0, int(mask[index].sum()) - 1
        for t in range(last, -1, -1):
            x = (logps[index, t] - ref_logps[index, t]).item()
            kl = {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[kl_estimator]
            togo += (shaped if t == last else 0.0) - BETA * min(max(kl, -10.0), 10.0)
            advantages[index, t] = togo
    return advantages


@pytest.mark.parametrize("bounds", [None, [-0.15, 0.1]])
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("estimator", ["rloo", "group"])
def test_advantages_per_token_are_openrlhfs(roll_out, estimator, kl_estimator, bounds):
    """Its `group_norm` adds 1e-9 where TRL, and so we, add 1e-4 to the standard deviation."""
    trainer, batch = roll_out(
        advantage_estimator=estimator,
        kl_in_reward=BETA,
        kl_in_reward_level="token",
        kl_in_reward_estimator=kl_estimator,
        reward_clip_range=bounds,
    )
    rewards = trainer._scored["train"][0][:, 1].tolist()
    with torch.no_grad():
        logps, ref_logps = score(trainer.model, batch), score(trainer.ref_model, batch)
    mask = batch["completion_mask"]
    assert mask.sum(dim=1).unique().numel() > 1  # completions of several lengths
    expected = openrlhf_advantages(rewards, logps, ref_logps, mask, estimator, kl_estimator, bounds)
    torch.testing.assert_close(batch["advantages"], expected, rtol=0, atol=2e-6)


def test_what_no_reward_scored_moves_nothing_per_token_either(roll_out):
    trainer, batch = roll_out(
        advantage_estimator="rloo", kl_in_reward=BETA, kl_in_reward_level="token", reward=now_and_then
    )
    moved = (batch["advantages"] != 0).any(dim=1)
    scored = ~trainer._scored["train"][0][:, 1].isnan()
    assert moved.tolist() == scored.tolist() == [index not in (1, 5) and index <= 8 for index in range(16)]


def test_the_kl_of_a_token_is_bounded_per_token_alone(roll_out, monkeypatch):
    monkeypatch.setattr("cfpo_trl.alignment.approximate_kl", lambda logps, *_: torch.full_like(logps, 12.0))
    for level, bound in (("token", 10.0), ("sequence", 12.0)):
        trainer, batch = roll_out(kl_in_reward=BETA, kl_in_reward_level=level)
        lengths = batch["completion_mask"].sum(dim=1)
        assert trainer._metrics["train"]["kl_in_reward/mean"] == [pytest.approx(bound * lengths.float().mean().item())]


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_reference_scores_although_the_loss_has_no_kl(roll_out, level):
    trainer, batch = roll_out(advantage_estimator="rloo", kl_in_reward=BETA, kl_in_reward_level=level)
    assert trainer.ref_model is not None
    assert (trainer.beta, trainer.args.beta) == (0, 0)
    assert "ref_per_token_logps" not in batch
    trainer.compute_loss(trainer.model, batch)
    assert "kl" not in trainer._metrics["train"]


def test_kl_in_the_reward_and_in_the_loss(roll_out):
    trainer, batch = roll_out(advantage_estimator="rloo", kl_in_reward=BETA, beta=0.1)
    assert trainer.beta == 0.1
    trainer.compute_loss(trainer.model, batch)
    assert trainer._metrics["train"]["kl"][0] > 0


def test_group_advantages_with_kl_of_the_sequence(roll_out):
    trainer, batch = roll_out(kl_in_reward=BETA)
    with torch.no_grad():
        kl = (score(trainer.model, batch) - score(trainer.ref_model, batch)) * batch["completion_mask"]
    groups = (trainer._scored["train"][0][:, 1] - BETA * kl.sum(dim=1)).view(-1, K)
    expected = (groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch["advantages"], expected.flatten(), rtol=0, atol=1e-5)


def test_evaluation_with_one_completion_per_prompt(roll_out):
    trainer, batch = roll_out(
        advantage_estimator="rloo", kl_in_reward=BETA, num_generations_eval=1, mode="eval", eval_strategy="no"
    )
    assert batch["advantages"].tolist() == [0] * 16
    assert trainer._metrics["eval"]["kl_in_reward/mean"]


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_one_update_is_reinforce_with_that_advantage(roll_out, level):
    trainer, batch = roll_out(
        advantage_estimator="rloo", kl_in_reward=BETA, kl_in_reward_level=level, loss_type="bnpo", num_iterations=1
    )
    assert "old_per_token_logps" not in batch
    trainer.compute_loss(trainer.model, batch).backward()
    gradients = [parameter.grad.clone() for parameter in trainer.model.parameters()]
    trainer.model.zero_grad()
    advantages = batch["advantages"] if level == "token" else batch["advantages"].unsqueeze(1)
    mask = batch["completion_mask"]
    (-(advantages * score(trainer.model, batch) * mask).sum() / mask.sum()).backward()
    for gradient, parameter in zip(gradients, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss_type", ["grpo", "luspo", "dapo"])
@pytest.mark.parametrize("ratios", ["token", "sequence"])
def test_advantages_per_token_train(build_trainer, start, ratios, loss_type):
    """With stale rollouts, an entropy quantile and the off-policy mask."""
    if loss_type == "luspo" and Version(trl.__version__) < LUSPO_BY_TOKEN:
        pytest.skip("refused")
    trainer = build_trainer(
        CFPOTrainer,
        CFPOConfig,
        model=start,
        advantage_estimator="rloo",
        kl_in_reward=BETA,
        kl_in_reward_level="token",
        importance_sampling_level=ratios,
        loss_type=loss_type,
        num_iterations=2,
        steps_per_generation=2,
        per_device_train_batch_size=8,
        top_entropy_quantile=0.8,
        off_policy_mask_threshold=0.5,
        max_steps=8,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in logs)
    assert all("kl_in_reward/mean" in entry for entry in logs[::4])
    assert logs[-1]["cfpo/tv"] > 0
    assert logs[-1]["cfpo/penalty"] > 0


def test_penalty_of_sequence_ratios_with_advantages_per_token(roll_out):
    trainer, batch = roll_out(importance_sampling_level="sequence", num_iterations=2, loss_type="grpo")
    mask = torch.zeros_like(batch["completion_mask"])
    mask[0, :3], mask[1, :1] = 1, 1
    rows = {name: value[:2] if value.dim() else value for name, value in batch.items()} | {"completion_mask": mask[:2]}
    rows["advantages"] = torch.full(mask[:2].shape, 99.0)
    rows["advantages"][0, :3] = torch.tensor([1.0, -2.0, 0.5])
    rows["advantages"][1, :1] = -1.0
    with torch.no_grad():
        logps, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1),
            torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1),
            mask.size(1),
        )
    rows["old_per_token_logps"] = logps - math.log(1.1)
    trainer.compute_loss(trainer.model, rows)
    trainer.log({})
    logs = trainer.state.log_history[-1]
    assert logs["cfpo/tv"] == pytest.approx(0.05, rel=1e-3)  # over two sequences
    assert logs["cfpo/penalty"] == pytest.approx((1 + 2 + 0.5 + 1) * 0.1**2 / 0.4 / 4, rel=1e-3)  # over four tokens


def test_metrics_where_every_completion_was_cut_off(roll_out):
    trainer, batch = roll_out(importance_sampling_level="sequence", kl_in_reward=BETA, kl_in_reward_level="token")
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    trainer.compute_loss(trainer.model, batch)
    trainer.log({})
    assert "cfpo/tv" not in trainer.state.log_history[-1]


def test_lora_has_its_base_as_the_reference(build_trainer, start):
    from peft import LoraConfig

    trainer = build_trainer(
        CFPOTrainer,
        CFPOConfig,
        model=start,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        advantage_estimator="rloo",
        kl_in_reward=BETA,
        learning_rate=1e-2,
    )
    trainer.train()
    kl = [entry["kl_in_reward/mean"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.ref_model is None
    assert kl[0] == 0
    assert kl[-1] != 0


def test_the_completions_table_has_these_advantages(roll_out):
    trainer, batch = roll_out(advantage_estimator="rloo")
    logged = list(trainer._logs["advantages"])
    assert isinstance(trainer._logs["advantages"], deque)
    assert logged == pytest.approx(batch["advantages"].tolist())


def test_length_metrics_by_hand(build_trainer, prompts):
    """Also that they do not depend on how the completions since the last log were split into batches."""
    trainer = build_trainer(config_class=CFPOConfig)
    trainer.reward_func_names = ["first", "second"]
    lengths = torch.tensor([2.0, 4.0, 6.0, 8.0, 10.0])
    first = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0])
    second = torch.tensor([5.0, math.nan, 5.0, 5.0, 5.0])
    rows = torch.stack([lengths, first, first, second], dim=1)
    trainer._scored["train"] = [rows[:2], rows[2:]]
    trainer.log({})
    logs = trainer.state.log_history[-1]
    assert [logs[f"completions/length_q{q}"] for q in (10, 50, 90)] == pytest.approx([2.8, 6, 9.2])
    assert logs["reward_length/slope"] == pytest.approx(0.4)  # Σxy = 16, Σx² = 40
    assert logs["reward_length/correlation"] == pytest.approx(0.8)  # Σy² = 10
    assert logs["rewards/first/length_correlation"] == pytest.approx(0.8)
    assert logs["rewards/second/length_slope"] == 0
    assert "rewards/second/length_correlation" not in logs  # all equal
    trainer.log({})
    assert "reward_length/slope" not in trainer.state.log_history[-1]


def test_length_metrics_of_a_real_run(build_trainer, prompts):
    trainer = build_trainer(
        config_class=CFPOConfig, eval_dataset=prompts.select(range(16)), per_device_eval_batch_size=8, max_steps=2
    )
    trainer.train()
    evaluated = trainer.evaluate()
    trained = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert -1 <= trained["reward_length/correlation"] <= 1
    assert trained["completions/length_q10"] <= trained["completions/length_q50"] <= trained["completions/length_q90"]
    assert trained["completions/length_q90"] <= trained["completions/max_length"]
    assert "rewards/early_letters/length_slope" not in trained  # one reward is the reward
    assert {**evaluated, **trainer.state.log_history[-1]}["eval_completions/length_q50"] > 0
