"""Which blocks are sparse."""

import re


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
