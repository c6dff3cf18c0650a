"""The command line `vmoe-momentum import ...`: weights from elsewhere into a directory that timm loads."""

import inspect
import sys
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from ..moe import Router
from ..momentum import MomentumRule
from ..parsers import new_parser
from ..ranges import in_range
from . import directory
from .flax_checkpoint import read_flax
from .flax_import import READ, ExpertOutput, describe_import, doubts, from_flax
from .upcycling import UpcycledViT, differences
from .vit import NUMBERS, MomentumVisionTransformer

_EXAMPLES = """examples:
  vmoe-momentum import flax --source vmoe_s32_last2 --out weights/vmoe_s32 --router TopKRouter --router.top_k 2
  vmoe-momentum import flax --source params.npz --out weights/v --router TopKRouter --image_size 384 --num_classes 10
  vmoe-momentum import flax --source fork --out weights/f --router TopKRouter --expert_output subtracted \
    --rule HeavyBall --rule.mu 0.9
  vmoe-momentum import timm --source vit_small_patch16_224 --out weights/up --moe_layers last2 --num_experts 8
  vmoe-momentum import timm --source local-dir:weights/dense --out weights/up --rule HeavyBall --rule.mu 0.5

then, in Python:
  import timm, vmoe_momentum
  net = timm.create_model("local-dir:weights/vmoe_s32", pretrained=True)"""


@in_range("--", **READ)
def import_flax(
    source: str,
    out: str,
    router: Router | None = None,
    rule: MomentumRule | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    num_heads: int | None = None,
    pos_embed: Literal["sincos2d", "none"] | None = None,
    native_size: tuple[int, int] | None = None,
    expert_output: ExpertOutput | None = None,
    overwrite: bool = False,
) -> MomentumVisionTransformer:
    """A V-MoE or Soft MoE checkpoint of google-research/vmoe, or of the fork of MomentumSMoE's authors, without jax.

    Depth, width, experts, sparse blocks, positions and head are read off the tensors. What lies in no tensor (how many
    experts a token takes, capacity, groups) is said with --router. Every tensor must be there, known and of its shape.

    Args:
        source: A .npz with /-joined names, or the prefix of PREFIX.index and PREFIX.data-nnnnn-of-NNNNN.
        out: New directory for config.json and model.safetensors.
        router: How tokens are routed, such as TopKRouter; needed unless the routers are soft.
        rule: Momentum across the sparse blocks. Left out: Residual, as the weights were trained.
        image_size: Side, or [height, width], 1 to 16384 px, if it is to differ from the checkpoint's.
        num_classes: 0 to 1e9: 0 drops the head; another number than the checkpoint's gives a fresh one.
        num_heads: Attention heads, 1 to 65536, where the tensors do not say it.
        pos_embed: Kind of positions, where the checkpoint has no learned ones.
        native_size: [height, width], 1 to 16384 px, that the learned positions are for, where they are not square.
        expert_output: Whether sparse blocks added or subtracted what their experts say; needed for momentum networks of
            github.com/rachtsy/vmoe, which subtract.
        overwrite: Replace such a directory written earlier.
    """
    target = Path(out)
    directory.check_target(target, overwrite)
    sizes = (image_size, num_classes, num_heads, pos_embed, native_size)
    net = from_flax(read_flax(source), router, rule, *sizes, expert_output)
    directory.save(net, target, overwrite)
    return net


@in_range("--", **{name: NUMBERS[name] for name in ("moe_layers", "num_experts", "num_classes", "image_size")})
def import_timm(
    source: str,
    out: str,
    moe_layers: str | list[int] = "last2",
    num_experts: int = 8,
    rule: MomentumRule | None = None,
    router: Router | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    image_size: int | None = None,
    overwrite: bool = False,
) -> UpcycledViT:
    """Sparse upcycling: a dense timm ViT or DeiT whose MLPs are copied into experts.

    Args:
        source: A timm model name, or local-dir:PATH.
        out: New directory for config.json and model.safetensors.
        moe_layers: Sparse blocks: "last2" (the last two odd blocks), "every2", or a list of indices,
            0 to 10000.
        num_experts: Experts of a sparse block, 1 to 65536.
        rule: Momentum across the sparse blocks. Left out: Residual, which keeps the dense network's logits.
        router: Router of the sparse blocks. Left out: TopKRouter, K 2, renormalised gates, which keeps the logits too.
        pretrained: Start from timm's weights for a plain name (downloads them), or from the directory's.
        num_classes: 0 to 1e9; another number than the source's gives a fresh head.
        image_size: Side, 1 to 16384 px, if it is to differ from the source's.
        overwrite: Replace such a directory written earlier.
    """
    target = Path(out)
    directory.check_target(target, overwrite)
    try:
        net = UpcycledViT(
            source, pretrained, moe_layers, num_experts, rule, router, num_classes=num_classes, image_size=image_size
        )
    except ValueError as error:  # by the name that the setting has here
        raise ValueError(str(error).replace("backbone=", "source=", 1)) from error
    directory.save(net, target, overwrite)
    return net


def run(argv: list[str]) -> None:
    """Runs `import flax|timm`; argv is what follows `import`. Mistakes come out as exceptions."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    command = arguments.command
    settings = parser.instantiate(arguments)[command].as_dict()
    if command == "flax":
        net = import_flax(**settings)
        for name, fact in describe_import(net).items():
            print(f"{name:8} {fact}")
        if warning := doubts(net, settings["expert_output"]):
            print(f"warning: {warning}", file=sys.stderr)
    else:
        net = import_timm(**settings)
        reasons = differences(net)
        what = "features" if settings["num_classes"] is not None else "logits"  # the head may be a fresh one
        print(f"in evaluation its {what} " + ("differ from" if reasons else "equal") + " the dense network's")
        for reason in reasons:
            print(f"  {reason}")
    total = sum(parameter.numel() for parameter in net.parameters())
    print(f"{settings['out']}: {total:,} parameters; load it with timm.create_model(")
    print(f'    "local-dir:{settings["out"]}", pretrained=True)  # after `import vmoe_momentum`')


def _parser() -> ArgumentParser:
    parser = new_parser(
        "Bring weights in, as a directory that timm.create_model loads.", _EXAMPLES, prog="vmoe-momentum import"
    )
    commands = parser.add_subcommands(dest="command")
    for name, function in (("flax", import_flax), ("timm", import_timm)):
        told = inspect.getdoc(function) or ""
        command = new_parser(told.split("Args:")[0].rstrip(), _EXAMPLES)
        command.add_function_arguments(function, as_group=False, as_positional=False, skip={"overwrite"})
        command.add_argument("--overwrite", action="store_true", help="Replace such a directory written earlier.")
        commands.add_subcommand(name, command, help=told.splitlines()[0])
    return parser
