"""One entry point: `vmoe-momentum fit | validate | test | predict | data | import | analyze | robustness |
consolidate | export | classify | completion`.

The first four are Lightning's (configs, merging, `--print_config`); the others have parsers of their own, chosen by the
first word. Lightning, torch and timm take seconds to import, so each command imports what it needs once it is known.
"""

import atexit
import logging
import math
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

from .messages.endings import Told, ending
from .names import did_you_mean
from .stopping import Stopped, is_helper, stoppable

HELP = """usage: vmoe-momentum [--debug] COMMAND [OPTIONS]

Train, test and look into V-MoE vision transformers, and sparse language models, whose sparse layers carry momentum
across depth.

commands:
  data       prepare, verify and look at data (vmoe-momentum data --help)
  import     bring weights in: V-MoE checkpoints, or dense timm models made sparse (vmoe-momentum import --help)
  fit        train:       vmoe-momentum fit --config configs/digits.yaml
  validate   evaluate on the validation split
  test       evaluate a checkpoint:  vmoe-momentum test --config configs/digits.yaml --ckpt_path runs/.../last.ckpt
  predict    write class probabilities to predictions.csv
  analyze    look into trained networks: spectrum, load, norms, sensitivity, pareto, ablate, compare (--help)
  robustness corruptions, other pictures, attacks: a report for one or many models (... robustness --help)
  consolidate  a checkpoint that many devices wrote, as one file
  export     a checkpoint as timm directory, exported program, ONNX or tensors (... export --help)
  classify   the likeliest classes of pictures, from what export wrote (... classify --help)
  completion a script with which bash, zsh or tcsh completes all this (... completion --help)

options:
  --debug    show the traceback of an error
  --version  say which version this is

`vmoe-momentum COMMAND --help` lists a command's settings; `... fit --config FILE --print_config` shows the whole
configuration; any setting can follow on the command line, e.g. --model.net.init_args.rule HeavyBall.
"""

LIGHTNING = ("fit", "validate", "test", "predict")
AGAIN = {
    "data": "what is done is kept by prepare imagenet-c; ",
    "analyze": "what is done is kept by ablate; ",
    "robustness": "what is done is kept; ",
}  # when stopped


def run_data(argv: list[str]) -> None:
    from .datasets import commands
    from .robustness.regenerated import holds, verify_regenerated
    from .robustness.regenerating import prepare_imagenet_c

    commands.run(argv, {"imagenet-c": commands.Other(prepare_imagenet_c, holds, verify_regenerated)})


def run_import(argv: list[str]) -> None:
    from .models import commands

    commands.run(argv)


def run_analyze(argv: list[str]) -> None:
    from .analysis import commands
    from .datasets import ImageDataModule, TextDataModule
    from .language.looking import blocks_of, check_words, open_language_model
    from .lightning_cli import rehearse, run_lightning
    from .training import NotFinite

    def fit(options: list[str]) -> dict[str, float]:
        try:
            trainer = run_lightning(["fit", *options]).trainer
        except NotFinite as error:  # a result, too: the run diverged
            print(error, file=sys.stderr)
            return {"epochs": math.nan, "val/top1": math.nan, "val/loss": math.nan}
        return {"epochs": trainer.current_epoch, **{k: float(v) for k, v in trainer.callback_metrics.items()}}

    def check(options: list[str]) -> None:
        logging.disable(logging.INFO)  # devices and seeds, again for every pair of values
        try:
            rehearse(run_lightning(options, start=False))
        finally:
            logging.disable(logging.NOTSET)

    text = commands.Looked(
        TextDataModule, open_language_model, check_words, blocks_of, ("spectrum", "load", "norms", "pareto")
    )
    commands.run(argv, [commands.pictures(ImageDataModule), text], fit, check)


def run_robustness(argv: list[str]) -> None:
    from .robustness import commands

    def open_models(texts: list[str]) -> list[Any]:  # imported once the options are known to be right
        from . import classifiers

        return classifiers.open_models(texts)

    commands.run(argv, open_models)


def run_consolidate(argv: list[str]) -> None:
    from .training import consolidating

    consolidating.run(argv)


def run_export(argv: list[str]) -> None:
    from .export import commands

    def text(given: Any) -> dict[str, Any] | None:
        from .language.exporting import export_language_model, is_language_model

        if not is_language_model(given.ckpt_path, given.trust_pickle):
            return None
        commands.refuse_others(given)
        return export_language_model(given.ckpt_path, given.to, given.out, given.data, given.limit, given.overwrite)

    commands.run_export(argv, text)


def run_classify(argv: list[str]) -> None:
    from .export import commands

    commands.run_classify(argv)


def run_completion(argv: list[str]) -> None:
    from . import completion

    completion.run(argv, run, (*LIGHTNING, *COMMANDS))


COMMANDS = {
    "data": run_data, "import": run_import, "analyze": run_analyze, "robustness": run_robustness,
    "consolidate": run_consolidate, "export": run_export, "classify": run_classify,
    "completion": run_completion,
}  # fmt: skip


def run(argv: list[str]) -> None:
    """One command; errors are raised."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    if argv == ["--version"]:
        from . import __version__

        print(f"vmoe-momentum {__version__}")
        return
    command, *rest = argv
    if command in COMMANDS:
        COMMANDS[command](rest)
    elif command in LIGHTNING:
        if not any(word in ("-h", "--help", "--print_config") for word in rest):
            _refuse_mistyped(rest)
        from .lightning_cli import run_lightning

        run_lightning([command, *["--model.override_model=true" if a == "--override-model" else a for a in rest]])
    else:
        raise ValueError(f"command={command}{did_you_mean(command, [*COMMANDS, *LIGHTNING])}")


def main(argv: list[str] | None = None) -> None:
    """The console script. A mistake ends with one line on stderr and exit code 2; `--debug` shows the traceback.

    argv: by default the words of this process, which then ends with the command; else the caller goes on.
    """
    if argv is None:
        with _ranks_end_at_once():
            _main(sys.argv[1:])
    else:
        _main(list(argv))
        _leave_group()


def _main(argv: list[str]) -> None:
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    quieten()
    use_large_pages()
    try:
        with nullcontext() if is_helper() else stoppable():  # a helper's own command begins it
            run(argv)
    except Told as told:
        if debug:
            traceback.print_exception(told.__cause__)
        _leave(told.code)
    except Stopped as stopped:
        again = "" if argv[0] not in COMMANDS else f"{AGAIN.get(argv[0], '')}run the same command again"
        line, code = ending(Stopped(stopped.signum, again or stopped.way_out), {})
        if not is_helper():  # whoever started it says so
            print(f"\nvmoe-momentum: {line}", file=sys.stderr, flush=True)
        raise SystemExit(code) from None
    except Exception as error:
        if debug:
            raise
        line, code = ending(error, _sections(argv) if argv[0] in LIGHTNING else {})
        sys.stdout.flush()
        print(f"vmoe-momentum: {line}", file=sys.stderr, flush=True)
        raise SystemExit(code) from None


def _in_group() -> bool:
    dist: Any = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _leave_group() -> None:
    """Of a run on several ranks that is done: gloo ends what it still sends; for NCCL Lightning does the same."""
    if _in_group():
        sys.modules["torch.distributed"].destroy_process_group()


@contextmanager
def _ranks_end_at_once() -> Iterator[None]:
    """A rank's process ends without clearing up its interpreter: a thread of gloo's that lets go of a tensor meanwhile
    aborts it, and torchrun calls a finished run failed (pytorch issue 190489).

    Threads and processes are waited for and what libraries registered for the end is done as always: this is registered
    before theirs, so it is called last.
    """
    told = {"code": 1, "rank": False}

    def end() -> None:
        if not told["rank"]:
            return
        if told["code"] == 0:
            _leave_group()
            for child in multiprocessing.active_children():
                if not child.daemon:
                    child.join()
        logging.shutdown()
        _leave(int(told["code"]))

    atexit.register(end)
    try:
        yield
        told["code"] = 0
    except SystemExit as leaving:
        told["code"] = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        raise
    finally:
        told["rank"] = _in_group()


def _leave(code: int) -> NoReturn:
    """One of several ranks ends: at once, as what an interpreter clears up may wait for the others."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def use_large_pages() -> None:
    """torch asks the kernel for pages of 2 MB for its large tensors, unless the environment says otherwise.

    To be called before torch makes a tensor. New memory for the gradients of 64 experts is else a fifth of a training
    step on a CPU. Where the kernel knows no such pages (transparent_hugepage: never) this changes nothing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _refuse_mistyped(options: list[str]) -> None:
    """Raises ValueError: a key at the top that looks like another one, told before Lightning is imported."""
    from .configs import as_configs
    from .messages.mistakes import find_mistyped

    if mistake := find_mistyped(as_configs(options)):
        raise ValueError(mistake)


def _sections(argv: list[str]) -> dict[str, list[str]]:
    """For the parser's messages; what was raised before there was one needs none."""
    loaded = sys.modules.get(f"{__package__}.lightning_cli")
    try:
        return loaded.sections(loaded.kind_of(argv)) if loaded else {}
    except ValueError:  # a config that cannot be read, which is then what is told
        return {}


def quieten() -> None:
    """Lightning's advertisements and remarks for its library users say nothing to ours."""
    remarks = (
        "LightningCLI's args parameter",
        ".*does not have many workers",
        ".*isinstance.treespec, LeafSpec",
        "Couldn't infer the batch indices",
        "The dirpath has changed",
        "FSDP2-wrapped module .* returned a view tensor",  # which nothing of ours changes in place
    )
    for message in remarks:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip:" not in record.getMessage())
