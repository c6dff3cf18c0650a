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
    graph, pixels = program.graph_module.graph, program.graph_signature.user_inputs
    for node in list(graph.nodes):  # checks of dtypes keep what they check alive
        if node.target is torch.ops.aten._assert_tensor_metadata.default and node.args[0].name not in pixels:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    for module in program.graph_module.modules():  # sub-graphs, too
        for node in getattr(module, "graph", graph).nodes:
            node.meta.pop("stack_trace", None)  # names folders of this machine
    program.graph_module.recompile()
    return program


def write(model: PixelModel, folder: Path, request: Request, metadata: Metadata) -> Metadata:
    program = trace(Servable(model, request))
    content = io.BytesIO()  # torch's own writer of files aborts the process when the disk is full
    torch.export.save(program, content, extra_files={"metadata.json": json.dumps(metadata)})
    (folder / FILE).write_bytes(content.getbuffer())
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
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: no whole exported program ({error}); export it again") from error


def _check_entry(path: Path, name: str, content: bytes) -> None:
    base = name.rpartition("/")[2]
    unsafe = "opaque_obj" in base or "custom_obj" in base
    if base.endswith("_config.json"):  # of weights and constants
        unsafe = unsafe or any(entry.get("use_pickle") for entry in json.loads(content)["config"].values())
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
