"""Every rule and every router as exported program and as ONNX; what the three translations into ONNX do."""

import copy
import math

import numpy as np
import pytest
import torch
from registered import registered
from torch import nn
from torch.export.passes import move_to_device_pass

from vmoe_momentum import create_model
from vmoe_momentum.export.base import Request, Servable, as_answer
from vmoe_momentum.export.formats import FORMATS
from vmoe_momentum.models import MomentumVisionTransformer, PixelModel
from vmoe_momentum.models.saved import build_arguments
from vmoe_momentum.moe import Router
from vmoe_momentum.momentum import MomentumRule

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
RULES = sorted(registered(MomentumRule))
ROUTERS = sorted(registered(Router))
# torch.export is swept over rules and routers in tests/models and tests/moe, too
SWEPT = [pytest.param("pt2", marks=pytest.mark.long), "onnx"]
# rules of the same arithmetic as another one here: part of `make test-all`
ALIKE = ("Complex", "HeavyBall", "Nesterov", "Residual", "Robust")
# what makes a router drop, rank or choose otherwise
SETTINGS = {
    "capacity": ("TopKRouter", {"eval_capacity_factor": 0.6}),
    "batch priority": ("TopKRouter", {"eval_capacity_factor": 0.6, "batch_priority": True}),
    "top-1": ("TopKRouter", {"top_k": 1}),
    "renormalised": ("TopKRouter", {"renormalize": True}),
}

MILDER = ("capacity", "renormalised", "top-1")  # than "batch priority", which does the same and more


# as in the authors' vision code: norms behind the residual, look-ahead behind the norm, in dense blocks too
RELEASED = {"class_path": "Robust", "init_args": {"L": 1.0, "m": 0.8, "r": 0.2, "look_ahead": "after_norm"}}


def shallow(
    rule: str | dict = "HeavyBall", router: str = "TopKRouter", post_norm: str = "none", **settings
) -> PixelModel:
    """Two blocks, both sparse; with norms behind them a dense one comes between."""
    torch.manual_seed(0)
    spec = {"class_path": router, "init_args": settings}
    depth = 2 if post_norm == "none" else 3
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": depth, "num_heads": 2, "num_classes": 5}
    sparse = {"moe_layers": [0, depth - 1], "num_experts": 4, "share_expert_init": False, "post_norm": post_norm}
    net = MomentumVisionTransformer(**shape, rule=rule, router=spec, **sparse)
    nn.init.normal_(net.head.weight)
    return PixelModel(net).eval()


def differences(model: PixelModel, kind: str, folder, request: Request | None = None) -> dict[int, float]:
    """Largest difference from the network itself, by batch size."""
    request = request or Request()
    metadata = {"input": request.input, "output": request.output}
    FORMATS[kind].write(copy.deepcopy(model), folder, request, metadata)
    answer, expected = FORMATS[kind].open(folder, metadata), as_answer(Servable(model, request))
    found = {}
    for size in (1, 2, 17):
        images = torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(size))
        images = (images * 255).byte() if request.input == "uint8" else images
        found[size] = float((answer(images) - expected(images)).abs().max())
    return found


@pytest.mark.parametrize("kind", SWEPT)
@pytest.mark.parametrize("rule", [pytest.param(r, marks=pytest.mark.long) if r in ALIKE else r for r in RULES])
def test_every_rule(rule: str, kind: str, tmp_path) -> None:
    found = differences(shallow(rule), kind, tmp_path)
    assert max(found.values()) < (1e-3 if rule == "Adam" else 1e-4), found  # Adam divides by small numbers


@pytest.mark.parametrize("kind", SWEPT)
@pytest.mark.parametrize(
    "case", [*ROUTERS, *(pytest.param(c, marks=pytest.mark.long) if c in MILDER else c for c in SETTINGS)]
)
def test_every_router(case: str, kind: str, tmp_path) -> None:
    router, settings = SETTINGS.get(case, (case, {}))
    found = differences(shallow(router=router, **settings), kind, tmp_path)
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@pytest.mark.parametrize("router", ["ExpertChoiceRouter", "SoftRouter", "TopKRouter"])
def test_routing_over_several_images_has_no_program(router: str, kind: str, tmp_path) -> None:
    """Where an image's answer needs batch mates no batch size is free."""
    capacity = {"eval_capacity_factor": 0.6} if router == "TopKRouter" else {}
    model = shallow(router=router, group_size=17 * 4, **capacity)
    with pytest.raises(ValueError, match="routes 4 images together.*use --to hf or state-dict"):
        FORMATS[kind].write(model, tmp_path, Request(), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_pixels_in_bytes_and_probabilities_out(kind: str, tmp_path) -> None:
    model, request = shallow(), Request("uint8", "probabilities")
    assert max(differences(model, kind, tmp_path, request).values()) < 1e-5
    answer = FORMATS[kind].open(tmp_path, {"input": "uint8", "output": "probabilities"})
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(answer(images).sum(dim=1), torch.ones(3))
    with pytest.raises(Exception, match="(?i)dtype|data type"):
        answer(images.float())


def test_only_what_serving_needs_is_in_the_program(tmp_path) -> None:
    """No losses (their variances), no noise, no check but that of the pixels; any batch size."""
    from vmoe_momentum.export.program import trace

    program = trace(Servable(shallow(), Request()))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not {"aten.var.correction", "aten.randn.default", "aten.rand.default"} & set(names)
    assert sum("_assert_tensor_metadata" in name for name in names) == 1


def test_ties_are_broken_as_torch_breaks_them(tmp_path) -> None:
    """ONNX has no stable sort: TopK of everything, lower index first on a tie. And empty experts, and one for all."""
    from vmoe_momentum.export.onnx import translations

    class Ops(nn.Module):
        def forward(self, x, rows, weight, ends):
            values, order = x.sort(dim=-1, descending=True, stable=True)
            up, down = x.sort(dim=-1, stable=True)
            places = torch.searchsorted(
                up, torch.arange(4, device=x.device).expand(x.shape[0], -1).float().contiguous()
            )
            right = torch.searchsorted(up[0], torch.arange(4).float(), right=True)
            return values, order, up, down, places, right, torch.nn.functional.grouped_mm(rows, weight, offs=ends)

    batch, count = torch.export.Dim("batch", min=1), torch.export.Dim("rows", min=1)
    weight = torch.randn(4, 8, 16)
    generator = torch.Generator().manual_seed(0)

    def inputs(size: int, ends: list[int]):
        x = torch.randint(0, 3, (size, 20), generator=generator).float()
        return x, torch.randn(ends[-1], 8, generator=generator), weight, torch.tensor(ends, dtype=torch.int32)

    dynamic = ({0: batch}, {0: count}, None, None)
    traced = torch.export.export(Ops(), inputs(3, [2, 5, 5, 9]), dynamic_shapes=dynamic, strict=False)
    program = torch.onnx.export(traced, (), verbose=False, custom_translation_table=translations(), opset_version=20)
    program.save(tmp_path / "ops.onnx")
    session = runtime.InferenceSession(str(tmp_path / "ops.onnx"))
    for size, ends in ((3, [2, 5, 5, 9]), (1, [0, 0, 0, 7]), (5, [4, 4, 4, 4]), (2, [0, 1, 2, 3])):
        given = inputs(size, ends)
        got = session.run(None, {place.name: v.numpy() for place, v in zip(session.get_inputs(), given, strict=True)})
        for mine, theirs in zip(Ops()(*given), got, strict=True):
            torch.testing.assert_close(torch.from_numpy(theirs).to(mine.dtype), mine, atol=1e-5, rtol=1e-5)


@pytest.mark.long
def test_half_and_eight_bits_answer_alike(tmp_path) -> None:
    model = shallow()
    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    expected = as_answer(Servable(model, Request()))(images)
    sizes = {}
    for precision in ("fp32", "fp16", "int8"):
        folder = tmp_path / precision
        folder.mkdir()
        facts = FORMATS["onnx"].write(copy.deepcopy(model), folder, Request(precision=precision), {})
        found = FORMATS["onnx"].open(folder, facts)(images)
        sizes[precision] = (folder / "model.onnx").stat().st_size
        difference = float((found - expected).abs().max())
        assert found.dtype == torch.float32 and math.isfinite(difference)
        assert difference < 1e-4 if precision == "fp32" else difference > 1e-4  # it did something
        assert float((found.argmax(1) == expected.argmax(1)).float().mean()) >= 0.9
        assert ("quantization" in facts) == (precision == "int8")
    assert sizes["fp16"] < sizes["fp32"] and sizes["int8"] < sizes["fp32"]
    assert facts["quantization"]["weights"] == "uint8" and "VNNI" in facts["quantization"]["why"]
    check_eight_bits(tmp_path / "int8" / "model.onnx")
    with pytest.raises(ValueError, match="written by an earlier version with signed 8-bit weights"):
        FORMATS["onnx"].open(tmp_path / "int8", {"precision": "int8"})


# ---- 8 bits on processors without VNNI


def products_of_avx2(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[M, L] uint8 times [L, N] of 8 bits as onnxruntime computes it on x86 without VNNI.

    Unsigned by signed bytes is vpmaddubsw: neighbouring products are added in 16 bits and saturate. Unsigned by
    unsigned is widened to 16 bits first and added in 32.
    """
    if weights.dtype == np.uint8:
        return activations.astype(np.int64) @ weights.astype(np.int64)
    even = activations.shape[1] // 2 * 2
    terms = activations[:, :, None].astype(np.int64) * weights[None].astype(np.int64)
    pairs = np.clip(terms[:, 0:even:2] + terms[:, 1:even:2], -(2**15), 2**15 - 1)
    return pairs.sum(axis=1) + terms[:, even:].sum(axis=1)


def check_eight_bits(path) -> None:
    """No product of the graph can saturate, whatever this machine's processor does."""
    graph = onnx.load(path).graph
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMulInteger", "ConvInteger")]
    assert len(products) > 3
    for node in products:
        weights = constants[node.input[1]]
        assert weights.dtype == np.uint8, node.name
        of_conv = node.op_type == "ConvInteger"
        matrices = [weights.reshape(len(weights), -1).T] if of_conv else weights.reshape(-1, *weights.shape[-2:])
        for matrix in matrices:  # one each expert, where experts are a batch
            worst = np.full((1, len(matrix)), 255, dtype=np.uint8)
            exact = worst.astype(np.int64) @ matrix.astype(np.int64)
            assert np.array_equal(products_of_avx2(worst, matrix), exact), node.name


def test_signed_bytes_saturate_where_unsigned_ones_do_not() -> None:
    """By hand: 255 * 127 twice is 64,770; 16 bits hold 32,767. The same numbers with a zero point of 128 fit."""
    activations, weights = np.array([[255, 255, 255]], dtype=np.uint8), np.array([[127], [127], [1]], dtype=np.int8)
    assert products_of_avx2(activations, weights).tolist() == [[32767 + 255]]
    unsigned = (weights.astype(np.int16) + 128).astype(np.uint8)
    shifted = products_of_avx2(activations, unsigned) - 128 * activations.astype(np.int64).sum()
    assert shifted.tolist() == [[255 * 255]]


# ---- every rule and router through every format and precision

OFFERED = [(kind, precision) for kind, form in FORMATS.items() for precision in form.precisions]
CASES = {
    **{rule: {"rule": rule} for rule in RULES},
    **{router: {"router": router} for router in ROUTERS},
    **{name: {"router": router, **settings} for name, (router, settings) in SETTINGS.items()},
    "released robust": {"rule": RELEASED, "post_norm": "all"},
}
# one of each kind that has gone wrong: an operator without a half form, a root of small numbers
SHORT = [("ExpertChoiceRouter", "onnx", "fp16"), *(("released robust", kind, "fp32") for kind in FORMATS)]
SWEEP = [
    pytest.param(case, *offer, marks=() if (case, *offer) in SHORT else pytest.mark.long)
    for case in CASES
    for offer in OFFERED
]


@pytest.mark.parametrize(("case", "kind", "precision"), SWEEP)
def test_every_format_and_precision(case: str, kind: str, precision: str, tmp_path) -> None:
    from vmoe_momentum.export.round_trip import check, round_trip

    build = by_name if kind in ("hf", "state-dict") else shallow  # what is kept as a network is built by name
    model, request = build(**CASES[case]), Request(precision=precision)
    metadata = facts_of(model, request)
    metadata |= FORMATS[kind].write(copy.deepcopy(model), tmp_path, request, metadata)
    pixels = torch.randint(0, 256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    labels = torch.zeros(40, dtype=torch.int64)
    found = round_trip(model, FORMATS[kind].open(tmp_path, metadata), pixels, labels, request, tmp_path)
    if precision != "int8":
        return check(found, precision, kind)
    # random experts far apart: tokens near the border of two change places, and a few pictures their class
    check_eight_bits(tmp_path / "model.onnx")
    assert math.isfinite(found.max_difference) and found.agreement >= 0.85, found


@pytest.mark.parametrize("rule", ["HeavyBall", "Adam"])
def test_rounding_is_seen_in_more_than_one_way(rule: str) -> None:
    """Adam divides by small numbers: one way to round is near by luck, another program's is not. Others are near."""
    from vmoe_momentum.export.round_trip import TOLERANCE, rounding_error

    model = shallow(rule)
    before = copy.deepcopy(model.state_dict())
    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        own = float((model(images).double() - copy.deepcopy(model).double()(images.double())).abs().max())
    found = rounding_error(model, images)
    assert found > own and found == rounding_error(model, images)
    assert 2 * found > TOLERANCE if rule == "Adam" else 2 * found < TOLERANCE
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def facts_of(model: PixelModel, request: Request) -> dict:
    """What opening a folder and its card read."""
    return {
        "class_names": None, "class_ids": None, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0,
        "interpolation": "bilinear", "upright": False,
        "network": network_facts(model), "source": {"file": "x", "weights": "raw"}, "parameters": 1, "data": None,
        "scores": {}, "recipe": {}, **request._asdict(),
    }  # fmt: skip


def by_name(
    rule: str | dict = "HeavyBall", router: str = "TopKRouter", post_norm: str = "none", **settings
) -> PixelModel:
    """A network that timm builds by name, for formats that keep the network itself."""
    torch.manual_seed(0)
    spec = {"class_path": router, "init_args": settings}
    named = {"rule": rule, "router": spec, "post_norm": post_norm}
    net = create_model("vmoe_tiny_patch4_16", num_classes=5, share_expert_init=False, **named)
    nn.init.normal_(net.head.weight)
    return PixelModel(net).eval()


def network_facts(model: PixelModel) -> dict:
    return {
        "architecture": "vmoe_tiny_patch4_16", "model_args": build_arguments(model.net) or {}, "num_classes": 5,
        "image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3, "settings": model.net.function_settings(),
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(FORMATS))
@pytest.mark.gpu
def test_every_format_on_a_gpu(kind: str, tmp_path) -> None:
    """Written on the CPU, as always."""
    model, request = by_name(), Request()
    metadata = facts_of(model, request)
    FORMATS[kind].write(copy.deepcopy(model), tmp_path, request, metadata)
    images = torch.rand(17, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = as_answer(Servable(model, request))(images)
    found = FORMATS[kind].open(tmp_path, metadata, "cuda")(images)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("router", ["TopKRouter", "ExpertChoiceRouter", "SoftRouter"])
def test_a_program_moves_to_another_device_whole(router: str, tmp_path) -> None:
    """The meta device stands for the GPU: whatever stayed on the CPU does not go with it."""
    FORMATS["pt2"].write(shallow(router=router), tmp_path, Request(), {})
    moved = move_to_device_pass(torch.export.load(tmp_path / "model.pt2"), "meta")
    assert moved.module()(torch.rand(17, 3, 16, 16, device="meta")).shape == (17, 5)
