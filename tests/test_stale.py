"""Rollouts of an exact age: which policy wrote them, and that each is trained once."""

import pytest
import torch

from cfpo_trl import CFPOConfig
from cfpo_trl.studies.objectives import trainer_of
from cfpo_trl.studies.plan import expand
from cfpo_trl.studies.stale import stale


@pytest.mark.parametrize("objective", ["cfpo", "grpo", "drpo-0.1"])
@pytest.mark.parametrize("age", [0, 1, 4])
def test_each_batch_is_trained_once_by_the_policy_that_is_so_many_updates_newer(build_trainer, objective, age):
    options = {"max_steps": age + 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    trainer = build_trainer(stale(trainer_of(objective), age), CFPOConfig, **options)
    policies, trained, original = [], [], trainer.compute_loss

    def watch(model, inputs, *arguments, **keywords):
        policies.append({name: param.detach().clone() for name, param in model.named_parameters()})
        if inputs["advantages"].any():
            trained.append(
                (len(policies) - 1, {key: value for key, value in inputs.items() if torch.is_tensor(value)})
            )
        return original(model, inputs, *arguments, **keywords)

    trainer.compute_loss = watch
    trainer.train()
    assert [step for step, _ in trained] == list(range(age, age + 4))
    for name, param in policies[age].items():
        assert torch.equal(param, policies[0][name])  # nothing changed before
    assert len({batch["completion_ids"].data_ptr() for _, batch in trained}) == 4
    for step, batch in trained:
        if age == 0 and "old_per_token_logps" not in batch:
            continue
        trainer.model.load_state_dict(policies[step - age], strict=False)
        with torch.no_grad():
            logps = trainer._policy_logps(batch, "train")
        counted = batch["completion_mask"].bool()
        assert torch.allclose(logps[counted], batch["old_per_token_logps"][counted], atol=1e-5)
    logged = [entry["cfpo/tv"] for entry in trainer.state.log_history if "cfpo/tv" in entry]
    assert max(logged[: age + 1]) < 1e-6
    assert (logged[-1] > 1e-3) == (age > 0)


def study(tmp_path, **recipe):
    grid = {"objective": "cfpo", "staleness": [0, 2], "seed": 0}
    base = {"output": str(tmp_path), "recipe": recipe, "rollout_batches": 4, "evaluations": 2}
    return base | {"parts": {"stale": {"question": "?", "grid": grid}}}


def test_in_a_study_it_is_an_option_that_the_script_does_not_see(tmp_path):
    runs = expand(study(tmp_path))
    assert [run.recipe["staleness"] for run in runs] == [0, 2]
    assert all("staleness" not in run.script_recipe for run in runs)
    assert len({run.folder for run in runs}) == 2


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"num_iterations": 2}, "with staleness=2 a batch of rollouts is for one update"),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2}, "the 2 of gradient_accumulation_steps"),
    ],
)
def test_a_batch_that_would_be_trained_twice_is_refused(tmp_path, recipe, message):
    with pytest.raises(ValueError, match=message):
        expand(study(tmp_path, **recipe))
