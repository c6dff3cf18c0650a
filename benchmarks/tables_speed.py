"""The pages' tables of what things cost, from the committed CSVs."""

from tables_rows import read


def layers(*names: str) -> str:
    """Layers of all these files by shape: time over a dense MLP on K T tokens, forward / forward and backward."""
    rows = [row for name in names for row in read(name)]
    cases = list(dict.fromkeys((row["at"], row["dtype"], row["device"]) for row in rows))
    found = {(row["layer"], row["at"], row["dtype"], row["device"], row["pass"]): row["ratio"] for row in rows}
    shape = {(r["at"], r["dtype"], r["device"]): r for r in rows}
    heads = []
    for case in cases:
        one = shape[case]
        tokens = int(one["images"]) * int(one["tokens"])
        heads.append(f"{case[0]}: T {tokens}, D {one['width']}, F {one['hidden']}, E {one['experts']}, {case[1]}")
    lines = [f"| layer | {' | '.join(heads)} |", "|---" * (len(cases) + 1) + "|"]
    for layer in dict.fromkeys(row["layer"] for row in rows):
        cells = []
        for case in cases:
            pair = [found.get((layer, *case, what)) for what in ("forward", "forward+backward")]
            cells.append(" / ".join(f"{float(ratio):.2f}" for ratio in pair if ratio is not None))
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    devices = ", ".join(dict.fromkeys(f"{row['device']}, torch {row['torch']}" for row in rows))
    return "\n".join([*lines, "", f"Measured on {devices}."])


def steps(name: str) -> str:
    """Whole training steps: over the dense ViT of equal active FLOPs, over Residual, and where the time goes."""
    rows = read(name)
    columns = ("network", "images", "rule", "ms", "over_dense", "over_residual", "forward_ms", "backward_ms",
               "optimizer_ms", "peak_MB")  # fmt: skip
    lines = [f"| {' | '.join(column.replace('_', ' ') for column in columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(row[column] for column in columns)} |" for row in rows]
    return "\n".join([*lines, "", f"Measured on {rows[0]['device']}, torch {rows[0]['torch']}."])


def speed() -> str:
    """In short: our layers, and HeavyBall's steps."""
    lines = ["| what | over a dense MLP on K T tokens, forward / with backward | measured on |", "|---|---|---|"]
    rows = [*read("moe_layer"), *read("gpu/moe_layer_large")]
    for at, dtype, layer in dict.fromkeys((row["at"], row["dtype"], row["layer"]) for row in rows):
        own = [row for row in rows if (row["at"], row["dtype"], row["layer"]) == (at, dtype, layer)]
        if layer in ("ours, dropless", "ours, capacity 1.05"):
            ratios = " / ".join(f"{float(row['ratio']):.2f}" for row in own)
            lines.append(
                f"| sparse layer, {at}, E {own[0]['experts']}, {layer}, {dtype} | {ratios} | {own[0]['device']} |"
            )
    lines += ["", "| training step, HeavyBall | over a dense ViT of equal active FLOPs | over Residual | measured on |"]
    lines.append("|---|---|---|---|")
    for row in [*read("train_step"), *read("gpu/train_step")]:
        if row["rule"] == "HeavyBall":
            what = f"{row['network']}, {row['images']} images"
            lines.append(f"| {what} | {row['over_dense']} | {row['over_residual']} | {row['device']} |")
    return "\n".join(lines)


def busy() -> str:
    """Layers with a core taken by another process, by torch's threads, beside nothing else running."""
    ours = ("ours, dropless", "ours, capacity 1.05", "ours, expert choice", "ours, soft")
    names = ("dense MLP", *ours, "per-expert loop", "one-hot einsum")
    found = {
        (row["at"], row["layer"], row["pass"], how): f"{float(row['ms']):.0f}"
        for how, name in (("alone", "moe_layer"), ("2", "busy_threads2"), ("1", "busy_threads1"))
        for row in read(name)
    }
    lines = [
        "| shape | layer | alone, 2 threads | beside one, 2 threads | beside one, 1 thread |",
        "|---|---|---|---|---|",
    ]
    for at in dict.fromkeys(row["at"] for row in read("busy_threads2")):
        for layer in names:
            cells = [
                " / ".join(found[at, layer, what, how] for what in ("forward", "forward+backward"))
                for how in ("alone", "2", "1")
            ]
            lines.append(f"| {at} | {layer} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Measured on {read('busy_threads2')[0]['device']} and fewer."])


def before_after() -> str:
    """This code beside an earlier one's."""
    rows = read("before_after")
    lines = ["| what | before | now | ratio |", "|---|---|---|---|"]
    lines += [f"| {row['what']} | {row['before']} | {row['now']} | {row['ratio']} |" for row in rows]
    return "\n".join([*lines, "", f"Measured on {rows[0]['device']}, torch {rows[0]['torch']}."])


def dataloading() -> str:
    """Images per second beside torchvision's loader as it is and without normalising, what they cost, and memory."""
    rows = read("dataloading")
    peers = ["torchvision ImageFolder", "torchvision ImageFolder, normalised"]
    speed = {row["loader"]: float(row["images_per_second"]) for row in rows}
    heads = [f"over {name}" for name in peers]
    head = ["loader", "images/s", *heads, "CPU ms an image", "memory, MB", "kB an image on disk"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        # beside the plain one within a round, where it was measured so
        ratios = [row["ratio"], *(f"{speed[row['loader']] / speed[peer]:.2f}" for peer in peers[1:])]
        costs = [row[name] for name in ("cpu_ms_per_image", "megabytes", "kilobytes_an_image")]
        lines.append(f"| {' | '.join([row['loader'], row['images_per_second'], *ratios, *costs])} |")
    one = rows[0]
    how = f"{one['workers']} workers or threads, batches of {one['batch']}, medians of {one['rounds']} rounds"
    return "\n".join([*lines, "", f"Measured on {one['device']}: {how}."])


def corruptions() -> str:
    """Ours beside imagecorruptions and the JPEG that both end in."""
    rows = read("corruptions")
    lines = ["| corruption | ms | imagecorruptions, ms | ratio |", "|---|---|---|---|"]
    lines += [f"| {row['corruption']} | {row['ours_ms']} | {row['peer_ms']} | {row['ratio']} |" for row in rows]
    return "\n".join([*lines, "", f"Measured on {rows[0]['device']}."])


def adversarial_cost() -> str:
    """A step beside a clean one."""
    rows = read("adversarial_cost")
    lines = ["| step | ms | over a clean one | quartiles |", "|---|---|---|---|"]
    lines += [f"| {row['step']} | {row['ms']} | {row['of_clean']} | {row['low']} to {row['high']} |" for row in rows]
    return "\n".join([*lines, "", f"Measured on {rows[0]['device']}, torch {rows[0]['torch']}."])


def language_step() -> str:
    """One step at full vocabulary."""
    rows = read("language_step")
    lines = ["| logits | seconds | peak memory | above weights, gradients and moments |", "|---|---|---|---|"]
    for row in rows:
        more = float(row["peak_GB"]) - float(row["before_GB"])
        lines.append(f"| {row['logits']} | {row['seconds']} | {row['peak_GB']} GB | {more:.2f} GB |")
    return "\n".join([*lines, "", f"Measured on {rows[0]['device']}, torch {rows[0]['torch']}."])


def export() -> str:
    """Each format beside eager torch, largest batch."""
    rows = read("export")
    batches = sorted({int(row["batch"]) for row in rows})
    head = " | ".join(f"batch {batch}, over eager" for batch in batches)
    lines = [f"| {rows[0]['network']} | {head} | MB | largest difference |", "|---" * (len(batches) + 3) + "|"]
    for case in dict.fromkeys((row["format"], row["precision"]) for row in rows):
        own = {int(row["batch"]): row for row in rows if (row["format"], row["precision"]) == case}
        cells = [f"{float(own[b]['ratio']):.2f} ({float(own[b]['milliseconds']):.0f} ms)" for b in batches]
        last = own[batches[-1]]
        lines.append(
            f"| {' '.join(case)} | {' | '.join(cells)} | {last['megabytes']} | {float(last['difference']):.0e} |"
        )
    return "\n".join([*lines, "", f"Measured on {rows[0]['device']}, torch {rows[0]['torch']}."])


def traffic(ranks: int) -> str:
    """What each way to spread a network sends in a step, and what a rank holds and gathers, all in GB."""
    rows = [row for row in read("traffic") if int(row["ranks"]) == ranks and row["backend"] == "nccl"]
    ways = ["DDP", "FSDP2", "experts", "FSDP2 x experts"]
    lines = [f"| network | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    for name in dict.fromkeys(row["network"] for row in rows):
        cells = []
        for way in ways:
            own = [row for row in rows if (row["network"], row["how"]) == (name, way)]
            held = [float(own[0][column]) / 1e3 for column in ("sent_MB", "held_MB", "gathered_MB")] if own else []
            cells.append(f"{held[0]:.3g}; {held[1]:.3g} + {held[2]:.3g}" if held else "")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def traffic_measured() -> str:
    """Computed beside measured, MB."""
    lines = ["| ranks | how | sent, computed | sent, measured | held, computed | held, measured |", "|---" * 6 + "|"]
    for row in read("traffic"):
        if row["measured_sent_MB"]:
            cells = [
                row[name] for name in ("ranks", "how", "sent_MB", "measured_sent_MB", "held_MB", "measured_held_MB")
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
