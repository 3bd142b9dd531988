"""The attention of TRL's packed rows without a GPU: TRL takes it from a kernel that needs one."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    tree_kv_index: Tensor,
    tree_cu_seqlens_q: Tensor,
    tree_cu_seqlens_k: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Each segment's queries attend to the keys of their path from the root, itself included, up to their own place.

    Args:
        query: `(1, H, N, D)`, of all segments one after the other.
        key, value: `(1, G, N, D)` with `G` groups of heads.
        tree_kv_index: `(K,)`, the places in the row of each path's tokens, path after path.
        tree_cu_seqlens_q: `(S + 1,)`, where the segments begin and end in the row.
        tree_cu_seqlens_k: `(S + 1,)`, where their paths begin and end in `tree_kv_index`.
        scaling: Factor of the scores; default 1/√D.
        sliding_window: Tokens that a query sees, itself included; default all before it.

    Returns:
        `(1, N, H, D)`, and None in place of the weights.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    segments, paths = (pairwise(ends.tolist()) for ends in (tree_cu_seqlens_q, tree_cu_seqlens_k))
    outputs = []
    for (first, last), (path_first, path_last) in zip(segments, paths, strict=True):
        path = tree_kv_index[path_first:path_last]
        before = path_last - path_first - (last - first)  # tokens of the path before the segment
        place = torch.arange(before, before + last - first, device=query.device)[:, None]
        seen = torch.arange(path_last - path_first, device=query.device)
        mask = seen <= place
        if sliding_window:
            mask &= seen > place - sliding_window
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, first:last], key[:, :, path], value[:, :, path], attn_mask=mask, scale=scaling
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None
