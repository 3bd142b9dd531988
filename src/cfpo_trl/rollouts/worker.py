"""What runs inside vLLM's workers: new weights in, by vLLM's own reload."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn


class PolicyReload:
    """Extends vLLM's worker (`--worker-extension-cls cfpo_trl.rollouts.worker.PolicyReload`) by one remote call."""

    # The worker's own
    reload_weights: Callable[..., None]
    get_model: Callable[[], nn.Module]

    def reload_policy(self, folder: str) -> None:
        """Reads the weights that the trainer wrote into `folder`.

        Raises:
            FileNotFoundError: this machine does not see the trainer's folder.
        """
        if not list(Path(folder).glob("*.safetensors")):
            raise FileNotFoundError(f"no weights in {folder} on the machine of the vLLM server")
        self.reload_weights(weights_path=folder)
        repack_output_head(self.get_model())


def repack_output_head(model: nn.Module) -> None:
    """Repacks the output head for vLLM's CPU kernels; elsewhere there is nothing to pack.

    Where the head shares the embedding's weights, `reload_weights` updates these, but not the packed copy that the
    head computes with: without this, a model with tied embeddings samples by its old head.
    """
    head: Any = getattr(model, "lm_head", None)
    if getattr(head, "quant_method", None) is not None:
        head.quant_method.process_weights_after_loading(head)
