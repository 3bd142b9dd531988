"""Rollouts by vLLM where TRL's own way ends: no CUDA to send weights by, and a server that fails during the run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor
from trl import GRPOConfig
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer

from .health import RolloutServerError, watched
from .server import sync_folder
from .weights import reload_request, write_weights
from .worker import repack_output_head


@contextmanager
def vllm_generation_for(args: GRPOConfig) -> Iterator[None]:
    """Trainers built in this block, CFPO's and GRPO's, roll out with [`ServerRollouts`] or [`ColocatedRollouts`]."""
    original = grpo_trainer.VLLMGeneration
    if args.vllm_mode == "server":
        grpo_trainer.VLLMGeneration = partial(ServerRollouts, sync_folder=sync_folder(args))
    else:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM would take most of the machine's memory
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # vLLM would bind the trainer's threads, too
        grpo_trainer.VLLMGeneration = ColocatedRollouts
    try:
        yield
    finally:
        grpo_trainer.VLLMGeneration = original


class ColocatedRollouts(VLLMGeneration):
    """vLLM in the trainer's process, without CUDA: its CPU kernels pack the weights, so vLLM itself must load them."""

    def _init_vllm(self) -> None:
        # TRL leaves the dtype to vLLM, which would turn float32 weights into bfloat16.
        original = vllm_generation.LLM
        vllm_generation.LLM = partial(original, dtype=self.model.dtype, enforce_eager=True)
        try:
            super()._init_vllm()
        finally:
            vllm_generation.LLM = original

    def sync_weights(self) -> None:
        # Copies, because a gathered (ZeRO-3) or merged (LoRA) parameter lives no longer than its turn.
        weights = [(name, param.detach().clone()) for name, param in self._iter_named_params()]
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.apply_model(repack_output_head)
        self.llm.reset_prefix_cache()


class ServerRollouts(VLLMGeneration):
    """Rollouts from a vLLM server; when it fails, every process raises the same `RolloutServerError`.

    Args:
        sync_folder: Where the main process writes the weights for the server to read; None sends them by NCCL.
    """

    def __init__(self, *args: Any, sync_folder: Path | None, **kwargs: Any):
        self.sync_folder = sync_folder
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        if self.accelerator.is_main_process:
            url = self.server_base_url or f"http://{self.server_host}:{self.server_port}"
            self.vllm_client = WatchedClient(url.rstrip("/"), group_port=self.group_port)
            if self.sync_folder is None:
                self.vllm_client.init_communicator(device=self.accelerator.device)
        self.accelerator.wait_for_everyone()

    def sync_weights(self) -> None:
        failure: list[RolloutServerError | None] = [None]
        try:
            if self.sync_folder is None:
                super().sync_weights()
            else:
                self._sync_by_folder(self.sync_folder)
        except RolloutServerError as error:
            failure = [error]
        broadcast_object_list(failure)  # the other processes only gather: they cannot know
        if failure[0]:
            raise failure[0]

    def _sync_by_folder(self, folder: Path) -> None:
        weights = self._iter_named_params()  # gathered by all processes together
        if self.accelerator.is_main_process:
            try:
                write_weights(weights, folder)
            except OSError as error:  # a full disk
                for _ in weights:  # the other processes gather to the end
                    pass
                raise RolloutServerError(f"The policy's weights cannot be written to {folder}: {error}") from error
            self.vllm_client.reload_policy(folder)
            self.vllm_client.reset_prefix_cache()
        else:
            for _ in weights:
                pass

    def generate(self, *args: Any, **kwargs: Any) -> tuple:
        try:
            return super().generate(*args, **kwargs)
        except RolloutServerError as error:
            if self.accelerator.is_main_process:
                broadcast_object_list([error])  # the other processes wait for completions: to unpack it raises
            raise


class WatchedClient(VLLMClient):
    """TRL's client, which gives a request up when the server has been unwell for `PATIENCE` seconds.

    Raises:
        RolloutServerError: the server is gone, or refuses a request.
    """

    def reload_policy(self, folder: Path) -> None:
        """Makes the server read the weights in `folder`."""
        self._post(**reload_request(self.base_url, folder))

    def update_named_params(self, metadata: list, named_params: Iterator[tuple[str, Tensor]]) -> None:
        try:
            super().update_named_params(metadata, named_params)
        except RolloutServerError:
            for _ in named_params:  # the other processes gather to the end
                pass
            raise

    def _post(self, url: str, **kwargs: Any) -> Any:
        try:
            return watched(self.base_url, super()._post, url, **kwargs)
        except RolloutServerError:
            raise
        except Exception as error:
            raise RolloutServerError(f"The vLLM server failed at {url}: {error}") from error
