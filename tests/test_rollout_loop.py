"""The rollout process of asynchronous training, in this process, against a server that answers as vLLM does."""

import asyncio
import json
import pickle
import queue
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from datasets import Dataset

from cfpo_trl.rewards.named import NamedReward
from cfpo_trl.rollouts.loop import BARREN, RolloutLoop
from cfpo_trl.rollouts.staleness import VersionedQueue
from cfpo_trl.tiny.model import build_tokenizer
from conftest import LETTERS

WORDS = ["ab", "cd", "efghabcd", "ba"]  # the third is longer than the server takes
LONGEST = 6


class Completions(BaseHTTPRequestHandler):
    """Answers with the prompt's first letter; what it does with a prompt is the server's `behaviour`."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body["prompt"])
        status, tokens = self.server.behaviour(body["prompt"])
        answer = (
            {}
            if tokens is None
            else {"choices": [{"token_ids": tokens, "logprobs": {"token_logprobs": [-1.0] * len(tokens)}}]}
        )
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments): ...


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    server.requests = []
    server.behaviour = lambda prompt: (400, []) if len(prompt) > LONGEST else (200, [prompt[0], 1])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def build(server):
    PartialState()  # TRL's logger asks for it
    tokenizer = build_tokenizer(LETTERS)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor_pattern": "$",
        "fields": {"content": {"close": "<eos>"}},
    }

    def build(reward_funcs, words=WORDS, **options):
        context = get_context("spawn")
        rows = [{"prompt": [{"role": "user", "content": word}], "solution": word} for word in words]
        options = {"num_generations": 2, "max_inflight_tasks": 4, "request_timeout": 20} | options
        return RolloutLoop(
            model_name="tiny",
            dataset=Dataset.from_list(rows),
            reward_funcs=reward_funcs,
            processing_class=tokenizer,
            eos_token_ids=[tokenizer.eos_token_id],
            rollout_buffer=queue.Queue(),
            model_version_value=SimpleNamespace(value=3),
            heartbeat_value=SimpleNamespace(value=0.0),
            failed_event=context.Event(),
            exception_info_queue=queue.Queue(),
            metrics_queue=queue.Queue(),
            vllm_server_url=f"http://127.0.0.1:{server.server_port}",
            max_tokens=2,
            **options,
        )

    return build


@contextmanager
def running(loop):
    """The loop in a thread; raises what it raised."""
    raised = []

    def run():
        asyncio.set_event_loop(loop._loop)
        try:
            loop._loop.run_until_complete(loop._run_loops(stop_event=loop._stop_event))
        except Exception as error:
            raised.append(error)
        for task in (rest := asyncio.all_tasks(loop._loop)):
            task.cancel()
        loop._loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
        loop._loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        if thread.is_alive():
            loop._loop.call_soon_threadsafe(loop._stop_event.set)
            thread.join(timeout=20)
            assert not thread.is_alive()
        if raised:
            raise raised[0]


def taken(loop, count):
    """So many samples, as the trainer takes them."""
    versioned = VersionedQueue(loop.rollout_buffer)
    samples = []
    for _ in range(count):
        samples.append(versioned.get(timeout=20))
        versioned.taken = None
    return samples, versioned


def totals(loop):
    counts = {}
    while not loop._metrics_queue.empty():
        for name, value in loop._metrics_queue.get().items():
            counts.setdefault(name, []).append(value)
    return counts


def vowels(completions, **kwargs):
    return [float(completion[-1]["content"] in "ae") for completion in completions]


def test_a_prompt_that_the_server_refuses_is_left_out_counted_and_done(build, server):
    loop = build([vowels])
    with running(loop):
        samples, versioned = taken(loop, 10)
    assert 2 in versioned.dropped
    assert all(group % len(WORDS) == 2 for group in versioned.dropped)
    assert not any(sample.group_id % len(WORDS) == 2 for sample in samples)
    for sample in samples:
        assert sample.metrics["reward"] == (sample.group_id % len(WORDS) == 0)
    refused = [prompt for prompt in server.requests if len(prompt) > LONGEST]
    counted = sum(sum(values) for name, values in totals(loop).items() if name == "rollout/refused_total")
    assert 2 <= counted <= len(refused)  # the last of them may not have been sent to the trainer
    assert len(refused) <= 10  # no second try


def test_prompts_that_were_done_before_are_not_written_again(build):
    loop = build([vowels], words=["ab", "ba", "ac", "ca"], done=[1, 2])
    with running(loop):
        samples, _ = taken(loop, 6)
    assert not {sample.group_id for sample in samples} & {1, 2}


def test_a_completion_that_fails_leaves_its_group_to_the_others(build, server):
    turns = iter(range(1000))
    server.behaviour = lambda prompt: (
        200,
        None if next(turns) == 0 else [prompt[0], 1],
    )  # None: an answer without any
    loop = build([vowels], words=["ab"], num_generations=4, max_inflight_tasks=4)
    with running(loop):
        samples, versioned = taken(loop, 15)
    assert [sample.group_id for sample in samples].count(0) == 3
    assert not versioned.dropped
    assert sum(sum(values) for name, values in totals(loop).items() if name == "rollout/failed_total") == 1


def test_a_slow_reward_costs_its_group_alone(build):
    calls = iter(range(1000))

    def slow_at_first(completions, **kwargs):
        if next(calls) == 0:
            time.sleep(3)
        return [1.0] * len(completions)

    loop = build([slow_at_first], words=["ab", "ba"], request_timeout=1)
    with running(loop):
        samples, versioned = taken(loop, 2)
    assert len(versioned.dropped) == 1  # the first that was complete
    assert not versioned.dropped & {sample.group_id for sample in samples}
    assert totals(loop)["rollout/slow_rewards_total"] == [1.0]


def test_nothing_but_failures_ends_the_run_and_says_why(build, server):
    server.behaviour = lambda prompt: (400, [])
    loop = build([vowels])
    with pytest.raises(RuntimeError, match=f"Nothing came of {BARREN} prompts in a row"), running(loop) as thread:
        thread.join(timeout=20)


def test_each_completion_has_the_version_that_began_it(build, server):
    began = threading.Event()

    def behaviour(prompt):
        if not began.is_set():  # an update falls into the writing of the first
            began.set()
            loop._model_version_value.value += 2
        return 200, [prompt[0], 1]

    server.behaviour = behaviour
    loop = build([vowels], words=["ab"], max_inflight_tasks=1)
    with running(loop):
        samples, _ = taken(loop, 2)
    assert [sample.model_version for sample in samples] == [3, 5]  # TRL's: 3 and 3
    assert [sample.metrics["staleness/updates_while_written"] for sample in samples] == [2.0, 0.0]


def test_weights_count_in_the_reward_and_not_in_the_log(build):
    def twos(completions, **kwargs):
        return [2.0] * len(completions)

    async def no_reward_for_b(completions, log_metric, **kwargs):
        log_metric("mine", 4.0)
        return [None if completion[-1]["content"] == "b" else 1.0 for completion in completions]

    loop = build([twos, no_reward_for_b], words=["ab", "ba"], reward_weights=[0.5, 10.0])
    with running(loop):
        samples, _ = taken(loop, 4)
    for sample in samples:
        right = sample.group_id % 2 == 0
        assert sample.metrics["reward"] == (11.0 if right else 1.0)
        assert sample.metrics["rewards/twos"] == 2.0
        assert not right or sample.metrics["rewards/no_reward_for_b"] == 1.0
    logged = totals(loop)["mine"]
    assert {total / count for total, count in logged} == {4.0}


def test_a_closure_is_given_by_its_name():
    reward = NamedReward("format", {"think_opened": True}, "format_reward")
    (score,) = pickle.loads(pickle.dumps(reward))(completions=["so</think><answer>4</answer>"])
    assert score == 1.0
    assert pickle.loads(pickle.dumps(reward)).__name__ == "format_reward"


def test_letters_are_tokens(tokenizer):  # what the server above answers with
    assert tokenizer.decode(tokenizer(LETTERS[0]).input_ids) == LETTERS[0]
