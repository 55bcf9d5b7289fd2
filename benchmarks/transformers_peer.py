"""transformers in a process of its own, beside which `inference.py` measures: LlamaForCausalLM of
checkpoints of ours."""

import argparse
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

Prompts = Callable[[int], list[list[int]]]
"""Number of requests -> their prompts."""


def answerer(options: argparse.Namespace, folder: Path, prompts: Prompts) -> Callable[..., dict]:
    """A function of the numbers of requests and experts that has each expert continue its requests
    in one batch, and returns the times and tokens. options: of `inference.py`. folder: with the
    checkpoint of each expert, by its number."""
    import torch
    import transformers
    from transformers.generation.streamers import BaseStreamer

    clock = options.clock

    class Times(BaseStreamer):
        """When each token came; the first call is of the prompts."""

        def __init__(self):
            self.times = []

        def put(self, value):
            self.times.append(clock())

        def end(self):
            pass

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.logging.set_verbosity_error()
    loaded: dict[int, Any] = {}

    def model(number: int) -> Any:
        if number not in loaded:
            network: Any = transformers.AutoModelForCausalLM.from_pretrained(
                f"{folder}/{number}", dtype=getattr(torch, options.dtype)
            )
            loaded[number] = network.to(device).eval()
        return loaded[number]

    def answer(batch: int, experts: int) -> dict:
        ids = torch.tensor(prompts(batch), device=device)
        tokens: list[list[int]] = [[]] * batch
        begun, first = clock(), 0.0
        for number in range(min(experts, batch)):
            times, own = Times(), range(number, batch, experts)
            started = clock()
            with torch.no_grad():
                found = model(number).generate(
                    ids[list(own)],
                    attention_mask=torch.ones_like(ids[list(own)]),
                    do_sample=False,
                    max_new_tokens=options.new,
                    min_new_tokens=options.new,
                    pad_token_id=0,
                    eos_token_id=None,
                    streamer=times if len(own) == 1 else None,
                )
            if len(own) == 1:
                first += times.times[1] - started
            for row, request in zip(found[:, options.prompt :].tolist(), own):
                tokens[request] = row
        total = clock() - begun
        # A streamer takes one request at a time.
        return {"first": first or float("nan"), "total": total, "tokens": tokens}

    return answer


def memory() -> int:
    """Bytes that this process held at most: of a GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
