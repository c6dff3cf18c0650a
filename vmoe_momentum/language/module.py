"""Training and evaluating language models.

    B streams of text, N tokens of a block of text, D width, V words.

Streams go on from batch to batch: what the network has seen of them is kept here, apart for training and evaluation,
and in checkpoints. The network itself keeps nothing.
"""

import hashlib
import math
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import MeanMetric

from ..ranges import COUNT, NOT_NEGATIVE, in_range
from ..training.optimization import OptimizerSettings, ScheduleSettings
from ..training.profile import Cost
from ..training.trained import Trained
from ..training.trainers import steps_between_logs
from .heads import NO_WORD
from .intervals import Interval, resampled
from .measuring import cost_of_a_token, kept_of_a_batch
from .network import Cache, SparseLanguageModel

PAST = "vmoe_momentum_past"  # where checkpoints keep what training has seen of its streams


class TextModel(nn.Module):
    """A language model as `fit` trains it; adds the prefix `net.` to the names of its tensors."""

    def __init__(self, net: SparseLanguageModel) -> None:
        super().__init__()
        self.net = net

    def forward(self, words: Tensor, targets: tuple[Tensor, ...], cache: Cache) -> tuple[list[Tensor], Tensor, Cache]:
        """Words and each of the targets [B, N] -> sums of -log p of these targets, auxiliary loss, cache."""
        found = self.net.read(words, cache)
        return [self.net.head.losses(found.hidden, each) for each in targets], found.aux_loss, found.cache


@in_range("model.", vocab_size=COUNT, aux_loss_weight=NOT_NEGATIVE.because("0 is none"))
class LanguageModule(Trained):
    """Mean negative log-likelihood of each next word, plus the routers' auxiliary loss; perplexity over whole texts.

    Args:
        net: The network, from `vmoe_momentum.language.create_language_model`.
        vocab_size: Words of the data, 1 to 1e9; linked to it. A network of another number gets a fresh embedding and
            head.
        vocabulary: The words; linked to the data. Checkpoints keep their sha256: a word is its place among them.
        aux_loss_weight: Factor on the routers' auxiliary loss (which has its own weights inside), in [0, 1e6].
        optimizer: How weights move.
        schedule: The learning rate over steps.
        compile: Compile the network with torch.compile.
        recompute: Recompute blocks in the backward pass rather than keep what they made: less memory, more time.
        override_model: Load a checkpoint although it was trained with other model settings than these.
    """

    model: TextModel

    def __init__(
        self,
        net: nn.Module,
        vocab_size: int = 16,
        vocabulary: list[str] | None = None,
        aux_loss_weight: float = 1.0,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008  (a frozen default; jsonargparse reads it)
        schedule: ScheduleSettings = ScheduleSettings(),  # noqa: B008
        compile: bool = False,
        recompute: bool = False,
        override_model: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(net, SparseLanguageModel):
            raise ValueError(
                f"model.net: a {type(net).__name__} reads no text; use vmoe_momentum.language.create_language_model"
            )
        schedule.check_peak(optimizer.lr)
        if net.vocab_size != vocab_size:
            net.reset_vocabulary(vocab_size)
        net.grad_checkpointing = recompute
        self.model = TextModel(net)
        self.vocab_size, self.vocabulary, self.aux_loss_weight = vocab_size, vocabulary, aux_loss_weight
        self.optimizer_settings, self.schedule_settings = optimizer, schedule
        self.training_settings, self.override_model = {"aux_loss_weight": aux_loss_weight}, override_model
        self.compiled = compile
        if compile:
            self.model.compile()
        self.losses = nn.ModuleDict({name: MeanMetric().set_dtype(torch.float64) for name in ("val", "test", "clean")})
        self._past: dict[str, Cache] = {}
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []
        self._since: tuple[float, int] | None = None

    def forward(self, words: Tensor) -> Tensor:
        """Words [B, N] -> log-probabilities [B, N, V] of the word behind each."""
        return self.model.net(words)

    def _read(self, stage: str, batch: Any, *targets: Tensor) -> tuple[list[Tensor], Tensor]:
        """Sums of -log p and the auxiliary loss; goes on where the stage's last batch ended."""
        past = self._past.get(stage)
        if batch.begins or past is None:
            past = self.model.net.empty_cache(len(batch.words))
        losses, aux_loss, past = self.model(batch.words, targets, tuple(each.to(self.device) for each in past))
        self._past[stage] = past
        return losses, aux_loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (total,), aux_loss = self._read("train", batch, batch.targets)
        main_loss = total / batch.targets.numel()
        loss = main_loss + self.aux_loss_weight * aux_loss
        size = batch.targets.numel()
        self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=size)
        self.log_dict({"train/main_loss": main_loss, "train/aux_loss": aux_loss}, batch_size=size)
        self._log_speed(size)
        return loss

    def _log_speed(self, tokens: int) -> None:
        """Words a second over the steps between two lines of the log, those of all devices."""
        now, (start, seen) = time.perf_counter(), self._since or (time.perf_counter(), -tokens)
        self._since = (start, seen + tokens)
        if seen > 0 and (self.global_step + 1) % steps_between_logs(self.trainer) == 0:
            speed = self._since[1] * self.trainer.world_size / (now - start)
            self.log("train/tokens_per_second", speed, batch_size=1)
            self._since = None

    def on_train_epoch_start(self) -> None:
        self._since = None

    def on_validation_epoch_start(self) -> None:
        self._since = None
        self._past.pop("val", None)

    def on_test_epoch_start(self) -> None:
        self._past.pop("test", None)
        self._found = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._found.append(self._evaluate(batch, "test"))

    def predict_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, ...]:
        """Targets [B, N], their -log p, the likeliest words and theirs."""
        past = self._past.get("predict")
        if batch.begins or past is None:
            past = self.model.net.empty_cache(len(batch.words))
        found = self.model.net.read(batch.words, past)
        self._past["predict"] = found.cache
        rows = []
        for hidden, targets in zip(found.hidden, batch.targets, strict=True):  # [N, V] at a time
            best = self.model.net.head.log_prob(hidden)
            own = best.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1)
            least = best.max(dim=1)
            rows.append((targets, -own, least.indices, -least.values))
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    def _evaluate(self, batch: Any, stage: str) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, and sums of -log p of the targets and of those before words were swapped."""
        clean = [] if batch.clean_targets is None else [batch.clean_targets]
        totals = [total.double() for total in self._read(stage, batch, batch.targets, *clean)[0]]
        tokens = (batch.targets != NO_WORD).sum()
        if tokens:
            for name, total in zip((stage, "clean"), totals, strict=False):
                self._mean(name).update(total / tokens, tokens)
        return tokens, totals[0], totals[-1]

    def on_validation_epoch_end(self) -> None:
        self._log_perplexity("val", "val")

    def on_test_epoch_end(self) -> None:
        self._log_perplexity("test", "test")
        tokens, total, clean = self._of_all_ranks()
        self._log_interval("test/perplexity", resampled(total, tokens))
        if self._mean("clean").update_count:
            self._log_perplexity("clean", "test", "_of_clean_targets")
            self._log_interval("test/perplexity_of_clean_targets", resampled(clean, tokens))

    def _of_all_ranks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, losses and those of the clean targets of each batch, with the streams of all ranks, [batches]."""
        found = torch.stack([torch.stack([each.double().cpu() for each in row]) for row in self._found])
        if dist.is_available() and dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, found)  # as many batches on every rank
            found = torch.stack(parts).sum(dim=0)
        tokens, total, clean = found.unbind(dim=1)
        return tokens, total, clean

    def _mean(self, name: str) -> MeanMetric:
        found = self.losses[name]
        assert isinstance(found, MeanMetric)
        return found

    def _log_perplexity(self, metric: str, stage: str, more: str = "") -> None:
        loss = self._mean(metric).compute()  # over all ranks
        self._mean(metric).reset()
        told = {f"{stage}/loss{more}": loss, f"{stage}/perplexity{more}": loss.exp()}
        self.log_dict({name: value.float() for name, value in told.items()}, prog_bar=True, batch_size=1)

    def _log_interval(self, name: str, found: Interval) -> None:
        self.log_dict({f"{name}_low": found.low, f"{name}_high": found.high}, batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        mine = tuple(each.cpu() for each in self._past.get("train", ()))
        parts: list[Any] = [mine]
        if dist.is_available() and dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, mine)
        checkpoint[PAST] = joined(parts)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """On another number of devices, too: streams go on where they were, whoever reads them."""
        super().on_load_checkpoint(checkpoint)
        past = checkpoint.get(PAST)
        if past and self._trainer is not None and self.trainer.state.fn == "fit":
            self._past["train"] = share_of(past, self.global_rank, self.trainer.world_size)

    def facts(self) -> dict[str, Any]:
        net = self.model.net
        return {
            "architecture": type(net).__name__, "settings": net.function_settings(), "vocab_size": self.vocab_size,
            "model_args": net.build_arguments(), "vocabulary": vocabulary_hash(self.vocabulary),
        }  # fmt: skip

    def logged(self) -> list[str]:
        train = [f"train/{name}" for name in ("main_loss", "aux_loss", "tokens_per_second")]
        return [*train, "val/loss", "val/perplexity"]

    def cost(self) -> Cost:
        return cost_of_a_token(self.model.net)

    def told(self, cost: Cost) -> dict[str, str]:
        net = self.model.net
        return {
            "network": f"{len(net.moe_layers)} sparse blocks of width {net.width}, {self.vocab_size:,} words, form "
            f"{net.form}",
            "per word": f"{cost.gflops:.3g} GFLOPs forward",
        }

    def saved_bytes(self, data: Any) -> int | None:
        return None if data is None else kept_of_a_batch(self.model.net, data.batch_size, data.block_size)

    def seconds_per_batch(self, data: Any) -> float:
        """On at most 4 of its streams, black words, scaled; gradients and generators are put back."""
        few, net = min(4, data.batch_size), self.model.net
        words = torch.zeros(few, data.block_size, dtype=torch.int64, device=self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self.trainer.precision_plugin.forward_context():
            fastest = math.inf
            for _ in range(3):
                start = time.perf_counter()
                (loss,), aux_loss, _ = self.model(words, (words,), net.empty_cache(few))
                torch.autograd.grad(loss + aux_loss, list(net.parameters()), allow_unused=True)
                if devices:
                    torch.cuda.synchronize(self.device)
                fastest = min(fastest, time.perf_counter() - start)
        return fastest * data.batch_size / few

    def check_data(self, data: Any) -> None:
        data.train_dataloader()  # a text too short for its streams

    def try_batch(self, data: Any) -> None:
        words = torch.zeros(data.batch_size, data.block_size, dtype=torch.int64)
        self.model.train()(words, (words,), self.model.net.empty_cache(len(words)))


def joined(parts: list[Cache]) -> Cache:
    """Caches of ranks to which streams were dealt in turn -> of all streams, in their order."""
    return tuple(torch.stack(each, dim=1).flatten(0, 1) for each in zip(*parts, strict=True))


def share_of(cache: Cache, rank: int, ranks: int) -> Cache:
    """The streams that one rank of so many reads."""
    return tuple(each[rank::ranks].clone() for each in cache)


def vocabulary_hash(vocabulary: list[str] | None) -> str | None:
    """Of the words in their order."""
    return None if vocabulary is None else hashlib.sha256("\n".join(vocabulary).encode()).hexdigest()
