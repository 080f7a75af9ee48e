"""Layers on a GPU as the GPU takes them: captured in graphs, so that what is timed is kernels and not the launching of them.

In a network that keeps a GPU busy, kernels are launched while others run, and a layer alone is often over before the next
launch has reached the device: timed so, a form of three kernels would look three times as slow as a dense layer, whatever it
computes. Whether the whole network is bound by its launches is seen where it is timed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

REPEATS = 8
"""Of a run in its graph: each finds its weights at another place, as cold as in the network."""


def captured(
    runs: Sequence[Callable[[], Any]], moves: Sequence[Callable[[], Any]], device: torch.device
) -> list[Callable[[], Any]] | None:
    """Each run as the replay of a graph that holds it `REPEATS` times, its weights moved before each.

    Args:
        runs: What is captured; each makes the same kernels on every call and waits for nothing.
        moves: What puts the weights of the run at the same place elsewhere.
        device: Where they compute.

    Returns:
        The replays, or None where there are no graphs: no CUDA, or a run that cannot be captured.
    """
    if device.type != "cuda":
        return None
    pool, stream, replays = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device), []  # type: ignore[no-untyped-call]
    generator = torch.cuda.default_generators[device.index or 0]
    as_it_was = generator.clone_state()
    try:
        with torch.cuda.device(device):
            for run, move in zip(runs, moves, strict=True):
                with torch.cuda.stream(stream):
                    for _ in range(3):  # kernels are chosen and workspaces are made outside
                        run()
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                # One pool for all: none of them needs what another one has left there.
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    for _ in range(REPEATS):
                        move()
                        run()
                replays.append(graph.replay)
            torch.cuda.synchronize(device)
    except RuntimeError:  # a kernel that synchronises, say
        torch.cuda.synchronize(device)
        # A capture that broke off has left it believing that one is under way: nothing random could be made any more.
        generator.graphsafe_set_state(as_it_was)
        return None
    return replays
