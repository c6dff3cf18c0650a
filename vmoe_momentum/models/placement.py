"""Which blocks are sparse, where momentum runs over them, and which have a norm behind their MLP's residual."""

import re
from typing import Any, Literal, get_args

PostNorm = Literal["none", "dense", "sparse", "all"]


def moe_indices(moe_layers: str | list[int], depth: int) -> tuple[int, ...]:
    """Block indices, ascending, of a list or of a pattern.

    "lastN": the last N *odd* blocks, "every2": every odd block, "everyN": every Nth block, as V-MoE names them (blocks
    count from 0, so S/32 "last2" is 5 and 7 of 8); "none": no MoE layer. Raises ValueError: past the depth, or no such
    pattern.
    """
    if isinstance(moe_layers, str):
        match = re.fullmatch(r"(last|every)([1-9]\d*)", moe_layers)
        if moe_layers == "none":
            return ()
        if not match:
            raise ValueError(f'moe_layers={moe_layers!r}: use "last2", "every2", "none" or a list such as [5, 7]')
        where, number = match[1], int(match[2])
        found = range(1, depth, 2)[-number:] if where == "last" else range(number - 1, depth, number)
        if not found or (where == "last" and len(found) < number):
            raise ValueError(f"moe_layers={moe_layers!r}: a network of depth {depth} has {depth // 2} odd blocks")
        return tuple(found)
    for index in moe_layers:
        if not 0 <= index < depth:
            raise ValueError(f"moe_layers={moe_layers}: index {index} is past depth={depth}; use 0..{depth - 1}")
    if len(set(moe_layers)) < len(moe_layers):
        raise ValueError(f"moe_layers={moe_layers} names a block twice")
    return tuple(sorted(moe_layers))


def momentum_steps(num_blocks: int, last: int | None, restart: int | None) -> tuple[int, ...]:
    """t of the rule at each MoE block: 1, 2, ... since the start or the last restart; 0 for blocks without momentum.

    last: momentum over the last so many MoE blocks only; restart: begin anew every so many. Raises ValueError: below 1,
    or more blocks than there are.
    """
    for name, value in (("momentum_last", last), ("momentum_restart", restart)):
        if value is not None and not 1 <= value <= max(num_blocks, 1):
            raise ValueError(f"{name}={value}: the network has {num_blocks} MoE blocks; use 1..{num_blocks}")
    first = 0 if last is None else num_blocks - last
    return tuple(0 if i < first else (i - first) % (restart or num_blocks) + 1 for i in range(num_blocks))


def check_post_norm(post_norm: str) -> None:
    """Raises ValueError: no such place."""
    if post_norm not in get_args(PostNorm):
        raise ValueError(f"post_norm={post_norm}: use {', '.join(get_args(PostNorm))} (the blocks that have the norm)")


def block_settings(index: int, indices: tuple[int, ...], steps: tuple[int, ...], post_norm: PostNorm) -> dict[str, Any]:
    """step and post_norm of one block. indices, steps: of the MoE blocks.

    A dense block has the t of the MoE block to come, behind the last one the t that would come.
    """
    coming = [step for place, step in zip(indices, steps, strict=True) if place >= index]
    step = coming[0] if coming else (steps[-1] + 1 if steps else 1)
    return {"step": step, "post_norm": has_post_norm(index, indices, post_norm)}


def has_post_norm(index: int, indices: tuple[int, ...], post_norm: PostNorm) -> bool:
    """indices: of the MoE blocks."""
    return post_norm in ("sparse" if index in indices else "dense", "all")
