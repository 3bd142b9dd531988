"""How an asynchronous trainer's weights get to the vLLM server: through a folder; its failures are everybody's."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests
from torch import Tensor

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
        answer = requests.post(url, timeout=SECONDS_TO_LOAD, **request)
        if not answer.ok:
            raise requests.HTTPError(f"{url} answers with status {answer.status_code}: {answer.text[:500]}")


class WatchedTransfer:
    """A transfer whose first failure is kept for [`AsyncCFPOTrainer`], which raises it on all processes together.

    Without that, the others would wait for the main process until their collective's time-out.
    """

    def __init__(self, transfer: Any):
        self.transfer = transfer
        self.failure: str | None = None

    def init_weight_transfer(self) -> None:
        self._run("set up", self.transfer.init_weight_transfer)

    def pause(self) -> None:
        self._run("pause", self.transfer.pause)

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        self._run("send weights", self.transfer.send_weights, iterator)
        for _ in iterator:  # the other processes gather to the end
            pass

    def resume(self) -> None:
        self._run("resume", self.transfer.resume)

    def destroy(self) -> None:
        self.transfer.destroy()

    def _run(self, action: str, function: Callable[..., None], *arguments: Any) -> None:
        if self.failure is not None:
            return
        try:
            function(*arguments)
        except Exception as error:
            logger.exception("The vLLM server: %s", action)
            self.failure = f"the vLLM server failed to {action}: {type(error).__name__}: {error}"
