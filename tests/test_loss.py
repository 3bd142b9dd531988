"""CFPOTrainer's loss and gradient in fp64, against our own reference and against TRL's code with one line changed.

The second runs on several TRL versions: see test_trl_versions.py.
"""

import dataclasses
import inspect
import itertools
import sys
import textwrap

import pytest
import torch
import trl
from packaging.version import Version
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer

from cfpo_trl.config import LUSPO_BY_TOKEN

PADDED_LUSPO = Version(trl.__version__) < LUSPO_BY_TOKEN
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"]
LEVELS = ["token", "sequence"]
KL = [{"beta": 0.0}, {"beta": 0.3}, {"beta": 0.3, "use_bias_correction_kl": True}]
OLD_LOGPS = [True, False]
EXTRAS = [
    {},
    {"epsilon_high": 0.35},
    {"top_entropy_quantile": 0.4},
    {"off_policy_mask_threshold": 0.05},
    {"use_vllm": True},
    {"tool_mask": True},
    {"entropy_coef": 0.1},
    {"eval": True},
    {"per_token_advantages": True},
]
GRID = [{**kl, "old_logps": old_logps, **extra} for kl, old_logps, extra in itertools.product(KL, OLD_LOGPS, EXTRAS)]
EPSILON = 0.15
TEMPERATURE = 0.9
PROMPT, COMPLETION, BATCH = 3, 7, 6
STEPS_PER_GENERATION, ACCUMULATION = 4, 2


def make_batch(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random rollouts with padding on both sides, ratios well off 1, advantages of both signs and 0."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([7, 5, 6, 2, 7, 4]).unsqueeze(1)
    batch = {
        "prompt_ids": torch.randint(2, 12, (BATCH, PROMPT), generator=generator),
        "prompt_mask": (torch.arange(PROMPT) >= torch.tensor([0, 1, 0, 2, 0, 0]).unsqueeze(1)).long(),
        "completion_ids": torch.randint(2, 12, (BATCH, COMPLETION), generator=generator),
        "completion_mask": (torch.arange(COMPLETION) < lengths).long(),
        "advantages": torch.tensor([1.3, -0.7, 0.0, -2.0, 0.4, 0.9], dtype=torch.float64),
        "num_items_in_batch": torch.tensor(90),
    }
    with torch.no_grad():
        logps, _ = score(model, batch)
    batch["old_per_token_logps"] = logps + 0.4 * noise(BATCH, COMPLETION)
    batch["ref_per_token_logps"] = logps + 0.4 * noise(BATCH, COMPLETION)
    batch["sampling_per_token_logps"] = logps + 0.4 * noise(BATCH, COMPLETION)
    batch["importance_sampling_ratio"] = (0.2 * noise(BATCH, COMPLETION)).exp()
    return batch


def choose(batch: dict, case: dict) -> dict:
    """The tensors that this case's options use."""
    batch = dict(batch)
    if not case["old_logps"]:
        del batch["old_per_token_logps"]
    if case.get("tool_mask"):
        batch["tool_mask"] = (torch.arange(COMPLETION) % 3 != 1).long().expand(BATCH, -1)
    if case.get("per_token_advantages"):
        batch["advantages"] = batch["advantages"].unsqueeze(1) * torch.linspace(1.5, -0.5, COMPLETION).double()
    return batch


def score(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the completion's tokens and entropies, `(B, T)`, by the textbook."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, PROMPT - 1 : -1] / TEMPERATURE
    distribution = torch.distributions.Categorical(logits=logits)
    return distribution.log_prob(batch["completion_ids"]), distribution.entropy()


def reference_loss(model: torch.nn.Module, batch: dict, case: dict, loss_type: str, level: str) -> torch.Tensor:
    """CFPO's loss from the formulas of the papers that TRL's options cite; shares no code with TRL or cfpo_trl."""
    logps, entropies = score(model, batch)
    mask = batch["completion_mask"].double() * batch.get("tool_mask", torch.tensor(1.0))
    old = batch.get("old_per_token_logps", logps.detach())
    log_ratio = logps - old
    if level == "sequence":  # GSPO: the geometric mean over the sequence
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1)).unsqueeze(1)
    ratio = log_ratio.exp()
    advantages = batch["advantages"] if batch["advantages"].dim() == 2 else batch["advantages"].unsqueeze(1)
    high = case.get("epsilon_high", EPSILON)
    width = torch.full_like(ratio, high)
    width[ratio < 1] = EPSILON
    loss = -(ratio * advantages - advantages.abs() / (2 * width) * (ratio - 1) ** 2)

    active = mask
    if "off_policy_mask_threshold" in case:  # DeepSeek-V3.2, equation 9
        drift = ((batch["sampling_per_token_logps"] - logps.detach()) * mask).sum(1) / mask.sum(1)
        drop = (advantages < 0) & (drift > case["off_policy_mask_threshold"]).unsqueeze(1)
        loss = loss * (~drop).double()
    if "top_entropy_quantile" in case:
        counted = entropies[mask.bool()].float()
        threshold = torch.quantile(counted, 1 - case["top_entropy_quantile"])
        active = mask * (entropies >= threshold).double()
        loss = loss * (entropies >= threshold).double()
    if case.get("use_vllm"):
        loss = loss * batch["importance_sampling_ratio"]
    if case["beta"]:
        gap = batch["ref_per_token_logps"] - logps
        kl = gap.exp() - gap - 1
        loss = loss + case["beta"] * (kl * ratio if case.get("use_bias_correction_kl") else kl)

    loss = loss.expand_as(mask) * mask
    accumulation = 1 if case.get("eval") else ACCUMULATION
    if loss_type == "grpo":
        total = (loss.sum(1) / mask.sum(1)).mean() / accumulation
    elif loss_type == "bnpo":
        total = loss.sum() / mask.sum() / accumulation
    elif loss_type == "dr_grpo":
        total = loss.sum() / (BATCH * COMPLETION) / accumulation
    elif loss_type == "luspo":
        total = loss.sum(1).mean() / accumulation
    else:
        windows = 1 if case.get("eval") else STEPS_PER_GENERATION / ACCUMULATION
        total = loss.sum() / (batch["num_items_in_batch"] / windows)
    if "entropy_coef" in case:
        total = total - case["entropy_coef"] * (entropies * active).sum() / active.sum() / accumulation
    return total


def build_oracle():
    """TRL's own `_compute_loss` with its clip line replaced."""
    source = textwrap.dedent(inspect.getsource(GRPOTrainer._compute_loss))
    clip = "torch.clamp(coef_1, 1 - self.epsilon_low, 1 + self.epsilon_high)"
    assert source.count(clip) == 1
    source = source.replace(clip, "quadratic(coef_1, advantages, self.epsilon_low, self.epsilon_high)")

    def quadratic(ratio, advantages, low, high):
        widths = low * (ratio < 1).to(ratio.dtype) + high * (ratio >= 1).to(ratio.dtype)
        return ratio - torch.sign(advantages) * (ratio - 1) ** 2 / (2 * widths)

    namespace = {**vars(sys.modules[GRPOTrainer.__module__]), "quadratic": quadratic}
    exec(compile(source, "oracle", "exec"), namespace)
    return namespace["_compute_loss"]


def score_in_fp64(trainer) -> None:
    """Lets the trainer read fp64 scores of its model: TRL's chunked LM head returns fp32, which would hide errors."""
    original = trainer._get_per_token_logps_and_entropies

    def scored(model, input_ids, attention_mask, *arguments, **keywords):
        _, _, *aux_loss = original(model, input_ids, attention_mask, *arguments, **keywords)
        (prompt_ids, completion_ids), (prompt_mask, completion_mask) = (
            tensor.split([PROMPT, COMPLETION], dim=1) for tensor in (input_ids, attention_mask)
        )
        batch = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
        return *score(model, batch | {"completion_ids": completion_ids, "completion_mask": completion_mask}), *aux_loss

    trainer._get_per_token_logps_and_entropies = scored


@pytest.fixture
def trainer(build_trainer):
    trainer = build_trainer(
        dtype=torch.float64,
        per_device_train_batch_size=BATCH,
        num_generations=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        steps_per_generation=STEPS_PER_GENERATION,
        max_completion_length=COMPLETION,
        temperature=TEMPERATURE,
        epsilon=EPSILON,
    )
    score_in_fp64(trainer)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(3)  # peaked distributions, so that quantiles and ratios differ between tokens
    return trainer


def configure(trainer, case: dict, loss_type: str, level: str) -> None:
    """Sets the trainer to one case; an option is where TRL reads it, on the trainer or its arguments."""
    options = {"top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False, "entropy_coef": 0.0}
    options |= {"epsilon_high": EPSILON, "use_bias_correction_kl": False}
    options |= {name: value for name, value in case.items() if name in {*options, "beta"}}
    options |= {"loss_type": loss_type, "importance_sampling_level": level}
    for name, value in options.items():
        setattr(trainer, name, value)
        setattr(trainer.args, name, value)
    trainer._entropy_bonus_enabled = options["entropy_coef"] != 0
    trainer.current_gradient_accumulation_steps = ACCUMULATION
    trainer.model.train(not case.get("eval", False))


def value_and_gradient(loss: torch.Tensor, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def worst_errors(trainer, batch, loss_type: str, level: str, expected_loss) -> tuple[float, float]:
    """Worst relative errors of value and gradient over the grid, against `expected_loss(batch, case)`."""
    worst = torch.zeros(2, dtype=torch.float64)
    grid = [case for case in GRID if not (PADDED_LUSPO and loss_type == "luspo" and "per_token_advantages" in case)]
    for case in grid:
        configure(trainer, case, loss_type, level)
        inputs = choose(batch, case)
        actual = value_and_gradient(trainer.compute_loss(trainer.model, inputs), trainer.model)
        expected = value_and_gradient(expected_loss(inputs, case), trainer.model)
        errors = [(a - e).norm() / e.norm() for a, e in zip(actual, expected, strict=True)]
        assert max(errors) < 1e-9, f"{loss_type}, {level}, {case}: {errors}"
        worst = torch.maximum(worst, torch.stack(errors))
    print(f"{len(grid)} configurations of {loss_type}, {level}: worst relative errors {worst.tolist()}")
    return tuple(worst.tolist())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_against_an_independent_reference(trainer, loss_type, level, record_property):
    batch = make_batch(trainer.model)
    errors = worst_errors(
        trainer, batch, loss_type, level, lambda b, case: reference_loss(trainer.model, b, case, loss_type, level)
    )
    record_property("errors", errors)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_oracle_trl_with_its_clip_line_replaced(trainer, loss_type, level):
    if PADDED_LUSPO and (loss_type, level) == ("luspo", "token"):
        pytest.skip("this TRL averages padding into luspo with a loss per token, and CFPO does not penalise padding")
    oracle = build_oracle()
    batch = make_batch(trainer.model)
    worst_errors(trainer, batch, loss_type, level, lambda b, case: oracle(trainer, trainer.model, b))


@pytest.mark.skipif(
    "router_aux_loss_coef" not in {field.name for field in dataclasses.fields(GRPOConfig)},
    reason="this TRL has no auxiliary MoE loss",
)
def test_oracle_with_the_auxiliary_loss_of_a_mixture_of_experts(build_trainer, tokenizer):
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        experts_implementation="eager",  # the grouped kernel has no fp64
    )
    trainer = build_trainer(
        model=Qwen2MoeForCausalLM(config).double(),
        router_aux_loss_coef=0.3,
        temperature=TEMPERATURE,
        steps_per_generation=STEPS_PER_GENERATION,
        max_completion_length=COMPLETION,
    )
    score_in_fp64(trainer)
    case = {"beta": 0.0, "old_logps": True}
    batch = choose(make_batch(trainer.model), case)
    configure(trainer, case, "grpo", "token")
    actual = value_and_gradient(trainer.compute_loss(trainer.model, batch), trainer.model)
    expected = value_and_gradient(build_oracle()(trainer, trainer.model, batch), trainer.model)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() / e.norm() < 1e-9
    trainer.router_aux_loss_coef = 0.0
    assert (trainer.compute_loss(trainer.model, batch) - actual[0]).abs() > 1e-3  # the auxiliary loss was in it
