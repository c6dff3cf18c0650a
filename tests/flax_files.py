"""Random V-MoE parameters, and a writer of the official on-disk layout (as tests/oracles/official_checkpoint says)."""

import random
from pathlib import Path

import msgpack
import numpy as np


def random_params(
    seed: int = 0,
    *,
    image: tuple[int, int] = (12, 12),
    patch: tuple[int, int] = (4, 4),
    width: int = 16,
    depth: int = 3,
    heads: int = 2,
    hidden: int = 20,
    moe: tuple[int, ...] = (1,),
    normed: tuple[int, ...] = (),  # blocks with the fork's LayerNorm_2
    experts: int = 4,
    slots: int = 0,
    classifier: str = "token",
    positions: bool = True,
    qk_norm: bool = False,
    representation: int = 0,
    classes: int = 5,
) -> dict[str, np.ndarray]:
    """A flax tree, every array random (norms around 1)."""
    rng = np.random.default_rng(seed)
    tree: dict[str, np.ndarray] = {}

    def draw(name: str, *shape: int, mean: float = 0.0, std: float = 0.1) -> None:
        tree[name] = (mean + std * rng.standard_normal(shape)).astype(np.float32)

    def dense(name: str, inputs: int, outputs: int, *stack: int) -> None:
        draw(f"{name}/kernel", *stack, inputs, outputs, std=inputs**-0.5)
        draw(f"{name}/bias", *stack, outputs)

    def norm(name: str) -> None:
        draw(f"{name}/scale", width, mean=1.0)
        draw(f"{name}/bias", width)

    def attend(name: str) -> None:
        for part in ("query", "key", "value"):
            draw(f"{name}/{part}/kernel", width, heads, width // heads, std=width**-0.5)
            draw(f"{name}/{part}/bias", heads, width // heads)
        draw(f"{name}/out/kernel", heads, width // heads, width, std=width**-0.5)
        draw(f"{name}/out/bias", width)
        if qk_norm:
            draw(f"{name}/query_ln/scale", width // heads, mean=1.0)
            draw(f"{name}/key_ln/scale", width // heads, mean=1.0)

    draw("embedding/kernel", *patch, 3, width, std=0.2)
    draw("embedding/bias", width)
    tokens = (image[0] // patch[0]) * (image[1] // patch[1]) + (classifier == "token")
    if classifier == "token":
        draw("cls", 1, 1, width, std=1.0)
    if positions:
        draw("Encoder/posembed_input/pos_embedding", 1, tokens, width, std=0.5)
    for index in range(depth):
        block = f"Encoder/encoderblock_{index}"
        norm(f"{block}/LayerNorm_0")
        norm(f"{block}/LayerNorm_1")
        if index in normed:
            norm(f"{block}/LayerNorm_2")
        attend(f"{block}/SelfAttention")
        stack = (experts,) if index in moe else ()
        mlp = f"{block}/Moe/Mlp" if index in moe else f"{block}/Mlp"
        dense(f"{mlp}/Dense_0", width, hidden, *stack)
        dense(f"{mlp}/Dense_1", hidden, width, *stack)
        if index in moe and slots:
            draw(f"{block}/Moe/Router/mu", width, experts, slots)
            draw(f"{block}/Moe/Router/scale", mean=3.0)
        elif index in moe:
            draw(f"{block}/Moe/Router/dense/kernel", width, experts, std=0.5)
    norm("Encoder/encoder_norm")
    if classifier == "map":
        draw("MapHead/probe", 1, 1, width, std=1.0)
        attend("MapHead/MultiHeadDotProductAttention")
        norm("MapHead/LayerNorm")
        dense("MapHead/Mlp/Dense_0", width, hidden)
        dense("MapHead/Mlp/Dense_1", hidden, width)
    if representation:
        dense("pre_logits", width, representation)
    dense("head", representation or width, classes)
    return tree


def write_official(
    prefix: Path,
    params: dict[str, np.ndarray],
    shards: int,
    *,
    train_state: bool = False,
    bfloat16: bool = False,
    seed: int = 0,
) -> None:
    """Each tensor cut into random boxes along random axes, spread over random shards; some pieces in two parts.

    bfloat16: store the upper halves of the float32 values (see `truncated`).
    """
    choose = random.Random(seed)
    tree: dict = {}
    tensors = {f"params/{name}" if train_state else name: array for name, array in params.items()}
    if train_state:
        tensors["step"] = np.int32(7).reshape(())
        tensors |= {f"opt_state/0/mu/{name}": 0 * array for name, array in params.items()}
    numbers = {name: i for i, name in enumerate(sorted(tensors, key=lambda name: name.split("/")))}
    content: list[dict] = [{"__msgpack_array_chunk_a87ca2__": True} for _ in range(shards)]
    for name, array in tensors.items():
        boxes = _boxes(array.shape, choose)
        where = [choose.randrange(shards) for _ in boxes]
        dtype = "bfloat16" if bfloat16 and array.dtype == np.float32 else array.dtype.name
        info = pack([list(array.shape), dtype, False, {}])
        entry = msgpack.ExtType(8, pack([info, [pack_box(box) for box in boxes], where]))
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = entry
        for box, shard in zip(boxes, where, strict=True):
            values = array[tuple(slice(*axis) for axis in box)].reshape(-1)
            cut = choose.randrange(len(values) + 1)
            parts = [part for part in (values[:cut], values[cut:]) if len(part)]
            exts = [msgpack.ExtType(1, pack([[len(p)], dtype, _bytes(p, dtype)])) for p in parts]
            piece = [exts, msgpack.ExtType(6, pack_box(box))]
            content[shard].setdefault(str(numbers[name]), []).append(piece)
    index = {"shard_count": shards, "index": tree, "version": "20220622"}
    prefix.with_name(prefix.name + ".index").write_bytes(pack(index))
    for shard, values in enumerate(content):
        shard_path(prefix, shard, shards).write_bytes(pack(values))


def shard_path(prefix: Path, shard: int, shards: int) -> Path:
    return prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}")


def pack(value: object) -> bytes:
    return msgpack.packb(value)


def pack_box(box: tuple[tuple[int, int], ...]) -> bytes:
    return pack([pack([start, stop, None]) for start, stop in box])


def truncated(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """float32 values that bfloat16 can hold."""
    return {name: (array.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, array in params.items()}


def _bytes(values: np.ndarray, dtype: str) -> bytes:
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes() if dtype == "bfloat16" else values.tobytes()


def _boxes(shape: tuple[int, ...], choose: random.Random) -> list[tuple[tuple[int, int], ...]]:
    """A partition of the array's index space into at most eight boxes."""
    boxes: list[tuple[tuple[int, int], ...]] = [tuple((0, size) for size in shape)]
    for _ in range(choose.randrange(4)):
        axis = choose.randrange(len(shape)) if shape else 0
        cut = []
        for box in boxes:
            start, stop = box[axis] if box else (0, 1)
            if stop - start < 2:
                cut.append(box)
                continue
            middle = choose.randrange(start + 1, stop)
            cut += [(*box[:axis], half, *box[axis + 1 :]) for half in ((start, middle), (middle, stop))]
        boxes = cut
    choose.shuffle(boxes)
    return boxes
