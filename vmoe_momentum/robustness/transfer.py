"""Pictures made on one model and shown to another: how many each stands, source by target."""

from collections.abc import Mapping

from .cells import FROM
from .rows import Row
from .summary import eps_text
from .tables import Table, short_names

ITSELF = "itself"
# (attack, eps) -> (label of the source or ITSELF, label of the target) -> robust accuracy of each pair of models
Transfers = dict[tuple[str, str], dict[tuple[str, str], list[float]]]

NOTE = (
    "Robust accuracy in % of each column's model on pictures made on each line's; `itself`: on its own. Of labels of "
    "several models the mean over all pairs of two different ones. Lower than `itself`: its gradients may be masked."
)


def transfers(rows: list[Row], labels: Mapping[str, str]) -> Transfers:
    """labels: of the models, by name. {} where there are no transfer attacks."""
    robust = [row for row in rows if row.metric == "robust_top1"]
    found: Transfers = {}
    for row in robust:
        attack, _, source = row.condition.partition(FROM)
        if source:
            pairs = found.setdefault((attack, row.severity_or_eps), {})
            pairs.setdefault((labels[source], labels[row.model]), []).append(row.value)
    for row in robust:
        if (row.condition, row.severity_or_eps) in found:
            pairs = found[row.condition, row.severity_or_eps]
            pairs.setdefault((ITSELF, labels[row.model]), []).append(row.value)
    return found


def transfer_tables(rows: list[Row], labels: Mapping[str, str]) -> list[Table]:
    """One, or none."""
    found, targets = transfers(rows, labels), list(dict.fromkeys(labels.values()))
    if not found:
        return []
    names, told = short_names(targets)
    lines = [
        [f"{attack}, eps {eps_text(attack, eps)}" if source == ITSELF else "", source,
         *[_mean(pairs.get((source, target), [])) for target in targets]]
        for (attack, eps), pairs in found.items()
        for source in (ITSELF, *targets)
    ]  # fmt: skip
    return [Table("Transfer", NOTE + told, ["attack", "made on", *names], lines)]


def _mean(values: list[float]) -> str:
    return f"{100 * sum(values) / len(values):.1f}" if values else ""
