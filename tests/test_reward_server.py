"""Rewards from a server: the reference server, and servers that are down, slow, busy or wrong."""

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cfpo_trl import grpo
from cfpo_trl.rewards import load_reward
from cfpo_trl.rewards import serve as serve_reward
from cfpo_trl.rewards.model import RewardModel
from cfpo_trl.rewards.registry import check_rewards, load_rewards
from cfpo_trl.rewards.scores import RewardError
from cfpo_trl.tiny.model import build_model, build_reward_model, build_tokenizer
from conftest import LETTERS

ROOT = Path(__file__).parent.parent
PROMPTS = ["ab", "c", "def", "g"]
COMPLETIONS = ["abcdefghij", "", "aj", "hhhhh"]


def share_of_early_letters(request):
    return {"rewards": [sum(letter in "abcde" for letter in text) / 6 for text in request["completions"]]}


@pytest.fixture
def server():
    """A server whose `answers[n]` (default: the last) answers request n; a callable, a status, or the bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = server.answers[min(len(server.requests), len(server.answers) - 1)]
            server.requests.append(request)
            status, body = (answer, b"") if isinstance(answer, int) else (200, answer)
            if callable(answer):
                body = json.dumps(answer(request)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.requests = [share_of_early_letters], []
    server.url = f"http://127.0.0.1:{server.server_port}/score"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_requests_are_batched_and_rewards_in_order(server):
    reward = load_reward(server.url, {"batch_size": 3})
    assert reward.__name__ == server.url.removeprefix("http://")
    assert reward(prompts=PROMPTS, completions=COMPLETIONS) == [5 / 6, 0, 1 / 6, 0]
    assert server.requests == [
        {"prompts": PROMPTS[:3], "completions": COMPLETIONS[:3]},
        {"prompts": PROMPTS[3:], "completions": COMPLETIONS[3:]},
    ]
    conversation = [{"role": "user", "content": "ab"}]
    server.answers = [b'{"rewards": [null]}']
    assert reward([conversation], [conversation]) == [None]  # no reward applies
    assert server.requests[-1] == {"prompts": [conversation], "completions": [conversation]}


def test_a_busy_server_is_asked_again(server):
    server.answers = [503, 429, share_of_early_letters]
    start = time.monotonic()
    assert load_reward(server.url)(["a"], ["ab"]) == [1 / 3]
    assert len(server.requests) == 3
    assert 2 <= time.monotonic() - start < 10  # at once, then after 2 s


WRONG = [
    ([503], "gave no JSON but, with status 503, ''"),
    ([lambda request: time.sleep(3)], "gave no rewards within timeout=1 s, 1 retries: .*timed out"),
    ([b"<html>Not here</html>"], "gave no JSON but, with status 200, '<html>Not here</html>'"),
    ([404], "gave no JSON but, with status 404, ''"),
    ([b"[1, 2, 3, 4]"], r'gave, with status 200, no {"rewards": \[...\]} but \[1, 2, 3, 4\]'),
    ([b'{"rewards": [1, 2, 3]}'], "gave 3 rewards for 4 completions; it must give a list of one number for each"),
    ([b'{"rewards": 0.5}'], "gave 0.5 for 4 completions"),
    ([b'{"rewards": [1, 2, [3], 4]}'], r"gave \[3\] for completion 2; a reward is a number, or null"),
    ([b'{"rewards": [1, "2", 3, 4]}'], "gave '2' for completion 1; a reward is a number"),
    ([b'{"rewards": [1, true, 3, 4]}'], "gave True for completion 1; a reward is a number"),
    ([b'{"rewards": [1, NaN, 3, Infinity]}'], "gave 2 of 4 rewards that are not finite, the first nan"),
]


@pytest.mark.parametrize(("answers", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_with_an_answer(server, answers, message):
    server.answers = answers
    reward = load_reward(server.url, {"timeout": 1, "retries": 1})
    with pytest.raises(RewardError, match=f"Reward server {server.url} {message}"):
        reward(PROMPTS, COMPLETIONS)


def test_nothing_listens(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match=r"where no server listens: .*refused.*; start it \(`cfpo serve-reward"):
        load_reward(server.url, {"timeout": 1})
    with pytest.raises(ValueError, match="where no server listens: KeyError"):
        load_reward("ftp://127.0.0.1/score")


def test_the_first_look_at_a_server_goes_by_the_proxies_too(server, monkeypatch):
    """The only way to some servers: the proxy of this test answers for a host that does not exist."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    reward = load_reward("http://rewards.invalid/score")
    assert reward(PROMPTS, COMPLETIONS) == [5 / 6, 0, 1 / 6, 0]


def test_two_rewards_of_one_name_are_refused(server):
    with pytest.raises(ValueError, match="reward_funcs has .* and another that is called '127.0.0.1:.*/score' in the"):
        load_rewards([server.url, server.url + "/"], {}, [])
    with pytest.raises(ValueError, match="reward_funcs has 'conftest.early_letters' and another"):
        load_rewards(["conftest.early_letters", server.url, "conftest.early_letters"], {}, [])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nonsense"], "reward_funcs has 'nonsense', which is no reward: .* or a reward server's URL"),
        (["recipes/demo"], "reward_funcs has 'recipes/demo', a folder without a model's config.json"),
    ],
)
def test_names_are_checked_before_anything_is_loaded(names, message):
    with pytest.raises(ValueError, match=message):
        check_rewards(names, {})


def test_the_reference_server_gives_the_models_scores(tmp_path):
    tokenizer = build_tokenizer(LETTERS)
    build_reward_model(tokenizer).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    command = [sys.executable, "-m", "cfpo_trl.cli", "serve-reward", str(tmp_path / "reward"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        try:
            url = run.stdout.readline().split()[-1]
            reward = load_reward(url, {"batch_size": 3})
            expected = RewardModel(str(tmp_path / "reward"))(PROMPTS, COMPLETIONS)
            assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)
            with pytest.raises(RewardError, match="status 400, no .*bad request: ValueError"):
                reward.ask(PROMPTS, COMPLETIONS[:3])
            conversation = [{"role": "user", "content": "ab"}]
            with pytest.raises(RewardError, match="status 422, no .*has no chat template"):
                reward([conversation], [conversation])
        finally:
            run.kill()


def test_the_reference_server_says_what_failed_in_it():
    class Full:
        def score(self, prompts, completions):
            raise torch.OutOfMemoryError("7 GiB are too many")

    server = ThreadingHTTPServer(("127.0.0.1", 0), serve_reward.handler(Full()))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reward = load_reward(f"http://127.0.0.1:{server.server_port}", {"retries": 0})
    for _ in range(2):  # it goes on
        with pytest.raises(RewardError, match="status 500, no .*OutOfMemoryError: 7 GiB are too many"):
            reward(PROMPTS, COMPLETIONS)
    server.shutdown()
    server.server_close()


@pytest.fixture
def recipe(server, tmp_path):
    tokenizer = build_tokenizer(LETTERS)
    build_model(tokenizer, hidden_size=32, layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = "".join(json.dumps({"prompt": first + second}) + "\n" for first in LETTERS for second in LETTERS)
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
model_name_or_path: {tmp_path}/model
dtype: float32
dataset_name: {tmp_path}/data
reward_funcs: [{server.url}]
reward_parameters: {{"{server.url}": {{timeout: 2, retries: 0}}}}
advantage_estimator: rloo
kl_in_reward: 0.1
per_device_train_batch_size: 16
num_generations: 8
max_completion_length: 4
learning_rate: 3.0e-3
num_iterations: 2
max_steps: 8
logging_steps: 1
save_steps: 4
seed: 5
bf16: false
use_cpu: true
gradient_checkpointing: false
report_to: none
disable_tqdm: true
"""
    )
    return path


@pytest.mark.parametrize("fault", [b'{"rewards": [NaN]}', 500, b'{"rewards": []}'])
def test_a_server_that_fails_during_the_run_costs_no_step(server, recipe, tmp_path, capsys, fault):
    """It saves what it has, says why, and the same command follows the trajectory of an uninterrupted run."""
    grpo.main(["--config", str(recipe), "--output_dir", str(tmp_path / "whole")])
    server.answers, server.requests = [share_of_early_letters] * 3 + [fault], []
    arguments = ["--config", str(recipe), "--output_dir", str(tmp_path / "failed")]
    with pytest.raises(SystemExit) as exit:
        grpo.main(arguments)
    assert exit.value.code == 1
    printed = capsys.readouterr().out
    assert f"Reward server {server.url} gave" in printed
    assert "Stopped at step 6; last checkpoint: " in printed
    assert (tmp_path / "failed" / "checkpoint-6").exists()
    server.answers, server.requests = [share_of_early_letters], []
    grpo.main(arguments)
    assert len(server.requests) == 1  # it went on from step 6
    whole, failed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "failed"))
    assert all(torch.equal(whole[name], failed[name]) for name in whole)


def test_a_failure_in_an_evaluation_keeps_the_random_state_behind_the_step(server, recipe, tmp_path):
    """Request 3 is the evaluation after step 4; the resumed run follows one whose evaluation went well."""
    options = ["--eval_strategy", "steps", "--eval_steps", "4", "--dataset_test_split", "train"]
    options += ["--per_device_eval_batch_size", "200", "--num_generations_eval", "1"]
    grpo.main(["--config", str(recipe), "--output_dir", str(tmp_path / "whole"), *options])
    server.answers, server.requests = [share_of_early_letters] * 2 + [404], []
    arguments = ["--config", str(recipe), "--output_dir", str(tmp_path / "failed"), *options]
    with pytest.raises(SystemExit):
        grpo.main(arguments)
    assert (tmp_path / "failed" / "checkpoint-4").exists()
    server.answers = [share_of_early_letters]
    grpo.main(arguments)
    logs = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("whole", "failed")
    ]
    whole, failed = ([entry["reward"] for entry in log if "reward" in entry] for log in logs)
    assert len(whole) == 4
    assert failed == whole


@pytest.mark.slow
def test_a_failure_on_one_rank_stops_both(server, recipe, tmp_path):
    """The other rank does not wait for the failed one's rewards; both save together."""

    def nan_for_the_last_rank(request):
        late = any(prompt[0] in "ab" for prompt in request["prompts"])
        rewards = share_of_early_letters(request)["rewards"]
        return {"rewards": [float("nan")] * len(rewards) if late and len(server.requests) > 4 else rewards}

    server.answers = [nan_for_the_last_rank]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(ROOT / "src" / "cfpo_trl" / "grpo.py"), "--config", str(recipe)]
    script += ["--output_dir", str(tmp_path / "two"), "--max_steps", "200", "--num_iterations", "1"]
    start = time.monotonic()
    result = subprocess.run([*launch, *script], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert result.returncode == 1
    assert time.monotonic() - start < 120
    assert "rewards that are not finite" in result.stdout
    assert "Stopped at step" in result.stdout
    assert list((tmp_path / "two").glob("checkpoint-*"))
