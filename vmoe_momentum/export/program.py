"""torch.export: one file that runs wherever torch does, without this package."""

import io
import json
import logging
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass

from ..models import PixelModel
from ..models.groups import images_together
from .asked import Request
from .base import Answer, Format, Metadata, Servable, as_answer, image_size

FILE = "model.pt2"


def trace(servable: Servable) -> ExportedProgram:
    """With any batch size, without what only training needs: auxiliary losses, checks of inner dtypes.

    Raises ValueError: routing over several images, which ties the batch size.
    """
    together = images_together(servable.eval().model.net, image_size(servable.model))
    if together > 1:
        raise ValueError(
            f"--to: this network routes {together} images together (its router's group_size and capacity), and a "
            "program answers for batches of any size; use --to hf or state-dict, or train it with group_size=image"
        )
    program = torch.export.export(
        servable, (servable.example(),), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False
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


def open_answer(folder: Path, metadata: Metadata, device: str = "cpu") -> Answer:
    """torch.export.load unpickles, evaluates expressions and calls functions by name: for files one trusts."""
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it prints the traceback of a failure that is reported here
    try:
        program = torch.export.load(folder / FILE)
    except Exception as error:  # whatever damaged bytes make of the reader
        raise ValueError(f"{folder / FILE}: cannot be read ({str(error).splitlines()[0]}); export it again") from error
    finally:
        log.setLevel(level)
    # it was traced on the CPU, and tensors that its graph makes name their device
    return as_answer((program if device == "cpu" else move_to_device_pass(program, device)).module(), device)


FORMAT = Format(write, open_answer, is_program=True)
