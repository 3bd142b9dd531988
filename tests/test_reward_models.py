"""Reward models as rewards, and their training: scores against the textbook, and every refusal."""

import json
import logging
import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from cfpo_trl import grpo, reward_training
from cfpo_trl.rewards import load_reward
from cfpo_trl.rewards.model import RewardModel, unsharded
from cfpo_trl.rewards.scores import RewardError
from cfpo_trl.tiny.model import build_model, build_reward_model, build_tokenizer
from conftest import LETTERS

TEMPLATE = "{% for message in messages %}{{ message.role[0] }}{{ message.content }}{{ eos_token }}{% endfor %}"
PROMPTS = ["ab", "c", "def", "g"]
COMPLETIONS = ["abcdefghij", "", "aj", "hhhhh"]
OPTIONS = ["--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]


@pytest.fixture
def tokenizer():
    return build_tokenizer(LETTERS + "u")


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A saved reward model without mean, std and chat template."""
    build_reward_model(tokenizer).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


def textbook(folder, ids):
    """The score of one sequence: the output at its last token."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0].item()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_of_texts(folder, tokenizer, batch_size):
    expected = [
        textbook(folder, [*tokenizer(prompt + completion).input_ids, tokenizer.eos_token_id])
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    reward = load_reward(str(folder), {"batch_size": batch_size})
    assert reward.__name__ == "reward"
    assert reward(prompts=PROMPTS, completions=COMPLETIONS, solution=None) == pytest.approx(expected, abs=1e-5)
    assert reward(prompts=[], completions=[]) == []


def test_scores_of_conversations_by_the_models_own_template(folder, tokenizer):
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    eos = tokenizer.eos_token_id
    expected = [
        textbook(folder, [*tokenizer("u" + prompt).input_ids, eos, *tokenizer("a" + completion).input_ids, eos])
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    completions = [[{"role": "assistant", "content": completion}] for completion in COMPLETIONS]
    assert RewardModel(str(folder))(prompts, completions) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("conversational", [False, True])
def test_reads_what_trls_reward_trainer_trains_on(folder, tokenizer, tmp_path, conversational):
    row = {"prompt": "abc", "chosen": "de", "rejected": "f"}
    if conversational:
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        row = {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}
    args = RewardConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none")
    trainer = RewardTrainer(str(folder), args, train_dataset=Dataset.from_list([row]))
    reward = RewardModel(str(folder))
    for side in ("chosen", "rejected"):
        assert reward.tokenize(row["prompt"], row[side]) == trainer.train_dataset[0][f"{side}_ids"]


def test_normalised_and_clipped(folder):
    raw = RewardModel(str(folder))(PROMPTS, COMPLETIONS)
    with pytest.raises(ValueError, match=r"normalize=True needs `mean` and `std` in the config.json of .*"):
        RewardModel(str(folder), normalize=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mean": 0.5, "std": 2.0}))
    normalised = RewardModel(str(folder), normalize=True)(PROMPTS, COMPLETIONS)
    assert normalised == pytest.approx([(score - 0.5) / 2 for score in raw], abs=1e-6)
    low, high = sorted(normalised)[1:3]
    clipped = RewardModel(str(folder), normalize=True, clip=[low, high])(PROMPTS, COMPLETIONS)
    assert clipped == [min(max(score, low), high) for score in normalised]
    assert sorted(clipped)[0] == low < high


def test_longer_sequences_lose_their_end_and_a_warning_says_so(folder, tokenizer, caplog):
    reward = RewardModel(str(folder), max_length=5)
    with caplog.at_level(logging.WARNING):
        scores = reward(PROMPTS, COMPLETIONS)
    assert "3 of 4 sequences cut to 5 tokens" in caplog.text
    assert scores[0] == pytest.approx(textbook(folder, tokenizer("ababc").input_ids), abs=1e-5)
    assert RewardModel(str(folder)).max_length == 512  # the model's


def test_a_config_without_padding_takes_the_tokenizers(folder):
    expected = RewardModel(str(folder))(PROMPTS, COMPLETIONS)
    config = json.loads((folder / "config.json").read_text())
    assert config["pad_token_id"] == 0
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    assert RewardModel(str(folder))(PROMPTS, COMPLETIONS) == expected


def test_a_tokenizer_without_padding(folder, tokenizer, monkeypatch):
    """Its end-of-sequence token pads; the model then reads the token before it, in RewardTrainer as here."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    tokenizer.pad_token = None
    monkeypatch.setattr("cfpo_trl.rewards.model.AutoTokenizer.from_pretrained", lambda *_, **__: tokenizer)
    expected = [
        textbook(folder, tokenizer(prompt + completion).input_ids)
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    assert RewardModel(str(folder))(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)


def test_refusals(folder, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"reward_funcs has .*missing', which cannot be loaded as a model"):
        load_reward(str(tmp_path / "missing"))
    build_model(tokenizer, hidden_size=32, layers=1).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"has 2 outputs; a reward model has one \(num_labels=1\)"):
        load_reward(str(tmp_path / "policy"))
    with pytest.raises(ValueError, match=r"reward_parameters of .*: .*unexpected keyword argument 'lenght'"):
        load_reward(str(folder), {"lenght": 3})
    conversation = [{"role": "user", "content": "a"}]
    with pytest.raises(RewardError, match="has no chat template, and the completions are conversations"):
        load_reward(str(folder))([conversation], [conversation])


def test_a_score_that_is_not_finite(folder):
    reward = RewardModel(str(folder))
    reward.model.score.weight.data[0, 0] = math.nan
    with pytest.raises(RewardError, match=r"Reward model .* gave 4 of 4 rewards that are not finite, the first nan"):
        reward(PROMPTS, COMPLETIONS)


def test_loads_whole_where_fsdp_would_load_it_on_the_first_process_alone(monkeypatch):
    from transformers.distributed import fsdp

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(fsdp, "_is_torch_distributed_initialized", lambda: True)
    assert fsdp.is_fsdp_enabled()
    with unsharded():
        assert not fsdp.is_fsdp_enabled()
    assert fsdp.is_fsdp_enabled()


@pytest.fixture
def preferences(tokenizer, tmp_path):
    """Pairs of words of which the one with more letters from the alphabet's first half is preferred, and a start."""
    generator = torch.Generator().manual_seed(0)

    def word():
        size = int(torch.randint(2, 6, (1,), generator=generator))
        return "".join(LETTERS[i] for i in torch.randint(10, (size,), generator=generator))

    def early(text):
        return sum(letter in LETTERS[:5] for letter in text) / len(text)

    rows = []
    while len(rows) < 400:
        prompt, worse, better = word(), *sorted((word(), word()), key=early)
        if early(worse) < early(better):
            rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
    folder = tmp_path / "preferences"
    folder.mkdir()
    for split, part in (("train", rows[100:]), ("test", rows[:100])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    build_model(tokenizer, hidden_size=32, layers=2).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    return folder


def train_reward_model(preferences, name, *options):
    output = preferences.parent / name
    start = ["--model_name_or_path", str(preferences.parent / "start"), "--dtype", "float32"]
    schedule = ["--learning_rate", "5e-3", "--per_device_train_batch_size", "32", "--gradient_checkpointing", "false"]
    options = [*start, "--dataset_name", str(preferences), "--output_dir", str(output), *schedule, *OPTIONS, *options]
    reward_training.main(options)
    return output


@pytest.mark.parametrize("options", [(), ("--use_peft", "true", "--lora_r", "8", "--max_steps", "60")])
def test_a_reward_model_learns_preferences(preferences, capsys, options):
    output = train_reward_model(preferences, "out", "--max_steps", "40", "--save_strategy", "no", *options)
    pairs = [json.loads(line) for line in (preferences / "test.jsonl").read_text().splitlines()]
    reward = load_reward(str(output))
    chosen, rejected = ([*reward([p["prompt"] for p in pairs], [p[s] for p in pairs])] for s in ("chosen", "rejected"))
    accuracy = sum(better > worse for better, worse in zip(chosen, rejected, strict=True)) / 100
    assert accuracy > 0.85
    assert f"accuracy: {accuracy:.3f}" in capsys.readouterr().out
    scores = torch.tensor(chosen + rejected)
    config = json.loads((output / "config.json").read_text())
    assert config["mean"] == pytest.approx(scores.mean().item(), abs=1e-4)
    assert config["std"] == pytest.approx(scores.std(unbiased=False).item(), abs=1e-4)
    normalised = torch.tensor(
        load_reward(str(output), {"normalize": True})([p["prompt"] for p in pairs], [p["chosen"] for p in pairs])
    )
    torch.testing.assert_close(normalised, (torch.tensor(chosen) - config["mean"]) / config["std"])


@pytest.mark.parametrize("options", [(), ("--use_peft", "true")])
def test_what_is_pushed_is_what_was_measured(preferences, monkeypatch, options):
    pushed = []

    def init_hf_repo(trainer, token=None):
        trainer.hub_model_id = "someone/model"

    def upload_folder(api, *, repo_id, folder_path, ignore_patterns):
        pushed.append((repo_id, sorted(path.name for path in folder_path.iterdir()), load_reward(str(folder_path))))

    monkeypatch.setattr(RewardTrainer, "init_hf_repo", init_hf_repo)
    monkeypatch.setattr("cfpo_trl.reward_training.HfApi.upload_folder", upload_folder)
    push = ["--push_to_hub", "true", "--max_steps", "4", "--save_strategy", "no", *options]
    output = train_reward_model(preferences, "out", *push)
    ((repository, files, reward),) = pushed
    assert repository == "someone/model"
    assert "config.json" in files
    assert not any(name.startswith("adapter") for name in files)
    assert load_reward(str(output), {"normalize": True}).std > 0
    assert load_reward(str(output))(PROMPTS, COMPLETIONS) == reward(PROMPTS, COMPLETIONS)


def test_pairs_that_training_leaves_out_do_not_count(preferences, capsys):
    train_reward_model(preferences, "out", "--max_steps", "40", "--save_strategy", "no", "--max_length", "9")
    pairs = [json.loads(line) for line in (preferences / "test.jsonl").read_text().splitlines()]
    kept = [p for p in pairs if max(len(p["prompt"] + p[side]) + 1 for side in ("chosen", "rejected")) <= 9]
    assert 10 < len(kept) < 100
    reward = load_reward(str(preferences.parent / "out"))
    better, worse = (reward([p["prompt"] for p in kept], [p[side] for p in kept]) for side in ("chosen", "rejected"))
    accuracy = sum(a > b for a, b in zip(better, worse, strict=True)) / len(kept)
    assert f"accuracy: {accuracy:.3f}" in capsys.readouterr().out


def test_nothing_to_measure_on_is_said(preferences):
    long = {"prompt": "a" * 20, "chosen": "b", "rejected": "c"}
    (preferences / "test.jsonl").write_text(json.dumps(long) + "\n")
    with pytest.raises(ValueError, match="All 1 pairs to measure the reward model on are longer than its 15 tokens"):
        train_reward_model(preferences, "out", "--max_steps", "2", "--save_strategy", "no", "--max_length", "15")


def test_a_finished_reward_training_stays_and_another_is_refused(preferences, capsys):
    options = ["--max_steps", "2", "--save_strategy", "no"]
    output = train_reward_model(preferences, "out", *options)
    before = (output / "model.safetensors").stat().st_mtime_ns
    train_reward_model(preferences, "out", *options)
    assert "holds a finished run of 2 steps with this recipe" in capsys.readouterr().out
    assert (output / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"another recipe \(max_steps: 2 -> 3\)"):
        train_reward_model(preferences, "out", "--save_strategy", "no", "--max_steps", "3")


def test_a_resumed_reward_training_equals_an_uninterrupted_one(preferences, caplog):
    whole = train_reward_model(preferences, "whole", "--max_steps", "6", "--save_steps", "3")
    half = preferences.parent / "half"
    (whole / "checkpoint-3").rename(preferences.parent / "checkpoint-3")
    half.mkdir()
    (preferences.parent / "checkpoint-3").rename(half / "checkpoint-3")
    with caplog.at_level(logging.INFO):
        resumed = train_reward_model(preferences, "half", "--max_steps", "6", "--save_steps", "3")
    assert "half/checkpoint-3; for a fresh start" in caplog.text
    assert load_reward(str(resumed))(PROMPTS, COMPLETIONS) == load_reward(str(whole))(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "has no column rejected; it has prompt, chosen. Preferences have"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "1 of 300 rows have no chosen or no rejected text"),
    ],
)
def test_bad_preferences_are_refused_before_the_model_is_loaded(preferences, row, message):
    rows = [row] + [row | {"rejected": "c"} if "rejected" in row else row] * 299
    for split in ("train", "test"):
        (preferences / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        train_reward_model(preferences, "out", "--model_name_or_path", "no/such-model")


def test_several_models_and_a_function_weighted_in_one_run(preferences, folder, tmp_path):
    """The script's whole way: names in the recipe, parameters, weights, and the metrics of each."""
    second = tmp_path / "second"
    tokenizer = build_tokenizer(LETTERS)
    build_reward_model(tokenizer, seed=1).save_pretrained(second)
    tokenizer.save_pretrained(second)
    recipe = f"""
model_name_or_path: {tmp_path}/start
dtype: float32
dataset_name: {preferences}
reward_funcs: [{folder}, {second}, conftest.early_letters]
reward_weights: [1.0, -0.5, 2.0]
reward_parameters: {{{second}: {{clip: [-1.0, 1.0]}}}}
advantage_estimator: rloo
kl_in_reward: 0.1
kl_in_reward_level: token
per_device_train_batch_size: 16
num_generations: 8
max_completion_length: 4
max_steps: 2
logging_steps: 1
output_dir: {tmp_path}/rlhf
save_strategy: "no"
"""
    (tmp_path / "recipe.yaml").write_text(recipe)
    for objective in ("cfpo", "grpo"):
        output = tmp_path / objective
        arguments = ["--config", str(tmp_path / "recipe.yaml"), "--objective", objective, "--output_dir", str(output)]
        grpo.main([*arguments, *OPTIONS])
        logs = [e for e in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in e]
        for entry in logs:
            first, clipped, early = (entry[f"rewards/{name}/mean"] for name in ("reward", "second", "early_letters"))
            assert entry["reward"] == pytest.approx(first - 0.5 * clipped + 2 * early, abs=1e-5)
            assert abs(clipped) <= 1
        assert logs[1]["kl_in_reward/mean"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["cfpo", "grpo"])
def test_from_preferences_to_a_policy_that_they_prefer(preferences, objective, tmp_path):
    """The two commands of docs/alignment.md: the score rises by more than its spread, and what it stands for, too."""
    model = train_reward_model(preferences, "reward_model", "--max_steps", "60", "--save_strategy", "no")
    recipe = f"""
objective: {objective}
model_name_or_path: {tmp_path}/start
dtype: float32
dataset_name: {preferences}
reward_funcs: [{model}, conftest.early_letters]
reward_weights: [1.0, 0.0]
reward_parameters: {{{model}: {{normalize: true}}}}
advantage_estimator: rloo
kl_in_reward: 0.01
kl_in_reward_level: token
per_device_train_batch_size: 64
num_generations: 8
num_iterations: 2
max_completion_length: 6
learning_rate: 3.0e-3
lr_scheduler_type: constant
max_steps: 80
logging_steps: 2
output_dir: {tmp_path}/rlhf
save_strategy: "no"
"""
    (tmp_path / "recipe.yaml").write_text(recipe)
    grpo.main(["--config", str(tmp_path / "recipe.yaml"), *OPTIONS])
    logs = json.loads((tmp_path / "rlhf" / "trainer_state.json").read_text())["log_history"]
    first, last = ([entry for entry in logs if "loss" in entry][index] for index in (0, -1))
    assert last["reward"] - first["reward"] > 1
    assert last["rewards/early_letters/mean"] - first["rewards/early_letters/mean"] > 0.2
    assert last["kl_in_reward/mean"] > 0.1
