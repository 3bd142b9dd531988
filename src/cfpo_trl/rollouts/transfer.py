"""How an asynchronous trainer's weights get to the vLLM server: through a folder; its failures are everybody's."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests
from torch import Tensor

from .health import watched
from .weights import reload_request, write_weights

logger = logging.getLogger("cfpo_trl")

SECONDS_TO_LOAD = 1800.0


class FolderTransfer:
    """Hands the weights over in a folder that trainer and server both see; needs no NCCL, and no GPU.

    An implementation of [`~trl.experimental.async_grpo.async_grpo_trainer.WeightTransferProtocol`].

    Args:
        client: TRL's client of the server, which `cfpo serve` started.
        folder: Where the weights are written.
    """

    def __init__(self, client: Any, folder: Path):
        self.client, self.folder = client, folder

    def init_weight_transfer(self) -> None:
        self.client.wait_for_server_ready()

    def pause(self) -> None:
        self.client.pause()

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        """Raises an `HTTPError` with the server's answer where it cannot read them."""
        write_weights(iterator, self.folder)
        self._post(**reload_request(self.client.server_url, self.folder))
        self._post(f"{self.client.server_url}/reset_prefix_cache")  # what it holds was computed by the old weights

    def resume(self) -> None:
        self.client.resume()

    def destroy(self) -> None:
        pass

    def _post(self, url: str, **request: Any) -> None:
        answer = watched(self.client.server_url, requests.post, url, timeout=SECONDS_TO_LOAD, **request)
        if not answer.ok:
            raise requests.HTTPError(f"{url} answers with status {answer.status_code}: {answer.text[:500]}")


class Watched:
    """Keeps the first failure for [`AsyncCFPOTrainer`], which raises it on all processes together.

    Without that, the others would wait for the main process until their collective's time-out.

    Args:
        sender: What talks to the server.
        url: Of the server.
    """

    def __init__(self, sender: Any, url: str):
        self.sender, self.url = sender, url
        self.failure: str | None = None

    def _ask(self, action: str, function: Callable[..., None], *arguments: Any) -> None:
        """A request alone, which is given up with the server."""
        self._run(action, watched, self.url, function, *arguments)

    def _run(self, action: str, function: Callable[..., None], *arguments: Any) -> None:
        if self.failure is not None:
            return
        try:
            function(*arguments)
        except Exception as error:
            logger.exception("The vLLM server: %s", action)
            self.failure = f"the vLLM server failed to {action}: {type(error).__name__}: {error}"


class WatchedTransfer(Watched):
    """A transfer of weights."""

    def init_weight_transfer(self) -> None:
        self._run("set up", self.sender.init_weight_transfer)

    def pause(self) -> None:
        self._ask("pause", self.sender.pause)

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        self._run("send weights", self.sender.send_weights, iterator)
        for _ in iterator:  # the other processes gather to the end
            pass

    def resume(self) -> None:
        self._ask("resume", self.sender.resume)

    def destroy(self) -> None:
        self.sender.destroy()


class WatchedAdapters(Watched):
    """TRL's client of a server that is sent the adapter alone, once it is up."""

    def pause(self) -> None:
        self._ask("pause", self.sender.pause)

    def load_lora_adapter(self, name: str, path: str) -> None:
        self._ask("load the adapter", self.sender.load_lora_adapter, name, path)

    def resume(self) -> None:
        self._ask("resume", self.sender.resume)

    def unload_lora_adapter(self, name: str) -> None:
        self._ask("unload an adapter", self.sender.unload_lora_adapter, name)
