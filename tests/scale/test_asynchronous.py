"""A recipe with `rollouts: async`: the script, the real rollout process and a real vLLM server, on a CPU."""

import json
import os
import random
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
import requests
import torch
import yaml
from transformers import AutoModelForCausalLM
from trl.experimental.async_grpo.vllm_client import VLLMClient

from cfpo_trl.rollouts.transfer import FolderTransfer
from cfpo_trl.tiny.model import build_model, build_tokenizer
from cfpo_trl.tiny.warm_start import warm_start
from conftest import ROOT, environment, free_port, kill, launch, server_url_of, serving, until
from equivalence_run import LETTERS

SECONDS_TO_STOP = 60  # 30 s of patience, what was in the queue, a checkpoint
FAULTS = int(os.environ.get("FAULTS", "3"))  # kills in the test of kills
TEMPLATES = {
    "chat_template": "{{ messages[0].content }}",
    "response_template": {
        "defaults": {"role": "assistant"},
        "start_anchor_pattern": "$",
        "fields": {"content": {"close": "<eos>"}},
    },
}


@pytest.fixture
def recipe(write_recipe, tmp_path):
    """Of an asynchronous training; what a synchronous one has beside is left out."""
    return write_recipe(
        tmp_path,
        leave_out=["num_iterations"],
        rollouts="async",
        max_staleness=4,
        token_budget=0,
        vllm_mode="server",
        vllm_server_host="127.0.0.1",
        vllm_server_port=free_port(),
        output_dir=str(tmp_path / "out"),
        save_strategy="steps",
        save_steps=10,
        **TEMPLATES,
    )


def start(recipe, steps: int, *overrides: str) -> subprocess.Popen:
    command = [*launch(None), "--config", str(recipe), "--max_steps", str(steps), *overrides]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)


def run(recipe, steps: int) -> list[dict]:
    """Trains to that step, from where a run with more of them has stopped; the log of each update."""
    process = start(recipe, steps, "--if_output_exists", "continue")
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-4000:]
    return logged(recipe.parent / "out")


def logged(output: Path) -> list[dict]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "cfpo/tv" in entry]


def last_step(output: Path) -> int:
    """Of the last checkpoint that is whole."""
    whole = [path.parent.name for path in output.glob("checkpoint-*/trainer_state.json")]
    return max((int(name.removeprefix("checkpoint-")) for name in whole), default=0)


def logps(model, ids: list[int]) -> torch.Tensor:
    """Of each token but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def served(recipe, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """A completion by the server: its tokens, and the log-probs that it was sampled by."""
    url = server_url_of(recipe)
    body = {"model": requests.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"], "prompt": prompt}
    body |= {"max_tokens": tokens, "temperature": 1.0, "logprobs": 0, "return_token_ids": True, "ignore_eos": True}
    (choice,) = requests.post(f"{url}/v1/completions", json=body, timeout=120).json()["choices"]
    return choice["token_ids"], torch.tensor(choice["logprobs"]["token_logprobs"])


def counter(recipe, name: str) -> float:
    """A number of vLLM's own log."""
    metrics = requests.get(f"{server_url_of(recipe)}/metrics", timeout=60).text
    (line,) = [line for line in metrics.splitlines() if line.startswith(f"vllm:{name}")]
    return float(line.split()[-1])


def test_the_reward_rises_from_samples_some_versions_old(recipe, tmp_path):
    with serving(recipe, tmp_path / "server.log"):
        log = run(recipe, 40)
        completion, found = served(recipe, [2, 3, 4], 6)
    assert len(log) == 40
    assert 0 < max(entry["staleness/max"] for entry in log) <= 4
    dropped = [entry["staleness/dropped"] for entry in log]
    assert sum(dropped) / len(dropped) < 0.05  # paced, not thrown away
    assert max(entry["cfpo/tv"] for entry in log) > 0.01
    rewards = [entry["reward"] for entry in log]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(found, logps(trained, [2, 3, 4, *completion])[2:], atol=1e-4)  # it has the last update


def test_an_update_while_a_request_is_written(write_recipe, tmp_path):
    """What is written behind it comes from the new weights alone: neither cached prefixes nor its own cache stay."""
    tokenizer = build_tokenizer(LETTERS)
    old, new = (build_model(tokenizer, seed=seed) for seed in (0, 1))
    old.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = write_recipe(
        tmp_path,
        model_name_or_path=str(tmp_path / "model"),
        max_prompt_length=300,
        max_completion_length=210,
        vllm_mode="server",
        vllm_server_host="127.0.0.1",
        vllm_server_port=free_port(),
    )
    prompt = random.Random(0).choices(range(2, 2 + len(LETTERS)), k=280)  # two blocks of the prefix cache, and more
    answer = []
    with serving(recipe, tmp_path / "server.log"):
        for _ in range(2):  # the second time from the cache
            completion, found = served(recipe, prompt, 4)
            assert torch.allclose(found, logps(old, prompt + completion)[-4:], atol=1e-4)
        assert counter(recipe, "prefix_cache_hits_total") >= 256
        written = counter(recipe, "generation_tokens_total")
        request = threading.Thread(target=lambda: answer.extend(served(recipe, prompt, 210)))
        request.start()
        while counter(recipe, "generation_tokens_total") < written + 3:
            assert request.is_alive()
        transfer = FolderTransfer(VLLMClient(server_url_of(recipe)), tmp_path / "weights")
        transfer.pause()
        time.sleep(2)
        assert request.is_alive()  # it waits
        transfer.send_weights(new.named_parameters())
        transfer.resume()
        request.join(timeout=60)
        completion, found = answer
        by_old, by_new = (logps(model, prompt + completion)[-210:] for model in (old, new))
        switch = int((found - by_old).abs().lt(1e-4).cumprod(0).sum())
        assert 0 < switch < 210
        assert torch.allclose(found[switch:], by_new[switch:], atol=1e-4)
        completion, found = served(recipe, prompt, 4)  # the prompt that was in the cache
        assert torch.allclose(found, logps(new, prompt + completion)[-4:], atol=1e-4)


def test_a_server_that_dies_stops_the_training_with_a_checkpoint_and_the_same_command_goes_on(recipe, tmp_path):
    output = tmp_path / "out"
    with serving(recipe, tmp_path / "server.log") as server:
        process = start(recipe, 100_000)
        until(lambda: last_step(output) >= 10, 300, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        kill(server)
        _, errors = process.communicate(timeout=SECONDS_TO_STOP)
    assert process.returncode == 1
    assert "run the same command again" in errors.splitlines()[-1] or "server" in errors
    assert not psutil.wait_procs(workers, timeout=5)[1]
    step = last_step(output)
    saved = output / f"checkpoint-{step}"
    first = json.loads((saved / "rollout_state.json").read_text())["prompt_index"]
    done = first + len(json.loads((saved / "prompts_done.json").read_text()))
    assert 0 < first <= done
    history = json.loads((saved / "trainer_state.json").read_text())["log_history"]
    if not any(entry.get("staleness/dropped") for entry in history):
        assert done == step * 64 // 8  # each prompt once

    with serving(recipe, tmp_path / "server.log"):
        log = run(recipe, step + 3)
    assert [entry["step"] for entry in log] == list(range(1, step + 4))


def test_a_reward_that_raises_stops_the_training_and_is_named(recipe, tmp_path):
    with serving(recipe, tmp_path / "server.log"):
        process = start(recipe, 100, "--reward_funcs", "equivalence_run.no_reward")
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Reward equivalence_run.no_reward raised KeyError: 'nothing'" in errors


def test_whatever_is_killed_nothing_hangs_or_stays_and_the_same_command_goes_on(recipe, tmp_path):
    """`FAULTS=10` for more of them; at random moments, from a seed."""
    output, rng = tmp_path / "out", random.Random(0)
    victims = [name for _ in range(-(-FAULTS // 3)) for name in ("trainer", "server", "rollouts")][:FAULTS]
    server = None
    try:
        for victim in victims:
            if server is None:
                entered = serving(recipe, tmp_path / "server.log")
                server = entered.__enter__()
            before = last_step(output)
            process = start(recipe, 100_000)
            until(lambda before=before: last_step(output) > before, 200, process)
            time.sleep(rng.uniform(0, 4))
            everyone = psutil.Process(process.pid).children(recursive=True)
            (rollouts,) = [child for child in everyone if "spawn_main" in " ".join(child.cmdline())]
            if victim == "server":
                kill(server)
                entered.__exit__(None, None, None)
                server = None
            else:
                {"trainer": process, "rollouts": rollouts}[victim].kill()
            _, errors = process.communicate(timeout=SECONDS_TO_STOP)
            assert process.returncode == (-9 if victim == "trainer" else 1), (victim, errors[-2000:])
            assert not psutil.wait_procs(everyone, timeout=20)[1], victim
            assert last_step(output) > before
        if server is None:
            entered = serving(recipe, tmp_path / "server.log")
            server = entered.__enter__()
        step = last_step(output)
        log = run(recipe, step + 3)
        assert [entry["step"] for entry in log] == list(range(1, step + 4))
    finally:
        if server is not None:
            entered.__exit__(None, None, None)


def test_an_agent_whose_environment_lives_in_the_rollout_process(write_recipe, tmp_path):
    """The tools of `make demo-agent`, by the same recipe's options."""
    options = yaml.safe_load((ROOT / "recipes" / "demo" / "config_cfpo_agent.yaml").read_text())
    tokenizer = build_tokenizer("abcdefghijklmnopqrstuvwxyz>![]{}':_")
    model, rows, rng = build_model(tokenizer), [], random.Random(0)
    for _ in range(200):
        box, letters = rng.choice("abcd"), "".join(rng.choices(LETTERS, k=4))
        seen = letters["abcd".index(box)]
        rows.append({"prompt": box, "boxes": letters, "solution": seen})
    turns = [{"prompt": f"{row['prompt']}>", "solution": f"!{row['prompt']}"} for row in rows]
    turns += [
        {"prompt": f"{row['prompt']}>!{row['prompt']}<eos>[{row['solution']}]", "solution": row["solution"]}
        for row in rows
    ]
    warm_start(model, tokenizer, turns, LETTERS, 0.5, steps=60, learning_rate=3e-3)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "rooms.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ("environment", "max_tool_calling_iterations", "chat_template", "response_template", "reward_funcs")
    recipe = write_recipe(
        tmp_path,
        leave_out=["num_iterations"],
        model_name_or_path=str(tmp_path / "model"),
        dataset_name=str(data),
        rollouts="async",
        token_budget=0,
        max_completion_length=32,
        max_prompt_length=16,
        vllm_max_model_length=80,
        vllm_server_host="127.0.0.1",
        vllm_server_port=free_port(),
        output_dir=str(tmp_path / "out"),
        **{name: options[name] for name in names},
    )
    with serving(recipe, tmp_path / "server.log"):
        log = run(recipe, 4)
    assert len(log) == 4
    assert all(entry["tools/call_frequency"] > 0.3 for entry in log)
    assert any(entry["rollout/turns_mean"] > 1.3 for entry in log if "rollout/turns_mean" in entry)
    assert any(entry["reward"] > 0 for entry in log)
