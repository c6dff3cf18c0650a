"""torch.export: one file that runs wherever torch does, without this package."""

import io
import json
import zipfile
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from ..models import PixelModel
from .base import Answer, Format, Metadata, Request, Servable, as_answer

FILE = "model.pt2"


def trace(servable: Servable) -> ExportedProgram:
    """With any batch size, without what only training needs: auxiliary losses, checks of inner dtypes."""
    program = torch.export.export(
        servable.eval(), (servable.example(),), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False
    )
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        inner = node.target is torch.ops.aten._assert_tensor_metadata.default and node.args[0].op != "placeholder"
        if inner or (node.op == "call_function" and not node.users and "_assert" not in str(node.target)):
            graph.erase_node(node) if not node.users else None
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def write(model: PixelModel, folder: Path, request: Request, metadata: Metadata) -> Metadata:
    program = trace(Servable(model, request))
    torch.export.save(program, folder / FILE, extra_files={"metadata.json": json.dumps(metadata)})
    return {"file": FILE}


def open_answer(folder: Path, metadata: Metadata) -> Answer:
    check_program(folder / FILE)
    try:
        return as_answer(torch.export.load(folder / FILE).module())
    except Exception as error:  # whatever damaged bytes make of the reader
        raise ValueError(f"{folder / FILE}: cannot be read ({str(error).splitlines()[0]}); export it again") from error


def check_program(path: Path) -> None:
    """torch.export.load unpickles what some archives hold. Raises ValueError: this one would need that.

    Ours hold tensors as raw bytes and the graph as JSON; the example input is a pickle of plain tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for name in names:
                _check_entry(path, name, archive.read(name))
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: no whole exported program ({error}); export it again") from error


def _check_entry(path: Path, name: str, content: bytes) -> None:
    base = name.rpartition("/")[2]
    unsafe = "opaque_obj" in base or "custom_obj" in base
    if base.endswith("config.json") and ("weights" in name or "constants" in name):
        unsafe = unsafe or '"use_pickle": true' in content.decode(errors="replace")
    if base.endswith(".pt") or "sample_inputs" in name:
        try:
            torch.load(io.BytesIO(content), weights_only=True)
        except Exception:
            unsafe = len(content) > 0
    if unsafe:
        raise ValueError(
            f"{path}: {name} is a pickle, which may run any code when it is read; it is not opened. Export the network "
            "again with vmoe-momentum export, or load the file yourself if you trust where it comes from"
        )


FORMAT = Format(write, open_answer, keeps_network=False)
