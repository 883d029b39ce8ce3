"""Which peers race together: as many as fit into memory, and the anchor of all ratios in each heat."""

from __future__ import annotations

import torch
from peers import ANCHOR, Peer


def free_bytes(device: torch.device) -> int:
    """Returns the free memory of the device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))


def needed(peers: list[Peer], tensor_bytes: int) -> int:
    """Returns the bytes of a heat: all tensors of the peers, the gradients and one copy, the largest temporaries."""
    kept, spare = sum(peer.tensors for peer in peers), max((peer.spare for peer in peers), default=0)
    return int((kept + spare + 2) * tensor_bytes)


def distribute(peers: list[Peer], tensor_bytes: int, budget: int) -> tuple[list[list[Peer]], list[Peer]]:
    """Distributes peers over as few heats as fit into memory.

    Args:
        tensor_bytes: bytes of one tensor of the size of all parameters.
        budget: bytes of memory.

    Returns:
        The heats, the anchor first in each; and the peers that fit into none.
    """
    anchors = [peer for peer in peers if peer.name == ANCHOR]
    groups, rejected = [anchors], []
    for peer in peers:
        if peer.name == ANCHOR:
            continue
        group = next((g for g in groups if needed([*g, peer], tensor_bytes) <= budget), None)
        if group is not None:
            group.append(peer)
        elif needed([*anchors[:1], peer], tensor_bytes) <= budget:
            groups.append([*anchors[:1], peer])
        else:
            rejected.append(peer)
    if needed(anchors[:1], tensor_bytes) > budget:
        return [], list(peers)
    return [group for group in groups if group], rejected
