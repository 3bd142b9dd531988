"""AsyncCFPOTrainer on packed rows: its loss and gradient against a reference in fp64, and samples of a known age."""

import json
import math
import queue
import random
import socket
import threading
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from trl.experimental.async_grpo.async_grpo_trainer import (
    DataCollatorForRollout,
    FixedCountBatcher,
    TokenBudgetBatcher,
)
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from cfpo_trl import CFPOConfig, CFPOTrainer
from cfpo_trl.asynchronous import AsyncCFPOConfig, AsyncCFPOTrainer, AsyncClipTrainer, without_cuda
from cfpo_trl.rollouts import health
from cfpo_trl.rollouts.health import PatientHealth, RolloutServerError
from cfpo_trl.rollouts.staleness import QUEUE, VersionedCollator, pace
from cfpo_trl.rollouts.transfer import FolderTransfer, WatchedAdapters, WatchedTransfer
from cfpo_trl.tiny.model import build_model
from conftest import CPU, LETTERS

WIDTHS = [
    {"epsilon": 0.2},
    {"epsilon": 0.1, "epsilon_high": 0.3},
    {"epsilon": 0.2, "penalty_slope": 1.25},
    {"epsilon": 0.2, "penalty_slope": 1.0, "importance_sampling_level": "sequence"},
]
WIDTH_NAMES = ["epsilon", "two widths", "bounded", "sequence"]


class Worker:
    """A rollout worker without a server: a test puts the samples into its queue."""

    def __init__(self):
        self.rollout_buffer, self.metrics_queue, self.versions = queue.Queue(), queue.Queue(), []

    def start(self): ...

    def stop(self): ...

    def update_model_version(self, version):
        self.versions.append(version)

    def check_health(self, stale_after_s):
        raise RuntimeError("no samples")


class Transfer:
    """Takes the weights and forgets them."""

    def init_weight_transfer(self): ...

    def pause(self): ...

    def send_weights(self, iterator):
        self.names = [name for name, _ in iterator]

    def resume(self): ...

    def destroy(self): ...


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_model(tokenizer, hidden_size=32, layers=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def build(model, tokenizer, tmp_path):
    def build(
        trainer_class=AsyncCFPOTrainer,
        config_class=AsyncCFPOConfig,
        transfer=None,
        worker=None,
        peft_config=None,
        **options,
    ):
        options = {
            "per_device_train_batch_size": 4,
            "token_budget": 0,
            "learning_rate": 1e-3,
            "max_steps": 4,
        } | options
        args = config_class(str(tmp_path / "out"), **{"save_strategy": "no"} | CPU | options)
        data = Dataset.from_list([{"prompt": letter} for letter in LETTERS])
        with without_cuda():  # for TRL's own, too
            return trainer_class(
                str(model),
                lambda completions, **kwargs: [0.0] * len(completions),
                args,
                data,
                processing_class=tokenizer,
                rollout_worker=worker or Worker(),
                weight_transfer=transfer or Transfer(),
                peft_config=peft_config,
            )

    return build


def samples(seed: int, count: int) -> list[dict]:
    """Completions of some prompts, some with a fork in the middle, masked tokens, and log-probs off the policy's."""
    rng = random.Random(seed)
    rows, vocabulary = [], range(2, 2 + len(LETTERS))
    for index in range(count):
        group = index // 3
        prompt = random.Random(group + 1000 * seed).choices(vocabulary, k=3 + group % 3)
        stem = random.Random(group + 2000 * seed).choices(vocabulary, k=rng.randint(0, 2))  # shared, then they part
        completion = [*stem, *rng.choices(vocabulary, k=rng.randint(1, 6))]
        mask = [0] * len(prompt) + [int(rng.random() < 0.8) for _ in completion]
        mask[-1] = 1
        rows.append(
            {
                "input_ids": np.array(prompt + completion),
                "completion_mask": np.array(mask),
                "old_log_probs": np.array([rng.uniform(-4, -1) for _ in mask], dtype=np.float32),
                "advantage": rng.choice([-2.0, -0.5, 0.0, 1.0, 1.5]),
                "group_id": group,
                "metrics": {"sample/model_version": 1.0},
            }
        )
    return rows


def batches(rows: list[dict], budget: int) -> list[dict]:
    """Packed by TRL's own batchers and collator: a fixed count in each, or as many as fit the budget."""
    batcher = TokenBudgetBatcher(rows, 1, budget, defaultdict(list)) if budget else FixedCountBatcher(rows, 1, 4)
    collate = VersionedCollator(DataCollatorForRollout(pad_token_id=0, num_processes=1, token_budget=budget))
    return [collate([micro]) for micro in batcher]


def reference(model, rows: list[dict], args) -> torch.Tensor:
    """−ΣJ / tokens, sample by sample, from the paper: J = rA − |A|(r − 1)²/(2ε), linear beyond the bound.

    r is the token's ratio, or the geometric mean over the completion's trained tokens.
    """
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor(row["input_ids"])[None]
        logps = model(ids).logits[0].log_softmax(-1)
        places = [place for place in range(1, ids.shape[1]) if row["completion_mask"][place]]
        shifts = [logps[place - 1, ids[0, place]] - float(row["old_log_probs"][place]) for place in places]
        if args.importance_sampling_level == "sequence":
            shifts = [sum(shifts) / len(shifts)] * len(shifts)
        for shift in shifts:
            ratio = shift.exp()
            excess = abs(ratio - 1)
            width = (args.epsilon_high or args.epsilon) if ratio > 1 else args.epsilon
            penalty = excess**2 / (2 * width)
            slope = getattr(args, "penalty_slope", None)
            if slope and excess > slope * width:
                penalty = slope * excess - slope**2 * width / 2
            total = total + ratio * row["advantage"] - abs(row["advantage"]) * penalty
            tokens += 1
    return -total / tokens


def in_fp64(model):
    """The packed forward without TRL's fused head, which computes in fp32."""

    def forward(input_ids, shift_labels, fused_lm_head, **kwargs):
        logps = model.lm_head(model.model(input_ids, use_cache=False, **kwargs).last_hidden_state).log_softmax(-1)
        chosen = logps.gather(-1, shift_labels.clamp(min=0)[..., None])[..., 0]
        return SimpleNamespace(log_probs=chosen, entropy=-(logps.exp() * logps).sum(-1))

    return forward


@pytest.mark.parametrize(
    ("forward", "value", "gradient"),
    [(in_fp64, 1e-12, 1e-7), (lambda model: model, 1e-6, 1e-5)],  # Qwen2's norms pass gradients in fp32
    ids=["fp64", "fused head"],
)
@pytest.mark.parametrize("budget", [0, 24], ids=["fixed count", "token budget"])
@pytest.mark.parametrize("widths", WIDTHS, ids=WIDTH_NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_cfpo_s_on_packed_rows(build, model, seed, widths, budget, forward, value, gradient):
    trainer, of_sequences = build(**widths), "importance_sampling_level" in widths
    packed, plain = trainer.model.double(), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    rows = samples(seed, 12)
    trainer.current_gradient_accumulation_steps = 1
    seen = 0
    for batch in batches(rows, budget):
        packed.zero_grad()
        plain.zero_grad()
        loss = trainer.compute_loss(forward(packed), batch)
        loss.backward()
        count = int(batch["segment_id"].max()) + 1
        expected = reference(plain, rows[seen : seen + count], trainer.args)
        expected.backward()
        seen += count
        assert loss.item() == pytest.approx(expected.item(), rel=value, abs=value / 10 if of_sequences else None)
        size = max(param.grad.abs().max() for param in plain.parameters())
        size *= 5 if of_sequences else 1  # a mean's loss and gradient are smaller than what they are made of
        for (name, param), other in zip(packed.named_parameters(), plain.parameters(), strict=True):
            assert (param.grad - other.grad).abs().max() <= gradient * size, name
    assert seen >= 8
    assert math.isclose(trainer.epsilon_low, widths["epsilon"])


def one_batch(seed: int = 0) -> dict:
    (batch, *_) = batches(samples(seed, 4), 0)
    return batch


def test_where_no_ratio_has_moved_loss_and_gradient_are_the_clip_s(build):
    """As at version lag 0: the samples' log-probs are the policy's own."""
    gradients, losses = [], []
    for trainer in (build(), build(AsyncGRPOTrainer, AsyncGRPOConfig)):
        trainer.current_gradient_accumulation_steps = 1
        model, batch = trainer.model.double(), one_batch()
        seen = []
        forward = in_fp64(model)

        def recorded(forward=forward, seen=seen, **inputs):
            seen.append(forward(**inputs))
            return seen[-1]

        trainer.compute_loss(recorded, batch)
        batch["old_log_probs"] = seen[0].log_probs.detach().flatten()[batch["token_index"]]
        loss = trainer.compute_loss(forward, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([param.grad.flatten() for param in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_the_baseline_is_the_clip(build):
    losses, gradients = [], []
    for trainer in (build(AsyncClipTrainer), build(AsyncGRPOTrainer, AsyncGRPOConfig)):
        trainer.current_gradient_accumulation_steps = 1
        model = trainer.model.double()
        loss = trainer.compute_loss(in_fp64(model), one_batch())
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([param.grad.flatten() for param in model.parameters()]))
    assert losses[0] == losses[1]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)


def test_the_metrics_are_those_of_the_trained_tokens(build):
    trainer = build()
    trainer.current_gradient_accumulation_steps = 1
    batch = one_batch(3)
    outputs = in_fp64(trainer.model.double())
    trainer.model.train()
    trainer.compute_loss(outputs, batch)
    trainer.log({})
    logged = trainer.state.log_history[-1]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "shift_labels")}
    tree = {name: batch[name][0] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    logps = outputs(**inputs, **tree, fused_lm_head=True).log_probs.flatten()[batch["token_index"][0]]
    ratio = (logps - batch["old_log_probs"][0]).exp().detach()
    assert logged["cfpo/tv"] == pytest.approx(((ratio - 1).abs().mean() / 2).item(), rel=1e-6)
    assert logged["cfpo/outside"] == pytest.approx(((ratio - 1).abs() > 0.2).float().mean().item())
    penalty = batch["advantages"][0].abs() * (ratio - 1) ** 2 / (2 * 0.2)
    assert logged["cfpo/penalty"] == pytest.approx(penalty.mean().item(), rel=1e-6)
    assert logged["cfpo/ratio_max"] == pytest.approx(ratio.max().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "epsilon=0.0 is no trust-region width"),
        ({"penalty_slope": 0.5}, "penalty_slope=0.5 bounds"),
        ({"importance_sampling_level": "word"}, "'word' is unknown; use one of token, sequence"),
    ],
)
def test_refused_before_any_model_is_loaded(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        AsyncCFPOTrainer("no/such/model", None, AsyncCFPOConfig(str(tmp_path), **CPU, **options))


@pytest.mark.parametrize("step", ["init_weight_transfer", "pause", "send_weights", "resume"])
def test_a_transfer_that_fails_stops_the_training_and_gathers_to_the_end(build, step):
    def fail(*arguments):
        raise ConnectionError("the server is gone")

    transfer = Transfer()
    setattr(transfer, step, fail)
    trainer = build(transfer=transfer)
    gathered = []
    original = trainer._streaming_iter
    trainer._streaming_iter = lambda: (gathered.append(name) or (name, param) for name, param in original())
    with pytest.raises(RolloutServerError, match=r"the vLLM server failed to .*: ConnectionError: the server is gone"):
        trainer.train()
    assert len(gathered) == len(list(original()))


def test_an_adapter_that_the_server_does_not_take_is_everybody_s_failure():
    calls = []

    class Client:
        def pause(self):
            calls.append("pause")

        def load_lora_adapter(self, name, path):
            raise ConnectionError("the server is gone")

        def resume(self):
            calls.append("resume")

    client = WatchedAdapters(Client(), "http://127.0.0.1:1")
    client.pause()
    client.load_lora_adapter("policy-v1", "folder")
    client.resume()
    assert calls == ["pause"]
    assert client.failure == "the vLLM server failed to load the adapter: ConnectionError: the server is gone"


class OldPolicies(Worker):
    """Writes each sample when it is asked for, by the policy that was the newest `age` versions before."""

    def __init__(self, path, transfer, age: int):
        super().__init__()
        self.rollout_buffer, self.transfer, self.age = self, transfer, age
        self.policy = AutoModelForCausalLM.from_pretrained(path)
        self.written = []  # samples with the version of their policy

    def qsize(self):
        return 0

    def logps(self, version: int, ids: torch.Tensor) -> torch.Tensor:
        """Of each token given those before it, by the policy of that version."""
        self.policy.load_state_dict(self.transfer.weights[version], strict=False)
        with torch.no_grad():
            return self.policy(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]

    def get(self, timeout):
        number = len(self.written)
        version = max(self.versions[-1] - self.age, 1)
        rng = random.Random(number)
        ids = torch.tensor(rng.choices(range(2, 2 + len(LETTERS)), k=6))
        old = [0.0, *self.logps(version, ids).tolist()]
        self.written.append((version, ids))
        mask = np.array([0, 0, 1, 1, 1, 1])
        advantage = float(ids[2] % 2) * 2 - 1  # so that the policy moves
        return RolloutSample([], [], ids.numpy(), mask, np.array(old), advantage, version, number, {})


class Silent(Worker):
    """Has no sample, and is not well."""

    def __init__(self):
        super().__init__()
        self.rollout_buffer = self

    def qsize(self):
        return 0

    def get(self, timeout):
        raise queue.Empty


class KeptTransfer(Transfer):
    """Keeps the weights of each version; the first is 1."""

    def __init__(self):
        self.weights = {}

    def send_weights(self, iterator):
        self.weights[len(self.weights) + 1] = {name: param.clone() for name, param in iterator}


@pytest.mark.parametrize("age", [1, 4, 16])
def test_samples_of_a_known_age_are_logged_as_such_with_the_ratios_of_the_two_policies(build, model, age):
    transfer = KeptTransfer()
    worker = OldPolicies(model, transfer, age - 1)  # one version passes while the micro-batch is held in advance
    trainer = build(transfer=transfer, worker=worker, max_staleness=age, max_steps=age + 4, learning_rate=3e-3)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "cfpo/tv" in entry]
    assert len(logs) == age + 4
    for step, entry in enumerate(logs[age:], start=age):
        batch = worker.written[4 * step : 4 * step + 4]
        assert {version for version, _ in batch} == {step + 1 - age}  # the policy of update `step` is version step + 1
        assert entry["staleness/mean"] == entry["staleness/max"] == age
        assert entry[f"staleness/share_{age}"] == 1
        logps = [[worker.logps(v, ids)[1:] for v in (step + 1, version)] for version, ids in batch]
        ratio = torch.cat([(new - old).exp() for new, old in logps]).double()
        tv = (ratio - 1).abs().mean().item() / 2
        assert entry["cfpo/tv"] == pytest.approx(tv, rel=1e-3, abs=1e-6)
        assert entry[f"cfpo/tv_{age}"] == pytest.approx(tv, rel=1e-3, abs=1e-6)
        ess = (ratio.sum() ** 2 / (len(ratio) * ratio.square().sum())).item()
        assert entry["cfpo/ess"] == pytest.approx(ess, rel=1e-3)
    assert logs[-1]["cfpo/tv"] > 1e-3


def test_older_samples_than_the_bound_are_dropped_where_they_would_be_trained(build, model):
    transfer = KeptTransfer()
    worker = OldPolicies(model, transfer, 2)
    worker.get = lambda timeout, get=worker.get: worker.alternate(get)
    worker.alternate = lambda get: (setattr(worker, "age", 2 - worker.age), get(None))[1]  # ages 0 and 2 at the queue
    trainer = build(transfer=transfer, worker=worker, max_staleness=2, max_steps=8)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "staleness/max" in entry]
    assert max(entry["staleness/max"] for entry in logs) <= 2
    assert sum(entry.get("sample/dropped_stale_total") or 0 for entry in logs) > 8
    assert logs[-1]["staleness/dropped"] == pytest.approx(0.5)
    held = 4 + 1  # the micro-batch that Accelerate holds, and the sample before it that was dropped
    assert set(range(len(worker.written) - 2 * held)) <= trainer._trained_groups  # what was dropped is done, too


@pytest.mark.parametrize(("budget", "least"), [(0, 1), (64, 2), (None, 2)])
def test_a_bound_that_no_sample_can_keep_is_refused(tmp_path, budget, least):
    args = AsyncCFPOConfig(str(tmp_path), max_staleness=least - 1, token_budget=budget, **CPU)
    with pytest.raises(ValueError, match=f"max_staleness={least - 1} cannot hold: .* Use {least} or more"):
        AsyncCFPOTrainer("no/such/model", None, args)


@pytest.mark.parametrize(
    ("options", "inflight", "waiting"),
    [
        ({"max_staleness": 4, "per_device_train_batch_size": 64}, 80, 80),  # 3 x 64 less 4 groups of 8, in two halves
        ({"max_staleness": 2, "per_device_train_batch_size": 64}, 16, 16),
        ({"max_staleness": 2, "per_device_train_batch_size": 16}, 8, 8),  # two groups at least
        ({"max_staleness": 4, "per_device_train_batch_size": 64, "max_inflight_tasks": 100}, 100, 60),
        ({"max_staleness": 4, "per_device_train_batch_size": 64, "queue_maxsize": 5}, 80, 5),
    ],
)
def test_no_more_is_written_than_the_bound_lets_train(tmp_path, options, inflight, waiting):
    args = AsyncCFPOConfig(str(tmp_path), **CPU, **options)
    assert args.queue_maxsize in (
        QUEUE,
        options.get("queue_maxsize"),
    )  # TRL's default is still the one that we exchange
    pace(args)
    assert (args.max_inflight_tasks, args.queue_maxsize) == (inflight, waiting)


def steps_saved(output) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in output.glob("checkpoint-*"))


def test_a_resumed_run_knows_the_prompts_that_were_done_out_of_turn(build, model, tmp_path):
    """Those behind a straggler: the first that is not done is TRL's `prompt_index`."""
    transfer = KeptTransfer()
    worker = OldPolicies(model, transfer, 0)
    get, numbers = worker.get, iter([0, 1, 3, 4, 6, 7, 8, 9, *range(20, 100)])

    def out_of_turn(timeout):
        sample = get(timeout)
        sample.group_id = next(numbers)
        return sample

    worker.get = out_of_turn
    build(transfer=transfer, worker=worker, max_steps=2, save_strategy="steps", save_steps=1).train()
    checkpoints = [tmp_path / "out" / f"checkpoint-{step}" for step in (1, 2)]
    done = [json.loads((checkpoint / "prompts_done.json").read_text()) for checkpoint in checkpoints]
    assert done == [[1, 2], [1, 2, 4, 5, 6, 7]]  # 3, 4 and then 6 to 9, counted from 2
    resumed = build(transfer=transfer, worker=worker, max_steps=2, save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=str(checkpoints[0]))
    assert {1, 2} <= resumed._trained_groups


def test_where_no_sample_comes_at_all_it_is_said_why(build):
    with pytest.raises(RolloutServerError, match="no more rollouts: no samples"):
        build(worker=Silent()).train()


def test_where_no_more_samples_come_all_stop_with_a_checkpoint(build, model, tmp_path):
    transfer = KeptTransfer()
    worker = OldPolicies(model, transfer, 0)

    def get(timeout, get=worker.get):
        if len(worker.written) == 14:  # three updates, and half of one more
            raise queue.Empty
        return get(timeout)

    worker.get = get
    trainer = build(transfer=transfer, worker=worker, max_steps=20)
    with pytest.raises(RolloutServerError, match="no more rollouts: no samples"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert steps_saved(tmp_path / "out") == [3]
    assert trainer._trained_groups == set(range(12))  # TRL resumes behind them; each sample is a group here


def test_where_the_server_takes_no_weights_the_update_is_saved(build, model, tmp_path):
    transfer = KeptTransfer()
    transfer.pause = lambda: 1 / (len(transfer.weights) < 3)
    trainer = build(transfer=transfer, worker=OldPolicies(model, transfer, 0), max_steps=20)
    with pytest.raises(RolloutServerError, match="the vLLM server failed to pause: ZeroDivisionError"):
        trainer.train()
    assert steps_saved(tmp_path / "out") == [3]
    whole = [entry["step"] for entry in trainer.state.log_history if entry.keys() >= {"cfpo/tv", "loss", "grad_norm"}]
    assert whole == [1, 2, 3]
    assert [entry["step"] for entry in trainer.state.log_history] == [1, 2, 3, 3]  # and the run's times


def test_a_server_that_takes_no_weights_when_a_run_goes_on_leaves_its_checkpoint_alone(build, model, tmp_path):
    transfer = KeptTransfer()
    saving = {"max_steps": 20, "save_strategy": "steps", "save_steps": 2}
    trainer = build(transfer=transfer, worker=OldPolicies(model, transfer, 0), **saving | {"max_steps": 2})
    trainer.train()
    state = tmp_path / "out" / "checkpoint-2" / "trainer_state.json"
    before = state.read_bytes()
    transfer.pause = lambda: 1 / 0
    with pytest.raises(RolloutServerError, match="the vLLM server failed to pause: ZeroDivisionError"):
        build(transfer=transfer, worker=OldPolicies(model, transfer, 0), **saving).train(
            resume_from_checkpoint=str(state.parent)
        )
    assert state.read_bytes() == before
    assert steps_saved(tmp_path / "out") == [2]


@pytest.mark.parametrize("request_", ["pause", "resume", "/collective_rpc"])
def test_a_server_that_ends_with_a_request_open_is_given_up(monkeypatch, tmp_path, request_):
    """As vLLM's does on SIGTERM: it listens no more, and waits for requests that its dead engine never answers."""
    monkeypatch.setattr(health, "PATIENCE", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        client = SimpleNamespace(server_url=url)
        client.pause = client.resume = lambda: requests.post(url, timeout=1800)
        transfer = WatchedTransfer(FolderTransfer(client, tmp_path), url)
        opened = []

        def accept():
            opened.append(listener.accept())
            listener.close()

        threading.Thread(target=accept, daemon=True).start()
        if request_ == "/collective_rpc":
            transfer.send_weights(iter([("weight", torch.zeros(2))]))
        else:
            getattr(transfer, request_)()
        assert len(opened) == 1
        assert f"RolloutServerError: The vLLM server at {url} is gone (1 s)" in transfer.failure


def test_a_server_is_given_up_when_it_has_been_unwell_for_long(monkeypatch):
    times, problems = iter([0.0, 10.0, 20.0, 45.0, 55.0, 80.0]), iter(["x", None, "x", "x", None, "x"])
    monkeypatch.setattr(health.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(health, "health_problem", lambda url: next(problems))
    server = PatientHealth("http://127.0.0.1:1")
    for _ in range(4):  # unwell at 0, well at 10, unwell at 20 and 45: 25 s
        server.check()
    server.check()
    server.check()
    monkeypatch.setattr(health.time, "monotonic", lambda: 111.0)
    monkeypatch.setattr(health, "health_problem", lambda url: "it does not answer")
    with pytest.raises(RolloutServerError, match=r"http://127.0.0.1:1 is gone \(30 s\): it does not answer"):
        server.check()


def test_lora_trains_and_the_server_gets_merged_weights(build, model):
    transfer = KeptTransfer()
    lora = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", exclude_modules=["lm_head"])
    worker = OldPolicies(model, transfer, 0)
    trainer = build(transfer=transfer, worker=worker, peft_config=lora, learning_rate=1e-2, max_steps=6)
    trainer.train()
    base = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    first, last = transfer.weights[1], transfer.weights[7]
    assert first.keys() == last.keys() == base.keys()
    assert all(torch.equal(first[name], base[name]) for name in base)  # an adapter begins at zero
    moved = {name for name in base if not torch.equal(first[name], last[name])}
    assert moved == {name for name in base if "proj.weight" in name}
    merged = trainer.model.merge_and_unload()
    for name, param in merged.named_parameters():
        torch.testing.assert_close(last[name], param, rtol=0, atol=1e-6)
    logs = [entry for entry in trainer.state.log_history if "cfpo/tv" in entry]
    assert logs[0]["cfpo/tv"] == pytest.approx(0, abs=1e-5)
    assert logs[-1]["cfpo/tv"] > 1e-3


def as_samples(batch: dict, group: int) -> list[RolloutSample]:
    """GRPOTrainer's batch as the rollout process would hand it over: without padding."""
    rows = []
    for place, advantage in enumerate(batch["advantages"].tolist()):
        prompt = batch["prompt_ids"][place][batch["prompt_mask"][place].bool()]
        counted = batch["completion_mask"][place].bool()
        completion, logps = (batch[name][place][counted] for name in ("completion_ids", "old_per_token_logps"))
        ids, mask = [*prompt, *completion], [0] * len(prompt) + [1] * len(completion)
        old = [0.0] * len(prompt) + logps.tolist()
        arrays = np.array(ids), np.array(mask), np.array(old, dtype=np.float32)
        rows.append(RolloutSample([], [], *arrays, advantage, 1, group + place, {}))
    return rows


@pytest.mark.parametrize("widths", WIDTHS, ids=WIDTH_NAMES)
def test_one_update_is_that_of_the_synchronous_trainer_on_the_same_completions(build, build_trainer, widths):
    """With `loss_type: dapo`, which divides by the trained tokens of the batch, as asynchronous training does."""
    options = {"loss_type": "dapo", "num_iterations": 2, "max_steps": 1, "per_device_train_batch_size": 16}
    synchronous = build_trainer(CFPOTrainer, CFPOConfig, **options, **widths)
    batches, generate = [], synchronous._generate_and_score_completions

    def off_policy(inputs):
        batch = generate(inputs)
        noise = torch.randn(batch["old_per_token_logps"].shape, generator=torch.Generator().manual_seed(0))
        batch["old_per_token_logps"] = batch["old_per_token_logps"] + 0.3 * noise
        batches.append({name: value.clone() for name, value in batch.items() if torch.is_tensor(value)})
        return batch

    synchronous._generate_and_score_completions = off_policy
    synchronous.train()
    worker = Worker()
    for copy in range(2):  # Accelerate takes one micro-batch in advance
        for sample in as_samples(batches[0], 16 * copy):
            worker.rollout_buffer.put(sample)
    trainer = build(worker=worker, per_device_train_batch_size=16, max_steps=1, **widths)
    trainer.train()
    ours, theirs = trainer.state.log_history[0], synchronous.state.log_history[0]
    assert ours["cfpo/tv"] > 0.05
    means = ("cfpo/tv", "cfpo/penalty", "cfpo/outside")  # over tokens here, there over completions
    for name in ("grad_norm", "cfpo/ratio_max", *(means if "importance_sampling_level" not in widths else ())):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    for (name, mine), other in zip(trainer.model.named_parameters(), synchronous.model.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-5), name
