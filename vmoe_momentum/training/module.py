"""Training and evaluating any timm classifier, ours included.

B images, K classes. Batches: uint8 images [B, 3, H, W] (or float in [0, 1]) and int64 labels [B].
"""

from typing import Any

import torch
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from ..models import PixelModel
from ..models.groups import images_together
from ..models.loading import fit_to_data, pixels_per_patch
from ..ranges import COUNT, MOMENTUM, NOT_NEGATIVE, SHARE, SIDE, in_range
from .adversarial import AdversarialSettings, compared
from .consistency import ConsistencySettings
from .identity import describe_network
from .losses import Loss, Losses, classification_loss
from .optimization import OptimizerSettings, ScheduleSettings
from .pairs import Attacked, pairing
from .profile import Cost, measure_cost, saved_bytes
from .timing import seconds_per_batch
from .trained import Trained
from .trainers import data_of, steps_between_logs

Batch = tuple[Tensor, Tensor]


def forward_normalized(model: PixelModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Of the module that is given, so that copies of a compiled classifier (averages) do not share one."""
    return model.forward_normalized(images)


def forward_with_gates(model: PixelModel, images: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    return model.forward_normalized_with_gates(images)


NONE = NOT_NEGATIVE.because("0 is none")


@in_range(
    "model.", num_classes=COUNT, image_size=SIDE, label_smoothing=MOMENTUM.because("0 is none"), mixup=NONE,
    cutmix=NONE, aux_loss_weight=NONE, random_erasing=SHARE.because("0 is none, 1 every image"),
)  # fmt: skip
class ImageClassifier(Trained):
    """Cross-entropy plus the routers' auxiliary loss; top-1 and top-5 over the whole evaluation set.

    Args:
        net: The network: any timm classifier. Networks that offer `forward_with_aux` add their auxiliary loss.
        num_classes: Classes of the data, 1 to 1e9; linked to it. A network with another number gets a fresh head.
        image_size: Side of the images in pixels, 1 to 16384; linked to the data. The network is resized to it.
        class_names: Names of the classes in label order; linked to the data, kept with checkpoints.
        loss: softmax cross-entropy, or sigmoid (binary cross-entropy summed over classes, as V-MoE trains).
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1).
        mixup: Beta parameter of mixup on the device, in [0, 1e6]; 0 for none. Needs an even batch.
        cutmix: Beta parameter of cutmix, in [0, 1e6]; 0 for none. With both, each batch draws one.
        random_erasing: Share of the training images in which a rectangle becomes noise, in [0, 1]; 0 for none.
        aux_loss_weight: Factor on the routers' auxiliary loss (which has its own weights inside), in [0, 1e6].
        adversarial: Training on attacked pictures; null for none.
        consistency: A loss that keeps experts chosen alike between views of a picture; null for none.
        optimizer: How weights move.
        schedule: The learning rate over steps.
        test_time_flip: test and predict average the logits of each image and its mirror image: twice the time.
        compile: Compile the network with torch.compile.
        channels_last: Keep convolutions' weights channels last, as GPUs under autocast want them: convolutional
            networks train faster so; a ViT has one such layer. Checkpoints hold the same numbers.
        override_model: Load a checkpoint although it was trained with other model settings than these.
    """

    model: PixelModel

    def __init__(
        self,
        net: nn.Module,
        num_classes: int = 1000,
        image_size: int = 224,
        class_names: list[str] | None = None,
        loss: Loss = "softmax",
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        random_erasing: float = 0.0,
        aux_loss_weight: float = 1.0,
        adversarial: AdversarialSettings | None = None,
        consistency: ConsistencySettings | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008  (a frozen default; jsonargparse reads it)
        schedule: ScheduleSettings = ScheduleSettings(),  # noqa: B008
        test_time_flip: bool = False,
        compile: bool = False,
        channels_last: bool = False,
        override_model: bool = False,
    ) -> None:
        super().__init__()
        schedule.check_peak(optimizer.lr)
        if hasattr(net, "vocab_size"):
            raise ValueError(f"model.net: a {type(net).__name__} sees no pictures; use vmoe_momentum.create_model")
        fit_to_data(net, num_classes, image_size)
        self.model = PixelModel(net)
        self.num_classes, self.image_size, self.class_names = num_classes, image_size, class_names
        self.loss, self.label_smoothing, self.aux_loss_weight = loss, label_smoothing, aux_loss_weight
        self.optimizer_settings, self.schedule_settings = optimizer, schedule
        self.training_settings = {
            "loss": loss, "label_smoothing": label_smoothing, "mixup": mixup, "cutmix": cutmix,
            "random_erasing": random_erasing, "aux_loss_weight": aux_loss_weight, "adversarial": adversarial,
            "consistency": consistency,
        }  # fmt: skip
        self.override_model, self.random_erasing, self.test_time_flip = override_model, random_erasing, test_time_flip
        self.pairing = pairing(net, adversarial, consistency, loss, aux_loss_weight, random_erasing)
        self.mixup: Mixup | None = None
        if mixup > 0 or cutmix > 0:
            self.mixup = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
        top_k = {"top1": 1} | ({"top5": 5} if num_classes > 5 else {})
        accuracy = MetricCollection(
            {name: MulticlassAccuracy(num_classes, k, average="micro") for name, k in top_k.items()}
        )
        self.val_accuracy, self.test_accuracy = accuracy.clone("val/"), accuracy.clone("test/")
        self.forward_in_training, self.forward_with_gates = forward_normalized, forward_with_gates
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.compiled = compile
        if compile:  # in place, and of functions: no `_orig_mod.` in state dicts
            self.model.compile()
            self.forward_in_training = torch.compile(forward_normalized)
            self.forward_with_gates = torch.compile(forward_with_gates)

    def setup(self, stage: str) -> None:
        data = data_of(self.trainer)
        if data is not None:
            self.check_sizes(data.sizes())
        if data is not None and stage == "fit":
            self.check_batch_size(data.batch_size)
            self.check_groups(sorted(data.train_sizes()), data.batch_size)

    def check_sizes(self, sizes: list[int]) -> None:
        """Raises ValueError: the network takes one size of images only, or not in whole patches."""
        net: Any = self.model.net  # of any maker
        others = [size for size in sizes if size != self.image_size]
        if not others:
            return
        what = f"data.progressive or data.eval_image_size: images of {', '.join(map(str, others))} pixels"
        if not hasattr(net, "patch_embed"):  # convolutional ones take any size, others none: trying tells
            return self._try_sizes(others, what)
        if not getattr(net, "dynamic_img_size", False):
            raise ValueError(
                f"{what} beside data.image_size={self.image_size}, and the network takes one size;"
                " use model.net.init_args.dynamic_img_size=true"
            )
        patch = pixels_per_patch(net)[0]
        if any(size % patch for size in others):
            raise ValueError(f"{what} do not divide into patches of {patch}; use multiples of it")

    def check_batch_size(self, batch_size: int) -> None:
        """Raises ValueError: mixing cannot pair the images."""
        if self.mixup is not None and batch_size % 2:
            raise ValueError(
                f"data.batch_size={batch_size}: mixup and cutmix pair the images of a batch; use an even number, or "
                "model.mixup=0 and model.cutmix=0"
            )

    def _try_sizes(self, sizes: list[int], what: str) -> None:
        was = self.model.training
        try:
            with torch.no_grad():
                for size in sizes:
                    self.model.eval().net(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"{what}: {type(self.model.net).__name__} does not take them ({error})") from error
        finally:
            self.model.train(was)

    def check_groups(self, sizes: list[int], batch_size: int) -> None:
        """Raises ValueError: routers group so many tokens as do not divide those of a training batch of some size."""
        net: Any = self.model.net
        was_training = self.model.training
        try:
            together = {size: images_together(self.model.train().net, size) for size in sizes}
        finally:
            self.model.train(was_training)
        seen = batch_size + (0 if self.pairing is None else self.pairing.others(batch_size))
        for size, count in together.items():
            if batch_size % count or seen % count:
                group = next(r.group_size for r in net.modules() if getattr(r, "group_size", "image") != "image")
                tokens = batch_size * ((size // pixels_per_patch(net)[0]) ** 2 + net.num_prefix_tokens)
                raise ValueError(
                    f"data.batch_size={batch_size}: router.group_size={group} does not divide the {tokens} tokens of a "
                    f"batch of {size} pixels; use a multiple of {count} images, or group_size=image"
                )

    def forward(self, images: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] -> logits [B, K]."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses, pair = self.training_losses(batch)
        self.log("train/loss", losses.loss, prog_bar=True, on_step=True, on_epoch=True)
        for name in ("main_loss", "aux_loss", "trades_loss", "consistency_loss"):
            if getattr(losses, name) is not None:
                self.log(f"train/{name}", getattr(losses, name))
        if pair is not None and (self.global_step + 1) % steps_between_logs(self.trainer) == 0:
            self._log_attack(pair)
        return losses.loss

    def training_losses(self, batch: Batch) -> tuple[Losses, Attacked | None]:
        """Losses, and what was attacked on the way."""
        images, labels = batch
        images = self.model.normalize(images)  # a tensor of our own: what follows works in place
        if self.random_erasing:
            images = RandomErasing(self.random_erasing, mode="pixel", device=images.device)(images)
        if self.mixup is None:
            targets = mixup_target(labels, self.num_classes, smoothing=self.label_smoothing)
        else:
            images, targets = self.mixup(images, labels)
        if self.pairing is not None:
            views = self.pairing.views(self.model, images, targets, self.global_step)
            losses = self.pairing.losses(self.model, self.forward_in_training, self.forward_with_gates, views, targets)
            return losses, views.attacked
        logits, aux_loss = self.forward_in_training(self.model, images)
        main_loss = self.main_loss(logits, targets)
        return Losses(main_loss + self.aux_loss_weight * aux_loss, main_loss, aux_loss), None

    def _log_attack(self, pair: Attacked) -> None:
        seen = compared(self.model, self.model.net, pair.clean, pair.found, pair.targets.argmax(dim=-1))
        told = {"clean_top1": seen.clean_top1, "robust_top1": seen.robust_top1}
        told |= {f"routing_change/{block}": change for block, change in seen.routing_change.items()}
        self.log_dict({f"train/{name}": value for name, value in told.items()}, on_step=True, on_epoch=False)

    def main_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits, targets (rows sum to 1): [B, K] -> []."""
        return classification_loss(logits, targets, self.loss)

    def _evaluate(self, batch: Batch, accuracy: MetricCollection, stage: str) -> Tensor:
        images, labels = batch
        logits = self._logits(images, flip=stage == "test" and self.test_time_flip)
        accuracy.update(logits, labels)
        loss = self.main_loss(logits, mixup_target(labels, self.num_classes))
        # times the ranks: Lightning (2.6.6) divides the images of all by their number, in whole numbers
        weight = len(labels) * getattr(self._trainer, "world_size", 1)
        self.log(f"{stage}/loss", loss, batch_size=weight, sync_dist=True)
        self.log_dict(accuracy, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, self.val_accuracy, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, self.test_accuracy, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Class probabilities [B, K] and labels [B]. Sigmoid networks are ranked by softmax too: the order is equal."""
        images, labels = batch
        return self._logits(images, self.test_time_flip).float().softmax(dim=-1), labels

    def _logits(self, images: Tensor, flip: bool) -> Tensor:
        """flip: the mean over each image and its mirror image."""
        return (self(images) + self(images.flip(-1))) / 2 if flip else self(images)

    def facts(self) -> dict[str, Any]:
        data = getattr(self._trainer, "datamodule", None)  # no trainer outside of a run
        return {
            **describe_network(self.model.net),
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            **self.model.constants,
            "class_names": self.class_names,
            "class_ids": getattr(data, "class_ids", None),  # names of their folders
            "crop_pct": getattr(data, "eval_crop_ratio", None),  # how evaluation cuts pictures, and their size
            "eval_image_size": getattr(data, "eval_image_size", None),
            "upright": getattr(data, "upright", False),
        }

    def logged(self) -> list[str]:
        more = [] if self.pairing is None else self.pairing.logged()
        validated = map(str, self.val_accuracy.keys())
        return [*(f"train/{name}" for name in ("main_loss", "aux_loss", *more)), "val/loss", *validated]

    def cost(self) -> Cost:
        return measure_cost(self.model, self.image_size)

    def told(self, cost: Cost) -> dict[str, str]:
        network = f"{self.facts()['architecture']}, {self.num_classes} classes, {self.image_size} pixels"
        return {"network": network, "per image": f"{cost.gflops:.3g} GFLOPs forward"}

    def saved_bytes(self, data: Any) -> int | None:
        each = saved_bytes(self.model, self.image_size)
        return None if each is None else each * (0 if data is None else data.batch_size)

    def seconds_per_batch(self, data: Any) -> float:
        return seconds_per_batch(self, data.batch_size)

    def check_data(self, data: Any) -> None:
        self.check_batch_size(data.batch_size)
        self.check_sizes(data.sizes())

    def try_batch(self, data: Any) -> None:
        self.model.train().forward_with_aux(torch.zeros(data.batch_size, 3, self.image_size, self.image_size))
