"""What can be said of vLLM rollouts without vLLM: the command, the checks, the weights on disk, a silent server."""

import importlib.util
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import requests
import torch
from safetensors.torch import load_file
from trl import ModelConfig

from cfpo_trl import CFPOConfig
from cfpo_trl.rollouts import health
from cfpo_trl.rollouts import weights as weights_module
from cfpo_trl.rollouts.generation import ServerRollouts, WatchedClient
from cfpo_trl.rollouts.health import RolloutServerError
from cfpo_trl.rollouts.server import check_vllm, serve_command
from cfpo_trl.rollouts.serving import end_all, serving
from cfpo_trl.rollouts.weights import write_weights
from conftest import CPU

MODEL = ModelConfig(model_name_or_path="some/model", dtype="float32")
HAS_VLLM = importlib.util.find_spec("vllm") is not None


def config(tmp_path, **options) -> CFPOConfig:
    return CFPOConfig(str(tmp_path), use_vllm=True, vllm_mode="server", max_completion_length=100, **CPU, **options)


def options_of(command: list[str]) -> dict[str, str]:
    return {name: value for name, value in zip(command, [*command[1:], ""], strict=True) if name.startswith("--")}


def test_command_on_a_cpu(tmp_path):
    command = serve_command(config(tmp_path, vllm_server_base_url="http://10.0.0.1:9000/"), MODEL, 28)
    options = options_of(command)
    assert options["--model"] == "some/model"
    assert (options["--host"], options["--port"]) == ("10.0.0.1", "9000")
    assert options["--dtype"] == "float32"
    assert options["--max-model-len"] == "128"
    assert options["--logprobs-mode"] == "processed_logprobs"
    assert options["--max-logprobs"] == "-1"
    assert options["--worker-extension-cls"] == "cfpo_trl.rollouts.worker.PolicyReload"
    assert "--weight-transfer-config" not in options


def test_a_server_that_does_not_start_is_told_with_its_log(tmp_path):
    recipe, log = tmp_path / "recipe.yaml", tmp_path / "server.log"
    recipe.write_text("vllm_server_port: 1\nreward_funcs: []\n")
    with pytest.raises(RuntimeError, match=rf"ended with status [12]; its log is {log}"), serving(recipe, log):
        pytest.fail("it was healthy")
    assert "reward_funcs is empty" in log.read_text()


def test_all_that_a_server_started_ends_with_it(tmp_path):
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        child = psutil.Process(int(process.stdout.readline()))
        end_all(process)
        assert not psutil.wait_procs([child], timeout=5)[1]
        assert process.returncode == -signal.SIGTERM


def test_command_on_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    args = config(tmp_path, vllm_tensor_parallel_size=2)
    args.bf16 = True
    command = serve_command(args, MODEL, None)
    options = options_of(command)
    assert command[:3] == ["vllm", "serve", "some/model"]
    assert options["--dtype"] == "bfloat16"
    assert (options["--tensor-parallel-size"], options["--data-parallel-size"]) == ("2", "2")
    assert options["--weight-transfer-config"] == '{"backend": "nccl"}'
    assert not {"--max-model-len", "--worker-extension-cls", "--enforce-eager"} & set(command)
    args.vllm_sync_dir = "/shared/weights"
    assert options_of(serve_command(args, MODEL, None))["--worker-extension-cls"]


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_vllm_is_missing(tmp_path):
    with pytest.raises(ImportError, match=r"pip install 'cfpo_trl\[vllm\]'"):
        check_vllm(config(tmp_path), MODEL, None)


@pytest.mark.parametrize(
    ("options", "version", "message"),
    [
        ({"vllm_mode": "colocate", "vllm_enable_sleep_mode": True}, "1.16.0", "vllm_enable_sleep_mode=True frees GPU"),
        ({}, "1.15.0", "vllm_mode='server' needs trl>=1.16 here, and 1.15.0 is installed"),
    ],
)
def test_refusals(tmp_path, monkeypatch, options, version, message):
    monkeypatch.setattr("cfpo_trl.rollouts.server.find_spec", lambda name: "found")
    monkeypatch.setattr("trl.__version__", version)
    args = config(tmp_path)
    for name, value in options.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        check_vllm(args, MODEL, None)


def test_weights_are_written_in_shards_over_the_last_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_module, "SHARD_BYTES", 40)
    for layers, scale in ((9, 1.0), (3, 2.0)):  # a larger policy was there before
        weights = {f"layer{i}": torch.full((4, 2), scale * i) for i in range(layers)}
        write_weights(weights.items(), tmp_path / "policy")
    files = sorted((tmp_path / "policy").iterdir())
    assert [file.name for file in files] == ["policy-00000.safetensors", "policy-00001.safetensors"]
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.fixture
def silent_server():
    """Accepts connections and never answers: a host that hangs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def client(silent_server, monkeypatch):
    monkeypatch.setattr(health, "PATIENCE", 3.0)
    monkeypatch.setattr("cfpo_trl.rollouts.health.SECONDS_TO_ANSWER", 0.5)
    client = WatchedClient.__new__(WatchedClient)  # its constructor asks for vLLM, and waits for the server
    client.session, client.base_url, client._updating_weights = requests.Session(), silent_server, False
    return client


def test_a_server_that_hangs_is_given_up(client):
    start = time.monotonic()
    with pytest.raises(RolloutServerError, match=r"is gone \(3 s\)"):
        client._post(f"{client.base_url}/v1/completions", json={})
    assert time.monotonic() - start < 15


def test_a_server_that_refuses_says_why(client):
    client.base_url = "http://127.0.0.1:1"  # nothing listens
    with pytest.raises(RolloutServerError, match="failed at http://127.0.0.1:1/v1/completions"):
        client._post(f"{client.base_url}/v1/completions", json={})


def test_weights_that_cannot_be_written_stop_all_processes(tmp_path, monkeypatch):
    """A full disk on the main process: the others, which only gather, learn of it by the same error."""
    rollouts = ServerRollouts.__new__(ServerRollouts)  # its constructor asks for a server
    rollouts.sync_folder, rollouts.accelerator = tmp_path, SimpleNamespace(is_main_process=True)
    gathered = []
    rollouts._iter_named_params = lambda: ((gathered.append(n) or n, torch.zeros(2)) for n in ("a", "b", "c"))

    def fail(shard, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_module, "SHARD_BYTES", 1)
    monkeypatch.setattr(weights_module, "save_file", fail)
    with pytest.raises(RolloutServerError, match=r"weights cannot be written to .*: .*No space left on device"):
        rollouts.sync_weights()
    assert gathered == ["a", "b", "c"]


def test_weights_are_gathered_to_the_end_when_the_server_fails(client):
    client.base_url = "http://127.0.0.1:1"
    gathered = []

    def params():
        for name in ("first", "second"):
            gathered.append(name)
            yield name, torch.zeros(1)

    metadata = [(name, "float32", [1]) for name in ("first", "second")]
    with pytest.raises(RolloutServerError):
        client.update_named_params(metadata, params())
    assert gathered == ["first", "second"]  # the other processes take part in each gather


def test_a_failure_sent_in_place_of_completions_raises_where_it_is_unpacked():
    with pytest.raises(RolloutServerError, match="gone"):
        _prompts, _completions = RolloutServerError("gone")
