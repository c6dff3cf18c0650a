"""What is trained: the arms of benchmarks/evidence.py, each configs/fashion.yaml with some settings changed."""

import json
import math
from typing import Any, NamedTuple

NET = "--model.net.init_args"
GAMMAS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
DEPTHS = (8, 16, 32, 56)
RULES = ("residual", "heavy_ball_07", "heavy_ball_09", "complex")  # of margin, the control first
PARTS = ("main", "margin", "depth", "small")
ON_GPU = ("small",)  # run only where they are asked for
SHORT = {"margin": 200, "depth": 300}  # steps of 64 pictures; the learning rate decays to the last one
# seconds of a run of one thread, measures included, where no row says more; depth times its blocks over 8
GUESS = {"main": 600.0, "margin": 48.0, "depth": 62.0, "small": 90.0}


class Arm(NamedTuple):
    """One setting of the recipe, trained with `seeds` seeds: 0, 1, ...

    options: of fit, after those of the recipe. rule: None for the dense network. What decides between arms of one part
    is told by rule, post_norm, gamma and depth.
    """

    name: str
    part: str  # of PARTS
    seeds: int
    options: tuple[str, ...]
    rule: dict[str, Any] | None
    post_norm: bool = False
    gamma: float | None = None  # of margin
    depth: int = 8


class Cell(NamedTuple):
    arm: Arm
    seed: int


def rule(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


RESIDUAL = rule("Residual", gamma=1.0)
HEAVY_07 = rule("HeavyBall", mu=0.7, gamma=1.0)
HEAVY_09 = rule("HeavyBall", mu=0.9, gamma=1.0)
ADAM = rule("Adam", gamma1=0.1, mu=0.7, gamma2=1.0, adam_layers=1)
ROBUST = {"L": 1.0, "m": 0.25, "r": 0.6}  # ours: the paper gives no constants for vision
RELEASED = {"L": 1.0, "m": 0.8, "r": 0.2}  # of the authors' vision code
TURNING = rule("Complex", mu=0.7, phi=math.pi / 8, gamma=1.0)


def make(
    name: str, own: dict[str, Any] | None, seeds: int = 5, part: str = "main", norm: bool = False, more: Any = (),
    gamma: float | None = None, depth: int = 8,
) -> Arm:  # fmt: skip
    options = [] if own is None else [f"{NET}.rule={json.dumps(own)}"]
    options += [f"{NET}.post_norm=all"] if norm else []
    return Arm(name, part, seeds, (*options, *more), own, norm, gamma, depth)


def main_arms() -> list[Arm]:
    both = [
        ("residual", RESIDUAL, RESIDUAL),
        ("heavy_ball_07", HEAVY_07, HEAVY_07),
        ("heavy_ball_09", HEAVY_09, HEAVY_09),
        ("adam", ADAM, ADAM),
        # with the norm in the authors' form: it looks ahead behind the norm, and in dense blocks
        ("robust", rule("Robust", **ROBUST), rule("Robust", **ROBUST, look_ahead="after_norm")),
        ("robust_released", rule("Robust", **RELEASED), rule("Robust", **RELEASED, look_ahead="after_norm")),
    ]
    arms = [make("dense", None, more=("--config=configs/fashion_dense.yaml",))]
    for name, plain, normed in both:
        arms += [make(name, plain), make(f"{name}_norm", normed, norm=True)]
    # one total step: a constant update moves the stream by gamma / (1 - mu) in the long run
    for mu, name in ((0.7, "07"), (0.9, "09")):
        arms.append(make(f"heavy_ball_{name}_small_step", rule("HeavyBall", mu=mu, gamma=round(1 - mu, 9))))
        arms.append(make(f"residual_step_of_{name}", rule("Residual", gamma=round(1 / (1 - mu), 9))))
    arms.append(make("heavy_ball_07_dense_blocks", rule("HeavyBall", mu=0.7, gamma=1.0, dense_blocks=True)))
    further = {
        "heavy_ball_05": rule("HeavyBall", mu=0.5, gamma=1.0),
        "heavy_ball_learned": rule("HeavyBall", mu=0.7, gamma=1.0, learn=True),
        "nesterov": rule("Nesterov", mu=0.7, gamma=1.0),
        "complex": TURNING,
    }
    return arms + [make(name, own, seeds=3) for name, own in further.items()]


def short(part: str) -> tuple[str, ...]:
    steps = SHORT[part]
    length = ("--trainer.max_epochs=1", f"--trainer.limit_train_batches={steps}")
    return (*length, f"--model.schedule.warmup_steps={steps // 10}")  # a tenth; the recipe's are a twentieth


def margin_arms() -> list[Arm]:
    rules = {"residual": RESIDUAL, "heavy_ball_07": HEAVY_07, "heavy_ball_09": HEAVY_09, "complex": TURNING}
    return [
        make(f"margin_{name}_{gamma:g}", {**own, "init_args": {**own["init_args"], "gamma": gamma}}, 3, "margin",
             more=short("margin"), gamma=gamma)
        for name, own in rules.items() for gamma in GAMMAS
    ]  # fmt: skip


def depth_arms() -> list[Arm]:
    return [
        make(f"depth_{depth}_{name}{'_norm' if norm else ''}", own, 3, "depth", norm,
             (*short("depth"), f"{NET}.depth={depth}"), depth=depth)
        for depth in DEPTHS for name, own in (("residual", RESIDUAL), ("heavy_ball_07", HEAVY_07))
        for norm in (False, True)
    ]  # fmt: skip


def small_arms() -> list[Arm]:
    """Four of the main arms in the shapes of V-MoE-S/32."""
    own, main = "--config=configs/fashion_small.yaml", {arm.name: arm for arm in main_arms()}
    return [
        main[name]._replace(name=f"small_{name}", part="small", options=(own, *main[name].options))
        for name in ("residual", "residual_norm", "heavy_ball_07", "heavy_ball_09_norm")
    ]


ARMS = {arm.name: arm for arm in (*main_arms(), *margin_arms(), *depth_arms(), *small_arms())}


def cells(parts: list[str] | None = None, arm: str | None = None, seed: int | None = None) -> list[Cell]:
    """In the order they are run: all arms of seed 0 (main, margin, depth), then all of seed 1, ...

    parts: None leaves out what wants a GPU, unless the arm is such a one.
    Raises ValueError: no such part, arm, or seed of it.
    """
    unknown = sorted(set(parts or ()) - set(PARTS))
    if unknown:
        raise ValueError(f"--parts={unknown}: use some of {', '.join(PARTS)}")
    if arm is not None and arm not in ARMS:
        raise ValueError(f"--arm={arm}: no such arm; --list shows them")
    if parts is None:
        parts = [part for part in PARTS if arm is not None or part not in ON_GPU]
    found = [
        Cell(each, number) for number in range(5) for each in ARMS.values()
        if number < each.seeds and each.part in parts and arm in (None, each.name)
        and seed in (None, number)
    ]  # fmt: skip
    if not found:
        raise ValueError(
            f"--seed={seed}: the protocol has seeds 0 to {4 if arm is None else ARMS[arm].seeds - 1} there"
        )
    return found


def guess(arm: Arm) -> float:
    """Seconds of a run, measures included, from the protocol."""
    return GUESS[arm.part] * (arm.depth / 8 if arm.part == "depth" else 1.0)
