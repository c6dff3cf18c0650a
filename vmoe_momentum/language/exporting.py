"""Language models out: their tensors, or an exported program that runs without this package.

    B streams, N words, L positions looked back on, D width, V vocabulary.

The program reads a block of text and goes on from its cache: (words [B, N], cache, a tuple of [B, L, D]) ->
(log-probabilities [B, N, V] of the word behind each, the cache for the words that follow). metadata.json says how many
of which shape; zeros are the cache before the first word.
"""

import io
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import Dim

from ..datasets import TextDataModule
from ..files.checksums import listed, sha256
from ..files.staging import refuse_existing, staged
from ..models.saved import KEY, read_checkpoint
from .looking import Reader, blocks_of, check_words, open_language_model, rebuild
from .network import SparseLanguageModel

MARK, KINDS = "metadata.json", ("pt2", "state-dict")
TOLERANCE = 1e-4  # of log-probabilities, in float32


class Reading(nn.Module):
    """What the program holds."""

    def __init__(self, net: SparseLanguageModel) -> None:
        super().__init__()
        self.net = net

    def forward(self, words: Tensor, cache: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        found = self.net.read(words, cache)
        return self.net.head.log_prob(found.hidden), found.cache


def is_language_model(ckpt_path: str, trust_pickle: bool = False) -> bool:
    """Whether a checkpoint holds one. False where there is no such file, or none that can be read, which others say."""
    path = Path(ckpt_path)
    try:
        return path.is_file() and "vocab_size" in read_checkpoint(path, trust_pickle=trust_pickle)[KEY]
    except ValueError:
        return False


def export_language_model(
    ckpt_path: str, to: str, out: str, data: str, limit: int = 1000, overwrite: bool = False
) -> dict[str, Any]:
    """Writes the folder `out` and gives its metadata.

    to: pt2 or state-dict. data: the prepared text; at most `limit` blocks of 64 words of its validation text are
    compared on. Raises ValueError, FileNotFoundError: another format, damaged files, other words, an export unlike its
    network.
    """
    if to not in KINDS:
        raise ValueError(f"--to={to}: language models take {' or '.join(KINDS)}")
    place, text = Path(out), TextDataModule(data, block_size=64, batch_size=8)
    refuse_existing(place, overwrite, MARK)
    saved = open_language_model(ckpt_path)
    check_words(saved, text)
    model, batches = saved.build(), blocks_of(text, limit)
    net, facts = model.net, saved.facts
    metadata: dict[str, Any] = {
        "vmoe_momentum_export": 1, "kind": "language", "format": to, "network": facts, "vocabulary": "vocabulary.txt",
        "cache": {"tensors": len(net.blocks), "shape": ["streams", net.context, net.width]},
        "source": {"file": Path(ckpt_path).name, "epoch": saved.epoch, "step": saved.step,
                   "sha256": sha256(Path(ckpt_path))}, "exported": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    with staged(place, overwrite, MARK) as work:
        (work / "vocabulary.txt").write_text("\n".join(text.vocabulary) + "\n", encoding="utf-8")
        if to == "pt2":
            metadata["file"] = write_program(net, work, metadata)
            again = open_program(work)
        else:
            metadata["file"] = write_tensors(net, work)
            again = Reading(open_tensors(work, facts))
        metadata["round_trip"] = compared(model, again, batches)
        check(metadata["round_trip"], to)
        (work / MARK).write_text(json.dumps(listed(work, metadata), indent=1) + "\n")
    return metadata


def write_program(net: SparseLanguageModel, folder: Path, metadata: dict[str, Any]) -> str:
    """Any number of streams, and of words from two on."""
    words, cache = torch.zeros(2, 5, dtype=torch.int64), net.empty_cache(2)
    streams, length = Dim("streams", min=1), Dim("words", min=2)
    shapes = ({0: streams, 1: length}, tuple({0: streams} for _ in cache))
    program = torch.export.export(Reading(net).eval(), (words, cache), dynamic_shapes=shapes, strict=False)
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", program.graph_module.graph).nodes:
            node.meta.pop("stack_trace", None)  # names folders of this machine
    content = io.BytesIO()  # torch's own writer of files aborts the process when the disk is full
    torch.export.save(program, content, extra_files={MARK: json.dumps(metadata)})
    (folder / "model.pt2").write_bytes(content.getbuffer())
    return "model.pt2"


def open_program(folder: Path) -> nn.Module:
    """torch.export.load runs what the file's author put into it: for files one trusts."""
    return torch.export.load(folder / "model.pt2").module()


def write_tensors(net: SparseLanguageModel, folder: Path) -> str:
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in net.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return "model.safetensors"


def open_tensors(folder: Path, facts: dict[str, Any]) -> SparseLanguageModel:
    net = rebuild(facts)
    net.load_state_dict(load_file(folder / "model.safetensors"))
    return net.eval()


@torch.no_grad()
def compared(model: Reader, again: nn.Module, batches: list[Tensor]) -> dict[str, float]:
    """Each block in two parts, the second from the first one's cache. Largest difference of log-probabilities, and the
    perplexities of the words but the first of each block."""
    net, largest, losses, tokens = model.net, 0.0, torch.zeros(2, dtype=torch.float64), 0
    for words in batches:
        cuts, cache, parts = (words[:, :31], words[:, 31:]), net.empty_cache(len(words)), []
        for part in cuts:
            found, cache = again(part, tuple(cache))
            parts.append(found)
        before, after = net(words), torch.cat(parts, dim=1)
        largest = max(largest, float((before - after).abs().max()))
        own = words[:, 1:].unsqueeze(-1)
        losses += torch.stack([-told[:, :-1].gather(2, own).double().sum() for told in (before, after)])
        tokens += own.numel()
    first, second = (losses / tokens).exp().tolist()
    return {"words": tokens, "max_difference": largest, "perplexity_before": first, "perplexity_after": second}


def check(found: dict[str, float], to: str) -> None:
    """Raises ValueError: the export is not the network."""
    if not found["max_difference"] <= TOLERANCE * max(1.0, math.log(found["perplexity_before"])):
        raise ValueError(
            f"--to={to}: not the network it comes from (differs by up to {found['max_difference']:.3g}); nothing was "
            "written. Report this as a bug"
        )
