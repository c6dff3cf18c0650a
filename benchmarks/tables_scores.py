"""The pages' tables of networks and of what they reach, from the committed CSVs."""

import statistics
from collections import defaultdict

from scipy.stats import t
from tables_rows import read


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
