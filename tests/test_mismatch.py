"""Rollouts of another arithmetic: who wrote them, and by whose probabilities the ratio is measured."""

import copy

import pytest
import torch

from cfpo_trl import CFPOConfig
from cfpo_trl.studies.mismatch import mismatched
from cfpo_trl.studies.objectives import trainer_of
from cfpo_trl.studies.plan import expand
from cfpo_trl.studies.stale import stale
from cfpo_trl.tiny.model import build_model


def trained(build_trainer, dtype, age=0, objective="cfpo", **options):
    """A trainer after its updates, the weights before each of them, and their batches."""
    trainer = build_trainer(
        stale(mismatched(trainer_of(objective), dtype), age), CFPOConfig, learning_rate=1e-2, **options
    )
    policies, batches, original = [], [], trainer.compute_loss

    def watch(model, inputs, *arguments, **keywords):
        policies.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        batches.append({key: value for key, value in inputs.items() if torch.is_tensor(value)})
        return original(model, inputs, *arguments, **keywords)

    trainer.compute_loss = watch
    trainer.train()
    return trainer, policies, batches


@pytest.mark.parametrize("objective", ["cfpo", "grpo", "drpo-0.1"])
@pytest.mark.parametrize("age", [0, 2])
def test_the_old_log_probs_are_those_of_the_weights_in_bfloat16(build_trainer, tokenizer, objective, age):
    fresh = build_model(tokenizer, hidden_size=32, layers=2)  # not one that TRL has patched
    trainer, policies, batches = trained(build_trainer, "bfloat16", age, objective)
    for step in range(age, len(batches)):
        batch, writer = batches[step], copy.deepcopy(fresh)
        writer.load_state_dict(policies[step - age], strict=False)
        tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        length = batch["completion_ids"].shape[1]
        counted, found = batch["completion_mask"].bool(), {}
        for dtype in (torch.bfloat16, torch.float32):
            with torch.no_grad():
                logits = writer.to(dtype)(input_ids=tokens, attention_mask=mask).logits[:, -length - 1 : -1].float()
            logps = logits.log_softmax(-1).gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
            found[dtype] = (logps - batch["old_per_token_logps"])[counted].abs().max()
        assert found[torch.bfloat16] < 0.02  # of bf16 itself, where padding is other
        if step == age:
            assert trainer.state.log_history[step]["cfpo/ratio_max"] > 1.0005
            assert found[torch.float32] > 5e-4


def test_they_are_written_in_bfloat16_and_evaluations_are_not(build_trainer, prompts, monkeypatch):
    trainer = build_trainer(
        mismatched(trainer_of("cfpo"), "bfloat16"),
        CFPOConfig,
        eval_dataset=prompts.select(range(16)),
        num_generations_eval=1,
        max_steps=2,
    )
    writers, generate = [], type(trainer.model).generate

    def watch(model, *arguments, **keywords):
        writers.append((model.dtype, trainer.model.training))
        return generate(model, *arguments, **keywords)

    monkeypatch.setattr(type(trainer.model), "generate", watch)
    trainer.train()
    assert writers == [(torch.bfloat16, True)] * 2
    trainer.evaluate()
    assert set(writers[2:]) == {(torch.float32, False)}
    assert trainer.model.dtype == torch.float32


def test_in_the_policys_own_dtype_nothing_is_off(build_trainer):
    trainer, *_ = trained(build_trainer, "float32", num_iterations=1)
    logged = [entry["cfpo/tv"] for entry in trainer.state.log_history if "cfpo/tv" in entry]
    assert max(logged) < 1e-6


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"rollout_dtype": "int8"}, "rollout_dtype='int8' is unknown; use one of bfloat16, float16, float32"),
        ({"rollout_dtype": "bfloat16", "use_vllm": True}, "with use_vllm the engine's dtype is its own"),
    ],
)
def test_what_cannot_be_written_so_is_refused(tmp_path, cell, message):
    part = {"question": "?", "grid": {"objective": "cfpo", "seed": 0} | cell}
    study = {"output": str(tmp_path), "recipe": {}, "rollout_batches": 4, "evaluations": 2, "parts": {"one": part}}
    with pytest.raises(ValueError, match=message):
        expand(study)
