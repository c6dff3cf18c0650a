"""The pages' tables from the committed CSVs: `python benchmarks/tables.py` rewrites them between their markers."""

import csv
import re
import statistics
from collections import defaultdict
from functools import partial
from pathlib import Path

from scipy.stats import t

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def digits() -> str:
    """Mean and sample standard deviation over seeds, a row a rule."""
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in read("digits"):
        groups[row["rule"]].append(row)
    lines = ["| rule | seeds | epochs | top-1 on 360 held-out images | s / epoch |", "|---|---|---|---|---|"]
    for rule, rows in groups.items():
        top1 = [100 * float(row["top1"]) for row in rows]
        seconds = statistics.mean(float(row["seconds_per_epoch"]) for row in rows)
        score = f"{statistics.mean(top1):.2f} % ± {statistics.stdev(top1):.2f}"
        lines.append(f"| {rule} | {len(rows)} | {rows[0]['epochs']} | {score} | {seconds:.1f} |")
    return "\n".join(lines)


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


def before_after() -> str:
    """This code beside an earlier one's."""
    rows = read("before_after")
    lines = ["| what | before | now | ratio |", "|---|---|---|---|"]
    lines += [f"| {row['what']} | {row['before']} | {row['now']} | {row['ratio']} |" for row in rows]
    return "\n".join([*lines, "", f"Measured on {rows[0]['device']}, torch {rows[0]['torch']}."])


def corruptions() -> str:
    """Ours beside imagecorruptions and the JPEG that both end in."""
    rows = read("corruptions")
    lines = ["| corruption | ms | imagecorruptions, ms | ratio |", "|---|---|---|---|"]
    lines += [f"| {row['corruption']} | {row['ours_ms']} | {row['peer_ms']} | {row['ratio']} |" for row in rows]
    return "\n".join([*lines, "", f"Measured on {rows[0]['device']}."])


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


def zoo() -> str:
    """What each network has, uses and costs."""
    lines = [
        "| network | experts | sparse blocks | parameters | active | GFLOPs an image |",
        "|---|---|---|---|---|---|",
    ]
    for row in read("zoo"):
        millions = [f"{int(row[column]) / 1e6:,.1f} M" for column in ("parameters", "active")]
        cost = f"{float(row['gflops']):.3g}"
        cells = [f"`{row['name']}`", row["experts"], row["sparse_blocks"], *millions, cost]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rules() -> str:
    """Mean and sample standard deviation over seeds, an overlay a row, in the order of their names."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row in read("rules"):
        groups[row["overlay"]].append(100 * float(row["top1"]))
    lines = ["| configs/rules/ | seeds | top-1 on 360 held-out images | lowest |", "|---|---|---|---|"]
    for overlay, top1 in sorted(groups.items()):
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        lines.append(f"| {overlay} | {len(top1)} | {statistics.mean(top1):.2f} %{spread} | {min(top1):.2f} % |")
    return "\n".join(lines)


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


def adversarial() -> str:
    """Clean and attacked training side by side: mean and sample standard deviation over seeds."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read("adversarial"):
        kind = row["condition"] if row["metric"] == "robust_top1" else row["metric"] * (row["condition"] == "clean")
        found[row["model"].partition("#")[0]][kind].append(100 * float(row["value"]))
    columns = {"top1": "clean", "pgd-20": "PGD-20", "autoattack": "AutoAttack, 40 pictures"}
    columns = {kind: told for kind, told in columns.items() if all(kind in values for values in found.values())}
    lines = [f"| trained | seeds | {' | '.join(columns.values())} |", "|---" * (len(columns) + 2) + "|"]
    for model, values in found.items():
        cells = [f"{statistics.mean(values[c]):.1f} % ± {statistics.stdev(values[c]):.1f}" for c in columns]
        lines.append(f"| {model} | {len(values['top1'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def adversarial_suite() -> str:
    """Each attack on the same pictures: mean over seeds."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read("adversarial_suite"):
        if row["metric"] == "robust_top1" and row["condition"] != "sanity-pgd":  # of a huge eps
            found[row["condition"]][row["model"].partition("#")[0]].append(100 * float(row["value"]))
    models = list(next(iter(found.values())))
    lines = [f"| attack | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for attack, values in found.items():
        lines.append(f"| {attack} | {' | '.join(f'{statistics.mean(values[m]):.1f}' for m in models)} |")
    return "\n".join(lines)


def adversarial_cost() -> str:
    """A step beside a clean one."""
    rows = read("adversarial_cost")
    lines = ["| step | ms | over a clean one | quartiles |", "|---|---|---|---|"]
    lines += [f"| {row['step']} | {row['ms']} | {row['of_clean']} | {row['low']} to {row['high']} |" for row in rows]
    return "\n".join([*lines, "", f"Measured on {rows[0]['device']}, torch {rows[0]['torch']}."])


def language() -> str:
    """Perplexities of language models: mean and sample standard deviation over seeds, and differences seed by seed."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in read("language"):
        groups[row["model"], row["depth"]].append(row)
    columns = {"clean": "clean", "swapped": "2.5 % swapped", "swapped_inputs_only": "swapped inputs, clean targets"}
    lines = [f"| model | sparse blocks | seeds | {' | '.join(columns.values())} | clean, minus Residual (95 %) |"]
    lines.append("|---" * 7 + "|")
    for (model, depth), rows in sorted(groups.items(), key=lambda item: (int(item[0][1] or 0), item[0][0])):
        cells = []
        for column in columns:
            values = [float(row[column]) for row in rows if row[column]]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}" if values else "")
        cells.append(minus_residual(groups, model, depth))
        lines.append(f"| {model} | {depth} | {len(rows) if depth else ''} | {' | '.join(cells)} |")
    runs = sum(len(rows) for (_, depth), rows in groups.items() if depth)
    wanted = 27  # nine cells of three seeds
    if runs < wanted:
        lines += ["", f"{runs} of {wanted} runs are there: too few to say which rule reads better."]
    return "\n".join(lines)


def minus_residual(groups: dict[tuple[str, str], list[dict[str, str]]], model: str, depth: str) -> str:
    """Paired by seed: mean, and the interval of the t test, for which two pairs are too few to be told."""
    if not depth or model == "Residual":
        return ""
    control = {row["seed"]: float(row["clean"]) for row in groups["Residual", depth]}
    pairs = [float(row["clean"]) - control[row["seed"]] for row in groups[model, depth] if row["seed"] in control]
    if len(pairs) < 3:
        return ""
    reach = t.ppf(0.975, len(pairs) - 1) * statistics.stdev(pairs) / len(pairs) ** 0.5
    mean = statistics.mean(pairs)
    return f"{mean:+.2f} ({mean - reach:+.2f} to {mean + reach:+.2f})"


def language_step() -> str:
    """One step at full vocabulary."""
    rows = read("language_step")
    lines = ["| logits | seconds | peak memory | above weights, gradients and moments |", "|---|---|---|---|"]
    for row in rows:
        more = float(row["peak_GB"]) - float(row["before_GB"])
        lines.append(f"| {row['logits']} | {row['seconds']} | {row['peak_GB']} GB | {more:.2f} GB |")
    return "\n".join([*lines, "", f"Measured on {rows[0]['device']}, torch {rows[0]['torch']}."])


TABLES = {
    "language": language, "language_step": language_step,
    "dataloading": dataloading, "digits": digits, "export": export, "rules": rules, "speed": speed, "zoo": zoo,
    "layers": partial(layers, "moe_layer"),
    "layers_gpu": partial(layers, "gpu/moe_layer"), "layers_gpu_large": partial(layers, "gpu/moe_layer_large"),
    "steps": partial(steps, "train_step"), "steps_gpu": partial(steps, "gpu/train_step"),
    "traffic_8": partial(traffic, 8), "traffic_64": partial(traffic, 64), "traffic_measured": traffic_measured,
    "adversarial": adversarial, "adversarial_cost": adversarial_cost, "adversarial_suite": adversarial_suite,
    "corruptions": corruptions, "before_after": before_after, "busy": busy,
}  # fmt: skip
PAGES = tuple(
    ROOT / page for page in (
        "docs/networks.md", "docs/results.md", "docs/train.md", "docs/weights.md", "benchmarks/README.md",
        "configs/scale/README.md", "vmoe_momentum/training/README.md", "vmoe_momentum/language/README.md",
    )
)  # fmt: skip


def fill(text: str) -> str:
    """`text` with the lines between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda match, table=table: f"{match[1]}{table()}\n{match[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text()))
