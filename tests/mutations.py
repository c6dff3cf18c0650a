"""Configs with one mistake each, seeded: what the sweep of test_mutations.py feeds to `fit`."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))
NUMBERS = ("nan", "inf", "-.inf", -1, 0, 1e30, 0.5, 1.5)
TINY_VIT = {"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4}


class Mutation(NamedTuple):
    kind: str
    key: str  # dotted
    value: Any  # what now stands there, "" for none
    text: bytes  # of the file

    @property
    def name(self) -> str:
        return f"{self.kind} {self.key} {self.value!r:.60}"


def small(path: Path, data: Path) -> dict[str, Any]:
    """The config with all its keys, for pictures of 16 pixels and a network of seconds."""
    config = yaml.safe_load(path.read_text())
    if "data" in config:
        config["data"]["class_path"] = "FolderDataModule"
        settings = config["data"]["init_args"]
        settings |= {"root": str(data), "image_size": 16, "batch_size": 8, "num_workers": 0}
        settings.pop("batches_ahead", None)
        if "progressive" in settings:
            settings["progressive"] |= {"start_size": 8, "multiple": 4}
        net = config["model"]["net"]["init_args"]
        if "backbone" in net:
            net |= {"backbone": "vit_tiny_patch16_224", "pretrained": False, "backbone_args": dict(TINY_VIT)}
        elif not net["name"].startswith("vit"):
            net["name"] = "vmoe_tiny_patch4_16"
        else:
            net["name"] = "test_vit"
        for name in ("image_size", "num_experts"):
            if name in net:
                net[name] = {"image_size": 16, "num_experts": 4}[name]
        router = net.get("router", {})
        if isinstance(router, dict) and "group_size" in router.get("init_args", {}):
            router["init_args"]["group_size"] = 17 * 4
        config["model"]["schedule"]["warmup_steps"] = 2
        config["trainer"] |= {"accelerator": "cpu", "devices": 1}
    return config


def paths(node: Any, prefix: tuple = ()) -> Iterator[tuple]:
    """Every place in a config, as keys from the top."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


def put(config: dict, path: tuple, value: Any, drop: bool = False, rename: str = "") -> dict:
    config = copy.deepcopy(config)
    place = config
    for key in path[:-1]:
        place = place[key]
    if drop or rename:
        was = place.pop(path[-1])
        if rename:
            place[rename] = was
    else:
        place[path[-1]] = value
    return config


def dotted(path: tuple) -> str:
    return ".".join(str(key) for key in path)


def structural(config: dict, count: int, seed: int) -> Iterator[Mutation]:
    """`count` of them, each kind as often as the others."""
    rng, places = random.Random(seed), list(paths(config))
    kinds = [*ON_A_PLACE, *ON_THE_TEXT]
    for number in range(count):
        kind = kinds[number % len(kinds)]
        if kind in ON_THE_TEXT:
            value, text = ON_THE_TEXT[kind](yaml.safe_dump(config, sort_keys=False), rng)
            yield Mutation(kind, "config", value, text)
            continue
        fitting = [path for path in places if _fits(kind, config, path)]
        if not fitting:  # an overlay without a list, say
            kind = "drop"
            fitting = [path for path in places if _fits(kind, config, path)]
        path = rng.choice(fitting)
        key, value, changed = ON_A_PLACE[kind](config, path, at(config, path), rng)
        yield Mutation(kind, dotted(key), value, yaml.safe_dump(changed, sort_keys=False).encode())


def numeric(config: dict, count: int, seed: int) -> Iterator[Mutation]:
    """A number of the config, or one element of a list of them, becomes one of NUMBERS."""
    rng = random.Random(seed)
    places = [path for path in paths(config) if _is_number(at(config, path))]
    for _ in range(count if places else 0):
        path, value = rng.choice(places), rng.choice(NUMBERS)
        value = float(value) if isinstance(value, str) and "." not in value else value
        value = -float("inf") if value == "-.inf" else value
        yield Mutation(
            "number", dotted(path), value, yaml.safe_dump(put(config, path, value), sort_keys=False).encode()
        )


def at(config: Any, path: tuple) -> Any:
    for key in path:
        config = config[key]
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fits(kind: str, config: dict, path: tuple) -> bool:
    value, last = at(config, path), path[-1]
    if "class" in kind:
        return last == "class_path"
    if "path" in kind:
        return last in ("root", "save_dir")
    if kind in ("drop", "rename", "extra"):
        return isinstance(last, str) and (kind != "extra" or isinstance(value, dict))
    if kind == "scalar for mapping":
        return isinstance(value, dict)
    if kind == "scalar for list":
        return isinstance(value, list)
    return not isinstance(value, dict | list)


def _set(value: Any):
    def mutate(config: dict, path: tuple, was: Any, rng: random.Random) -> tuple:
        new = value(was, rng) if callable(value) else value
        return path, new, put(config, path, new)

    return mutate


def _rename(config: dict, path: tuple, was: Any, rng: random.Random) -> tuple:
    name = path[-1] + rng.choice("sx")
    return (*path[:-1], name), "", put(config, path, None, rename=name)


def _extra(config: dict, path: tuple, was: Any, rng: random.Random) -> tuple:
    new = (*path, rng.choice(["bogus", "lr_", "Name", "init_arg"]))
    return new, 1, put(config, path, {**was, new[-1]: 1})


def _drop(config: dict, path: tuple, was: Any, rng: random.Random) -> tuple:
    return path, "", put(config, path, None, drop=True)


ON_A_PLACE = {
    "drop": _drop,
    "rename": _rename,
    "extra": _extra,
    "word": _set("many"),
    "scalar for mapping": _set(lambda was, rng: rng.choice([3, "word", True])),
    "scalar for list": _set(lambda was, rng: rng.choice([3, "word"])),
    "list for scalar": _set(lambda was, rng: [was, was]),
    "mapping for scalar": _set(lambda was, rng: {"value": was}),
    "null": _set(None),
    "empty": _set(""),
    "unknown class": _set(lambda was, rng: rng.choice(["NoSuchClass", "torch.nn.NoSuch", "no.such.module.Class"])),
    "wrong class": _set(lambda was, rng: rng.choice(["torch.nn.Linear", "HeavyBall", "SoftRouter", "Folder"])),
    "path that is not there": _set("nowhere/at/all"),
    "path of a file": _set(str(FOLDER / "digits.yaml")),
}  # fmt: skip


def _twice(text: str, rng: random.Random) -> tuple:
    line = rng.choice([line for line in text.splitlines() if line.endswith(":") and line[0] != " "])
    return line.rstrip(":"), (text + f"{line} 3\n").encode()


def _insert(what: bytes):
    def mutate(text: str, rng: random.Random) -> tuple:
        lines = text.encode().splitlines(keepends=True)
        lines.insert(rng.randrange(len(lines)), what)
        return "", b"".join(lines)

    return mutate


ON_THE_TEXT = {
    "key twice": _twice,
    "no UTF-8": _insert(b"name: \xe9\xff\n"),
    "open bracket": _insert(b"seed_everything: [\n"),
    "tab": _insert(b"\tname: x\n"),
    "list at the top": lambda text, rng: ("", b"- 1\n- 2\n"),
    "text at the top": lambda text, rng: ("", b"hello\n"),
    "empty file": lambda text, rng: ("", b""),
    "control character": _insert(b"name: \x00\n"),
}
