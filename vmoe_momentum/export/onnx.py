"""ONNX through torch's dynamo exporter, checked with onnxruntime.

ONNX has no stable sort, no search in sorted rows, no grouped product; the functions below say them in
operators it has. So the graph does the same work as the network: each expert sees its own rows, not all of them.
"""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import PixelModel
from .asked import Request
from .base import Answer, Format, Metadata, Servable
from .program import trace

FILE = "model.onnx"
OPSET = 20
# Signed weights are wrong on many machines: without VNNI, AVX2 multiplies unsigned by signed bytes with vpmaddubsw,
# which adds pairs of products in 16 bits and saturates (255 * 127 twice is past 32,767). Unsigned by unsigned is
# widened first, on every processor. Measured with AVX2 alone on a small network whose logits spread by 5.0: largest
# difference 8.8 signed, 3.5 signed with 7 bits, 0.5 unsigned.
QUANTIZATION = {
    "weights": "uint8", "activations": "uint8",
    "why": "signed weights saturate in onnxruntime on x86 processors without VNNI; unsigned ones give the same answer "
    "on all",
}  # fmt: skip


def write(model: PixelModel, folder: Path, request: Request, metadata: Metadata) -> Metadata:
    _needs("onnxscript")
    path = folder / FILE
    servable = Servable(_halved(model) if request.precision == "fp16" else model, request)
    program = torch.onnx.export(
        trace(servable), (), verbose=False, optimize=False, custom_translation_table=translations(), opset_version=OPSET
    )
    assert program is not None  # of exported programs
    _simplify(program.model)
    facts = {"file": FILE, "opset": OPSET}
    if request.precision == "int8":
        facts["quantization"] = QUANTIZATION
    program.model.metadata_props["metadata.json"] = json.dumps({**metadata, **facts})
    for place, name in ((program.model.graph.inputs[0], "images"), (program.model.graph.outputs[0], request.output)):
        place.name = name
    program.save(path)
    if request.precision == "int8":
        _quantize(path)
    return facts


def _simplify(graph: Any) -> None:
    """Constants folded, equal weights once: what torch's own `optimize` does but for its rewriting rules.

    One of those (onnxscript 0.7.2) takes an addition of 1e-8 for one of 0 and removes it, which Adam's root cannot
    spare. Where each node stood in whose source is forgotten.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, DeduplicateInitializersPass
    from onnxscript import optimizer

    optimizer.inline(graph)
    optimizer.fold_constants_ir(graph)
    DeduplicateInitializersPass()(graph)
    optimizer.remove_unused_nodes(graph)
    ClearMetadataAndDocStringPass()(graph)


def _halved(model: PixelModel) -> PixelModel:
    """A copy with weights and arithmetic in float16; pixels, routing and momentum rules stay in float32."""
    model = copy.deepcopy(model)
    model.net.half().register_forward_pre_hook(lambda net, images: (images[0].half(),))
    return model


def _quantize(path: Path) -> None:
    """Weights of 8 bits in place: dynamic quantisation of matrix products."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path)
    del graph.graph.value_info[:]  # inner shapes as torch saw them; the quantizer turns matrices round
    logging.disable(logging.WARNING)  # it recommends a step that does not apply here
    try:
        quantize_dynamic(graph, path, weight_type=QuantType.QUInt8)
    finally:
        logging.disable(logging.NOTSET)


def computes_on(device: str) -> str:
    """A GPU only where onnxruntime can use it (the package onnxruntime-gpu)."""
    known = "CUDAExecutionProvider" in _needs("onnxruntime").get_available_providers()
    return device if known and device.startswith("cuda") else "cpu"


def open_answer(folder: Path, metadata: Metadata, device: str = "cpu") -> Answer:
    runtime = _needs("onnxruntime")
    if metadata.get("precision") == "int8" and metadata.get("quantization") != QUANTIZATION:
        raise ValueError(
            f"{folder / FILE}: written by an earlier version with signed 8-bit weights, which give wrong answers on "
            "processors without VNNI; export it again"
        )
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    kind, _, index = computes_on(device).partition(":")
    providers: list[Any] = ["CPUExecutionProvider"]
    if kind == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": index or "0"}))
    try:
        session = runtime.InferenceSession(str(folder / FILE), options, providers=providers)
    except Exception as error:  # onnxruntime has no common base of its errors
        raise ValueError(f"{folder / FILE}: onnxruntime cannot open it ({error}); export it again") from error
    name = session.get_inputs()[0].name

    def answer(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return answer


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """torch operator -> function that writes it in ONNX."""
    from onnxscript import opset20

    op: Any = opset20  # its hints tell types of elements apart, which constants and results do not say

    def stable_sort(self: Any, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
        """TopK of everything: on equal values ONNX takes the lower index first, which is what stable means."""
        size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    def grouped_mm(self: Any, mat2: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
        """rows [R, in], sorted by expert; mat2 [E, in, out]; offs [E]: a product an expert, side by side."""
        ends, axis = op.Cast(offs, to=7), op.Constant(value_ints=[0])
        start, parts = op.Constant(value_ints=[0]), []
        for expert in range(mat2.shape[0]):
            end = op.Gather(ends, op.Constant(value_ints=[expert]))
            rows = op.Slice(self, start, end, axis)
            parts.append(op.MatMul(rows, op.Gather(mat2, op.Constant(value_int=expert), axis=0)))
            start = end
        return op.Concat(*parts, axis=0)

    def searchsorted(
        sorted_sequence: Any, self: Any, out_int32: bool = False, right: bool = False, side: Any = None,
        sorter: Any = None,
    ) -> Any:  # fmt: skip
        """How many of [..., N] lie before each of [..., E]: counted, as E is small."""
        row, value = (
            op.Unsqueeze(sorted_sequence, op.Constant(value_ints=[-2])),
            op.Unsqueeze(self, op.Constant(value_ints=[-1])),
        )
        before = op.LessOrEqual(row, value) if right or side == "right" else op.Less(row, value)
        count = op.ReduceSum(op.Cast(before, to=7), op.Constant(value_ints=[-1]), keepdims=0)
        return op.Cast(count, to=6) if out_int32 else count

    def index_add(self: Any, dim: int, index: Any, source: Any, alpha: float = 1.0) -> Any:
        """Rows of source added to rows of self (dim 0, alpha 1: what expert choice needs). In float32: onnxruntime
        adds no halves."""
        if dim != 0 or alpha != 1:
            raise ValueError(f"--to=onnx: index_add with dim={dim}, alpha={alpha} has no translation; use --to pt2")
        where = op.Unsqueeze(index, op.Constant(value_ints=[-1]))
        return op.CastLike(op.ScatterND(op.Cast(self, to=1), where, op.Cast(source, to=1), reduction="add"), self)

    aten = torch.ops.aten
    return {
        aten.sort.stable: stable_sort, aten._grouped_mm.default: grouped_mm, aten.searchsorted.Tensor: searchsorted,
        aten.index_add.default: index_add,
    }  # fmt: skip


def _needs(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"onnx: the package {name} is missing; pip install 'vmoe_momentum[export]'") from error


FORMAT = Format(write, open_answer, precisions=("fp32", "fp16", "int8"), computes_on=computes_on)
