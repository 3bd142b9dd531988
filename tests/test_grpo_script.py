"""The training script: objectives, overrides, refusals."""

import json
import signal

import pytest
from safetensors.torch import load_file

from cfpo_trl import grpo
from conftest import LETTERS
from tiny_model import build_model, build_tokenizer


@pytest.fixture
def recipe(tmp_path):
    """A recipe for two steps on a tiny model, in a folder of its own."""
    tokenizer = build_tokenizer(LETTERS)
    build_model(tokenizer, hidden_size=32, layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [{"prompt": letter, "solution": letter} for letter in LETTERS]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
model_name_or_path: {tmp_path}/model
dtype: float32
dataset_name: {tmp_path}/data
reward_funcs: [exact_match]
per_device_train_batch_size: 16
num_generations: 8
max_completion_length: 3
learning_rate: 1.0e-2
num_iterations: 2
max_steps: 4
bf16: false
use_cpu: true
output_dir: {tmp_path}/cfpo
logging_steps: 1
save_strategy: "no"
"""
    )
    return path


def test_one_recipe_trains_both_objectives(recipe, tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    grpo.main(["--config", str(recipe)])
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    grpo.main(["--config", str(recipe), "--objective", "grpo", "--output_dir", str(tmp_path / "grpo")])
    logs = {
        name: json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        for name in ("cfpo", "grpo")
    }
    assert logs["cfpo"][0]["loss"] == logs["grpo"][0]["loss"]
    assert "cfpo/tv" in logs["cfpo"][1]
    assert "cfpo/tv" not in logs["grpo"][1]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("cfpo", "grpo")]
    assert weights[0].keys() == weights[1].keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss_type", "sapo"], "loss_type='sapo' has no clip to replace"),
        (["--reward_funcs", "bleu"], "reward_funcs has 'bleu', which is no reward: use some of accuracy"),
    ],
)
def test_refused(recipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        grpo.main(["--config", str(recipe), *arguments])


def test_unknown_objective_in_yaml(recipe):
    recipe.write_text(recipe.read_text() + "objective: ppo\n")
    with pytest.raises(ValueError, match="objective='ppo' is unknown; use one of cfpo, grpo"):
        grpo.main(["--config", str(recipe)])
