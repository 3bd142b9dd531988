"""The policy's weights in a folder, for a vLLM server to read."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 2 * 2**30


def reload_request(server_url: str, folder: Path) -> dict[str, Any]:
    """The request by which a server that `cfpo serve` started reads the weights in `folder`; arguments of a POST."""
    body = {"method": "reload_policy", "kwargs": {"folder": str(folder)}}
    return {"url": f"{server_url}/collective_rpc", "json": body}


def write_weights(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Writes the weights as safetensors of at most about `SHARD_BYTES` each, in place of those of the last time."""
    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, Tensor] = {}
    number = 0
    for name, param in weights:
        shard[name] = param.detach().to("cpu", copy=True).contiguous()
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            write_shard(shard, folder / f"policy-{number:05}.safetensors")
            shard, number = {}, number + 1
    if shard:
        write_shard(shard, folder / f"policy-{number:05}.safetensors")
        number += 1
    for path in folder.glob("policy-*.safetensors"):  # of a larger policy
        if int(path.stem.removeprefix("policy-")) >= number:
            path.unlink()


def write_shard(shard: dict[str, Tensor], path: Path) -> None:
    # A new file takes the old one's name: the server may have the old one mapped.
    temporary = path.with_suffix(".tmp")
    save_file(shard, temporary)
    temporary.replace(path)
