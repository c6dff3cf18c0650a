"""fit, validate, test and predict: LightningCLI, with what it does not check, and callbacks of ours in every run."""

import inspect
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loops.utilities import _parse_loop_limits
from lightning.pytorch.utilities import rank_zero_only

from . import models
from .configs import as_configs
from .files.staging import check_writable
from .kinds import Kind, kind_of
from .messages.endings import Told, ending
from .messages.mistakes import find_mistake, find_unnoticed
from .models.saved import read_checkpoint
from .models.sharded import is_checkpoint
from .parsers import WholeFirst
from .ranges import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, SEED, Range, check_all
from .resources import Exhausted, explain
from .training import (
    AtomicCheckpointIO,
    Attempts,
    EndTogether,
    EpochSeconds,
    FiniteTraining,
    FSDP2Strategy,
    JobCheckpoints,
    MonitorCheck,
    OptimizerSettings,
    PartialEpoch,
    ResumedSettings,
    RouterGuard,
    RouterStats,
    RunSummary,
    SaveOnStop,
    ScheduleSettings,
    SeededSteps,
    StopSignals,
)
from .training.accepted import check_apart, check_callbacks
from .training.attempts import join_attempt
from .training.experts import check_experts
from .training.keeping import add_keepers
from .training.materializing import create_on_meta
from .training.ranks import follow_first_rank
from .training.sharding import refuse_unsharded
from .training.trainers import callbacks_of

TRAINER = {  # numbers of Lightning's that it does not check, or in other words
    "gradient_clip_val": NOT_NEGATIVE.or_(None), "accumulate_grad_batches": COUNT, "num_nodes": COUNT,
    **dict.fromkeys(("max_epochs", "max_steps", "num_sanity_val_steps"), Range(-1, 10**9, whole=True).or_(None)),
    **dict.fromkeys(("min_epochs", "min_steps", "log_every_n_steps"), COUNT_OR_NONE.or_(None)),
    **{f"limit_{stage}_batches": Range(0, 10**9).or_(None) for stage in ("train", "val", "test", "predict")},
    "overfit_batches": Range(0, 10**9), "check_val_every_n_epoch": COUNT.or_(None),
    "reload_dataloaders_every_n_epochs": COUNT_OR_NONE,
}  # fmt: skip
SINGLE = {  # types of the keys at the top of a config that are no sections
    "seed_everything": bool | int, "ckpt_path": str | None,
    "weights_only": bool | None, "print_config": Any, "verbose": bool, "return_predictions": bool | None,
}  # fmt: skip
CKPT_KEYWORDS = ("best", "last", "hpc")


class FitParser(WholeFirst, LightningArgumentParser):
    """Of fit, validate, test and predict."""

    def instantiate(self, namespace: Any, instantiate_groups: bool = True, **options: Any) -> Any:
        """jsonargparse's; what is to be spread over devices is built without memory."""
        told = namespace.get(namespace.get("subcommand")) or namespace
        strategy, net = told.get("trainer.strategy"), told.get("model.net")
        sharded = str(getattr(strategy, "class_path", strategy)).endswith(FSDP2Strategy.__name__)
        name = str(getattr(net, "class_path", ""))
        if sharded and name.startswith(f"{__package__}.") and name.endswith(f".{models.create_model.__name__}"):
            namespace = namespace.clone()
            told = namespace.get(namespace.get("subcommand")) or namespace
            told.model.net.class_path = f"{create_on_meta.__module__}.{create_on_meta.__qualname__}"
        return super().instantiate(namespace, instantiate_groups, **options)


class VMoECLI(LightningCLI):
    """LightningCLI with what the data knows, classes and sizes or words, linked to the model.

    command: the one of Lightning's commands to build a parser for; "" for none of them.
    """

    def __init__(self, *args: Any, command: str, kind: Kind, **kwargs: Any) -> None:
        known, self.kind = LightningCLI.subcommands(), kind
        # of this command line alone
        self.subcommands = lambda: {command: known[command]} if command else {}  # type: ignore[method-assign]
        super().__init__(kind.module, kind.data, *args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in self.kind.linked:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.argv = list(args or ())
        configs = as_configs(self.argv)
        single = {**SINGLE, "data": self.kind.data}
        classes: dict[str, Callable[..., Any]] = {"model": self.kind.module, "trainer": Trainer}
        try:
            super().parse_arguments(parser, args)
        except Exception as error:  # whatever the parser raises for what it did not foresee
            if mistake := find_mistake(configs, single, classes):
                raise ValueError(mistake) from error
            raise
        if mistake := find_unnoticed(configs, single, classes):
            raise ValueError(mistake)
        config = self.config.get(self.config.get("subcommand")) or self.config
        check_all("", config, {"seed_everything": SEED.or_(True, False)})
        check_all("trainer.", config.trainer, TRAINER)

    def _parse_ckpt_path(self) -> None:
        """A first look at the checkpoint, before anything is built.

        In place of Lightning's, which would let hyperparameters of the checkpoint override the config (issue 21455).
        """
        command = self.config.get("subcommand")
        if command is None:  # only instantiated
            return
        path = self.config[command].get("ckpt_path")
        if path is None and command != "fit":
            rank_zero_only(print)(f"{command}: no --ckpt_path, so the network is used as built", file=sys.stderr)
        if path is None or path in CKPT_KEYWORDS:
            return
        if "://" in str(path):
            raise ValueError(f"ckpt_path={path}: checkpoints load from local files only; download it first")
        if not is_checkpoint(Path(path)):
            raise FileNotFoundError(f"ckpt_path={path}: no such file; give a .ckpt that fit wrote, or leave it out")
        read_checkpoint(Path(path), "ckpt_path=", tensors=False)

    def _check_keyword(self, trainer: Trainer) -> None:
        """Raises FileNotFoundError: Lightning would train from scratch where last and hpc find nothing."""
        command = self.config.get("subcommand")
        word = self.config[command].get("ckpt_path") if command else None
        if word not in ("last", "hpc"):
            return
        if word == "hpc":
            folders, pattern = [trainer.default_root_dir], "slurm_JOB.ckpt"
            found = trainer._checkpoint_connector._hpc_resume_path is not None
        else:
            kept = [getattr(saver, "dirpath", None) for saver in trainer.checkpoint_callbacks]
            folders, pattern = [folder for folder in kept if folder], "last*.ckpt"
            found = any(list(Path(folder).glob(pattern)) for folder in folders)
        if not found:
            where = ", ".join(map(str, folders)) or "this run's own new folder"
            raise FileNotFoundError(
                f"ckpt_path={word}: no {pattern} in {where}; give the file, as runs/.../checkpoints/last.ckpt"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        check_apart(self._get(self.config_init, "trainer.callbacks"))
        trainer = super().instantiate_trainer(**kwargs)
        refuse_unsharded(trainer.strategy)
        self.kind.check(trainer)
        spread = getattr(trainer.strategy, "expert_parallel", 1)
        check_experts(self.model.model.net, trainer.num_devices * trainer.num_nodes, spread)
        folders = [("logger.save_dir", logger.save_dir) for logger in trainer.loggers]
        for name, folder in (*folders, ("default_root_dir", trainer.default_root_dir)):
            if folder is not None and "://" not in str(folder):
                check_writable(folder, f"trainer.{name}")
        given = callbacks_of(trainer)
        check_callbacks(given)
        guards = [
            next((c for c in given if isinstance(c, kind)), None) or kind() for kind in (FiniteTraining, RouterGuard)
        ]
        others = [callback for callback in given if callback not in guards]
        ours = [RouterStats(), EpochSeconds(), MonitorCheck(), RunSummary(), self.kind.writer(), SeededSteps()]
        ours += [ResumedSettings(), Attempts(self.argv)]
        self.together = EndTogether(self._ending, self.argv)
        callbacks = [*guards, *ours, PartialEpoch(), *others, SaveOnStop(self.argv)]
        add_keepers(callbacks)
        trainer.callbacks = [self.together, *callbacks]  # type: ignore[attr-defined]  # see callbacks_of
        trainer._signal_connector, trainer._checkpoint_connector = (
            StopSignals(trainer),
            JobCheckpoints(trainer, self.argv),
        )
        follow_first_rank(trainer)
        join_attempt(trainer.strategy)
        self._check_keyword(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # sharded ones are directories of their own
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        _share_folder(trainer.loggers)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            code = self.together.leave()
            if code is not None:
                raise Told(code) from error
            worded = self._in_words(error)
            if worded is error:
                raise
            raise worded from error

    def _in_words(self, error: BaseException) -> BaseException:
        """A full disk or memory with the setting to lower; other errors as they are."""
        data, fitting = self.datamodule, self.subcommand == "fit"
        size = f"data.batch_size={data.batch_size}" if fitting else f"data.eval_batch_size={data.eval_batch_size}"
        more = ", raise trainer.accumulate_grad_batches to match" if fitting else ""
        side = "image_size" if hasattr(data, "image_size") else "block_size"
        lower = f"{size} at data.{side}={getattr(data, side)} is too much; lower it{more}, or take a smaller {side}"
        told = explain(error, f"{lower} or network") if isinstance(error, Exception) else None
        return error if told is None else Exhausted(told)

    def _ending(self, error: BaseException) -> tuple[str, int]:
        return ending(self._in_words(error), sections(self.kind))


def _share_folder(loggers: list[Any]) -> None:
    """CSV and TensorBoard logs of one run lie in one version_N, though each counts for itself."""
    for logger in loggers[1:]:
        if getattr(logger, "_version", 0) is None and logger.name == loggers[0].name:
            logger._version = loggers[0].version


def sections(kind: Kind) -> dict[str, list[str]]:
    """The valid keys of each part of a config, for messages."""
    keys = {
        "model": list(inspect.signature(kind.module).parameters),
        "trainer": list(inspect.signature(Trainer).parameters),
        "model.net": ["class_path", "init_args"],
        "data": ["class_path", "init_args"],
        "model.optimizer": list(inspect.signature(OptimizerSettings).parameters),
        "model.schedule": list(inspect.signature(ScheduleSettings).parameters),
    }
    return {**keys, "": ["config", "seed_everything", "model", "data", "trainer", "ckpt_path"]}


def run_lightning(argv: list[str], start: bool = True) -> VMoECLI:
    """fit, validate, test or predict; without `start` only what `fit` would use is built (argv without the command)."""
    # defaults such as Timer's interval have no form in YAML, and config.yaml is saved with them
    yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_data(value.value))
    quiet = {"exit_on_error": False, "allow_abbrev": False}  # errors are ours to print; a cut-off name is a mistake
    kinds = {argv[0]: dict(quiet)} if start else {}
    return VMoECLI(
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        # the loaders split the data over ranks themselves; RunSummary says more than Lightning's table
        trainer_defaults={"use_distributed_sampler": False, "enable_model_summary": False},
        parser_class=FitParser,
        parser_kwargs={"prog": "vmoe-momentum", **quiet, **kinds},
        args=argv,
        run=start,
        command=argv[0] if start else "",
        kind=kind_of(argv),
    )


def rehearse(built: VMoECLI) -> None:
    """What fit would refuse only once it has started: data, batch sizes, the schedule, groups of tokens.

    Model and data meet the trainer as in `fit`, so that steps are counted by Lightning, once for both.
    """
    trainer, module, data = built.trainer, built.model, built.datamodule
    fit = trainer.fit_loop
    limits = (trainer.min_steps, trainer.max_steps, trainer.min_epochs, trainer.max_epochs)
    fit.min_epochs, fit.max_epochs = _parse_loop_limits(*limits, trainer)
    trainer.strategy.connect(module)
    trainer._data_connector.attach_data(module, datamodule=data)
    data.setup("fit")
    data.val_dataloader()
    module.check_data(data)
    module.configure_optimizers()
    MonitorCheck().on_fit_start(trainer, module)
    with torch.no_grad():
        module.try_batch(data)
