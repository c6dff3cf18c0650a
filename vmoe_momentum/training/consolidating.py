"""The command line `vmoe-momentum consolidate`: a checkpoint that many devices wrote, as one file."""

from pathlib import Path

from ..models.saved import read_checkpoint
from ..models.sharded import is_sharded
from ..parsers import new_parser, summary_of
from .resuming import AtomicCheckpointIO

_EXAMPLES = """examples:
  vmoe-momentum consolidate --ckpt_path runs/vmoe/version_0/checkpoints/last.ckpt --out last.ckpt
  vmoe-momentum export --ckpt_path last.ckpt --to hf --out exported"""


def consolidate(ckpt_path: str, out: str, overwrite: bool = False) -> Path:
    """A sharded checkpoint, a folder, as the single file that one device would have written, optimizer and all.

    Every command reads folders, too; a file is for other programs, and for moving it about.

    Args:
        ckpt_path: The folder that fit wrote under trainer.strategy.checkpoints=sharded.
        out: The file to write; the whole checkpoint passes through this machine's memory.
        overwrite: Replace a file of that name.
    """
    source, target = Path(ckpt_path), Path(out)
    if not is_sharded(source):
        kind = "a single file already" if source.is_file() else "no such folder of shards"
        raise ValueError(f"--ckpt_path={ckpt_path}: {kind}; give a .ckpt folder that fit wrote")
    if target.is_dir() or (target.exists() and not overwrite):
        raise ValueError(f"--out={out}: it exists; choose another name, or replace a file with --overwrite")
    AtomicCheckpointIO().save_checkpoint(read_checkpoint(source, "--ckpt_path="), target)
    return target


def run(argv: list[str]) -> None:
    """Mistakes come out as exceptions."""
    parser = new_parser(summary_of(consolidate), _EXAMPLES, prog="vmoe-momentum consolidate")
    parser.add_function_arguments(consolidate, as_group=False, as_positional=False, skip={"overwrite"})
    parser.add_argument("--overwrite", action="store_true", help="Replace a file of that name.")
    found = parser.parse_args(argv)
    target = consolidate(found.ckpt_path, found.out, found.overwrite)
    print(f"{target}: {target.stat().st_size:,} bytes")
