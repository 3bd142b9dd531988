"""The vLLM server of a recipe: the command that starts it, and what must hold before training."""

import json
import logging
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import requests
import torch
import trl
from packaging.version import Version
from trl import GRPOConfig, ModelConfig

from .health import SECONDS_TO_ANSWER, health_problem

logger = logging.getLogger(__name__)

WORKER = "cfpo_trl.rollouts.worker.PolicyReload"
API_SERVER = "vllm.entrypoints.openai.api_server"
START = "`cfpo serve --config <recipe>` starts the right one."
SEAM = Version("1.16")  # from here on TRL talks to vLLM's own server


def trl_rolls_out(args: GRPOConfig) -> bool:
    """Whether TRL's own rollouts do: without vLLM, or with vLLM colocated on GPUs."""
    return not args.use_vllm or (args.vllm_mode == "colocate" and torch.cuda.is_available())


def check_vllm(args: GRPOConfig, model_args: ModelConfig, max_prompt_length: int | None) -> None:
    """Raises what would keep a run with vLLM from rolling out, before any model is loaded.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: the options do not fit the machine or TRL's version; or see [`check_server`].
        ConnectionError: see [`check_server`].
    """
    if find_spec("vllm") is None:
        raise ImportError("use_vllm=True needs vLLM: `pip install 'cfpo_trl[vllm]'`, or set use_vllm=False.")
    if not trl_rolls_out(args) and Version(trl.__version__) < SEAM:
        raise ValueError(f"vllm_mode={args.vllm_mode!r} needs trl>={SEAM} here, and {trl.__version__} is installed.")
    if getattr(args, "vllm_enable_sleep_mode", False) and not torch.cuda.is_available():
        raise ValueError("vllm_enable_sleep_mode=True frees GPU memory, and there is no GPU; set it to False.")
    if args.vllm_mode == "server" and args.process_index == 0:  # the other processes never talk to the server
        check_server(args, model_args, max_prompt_length)


def server_url(args: GRPOConfig) -> str:
    """Where the server listens: `vllm_server_base_url`, or `vllm_server_host` and `vllm_server_port`."""
    return (args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}").rstrip("/")


def sync_folder(args: GRPOConfig) -> Path | None:
    """The folder through which the server gets new weights; None where TRL sends them by NCCL."""
    if getattr(args, "vllm_sync_dir", None):
        return Path(args.vllm_sync_dir).absolute()
    return None if torch.cuda.is_available() else Path(args.output_dir, "vllm_weights").absolute()


def serve_command(args: GRPOConfig, model_args: ModelConfig, max_prompt_length: int | None) -> list[str]:
    """The command of the server that a recipe's training needs; it wants `VLLM_SERVER_DEV_MODE=1` in its environment.

    Flags: https://huggingface.co/docs/trl/vllm_integration. The model, its dtype in the rollouts, the longest
    sequence, and the log-probs after temperature and truncation are the recipe's. The server takes all GPUs that it
    sees: `vllm_tensor_parallel_size` of them for each copy of the model. Where the recipe names no host, this machine
    alone reaches it.
    """
    copies = torch.cuda.device_count() // args.vllm_tensor_parallel_size
    host, _, port = server_url(args).rpartition("//")[2].partition("/")[0].partition(":")
    options = {
        # TRL's default, 0.0.0.0, is every network of the machine, and who reaches the server can load weights into it.
        "host": "127.0.0.1" if host == "0.0.0.0" else host,
        "port": port or "80",
        "revision": model_args.model_revision,
        "dtype": "bfloat16" if args.bf16 else "float16" if args.fp16 else model_args.dtype,
        "max-model-len": model_length(args, max_prompt_length),
        "tensor-parallel-size": args.vllm_tensor_parallel_size,
        "data-parallel-size": copies if copies > 1 else None,
        "model-impl": args.vllm_model_impl,
        "logprobs-mode": "processed_logprobs",
        "max-logprobs": -1,
    }
    if sync_folder(args):
        options["worker-extension-cls"] = WORKER
    else:
        options["weight-transfer-config"] = json.dumps({"backend": "nccl"})
    # vLLM's own command does not start from its CPU build, the module does.
    serve = ["vllm", "serve"] if torch.cuda.is_available() else [sys.executable, "-m", API_SERVER, "--model"]
    command = [*serve, model_args.model_name_or_path]
    for name, value in options.items():
        if value is not None:
            command += [f"--{name}", str(value)]
    if not torch.cuda.is_available():
        command.append("--enforce-eager")
    if getattr(args, "trust_remote_code", False):
        command.append("--trust-remote-code")
    return command


def model_length(args: GRPOConfig, max_prompt_length: int | None) -> int | None:
    """Tokens of the longest prompt and completion, where the recipe bounds both."""
    if args.vllm_max_model_length is not None:
        return args.vllm_max_model_length
    return None if max_prompt_length is None else max_prompt_length + args.max_completion_length


def check_server(args: GRPOConfig, model_args: ModelConfig, max_prompt_length: int | None) -> None:
    """Waits up to `vllm_server_timeout` seconds for the server, and checks that it is the one of this recipe.

    Raises:
        ConnectionError: it does not answer in time.
        ValueError: it serves another model or too short sequences, or lacks what weights and log-probs need.
    """
    url = server_url(args)
    wait_for_health(url, args.vllm_server_timeout)
    served = get_json(url, "/v1/models")["data"][0]
    model = model_args.model_name_or_path
    if model not in (served["id"], served["root"]):
        raise ValueError(f"The vLLM server at {url} serves {served['root']!r}, the recipe trains {model!r}. {START}")
    needed = model_length(args, max_prompt_length) or args.max_completion_length
    if served["max_model_len"] < needed:
        raise ValueError(
            f"The vLLM server at {url} holds sequences of {served['max_model_len']} tokens (--max-model-len), the "
            f"recipe needs {needed}. {START}"
        )
    config = get_json(url, "/server_info?config_format=json")["vllm_config"]
    mode = config["model_config"]["logprobs_mode"]
    reads_logprobs = getattr(args, "vllm_importance_sampling_correction", True)  # asynchronous training always does
    if reads_logprobs and mode != "processed_logprobs":
        raise ValueError(
            f"The vLLM server at {url} runs with --logprobs-mode {mode}, and importance sampling needs "
            f"processed_logprobs. {START}"
        )
    if sync_folder(args) and config["parallel_config"]["worker_extension_cls"] != WORKER:
        raise ValueError(f"The vLLM server at {url} lacks --worker-extension-cls {WORKER}. {START}")
    if not sync_folder(args) and config["weight_transfer_config"] is None:
        raise ValueError(f"The vLLM server at {url} lacks --weight-transfer-config. {START}")


def wait_for_health(url: str, seconds: float, between: Callable[[], None] = lambda: None) -> None:
    """Returns as soon as the server is healthy; a `ConnectionError` says what it answered instead.

    `between` is called between two looks, and may raise.
    """
    deadline = time.monotonic() + seconds
    told = 0.0
    while (problem := health_problem(url)) is not None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ConnectionError(
                f"No vLLM server at {url} within vllm_server_timeout={seconds:g} s: {problem}. {START} If it is still "
                "loading its model, wait, or raise vllm_server_timeout."
            )
        if time.monotonic() - told > 10:
            logger.info("Waiting for the vLLM server at %s, %.0f s more: %s", url, left, problem)
            told = time.monotonic()
        between()
        time.sleep(min(1.0, left))


def get_json(url: str, path: str) -> Any:
    """The answer of an endpoint; a `ValueError` says which one a server lacks."""
    response = requests.get(f"{url}{path}", timeout=SECONDS_TO_ANSWER * 6)
    if response.status_code != 200:
        raise ValueError(
            f"The server at {url} answers {path} with status {response.status_code}; it must be vLLM's, with "
            f"VLLM_SERVER_DEV_MODE=1 in its environment. {START}"
        )
    return response.json()
