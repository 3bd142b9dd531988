"""A model behind an OpenAI-compatible server: started here for a checkpoint, or one that runs already."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from lighteval.models.abstract_model import LightevalModel, ModelConfig
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.prompt_manager import PromptManager
from lighteval.tasks.requests import Doc
from lighteval.utils.cache_management import SampleCache
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ..rollouts.health import health_problem
from .errors import EvaluationError

CONCURRENT = 64  # requests at a time
# Said, because a server takes what is not said from the checkpoint's generation_config.json.
NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class ServerError(EvaluationError):
    """The server did not start, refused a request, or went away."""


@contextmanager
def serving(command: list[str], log: Path, seconds: float) -> Iterator[str]:
    """Runs `vllm serve`, or the module that does the same, for the block; gives its address, once it is healthy.

    Raises:
        ServerError: it ended, or was not healthy in time; the end of its log is in the message.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ,  # GiB; else most of the memory, on a CPU
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + seconds
        while (problem := health_problem(url)) is not None:
            if server.poll() is not None or time.monotonic() > deadline:
                ended = f"ended with status {server.returncode}" if server.returncode is not None else problem
                tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:])
                raise ServerError(f"The server was not healthy within {seconds:g} s: {ended}. Its last lines:\n{tail}")
            time.sleep(0.5)
        yield url
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


class ServerConfig(ModelConfig):
    """Configuration of [`ServerModel`], as lighteval records it.

    Args:
        url: Address of the server.
        tokenizer: Path or name of the tokenizer, whose chat template renders the questions.
    """

    url: str
    tokenizer: str


class ServerModel(LightevalModel):
    """Asks by token ids, so that the prompt is the one that the transformers backend sees.

    Raises:
        ServerError: a request failed.
    """

    def __init__(self, config: ServerConfig):
        self.config = config
        self._tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
        self.prompt_manager = PromptManager(
            use_chat_template=self._tokenizer.chat_template is not None,
            tokenizer=self._tokenizer,
            system_prompt=config.system_prompt,
        )
        self._cache = SampleCache(config)  # lighteval wants one; nothing is read from it
        served = self._ask("GET", "/v1/models")["data"][0]
        self.served, self._max_length = served["id"], served.get("max_model_len") or 2**20

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    @property
    def add_special_tokens(self) -> bool:
        return self._tokenizer.chat_template is None  # a template writes its own

    @property
    def max_length(self) -> int:
        return self._max_length

    def greedy_until(self, docs: list[Doc]) -> list[ModelResponse]:
        """Completions of each question, sampled or greedy as the generation parameters say."""
        with ThreadPoolExecutor(CONCURRENT) as executor:
            return list(executor.map(self._complete, docs, range(len(docs))))

    def _complete(self, doc: Doc, index: int) -> ModelResponse:
        parameters = self.config.generation_parameters
        prompt = self.prompt_manager.prepare_prompt(doc)
        ids = self._tokenizer.encode(prompt, add_special_tokens=self.add_special_tokens)
        room = self._max_length - len(ids)
        body = {
            "model": self.served,
            "prompt": ids,
            "n": doc.num_samples,
            "temperature": parameters.temperature,
            "top_p": parameters.top_p or 1.0,
            "top_k": 0,
            **NEUTRAL,
            "seed": parameters.seed + index,
            "max_tokens": room if doc.generation_size is None else min(doc.generation_size, room),
            "stop": list(doc.stop_sequences or ()),
            "return_token_ids": True,
        }
        choices = self._ask("POST", "/v1/completions", json=body)["choices"]
        return ModelResponse(
            input=prompt,
            input_tokens=ids,
            text=[choice["text"] for choice in choices],
            output_tokens=[choice["token_ids"] for choice in choices],
        )

    def _ask(self, method: str, path: str, **body: Any) -> dict:
        try:
            response = requests.request(method, self.config.url + path, timeout=3600, **body)
        except requests.RequestException as error:
            raise ServerError(f"The server at {self.config.url} does not answer {path}: {error}") from error
        if response.status_code != 200:
            raise ServerError(f"The server at {self.config.url} refuses {path}: {response.text[:500]}")
        return response.json()

    def loglikelihood(self, docs: list[Doc]) -> list[ModelResponse]:
        raise NotImplementedError("only generated answers are scored")

    def loglikelihood_rolling(self, docs: list[Doc]) -> list[ModelResponse]:
        raise NotImplementedError("only generated answers are scored")


def vllm_command(model: str, gpus: int, parallel: str, python: str | None) -> list[str]:
    """The command that serves a checkpoint: vLLM's own, or the module in the environment of `python`, for a CPU."""
    serve = [python, "-m", "vllm.entrypoints.openai.api_server", "--model"] if python else ["vllm", "serve"]
    # vLLM turns float32 into half precision unless told
    command = [*serve, model, "--dtype", str(AutoConfig.from_pretrained(model).dtype or "auto").removeprefix("torch.")]
    if gpus > 1:
        command += [f"--{parallel}-parallel-size", str(gpus)]
    if python:
        command.append("--enforce-eager")
    return command
