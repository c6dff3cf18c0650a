"""One training step of smoe_lm_medium at WikiText-103's vocabulary, on random words: time and peak memory.

    python benchmarks/language.py --step true

Each way in a process of its own, as a process's peak never falls: logits a part at a time, as the package does, with
recomputed blocks, and all [tokens, V] logits in memory at once. 4 streams of 512 words, with the context of 1,024.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import write_rows

STREAMS, BLOCK, WORDS = 4, 512, 267_735
WAYS = ("in parts", "in parts, blocks recomputed", "all logits at once")


def measure(path: Path) -> None:
    rows = []
    for way in WAYS:
        done = subprocess.run([sys.executable, __file__, way], capture_output=True, text=True, check=True)
        seconds, before, peak = map(float, done.stdout.split())
        rows.append({"logits": way, "streams": STREAMS, "block": BLOCK, "words": WORDS, "seconds": f"{seconds:.1f}",
                     "before_GB": f"{before:.2f}", "peak_GB": f"{peak:.2f}"})  # fmt: skip
        print(rows[-1])
    write_rows(path, rows)


def one(way: str) -> None:
    """Weights and the optimizer's moments are there before; printed: seconds, memory before, peak."""
    from vmoe_momentum.language import create_language_model
    from vmoe_momentum.training import OptimizerSettings

    torch.manual_seed(0)
    net = create_language_model("smoe_lm_medium", WORDS, rule="HeavyBall").train()
    net.grad_checkpointing = "recomputed" in way
    optimizer = OptimizerSettings("adam", 7e-4, 0.0).build(net)
    words = torch.randint(WORDS, (STREAMS, BLOCK + 1))
    cache = net.empty_cache(STREAMS)
    for p in net.parameters():  # moments
        p.grad = torch.zeros_like(p)
    optimizer.step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    optimizer.zero_grad()
    start = time.perf_counter()
    hidden = net.read(words[:, :-1], cache).hidden
    if way == "all logits at once":
        loss = F.cross_entropy(net.head(hidden).flatten(0, 1), words[:, 1:].flatten(), reduction="sum")
    else:
        loss = net.head.losses(hidden, words[:, 1:])
    (loss / words[:, 1:].numel()).backward()
    optimizer.step()
    print(time.perf_counter() - start, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


if __name__ == "__main__":
    one(sys.argv[1])
