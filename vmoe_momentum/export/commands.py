"""The command lines `vmoe-momentum export ...` and `vmoe-momentum classify ...`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..parsers import DEVICE, Parser, new_parser, pick_device
from ..pictures import UPRIGHT_HELP
from ..ranges import COUNT
from .asked import Pick, Request, Weights
from .hub import push

_EXPORT = """examples:
  vmoe-momentum export --ckpt_path runs/digits/version_0 --to hf --out exported/hf --data data/digits
  vmoe-momentum export --ckpt_path last.ckpt --to pt2 --input uint8 --out exported/pt2 --data data/digits
  vmoe-momentum export --ckpt_path last.ckpt --to onnx --precision int8 --out exported/int8 --data data/digits

  hf          timm's directory with a model card: timm.create_model("local-dir:exported/hf", pretrained=True)
  pt2         torch.export: torch.export.load("exported/pt2/model.pt2").module()(pixels), without vmoe_momentum
  onnx        onnxruntime.InferenceSession("exported/onnx/model.onnx"), without torch
  state-dict  tensors under timm's names, as safetensors

Every export is read back and compared with the checkpoint on pictures of --data before it gets its name."""

_CLASSIFY = """examples:
  vmoe-momentum classify exported/onnx cat.jpg dog.jpg
  vmoe-momentum classify exported/hf cat.jpg --plot experts.png"""


def export_parser() -> Parser:
    words = new_parser("A checkpoint as files that other programs run.", _EXPORT, prog="vmoe-momentum export")
    words.add_argument(
        "--ckpt_path", type=str, required=True, help="A .ckpt of fit, the folder of a run, or local-dir:PATH."
    )
    words.add_argument("--to", type=Literal["hf", "pt2", "onnx", "state-dict"], required=True, help="The format.")
    words.add_argument("--out", type=str, required=True, help="New folder.")
    words.add_argument(
        "--data",
        type=str,
        required=True,
        help="What to compare on: labelled pictures, ROOT/val/CLASS/* or ROOT/CLASS/*; or the prepared text.",
    )
    words.add_number("--limit", int, COUNT, "At most so many of them, or blocks of text.", default=1000)
    words.add_argument(
        "--input", type=Literal["float32", "uint8"], default="float32", help="Pixels in [0, 1], or 0 to 255."
    )
    words.add_argument("--output", type=Literal["logits", "probabilities"], default="logits", help="What comes out.")
    words.add_argument(
        "--precision", type=Literal["fp32", "fp16", "int8"], default="fp32", help="Of ONNX weights; accuracy is shown."
    )
    words.add_argument("--pick", type=Pick | None, help="Which checkpoint of a run's folder; best by default.")
    words.add_argument(
        "--weights", type=Weights, default="auto", help="auto: the averaged ones (EMA) where there are any."
    )
    words.add_argument("--device", type=str | None, help=f"What computes the comparison: {DEVICE} Files are the same.")
    words.add_argument("--scores", type=str | None, help="Log folder of a `test` run: its scores go into the card.")
    words.add_argument("--push", type=str | None, help="OWNER/NAME: upload an hf export to the Hugging Face hub.")
    words.add_argument("--overwrite", action="store_true", help="Replace a folder that export wrote earlier.")
    words.add_argument(
        "--trust_pickle", action="store_true",
        help="Read a checkpoint that holds more than tensors. It may then run any code: only files of your own.",
    )  # fmt: skip
    return words


def run_export(argv: list[str], others: Callable[[Any], dict[str, Any] | None]) -> None:
    """others: exports what is no image classifier, given the options, and gives its metadata; None: it is one."""
    given = export_parser().parse_args(argv)
    if given.push is not None and given.to != "hf":
        raise ValueError(f"--push={given.push}: the hub takes --to hf, not {given.to}")
    request = Request(given.input, given.output, given.precision)
    if given.to in ("hf", "state-dict") and request != Request():
        raise ValueError(
            f"--to={given.to}: keeps the network itself; --input, --output, --precision are for pt2 and onnx"
        )
    if (told := others(given)) is not None:
        return _show_text(told, given.out)
    from .exporting import export  # here, as below: mistakes above are told before torch is imported

    device = pick_device(given.device)
    _tell(device, given.to)
    metadata = export(
        given.ckpt_path, given.to, given.out, given.data, request, given.weights, given.pick, given.scores, given.limit,
        given.overwrite, given.trust_pickle, device,
    )  # fmt: skip
    source, found = metadata["source"], metadata["round_trip"]
    table = Table(box=None, show_header=False)
    told = {
        "checkpoint": source["file"] + (f", epoch {source['epoch']}" if "epoch" in source else ""),
        "weights": source["weights"],
        "compared on": f"{found['pictures']} pictures, on {found['device']}: "
        f"largest difference {found['max_difference']:.2g}, same class {100 * found['agreement']:.1f} %",
        "top-1": f"{100 * found['top1_before']:.2f} % before, {100 * found['top1_after']:.2f} % after",
        "size": f"{found['megabytes']:.1f} MB",
        "latency": f"{found['latency_ratio']:.2f} of eager torch",
    }
    for name, value in told.items():
        table.add_row(name, Text(value))
    console = Console()
    console.print(table)
    console.print(f"[bold]{given.to}[/bold]  {given.out}", soft_wrap=True, highlight=False)
    if given.push is not None:
        console.print(push(Path(given.out), given.push), soft_wrap=True, highlight=False)


def refuse_others(given: Any) -> None:
    """Raises ValueError: an option that means nothing for language models, which are compared on the CPU."""
    for name in ("input", "output", "precision", "pick", "weights", "scores", "push", "device"):
        value, default = getattr(given, name), export_parser().get_default(name)
        if value != default:
            raise ValueError(f"--{name}={value}: for image classifiers; leave it out for language models")


def _show_text(metadata: dict[str, Any], out: str) -> None:
    found, table = metadata["round_trip"], Table(box=None, show_header=False)
    told = {
        "checkpoint": f"{metadata['source']['file']}, epoch {metadata['source']['epoch']}",
        "compared on": f"{found['words']:,} words: largest difference {found['max_difference']:.2g}",
        "perplexity": f"{found['perplexity_before']:.2f} before, {found['perplexity_after']:.2f} after",
    }
    for name, value in told.items():
        table.add_row(name, Text(value))
    Console().print(table)
    Console().print(f"[bold]{metadata['format']}[/bold]  {out}", soft_wrap=True, highlight=False)


def classify_parser() -> Parser:
    words = new_parser("The likeliest classes of pictures.", _CLASSIFY, prog="vmoe-momentum classify")
    words.add_argument("source", type=str, help="A folder that export wrote, of any format.")
    words.add_argument("images", type=str, nargs="+", help="Pictures.")
    words.add_number("--top_k", int, COUNT, "How many classes.", default=5)
    words.add_argument(
        "--trust_program", action="store_true", help="Open a pt2 file. It may run any code: only files of your own."
    )
    words.add_argument("--upright", type=bool | None, help=f"{UPRIGHT_HELP} By default as it was trained.")
    words.add_argument("--device", type=str | None, help=f"What computes: {DEVICE}")
    words.add_argument("--plot", type=str | None, help="PNG: which expert each patch went to, block by block.")
    return words


def run_classify(argv: list[str]) -> None:
    given = classify_parser().parse_args(argv)
    paths = [Path(path) for path in given.images]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
    from ..analysis.expert_map import draw_experts
    from .serving import classify, open_served

    device = pick_device(given.device)
    served = open_served(given.source, given.trust_program, device)
    _tell(device, served.metadata["format"])
    if given.upright is not None:
        served = served._replace(metadata={**served.metadata, "upright": given.upright})
    network = served.network() if given.plot is not None else None
    console = Console()
    for path, found in zip(paths, classify(served, paths, given.top_k), strict=True):
        console.print(Text(str(path), style="bold"), soft_wrap=True)
        for name, value in found:
            console.print(Text(f"  {100 * value:5.1f} %  {name}"), soft_wrap=True)
    if network is not None:
        draw_experts(network, [served.pixels(path) for path in paths], [path.name for path in paths], Path(given.plot))
        console.print(f"[bold]experts[/bold]  {given.plot}", soft_wrap=True, highlight=False)


def _tell(device: str, kind: str) -> None:
    """What computes, on stderr, as all commands do."""
    from .formats import FORMATS

    taken = FORMATS[kind].computes_on(device)
    told = f"on {device}" if taken == device else f"on {device}; {kind} on {taken}, as its runtime has no {device} here"
    Console(stderr=True).print(told, soft_wrap=True, highlight=False)
