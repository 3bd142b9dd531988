"""The accuracy reward: math-verify's verdicts, and nothing that a completion holds can hang, blow up or outlive it."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl.rewards import accuracy_reward as trl_accuracy
from trl.rewards import get_cosine_scaled_reward

from cfpo_trl.rewards import (
    accuracy_reward,
    get_accuracy_reward,
    get_cosine_reward,
    length_reward,
    reasoning_accuracy_reward,
)
from cfpo_trl.rewards.golds import read_gold
from cfpo_trl.rewards.pool import Limits, VerifierPool, get_pool

ADVERSARIAL = [
    r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}",
    r"\boxed{2.5^{3.7^{9.9^{9.9}}}}",
    r"\boxed{" * 1500,
    r"\boxed{" + "(" * 300 + "1" + ")" * 300 + "}",
    "The answer is $5$" + " " * 3000,
    r"\boxed{" + "9" * 20_000 + "!}",
    r"\boxed{\begin{pmatrix}" + "1 & " * 3000 + r"1\end{pmatrix}}",
]

# (gold, answer, right?): integers, fractions, decimals, radicals, intervals, sets, tuples, matrices, equations,
# percentages, units, text.
CORPUS = [
    ("42", "42", True),
    ("42", "43", False),
    ("-7", "-7", True),
    ("1,234", "1234", True),
    ("0", "0.0", True),
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac{1}{2}", r"\dfrac{2}{4}", True),
    (r"\frac{1}{2}", r"\frac{1}{3}", False),
    (r"\frac{3}{4}", "3/4", True),
    (r"\sqrt{2}", r"\sqrt{2}", True),
    (r"\sqrt{8}", r"2\sqrt{2}", True),
    (r"\sqrt{2}", "1.5", False),
    (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}", True),
    ("2x+3", "3+2x", True),
    ("2x+3", "2x-3", False),
    ("(x+1)^2", "x^2+2x+1", True),
    (r"\pi", r"\pi", True),
    (r"2\pi", "6.28", False),
    ("[0,1)", "[0,1)", True),
    ("[0,1)", "(0,1)", False),
    (r"(-\infty, 3]", r"(-\infty,3]", True),
    (r"\{1,2,3\}", r"\{3,2,1\}", True),
    (r"\{1,2\}", r"\{1,2,3\}", False),
    ("(1,2)", "(1, 2)", True),
    ("(1,2)", "(2,1)", False),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", True),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", False),
    ("x=5", "5", True),
    ("5", "x=5", True),
    ("y=2x+1", "y=1+2x", True),
    ("50\\%", "50\\%", True),
    ("50\\%", "0.5", True),
    (r"10\text{ cm}", "10", True),
    (r"10\text{ cm}", "11", False),
    ("x<3", "x<3", True),
    ("x<3", "x<4", False),
    ("2^{10}", "1024", True),
    ("5!", "120", True),
    (r"\log_2 8", "3", True),
    ("3+4i", "3+4i", True),
    (r"\text{yes}", r"\text{yes}", True),
    (r"\text{yes}", r"\text{no}", False),
    ("90^\\circ", "90", True),
    ("1.5\\times 10^3", "1500", True),
]


def boxed(answer: str) -> str:
    return rf"We find that the answer is $\boxed{{{answer}}}$."


def test_agrees_with_trl_s_reward_on_answers_of_many_kinds():
    """TRL parses the raw gold: give it the one that ours is read as, so that only the verdicts are compared."""
    completions = [boxed(answer) for _, answer, _ in CORPUS]
    golds = [gold for gold, _, _ in CORPUS]
    ours = accuracy_reward(completions, golds)
    theirs = trl_accuracy([[{"content": text}] for text in completions], [read_gold(gold) for gold in golds])
    assert ours == theirs


def test_verdicts_are_the_mathematician_s():
    ours = accuracy_reward([boxed(answer) for _, answer, _ in CORPUS], [gold for gold, _, _ in CORPUS])
    wrong = [(gold, answer) for (gold, answer, right), reward in zip(CORPUS, ours, strict=True) if reward != right]
    assert wrong == MATH_VERIFY_DIFFERS


MATH_VERIFY_DIFFERS: list[tuple[str, str]] = []


def test_forms_of_completions_and_golds():
    text = boxed("3")
    parts = [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
    turns = [{"role": "assistant", "content": "let me see"}, {"role": "tool", "content": "3"}, {"content": text}]
    completions = [text, [{"role": "assistant", "content": text}], parts, turns, "", [], text, text, text]
    solution = ["3", "3", "3", "3", "3", "3", None, 3, "#### 3"]
    assert accuracy_reward(completions, solution) == [1, 1, 1, 1, 0, 0, None, 1, 1]
    assert accuracy_reward([], []) == []


def test_unreadable_gold_is_none_and_counted():
    metrics = {}
    assert accuracy_reward([boxed("3")] * 4, ["3", None, "$$", "4"], log_metric=metrics.__setitem__) == [
        1,
        None,
        None,
        0,
    ]
    assert metrics["accuracy/unparseable_gold"] == 0.25
    assert metrics["accuracy/missing_gold"] == 0.25
    assert metrics["accuracy/timeout"] == 0
    assert metrics["accuracy/seconds"] > 0


def test_extra_columns_show_what_was_parsed():
    columns = {}
    accuracy_reward([boxed(r"\frac{1}{2}"), "nothing"], ["0.5", "7"], log_extra=columns.__setitem__)
    assert columns["answer_parsed"] == [r"\frac{1}{2}", "[no_answer]"]
    assert columns["gold_parsed"] == [r"\frac{1}{2}", "7"]


def test_reasoning_accuracy_reads_only_what_follows_the_reasoning():
    completions = [
        f"<think>{boxed('3')}</think> {boxed('4')}",
        f"<think>{boxed('4')}",
        f"a</think>b</think>{boxed('4')}",
    ]
    assert reasoning_accuracy_reward(completions, ["4"] * 3) == [1, 0, 1]


def test_cosine_is_trl_s_schedule_on_our_verdicts():
    arguments = {"max_len": 100, "min_value_wrong": -2.0, "max_value_correct": 3.0}
    completions, solution = [boxed("3")] * 4 + [boxed("4")] * 4, ["3"] * 8
    ids = [[1] * length for length in (0, 30, 100, 300)] * 2
    theirs = get_cosine_scaled_reward(**arguments)([[{"content": text}] for text in completions], solution, ids)
    assert get_cosine_reward(**arguments)(completions, solution, completion_ids=ids) == pytest.approx(theirs)


def test_length_compares_within_a_prompt_s_group():
    completions = [boxed("3"), boxed("3"), boxed("4"), boxed("4"), boxed("3"), boxed("3")]
    ids = [[1] * length for length in (10, 30, 10, 30, 5, 5)]
    prompts = ["a", "a", "a", "a", "b", "b"]
    rewards = length_reward(completions, ["3", "3", "3", "3", "3", None], prompts=prompts, completion_ids=ids)
    assert rewards == [0.5, -0.5, 0.0, -0.5, 0.0, None]


@pytest.mark.slow
def test_adversarial_batch_returns_in_its_budget_and_scores_the_others_right():
    ordinary = [(boxed(str(index % 7)), "3") for index in range(64)]
    kinds = itertools.cycle(ADVERSARIAL)
    bad = [(next(kinds) + " " * index, "5") for index in range(75)]
    mixed = [pair for pairs in itertools.zip_longest(bad, ordinary) for pair in pairs if pair]
    peak = PeakMemory()
    with peak:
        start = time.perf_counter()
        rewards = accuracy_reward([text for text, _ in mixed], [gold for _, gold in mixed])
        seconds = time.perf_counter() - start
    assert seconds < 30
    scored = [reward for reward, pair in zip(rewards, mixed, strict=True) if pair in ordinary]
    assert scored == [float(index % 7 == 3) for index in range(64)]
    assert peak.bytes < 2 * Limits().count() * Limits().memory_gib * 2**30
    print(f"{len(mixed)} completions, {len(bad)} of them adversarial: {seconds:.1f} s, {peak.bytes / 2**30:.2f} GiB")


class PeakMemory(threading.Thread):
    """Samples the resident memory of all worker processes together."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self.ended = 0, threading.Event()

    def run(self):
        while not self.ended.wait(0.05):
            self.bytes = max(self.bytes, sum(map(resident, psutil.Process().children(recursive=True))))

    def __enter__(self):
        self.start()

    def __exit__(self, *_):
        self.ended.set()
        self.join()


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def gone(pids) -> bool:
    """Whether all of these processes end within some seconds."""
    deadline = time.monotonic() + 15
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(runs, pids))


def resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:  # it ended between the listing and the reading
        return 0


def test_a_batch_over_its_budget_scores_0_and_the_next_one_is_fresh():
    reward = get_accuracy_reward(seconds=1.0, budget=2.5, workers=1)
    start = time.perf_counter()
    texts = [ADVERSARIAL[0] + " " * index for index in range(8)]
    assert reward(texts, ["5"] * 8) == [0.0] * 8
    assert time.perf_counter() - start < 8  # 2.5 s, and the start of the workers
    assert reward([boxed("3"), boxed("4")], ["3", "3"]) == [1, 0]


@pytest.mark.parametrize("victim", ["child", "process"])
def test_a_worker_killed_while_it_waits_costs_nothing(victim):
    pool = VerifierPool(Limits(workers=1))
    assert pool.judge([("$3$", boxed("3"))])[0].reward == 1
    (worker,) = pool.workers
    os.kill(worker.child if victim == "child" else worker.process.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert pool.judge([("$3$", boxed("3"))])[0].reward == 1
    processes = {worker.child, pool.workers[0].child, pool.workers[0].process.pid}
    pool.close()
    assert gone(processes)


def test_a_worker_killed_at_work_costs_its_task_alone():
    pool = VerifierPool(Limits(workers=1))
    pool.judge([("$3$", boxed("3"))])
    child = pool.workers[0].child
    threading.Timer(0.1, os.kill, (child, signal.SIGKILL)).start()
    verdicts = pool.judge([("$3$", ADVERSARIAL[3]), ("$4$", boxed("4"))])
    assert [verdict.reward for verdict in verdicts] == [0, 1]
    assert pool.workers[0].child != child
    pool.close()


def test_a_worker_that_cannot_start_says_so():
    pool = VerifierPool(Limits(memory_gib=0.02, workers=1))
    with pytest.raises(RuntimeError, match="memory_gib=0.02 may be too small"):
        pool.judge([("$3$", boxed("3"))])
    pool.close()


def test_threads_share_the_pool():
    results = {}

    def score(index: int) -> None:
        results[index] = accuracy_reward([boxed(str(value)) for value in range(8)], [str(index)] * 8)

    threads = [threading.Thread(target=score, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {index: [float(value == index) for value in range(8)] for index in range(6)}


def test_works_in_a_spawned_process_that_got_it_pickled():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(accuracy_reward, ([boxed("3")], ["3"])) == [1]


def test_workers_import_no_torch():
    accuracy_reward([boxed("3")], ["3"])
    for worker in get_pool(accuracy_reward.limits).workers:
        maps = Path(f"/proc/{worker.process.pid}/maps").read_text()
        assert "python" in maps
        assert "torch" not in maps


ORPHAN = r"""
import os, sys, threading
from cfpo_trl.rewards import accuracy_reward
from cfpo_trl.rewards.pool import get_pool
workers = get_pool(accuracy_reward.limits).workers
while not workers or any(worker.child is None for worker in workers):  # one may do all before the other has started
    accuracy_reward([r"\boxed{3}", r"\boxed{4}"], ["3", "3"])
print(*[pid for worker in workers for pid in (worker.process.pid, worker.child)], flush=True)
accuracy_reward([sys.argv[1], sys.argv[1] + " "], ["5", "5"])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_orphans_when_the_trainer_dies_within_a_batch(number):
    trainer = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, ADVERSARIAL[0]], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    assert workers
    time.sleep(0.5)
    os.kill(trainer.pid, number)
    trainer.wait(timeout=20)
    assert gone(workers)


@pytest.mark.parametrize("options", [{"seconds": 0}, {"budget": -1}, {"memory_gib": 0}, {"workers": 0}])
def test_invalid_limits(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* must be"):
        get_accuracy_reward(**options)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.text(alphabet=st.characters(), max_size=60) | st.text(r"\boxed{}$^_()[]=,.0123x ", max_size=60), max_size=4
    )
)
def test_no_completion_raises(texts):
    reward = get_accuracy_reward(seconds=1.0, budget=10.0)
    assert all(value in (0.0, 1.0) for value in reward(texts, ["3"] * len(texts)))


@pytest.mark.parametrize("text", ["\0", "\ud800 \\boxed{3}", "x" * 100_000, "\\boxed{" + "1" * 100_000])
def test_odd_completions(text):
    assert accuracy_reward([text, boxed("3")], ["3", "3"])[1] == 1
