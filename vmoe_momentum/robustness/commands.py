"""The command line `vmoe-momentum robustness ...`; benchmarks/robustness.py is the same."""

import os
import platform
import shlex
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from ..files.checksums import sha256
from ..files.staging import check_writable
from ..parsers import DEVICE, Parser, new_parser, pick_device
from ..pictures import UPRIGHT_HELP
from ..ranges import COUNT, WORKERS, Range
from ..stopping import is_helper, stoppable
from .asked import ATTACK_NAMES, RANGES, TRANSFER_NAMES
from .processes import Helpers, Place, choose_device, end_with_parent, find_place, shared_cores
from .sets import SETS, named_corruptions

if TYPE_CHECKING:
    from .models import Model
    from .settings import Settings

_EXAMPLES = """examples:
  vmoe-momentum robustness --data data/digits --model Residual=a.ckpt --model HeavyBall=b.ckpt --out runs/robustness
  vmoe-momentum robustness --data data/imagenet --model vit_small_patch16_224 --imagenet_c data/imagenet-c --limit 1000
  vmoe-momentum robustness --data data/digits --model HB=s0.ckpt --model HB=s1.ckpt --model Res=s2.ckpt '--eps=[1/255]'

  vmoe-momentum robustness --data data/digits --model Residual=a.ckpt --model HeavyBall=b.ckpt '--transfer=[mi-fgsm]'
  vmoe-momentum robustness --data data/imagenet --model a.ckpt --processes 8 --device cuda   # a GPU each
  torchrun --nproc_per_node 8 --no-python vmoe-momentum robustness --data data/imagenet --model a.ckpt --device cuda
  sbatch configs/scale/robustness_array.sbatch --data data/imagenet --model a.ckpt --out runs/robustness

It writes rows.csv, report.json, report.md, report.html (self-contained) and report.tex to --out; stopped, it goes on
from there. For other programs: models.csv (a line a model), timm/ (as timm's results/*.csv) and, of models attacked by
autoattack, model_info/ (as RobustBench's). What differs between two equal runs, their times, is in times.json. The same
command with the same --out, started again elsewhere while it runs, takes its share of what is left; the report is the
same whoever computed what."""


def run(argv: list[str], open_models: Callable[[list[str]], "list[Model]"]) -> None:
    """argv: what follows `robustness`. Mistakes come out as exceptions, before anything is evaluated."""
    given = parser().parse_args(argv).as_dict()
    place = find_place(os.environ)
    if given["processes"] > 1:
        if place.count > 1:
            raise ValueError(
                f"--processes={given['processes']}: this is {place.name} already; leave it out, or start one"
            )
        place = Place(0, given["processes"], 0, given["processes"], f"process 0 of {given['processes']}")
    if is_helper():
        end_with_parent()
    try:
        _run(given, argv, open_models, place)
    except Exception as error:
        if place.name:
            error.add_note(place.name)
        raise


def _run(
    given: dict[str, Any], argv: list[str], open_models: Callable[[list[str]], "list[Model]"], place: Place
) -> None:
    from .claims import Claims
    from .effects import check_effects, named_in  # here: mistyped options are told before torch is imported
    from .evaluate import evaluate, loader_workers
    from .models import turned
    from .plan import describe_pictures, make_plan
    from .report import is_report, stamp, write_report
    from .settings import check_settings
    from .terminal import show
    from .versions import versions

    settings = _settings(given)
    check_settings(settings)
    check_effects(named_in(argv), settings)
    picked = pick_device(given["device"])
    device = choose_device(picked, place)
    if not given["out"].strip():
        raise ValueError("--out=: name a folder for the report")
    out = Path(given["out"])
    check_writable(out, "--out")
    models = open_models(given["model"] or [])
    if given["upright"] is not None:
        models = [turned(model, given["upright"]) for model in models]
    cells = make_plan(settings, models)
    start, before = time.monotonic(), stamp(out)
    words = without_processes(argv)
    helpers = Helpers(words, place.local_count) if given["processes"] > 1 else None
    workers = loader_workers(cells, place.local_count) if given["workers"] is None else given["workers"]
    if not place.rank:
        by = f"{workers} worker{'s' * (workers > 1)}" if workers else "this process"
        Console(stderr=True).print(f"on {picked}, pictures read by {by}", soft_wrap=True, highlight=False)
    # a helper has nothing to leave in order before, and a signal that raises inside of what it imports may abort it
    with stoppable() if is_helper() else nullcontext(), shared_cores(place.local_count):
        evaluation = evaluate(cells, models, out, given["batch_size"], workers, device, place, helpers)
    if place.rank:
        return  # the first of those that were started together writes
    provenance = {
        "command": shlex.join(["vmoe-momentum", "robustness", *words]), "settings": settings._asdict(),
        "models": {model.name: model.provenance for model in models}, "batch_size": given["batch_size"],
        "device": picked, "machine": platform.machine(), "python": platform.python_version(),
        "pictures": describe_pictures(cells), "versions": versions(),
        **({} if settings.ids is None else {"ids_sha256": sha256(Path(settings.ids))}),
    }  # fmt: skip
    with Claims(out / "cells") as claims:  # others that were started by themselves may be as far
        claims.wait_for("report", seconds=120)
        if stamp(out) != before and is_report(out, provenance):
            told = f"report: {out / 'report.html'}, by another process"
        else:
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
        help="[LABEL=]SOURCE: a .ckpt of fit, local-dir:PATH, a timm name, robustbench:NAME, or module:callable; "
        "several times. One label again makes a group, such as seeds: mean, spread, paired differences.",
    )  # fmt: skip
    words.add_argument(
        "--data",
        type=str | None,
        help="Clean labelled pictures: ROOT/val/CLASS/* or ROOT/CLASS/*, CLASS as trained on.",
    )
    for name, found in SETS.items():
        words.add_argument(f"--{name}", type=str | None, help=f"Folder of {found.title}: {found.layout}.")
    names = "Names, by default all of a set (of ImageNet-C the 15 of the benchmark); [none] for none. All: "
    names += f"{', '.join(named_corruptions())}."
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
        "--transfer", type=list[str], default=[],
        help="Attacks whose pictures, made on each model, are shown to all the others, too; by default none. Any of "
        f"{', '.join(TRANSFER_NAMES)}.",
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
    text = "Attacks begin at a random point of the ball, not at the picture; square, apgd and their kind do anyway."
    words.add_argument("--random_start", action="store_true", help=text)
    text = "Times that attacks start; all but the first at random, and of each picture the worst counts."
    words.add_number("--restarts", int, RANGES["restarts"], text, default=1)
    text = "Passes that attacks average over, for models that answer at random in evaluation."
    words.add_number("--eot", int, RANGES["eot"], text, default=1)
    text = "Only so many pictures of each set, the same ones every time."
    words.add_number("--limit", int | None, RANGES["limit"], text)
    words.add_argument(
        "--ids", type=str | None,
        help="Instead: a text file of the pictures of --data and --imagenet_c to take, CLASS/NAME or NAME a line, such "
        "as RobustBench's imagenet_test_image_ids.txt. Other sets are whole.",
    )  # fmt: skip
    words.add_number("--seed", int, RANGES["seed"], "Of corruptions, noise, attacks and subsets.", default=0)
    words.add_number("--batch_size", int, COUNT, "Pictures at once.", default=64)
    text = "Processes that decode and corrupt, of each of --processes; by default its cores for photographs, "
    words.add_number("--workers", int | None, WORKERS.or_(None), f"{text}0 for small pictures.", default=None)
    text = "That share the cells, on this machine; each a share of the cores and, with --device=cuda, a GPU in turn."
    words.add_number("--processes", int, Range(1, 1024, whole=True), text, default=1)
    words.add_argument("--device", type=str | None, default=None, help=DEVICE)
    words.add_argument("--upright", type=bool | None, help=f"{UPRIGHT_HELP} By default as each was trained.")
    words.add_argument(
        "--out", type=str, default="runs/robustness", help="Folder for the report; a report there is replaced."
    )
    return words


def without_processes(argv: list[str]) -> list[str]:
    """What changes no number is not part of the report, nor for helpers to repeat."""
    return [
        word
        for place, word in enumerate(argv)
        if word.partition("=")[0] != "--processes" and (not place or argv[place - 1] != "--processes")
    ]


def _settings(given: dict[str, Any]) -> "Settings":
    """[none] means no corruption, as [] does; corruptions are made where no published ones are given."""
    from .settings import DEFAULT_EPS, Settings, parse_eps

    made_here = given["imagenet_c"] is None if given["regenerate"] is None else given["regenerate"]
    corruptions = [] if given["corruptions"] == ["none"] else given["corruptions"]
    eps = DEFAULT_EPS[given["norm"]] if given["eps"] is None else [parse_eps(text) for text in given["eps"]]
    sets = {name: given[name] for name in SETS if given[name] is not None}
    chosen = {"corruptions": corruptions, "eps": eps, "regenerate": made_here, "sets": sets}
    named: dict[str, Any] = {name: chosen[name] if name in chosen else given[name] for name in Settings._fields}
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in named.items()}
    return Settings(**values)
