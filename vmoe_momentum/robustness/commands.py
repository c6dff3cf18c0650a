"""The command line `vmoe-momentum robustness ...`; benchmarks/robustness.py is the same."""

import platform
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from ..parsers import Parser, check_device, new_parser
from ..pictures import UPRIGHT_HELP
from ..ranges import COUNT, WORKERS
from ..staging import check_writable
from .asked import ATTACK_NAMES, BENCHMARK, EXTRA, RANGES, SHIFTED

if TYPE_CHECKING:
    from .models import Model
    from .plan import Settings

_EXAMPLES = """examples:
  vmoe-momentum robustness --data data/digits --model Residual=a.ckpt --model HeavyBall=b.ckpt --out runs/robustness
  vmoe-momentum robustness --data data/imagenet --model vit_small_patch16_224 --imagenet_c data/imagenet-c --limit 1000
  vmoe-momentum robustness --data data/digits --model HB=s0.ckpt --model HB=s1.ckpt --model Res=s2.ckpt '--eps=[1/255]'

It writes rows.csv, report.json, report.md and report.html (self-contained) to --out; stopped, it goes on from there.
What differs between two equal runs, their times, is in times.json."""


def run(argv: list[str], open_models: Callable[[list[str]], "list[Model]"]) -> None:
    """argv: what follows `robustness`. Mistakes come out as exceptions, before anything is evaluated."""
    given = parser().parse_args(argv).as_dict()

    from .effects import check_effects, named_in  # here: mistyped options are told before torch is imported
    from .evaluate import evaluate
    from .models import turned
    from .plan import check_settings, describe_pictures, make_plan
    from .report import write_report
    from .terminal import show
    from .versions import versions

    settings = _settings(given)
    check_settings(settings)
    check_effects(named_in(argv), settings)
    check_device(given["device"])
    if not given["out"].strip():
        raise ValueError("--out=: name a folder for the report")
    out = Path(given["out"])
    check_writable(out, "--out")
    models = open_models(given["model"] or [])
    if given["upright"] is not None:
        models = [turned(model, given["upright"]) for model in models]
    cells = make_plan(settings, models)
    start = time.monotonic()
    evaluation = evaluate(cells, models, out, given["batch_size"], given["workers"], given["device"])
    provenance = {
        "command": shlex.join(["vmoe-momentum", "robustness", *argv]), "settings": settings._asdict(),
        "models": {model.name: model.provenance for model in models}, "batch_size": given["batch_size"],
        "device": given["device"], "machine": platform.machine(), "python": platform.python_version(),
        "pictures": describe_pictures(cells), "versions": versions(),
    }  # fmt: skip
    times = {"seconds": round(time.monotonic() - start, 1), "finished": time.strftime("%Y-%m-%d %H:%M:%S")}
    report = write_report(evaluation, out, provenance, times)
    show(report)
    told = f"{len(report.rows)} rows: {out / 'rows.csv'}; report: {out / 'report.html'}"
    Console().print(told, soft_wrap=True, highlight=False, markup=False)


def parser() -> Parser:
    words = new_parser(
        "How robust is it? One report for one or many models.", _EXAMPLES, prog="vmoe-momentum robustness"
    )
    words.add_argument(
        "--model", action="append", type=str, default=None,
        help="[LABEL=]SOURCE: a .ckpt of fit, local-dir:PATH, a timm name, or module:callable; several times. One "
        "label again makes a group, such as seeds: mean, spread, paired differences.",
    )  # fmt: skip
    words.add_argument(
        "--data",
        type=str | None,
        help="Clean labelled pictures: ROOT/val/CLASS/* or ROOT/CLASS/*, CLASS as trained on.",
    )
    words.add_argument(
        "--imagenet_c", type=str | None, help="The published ImageNet-C: <corruption>/<severity>/<wnid>/*."
    )
    for name in SHIFTED:
        words.add_argument(f"--{name}", type=str | None, help=f"Folder of {name.replace('_', '-')}, one folder a wnid.")
    names = f"Names, by default the 15 of the benchmark; [none] for none. All: {', '.join((*BENCHMARK, *EXTRA))}."
    words.add_argument("--corruptions", type=list[str] | None, help=names)
    words.add_number("--severities", list[int] | None, RANGES["severities"], "By default all of them.")
    words.add_argument(
        "--regenerate", type=bool | None,
        help="Make corruptions of --data; by default only where there is no --imagenet_c.",
    )  # fmt: skip
    words.add_argument(
        "--attacks", type=list[str], default=["fgsm", "pgd", "pgd-margin", "square"],
        help=f"Any of {', '.join(ATTACK_NAMES)}; [] for none.",
    )  # fmt: skip
    words.add_argument(
        "--eps", type=list[float | str] | None, default=None,
        help="Budgets in pixels of [0, 1]; by default [1/255,2/255,4/255], or [0.5,1,2] in L2.",
    )  # fmt: skip
    words.add_argument("--norm", type=Literal["Linf", "L2"], default="Linf", help="Of the attacks.")
    words.add_number("--steps", int, RANGES["steps"], "Of iterative attacks.", default=20)
    words.add_number("--queries", int, RANGES["queries"], "Of square and spsa, an image.", default=5000)
    text = "Images that square and spsa attack; by default a tenth of the pictures, 100 at least and 1000 at most."
    words.add_number("--query_images", int | None, RANGES["query_images"], text)
    words.add_argument("--router_aware", action="store_true", help="Attacks also drive up the routers' loss.")
    text = "Only so many pictures of each set, the same ones every time."
    words.add_number("--limit", int | None, RANGES["limit"], text)
    words.add_number("--seed", int, RANGES["seed"], "Of corruptions, noise, attacks and subsets.", default=0)
    words.add_number("--batch_size", int, COUNT, "Pictures at once.", default=64)
    words.add_number("--workers", int, WORKERS, "Processes that decode and corrupt.", default=0)
    words.add_argument("--device", type=str, default="cpu", help="cpu, cuda, cuda:1, ...")
    words.add_argument("--upright", type=bool | None, help=f"{UPRIGHT_HELP} By default as each was trained.")
    words.add_argument(
        "--out", type=str, default="runs/robustness", help="Folder for the report; a report there is replaced."
    )
    return words


def _settings(given: dict[str, Any]) -> "Settings":
    """[none] means no corruption, as [] does; corruptions are made where no published ones are given."""
    from .plan import DEFAULT_EPS, Settings, parse_eps

    made_here = given["imagenet_c"] is None if given["regenerate"] is None else given["regenerate"]
    corruptions = [] if given["corruptions"] == ["none"] else given["corruptions"]
    eps = DEFAULT_EPS[given["norm"]] if given["eps"] is None else [parse_eps(text) for text in given["eps"]]
    chosen = {"corruptions": corruptions, "eps": eps, "regenerate": made_here}
    values = {name: chosen.get(name, given[name]) for name in Settings._fields}
    return Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
