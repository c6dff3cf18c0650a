"""Any classifier as the robustness benchmark wants it: of fit, in directories, timm's, RobustBench's, callables.

B images, N tokens, E experts, K classes.
"""

import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from torch import Tensor, nn

from ..analysis import record
from ..analysis.subjects import split_label
from ..files.checksums import sha256
from ..models import MomentumBlock, PixelModel, create_model
from ..models.networks import as_classifier
from ..models.saved import open_saved
from ..moe import TopKPlan
from ..robustness import Model, View
from .robustbench_zoo import PREFIX, open_zoo_model


def open_models(texts: list[str], pretrained: bool = True) -> list[Model]:
    """`[LABEL=]SOURCE` each; one label several times is a group, such as the seeds of a rule.

    SOURCE: a .ckpt that fit wrote, local-dir:PATH, a timm name, robustbench:NAME, or module:callable (a function
    without arguments that gives a module from pixels in [0, 1] to logits; its attributes image_size, crop_pct,
    class_ids and class_names, all optional, say how it wants pictures and which folders its classes are). Raises
    ValueError, FileNotFoundError: none of these.
    """
    if not texts:
        raise ValueError("--model: none given; use --model LABEL=runs/.../last.ckpt, or a timm name")
    found: list[Model] = []
    for text in texts:
        if not split_label(text)[1]:
            raise ValueError(f"--model={text}: no source; use LABEL=runs/.../last.ckpt, or a timm name")
        found.append(_open(*split_label(text), pretrained))
    labels = [model.label for model in found]
    named = []
    for number, model in enumerate(found):
        if labels.count(model.label) > 1:
            model = model._replace(name=f"{model.label}#{labels[: number + 1].count(model.label)}")
        named.append(model)
    _check_names(named)
    return named


def _check_names(models: list[Model]) -> None:
    """Raises ValueError: two models of one name, one model twice in a group, a group of different networks."""
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"--model: two are called {twice}; choose labels without #")
    for label in dict.fromkeys(model.label for model in models):
        told = [model.provenance for model in models if model.label == label]
        for key in ("sha256", "weights_sha256"):
            found = [facts[key] for facts in told if key in facts]
            if len(set(found)) < len(found):
                raise ValueError(f"--model: {label} is the same weights twice; a group is of different seeds")
        if len({json.dumps(facts.get("settings"), sort_keys=True) for facts in told}) > 1:
            raise ValueError(f"--model: different networks are called {label}; give each a label, as --model mine=PATH")


def _open(label: str, source: str, pretrained: bool) -> Model:
    if source.endswith(".ckpt") or source.startswith("local-dir:"):
        return _saved(label, source)
    if source.startswith(PREFIX):
        return _of_zoo(label, source)
    if ":" in source and not source.startswith("hf-hub:"):
        return _callable(label, source)
    if Path(source).is_dir():
        return _saved(label, f"local-dir:{source}")
    try:
        net = create_model(source, pretrained=pretrained)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--model={source}: its weights could not be had ({str(error).splitlines()[0]})") from error
    if not getattr(net, "num_classes", 0):
        raise ValueError(
            f"--model={source}: has no classifier (its features only); use a name that was trained on classes"
        )
    facts = {"weights": "timm" if pretrained else "random"}
    return _from_net(label or source, source, PixelModel(net), _classes_of(net), facts)


def _saved(label: str, source: str) -> Model:
    saved = open_saved(source)
    model = saved.build()
    file = Path(source) if saved.epoch is not None else Path(source.partition(":")[2]) / "model.safetensors"
    facts = {"sha256": sha256(file), "epoch": saved.epoch, "settings": saved.facts["settings"]}
    rule = saved.facts["settings"].get("rule", {}).get("class_path")
    return _from_net(label or rule or Path(source).stem, source, model, saved.facts, facts)


def _classes_of(net: nn.Module) -> dict[str, list[str]]:
    """class_names where the network's record has them, else wnids as class_ids where its number is that of a list."""
    told, subset = as_classifier(net), infer_imagenet_subset(net)
    names = (told.pretrained_cfg or {}).get("label_names")
    if names and len(names) == told.num_classes:
        return {"class_names": list(names)}
    return {} if subset is None else {"class_ids": ImageNetInfo(subset).label_names()}


def _of_zoo(label: str, source: str) -> Model:
    found = open_zoo_model(source)
    size, name = found.view.size, label or found.entry.rpartition("/")[2]
    with torch.inference_mode():
        classes = int(found.module(torch.zeros(1, 3, size, size)).shape[-1])
    provenance = {
        "source": source, "robustbench": found.entry, "view": found.view._asdict(),
        "weights_sha256": _weights_hash(found.module), "answers_sha256": _answers_hash(found.module, size),
    }  # fmt: skip
    return Model(
        name, name, found.module, found.view, classes, found.class_names, None, None, provenance,
        architecture=type(getattr(found.module, "model", found.module)).__name__,
    )  # fmt: skip


def _callable(label: str, source: str) -> Model:
    place, _, name = source.rpartition(":")
    if not place or not name:
        raise ValueError(f"--model={source}: write module:callable")
    try:
        module = getattr(importlib.import_module(place), name)()
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"--model={source}: no such module:callable ({error}); it must be importable from here"
        ) from error
    except Exception as error:  # the user's code may raise anything
        raise ValueError(f"--model={source}: raises {type(error).__name__} ({error}); call it by hand") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"--model={source}: gives {type(module).__name__}, not a torch module from pixels to logits")
    size = int(getattr(module, "image_size", 224))
    module = module.eval()
    try:
        with torch.inference_mode():
            classes = int(module(torch.zeros(1, 3, size, size)).shape[-1])
    except Exception as error:
        raise ValueError(
            f"--model={source}: fails on {size}-pixel images ({type(error).__name__}: {error}); it takes [B, 3, H, W] "
            "in [0, 1] and gives logits; an attribute image_size says another size"
        ) from error
    names, ids = (_said(module, key, classes, source) for key in ("class_names", "class_ids"))
    view = View(size, float(getattr(module, "crop_pct", 0.875)), "bilinear")
    provenance = {
        "source": source, "view": view._asdict(), "weights_sha256": _weights_hash(module),
        "answers_sha256": _answers_hash(module, size),
    }  # fmt: skip
    return Model(label or name, label or name, module, view, classes, names, None, None, provenance, class_ids=ids)


def _said(module: nn.Module, key: str, classes: int, source: str) -> list[str] | None:
    """An attribute of a callable. Raises ValueError: not one name a class."""
    value = getattr(module, key, None)
    if value is None:
        return None
    value = list(value)
    if len(value) != classes or not all(isinstance(name, str) for name in value):
        raise ValueError(f"--model={source}: its {key} has {len(value)} entries for {classes} classes; one name each")
    return value


def _from_net(label: str, source: str, model: PixelModel, saved: dict[str, Any], facts: dict[str, Any]) -> Model:
    net, view = model.net.eval(), view_of(model.net, saved)
    sparse = any(isinstance(block, MomentumBlock) for block in net.modules())
    provenance = {
        "source": source, **model.constants,
        "view": view._asdict(), "timm": timm.__version__, **facts,
    }  # fmt: skip
    if "sha256" not in facts:
        provenance["weights_sha256"] = _weights_hash(net)
    routing = _routing(model) if sparse else None
    return Model(
        label, label, model, view, as_classifier(net).num_classes, saved.get("class_names"), routing,
        _router_loss(model) if sparse else None, provenance, class_ids=saved.get("class_ids"),
        architecture=_architecture(net, saved),
    )  # fmt: skip


def _architecture(net: nn.Module, saved: dict[str, Any]) -> str:
    """The name it is built by, and its momentum rule."""
    name = saved.get("architecture") or (as_classifier(net).pretrained_cfg or {}).get("architecture")
    name = name or type(net).__name__
    rule = saved.get("settings", {}).get("rule", {}).get("class_path", "").rpartition(".")[2]
    return f"{name}, {rule}" if rule else name


def view_of(net: nn.Module, saved: dict[str, Any]) -> View:
    """How a network wants its pictures: as it was evaluated in training, else by timm's record of it.

    saved: what its checkpoint says (image_size, crop_pct, upright), empty for none. Raises ValueError: not as a square.
    """
    config, upright = resolve_model_data_config(net), bool(saved.get("upright", False))
    if saved.get("crop_pct") is not None:  # our data modules' evaluation
        return View(saved.get("eval_image_size") or saved["image_size"], float(saved["crop_pct"]), "bilinear", upright)
    height, width = config["input_size"][-2:]
    if height != width or config["crop_mode"] not in ("center", "squash"):
        raise ValueError(
            f"--model={type(net).__name__}: it takes {height} x {width} pixels, crop_mode {config['crop_mode']}; "
            "models here take squares, cut from the centre or squashed"
        )
    name = config["interpolation"]
    interpolation = name if name in ("bilinear", "bicubic") else "bilinear"
    squash = config["crop_mode"] == "squash"
    return View(saved.get("image_size") or width, float(config["crop_pct"]), interpolation, upright, squash)


def _routing(model: PixelModel) -> Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]:
    """Logits, and which experts each token reaches; nothing of blocks where all reach all, as under soft routing."""

    def routing(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with record(model.net) as visits:
            logits, found = model(images), {}
            for visit in visits:
                reached = visit.plan.assigned()
                if not bool(reached.all()):
                    found[f"block{visit.block}"] = reached.reshape(*visit.tokens.shape[:2], -1)[: len(images)]
        return logits, found

    return routing


def _router_loss(model: PixelModel) -> Callable[[Tensor, Tensor], Tensor]:
    """How near tokens are to other experts: minus the gap between the last expert chosen and the first not chosen.

    Mean over tokens, summed over blocks. Where experts choose, or all are mixed, the routers' auxiliary loss.
    """

    def router_loss(images: Tensor, labels: Tensor) -> Tensor:
        with record(model.net) as visits:
            auxiliary, total = model.forward_with_aux(images)[1], images.new_zeros(())
            for visit in visits:
                if not isinstance(visit.plan, TopKPlan) or visit.plan.expert.shape[-1] == visit.plan.gates.shape[-1]:
                    return auxiliary
                top_k = visit.plan.expert.shape[-1]
                gates = visit.plan.gates.sort(dim=-1, descending=True).values
                total = total - (gates[..., top_k - 1] - gates[..., top_k]).mean()
        return total

    return router_loss


def _answers_hash(module: nn.Module, size: int) -> str:
    """Of its logits on noise: code may change where weights do not."""
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return hashlib.sha256(module(images).double().numpy().tobytes()).hexdigest()


def _weights_hash(module: nn.Module) -> str:
    """Of its state dict, whatever the shapes: BatchNorm counts its batches in a tensor without dimensions."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten()  # bytes can be seen only along a dimension
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        else:  # get_extra_state of the user's modules
            digest.update(repr(value).encode())
    return digest.hexdigest()
