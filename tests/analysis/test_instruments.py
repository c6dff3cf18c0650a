"""load, norms, sensitivity, compare and ablate, against loops and by hand."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from analysis_helpers import files, images, subject, tiny

from vmoe_momentum import ExpertChoiceRouter, HeavyBall, Residual, SoftRouter, TopKRouter
from vmoe_momentum.analysis import Files, ablate, compare, load, norms, parse_axis, record, sample, sensitivity
from vmoe_momentum.analysis.ablate import Axis
from vmoe_momentum.analysis.sensitivity import expert_set_change
from vmoe_momentum.momentum import SAM


def pixels() -> torch.Tensor:
    return torch.cat(images()) / 127.5 - 1


def test_samples_lie_evenly_over_the_split() -> None:
    """The pictures of a split lie class by class: the first few would be of one class."""
    loader = [(torch.arange(i, min(i + 4, 10)), None) for i in range(0, 10, 4)]
    assert torch.cat(sample(loader, 4, 10)).tolist() == [0, 2, 5, 7]
    assert torch.cat(sample(loader, 10, 10)).tolist() == list(range(10))
    assert torch.cat(sample(loader, 99, 10)).tolist() == list(range(10))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- load


def test_load_and_load_by_norm_by_a_loop_over_tokens(tmp_path: Path) -> None:
    net = tiny(rule=HeavyBall(), router=TopKRouter(top_k=2))
    rows = load([subject(net, tmp_path)], images(), files(tmp_path))
    with record(net) as visits, torch.no_grad():
        net(pixels())
    visit = visits[2]
    block = net.blocks[visit.block]
    experts, gate = block.mlp.experts, block.mlp.router.weight
    received, by_rank, count = [0] * 4, [0] * 4, 0
    block.requires_grad_(False)
    for token in visit.tokens.flatten(0, 1):
        sizes = []
        for e in range(4):
            hidden = experts.act(experts.fc1.weight[e] @ token + experts.fc1.bias[e])
            sizes.append(float((experts.fc2.weight[e] @ hidden + experts.fc2.bias[e]).norm()))
        loudest = sorted(range(4), key=lambda e: -sizes[e])
        for e in (gate @ token).topk(2).indices.tolist():
            received[e] += 1
            by_rank[loudest.index(e)] += 1
        count += 1
    found = {m: [r.value for r in rows if (r.block, r.metric) == (visit.block, m)] for m in {r.metric for r in rows}}
    shares = [value / (2 * count) for value in received]
    assert found["load"] == pytest.approx(shares)
    assert found["load_by_norm"] == pytest.approx([value / count for value in by_rank])
    assert sum(found["load_by_norm"]) == pytest.approx(2)
    assert found["entropy"] == [pytest.approx(-sum(p * math.log(p) for p in shares if p))]
    assert found["cv"] == [pytest.approx(math.sqrt(sum((4 * p - 1) ** 2 for p in shares) / 4))]
    assert found["dropped"] == [0.0]
    assert [r.index for r in rows if (r.block, r.metric) == (visit.block, "load")] == [0, 1, 2, 3]
    assert (tmp_path / "out" / "x.png").stat().st_size > 10_000


def test_dropped_assignments_are_counted_and_soft_routing_reaches_everyone(tmp_path: Path) -> None:
    net = tiny(router=TopKRouter(eval_capacity_factor=0.5))
    full = load([subject(net, tmp_path)], images(), files(tmp_path, "a"))
    with record(net) as visits, torch.no_grad():
        net(pixels())
    kept = visits[0].plan.kept.float().mean()
    dropped = {row.block: row.value for row in full if row.metric == "dropped"}
    assert dropped[1] == pytest.approx(1 - float(kept)) and 0.2 < dropped[1] < 0.8
    soft = load([subject(tiny(router=SoftRouter()), tmp_path, "soft")], images(), files(tmp_path, "b"))
    assert all(row.value == 1.0 for row in soft if row.metric == "load_by_norm")
    chosen = load([subject(tiny(router=ExpertChoiceRouter()), tmp_path, "ec")], images(), files(tmp_path, "c"))
    assert all(row.value == pytest.approx(0.25) for row in chosen if row.metric == "load")


# ---- norms


def test_norms_by_the_networks_own_intermediates(tmp_path: Path) -> None:
    net, plain = tiny(rule=HeavyBall(0.5, 0.8)), tiny(rule=Residual())
    rows = norms([subject(net, tmp_path, "hb"), subject(plain, tmp_path, "plain")], images(), files(tmp_path))
    value = {(r.model, r.block, r.metric): r.mean for r in rows}
    with torch.no_grad():
        after = net.forward_intermediates(pixels(), indices=[1, 3], output_fmt="NLC", intermediates_only=True)
        first = torch.cat([net.pos_embed[:, :1] * 0 + after[0][:, :1] * 0, after[0]], dim=1)[:, 1:]
    # patches only, so the class token is left out of this comparison by recording it
    with record(net) as visits, torch.no_grad():
        net(pixels())
    torch.testing.assert_close(visits[0].x[:, 1:], first)
    assert value["hb", 1, "token_norm"] == pytest.approx(float(visits[0].x.norm(dim=-1).mean()), rel=1e-5)
    assert value["hb", 1, "update_norm"] == pytest.approx(value["hb", 1, "momentum_norm"])  # p = u at the start
    p = 0.5 * visits[0].update + visits[1].update
    assert value["hb", 3, "momentum_norm"] == pytest.approx(float(p.norm(dim=-1).mean()), rel=1e-5)
    u, v = visits[0].update.flatten(0, 1), visits[1].update.flatten(0, 1)
    spread = {(r.model, r.block, r.metric): r.std for r in rows}
    assert spread["hb", 3, "momentum_norm"] == pytest.approx(float(p.norm(dim=-1).std(correction=0)), rel=1e-5)
    cosine = (u * v).sum(-1) / (u.norm(dim=-1) * v.norm(dim=-1))
    assert value["hb", 1, "cosine"] == pytest.approx(float(cosine.mean()), abs=1e-6)
    assert ("hb", 7, "cosine") not in value and ("plain", 1, "momentum_norm") not in value


def test_norms_over_training_come_from_the_log(tmp_path: Path) -> None:
    write_log(tmp_path / "run", [0.1, 0.2], [1.0, 1.0])
    one = [subject(tiny(), tmp_path)]
    norms(one, images(), files(tmp_path, "with"), logs=[f"a={tmp_path / 'run'}"])
    assert (tmp_path / "out" / "with_training.png").exists()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "metrics.csv").write_text("epoch,val/top1\n0,0.5\n")
    with pytest.raises(ValueError, match="--logs=b: no update_norm"):
        norms(one, images(), files(tmp_path, "without"), logs=[f"b={tmp_path / 'bare'}"])
    assert not list((tmp_path / "out").glob("without*"))


# ---- sensitivity


def test_change_of_expert_sets_by_hand() -> None:
    before = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    after = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    assert expert_set_change(before, after).tolist() == pytest.approx([0, 2 / 3, 1, 0])


def test_sensitivity_grows_with_noise_and_is_the_same_for_equal_networks(tmp_path: Path) -> None:
    net = tiny(rule=HeavyBall())
    subjects = [
        subject(net, tmp_path, "a"),
        subject(net, tmp_path, "b"),
        subject(tiny(router=SoftRouter()), tmp_path, "s"),
    ]
    rows = sensitivity(subjects, images(), files(tmp_path), noise=[0.0, 8.0, 64.0])
    value = {(r.model, r.noise, r.metric, r.block): r.value for r in rows}
    assert all(v == 0 for key, v in value.items() if key[1] == 0.0)
    drawn = torch.Generator().manual_seed(0)
    moved = []
    for batch in images():
        clean = batch.float() / 255
        noisy = (clean + torch.randn(clean.shape, generator=drawn) * 64 / 255).clamp(0, 1)
        with torch.no_grad():
            before, after = net(2 * clean - 1), net(2 * noisy - 1)
        moved.append((after - before).norm(dim=1) / before.norm(dim=1))
    assert value["a", 64.0, "logits_change", None] == pytest.approx(float(torch.cat(moved).mean()), rel=1e-4)
    assert 0 < value["a", 8.0, "logits_change", None] < value["a", 64.0, "logits_change", None]
    assert 0 < value["a", 8.0, "routing_change", 7] < value["a", 64.0, "routing_change", 7] <= 1
    assert {key[1:]: v for key, v in value.items() if key[0] == "a"} == {
        key[1:]: v for key, v in value.items() if key[0] == "b"
    }
    assert not any(key[0] == "s" and key[2] == "routing_change" for key in value)


def test_noise_is_in_pixel_units_and_clipped(tmp_path: Path, monkeypatch) -> None:
    seen = []
    one = subject(tiny(), tmp_path)
    build = type(one).build

    def spy(self, device="cpu"):
        model = build(self, device)
        model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        return model

    monkeypatch.setattr(type(one), "build", spy)
    grey = [torch.full((4, 3, 16, 16), 128, dtype=torch.uint8), torch.zeros(4, 3, 16, 16, dtype=torch.uint8)]
    sensitivity([one], grey, files(tmp_path), noise=[16.0])
    assert float((seen[2] * 255).std()) == pytest.approx(16.0, rel=0.05)
    assert float(seen[2].mean()) == pytest.approx(128 / 255, abs=0.005)
    assert float(seen[3].min()) == 0.0 and float((seen[3] > 0).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_routing_is_watched_under_sam_too(tmp_path: Path) -> None:
    rows = sensitivity([subject(tiny(rule=SAM()), tmp_path)], images(), files(tmp_path), noise=[32.0])
    assert {row.block for row in rows if row.metric == "routing_change"} == {1, 3, 5, 7}


# ---- compare


def write_log(folder: Path, top1: list[float], seconds: list[float]) -> Path:
    """A metrics.csv as Lightning writes it: one row for training, one for validation."""
    folder.mkdir(parents=True)
    lines = ["epoch,train/epoch_seconds,val/top1,val/block1/update_norm,val/block1/token_norm,val/block1/momentum_norm"]
    for epoch, (score, spent) in enumerate(zip(top1, seconds, strict=True)):
        lines += [f"{epoch},{spent},,,,", f"{epoch},,{score},1.5,2.5,3.5"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_compare_by_hand(tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow" / "version_0"
    write_log(fast, [0.5, 0.9, 0.96], [2.0, 1.0, 1.0])
    write_log(slow, [0.2, 0.94, 0.93], [1.0, 1.5, 1.0])
    rows = compare([f"fast={fast}", f"slow={tmp_path / 'slow'}"], [0.9, 0.95], files(tmp_path, "compare"))
    assert [(r.label, r.target, r.epochs, r.seconds) for r in rows] == [
        ("fast", 0.9, 2, 3.0), ("fast", 0.95, 3, 4.0), ("slow", 0.9, 2, 2.5), ("slow", 0.95, None, None),
    ]  # fmt: skip
    assert [(r.best, r.final) for r in rows[2:]] == [(0.94, 0.93)] * 2
    assert rows_of(tmp_path / "out" / "compare.csv")[3]["epochs"] == ""


def test_compare_takes_perplexities_of_language_models(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "a", [120.0, 60.0, 61.0], [2.0, 1.0, 1.0])
    text = (folder / "metrics.csv").read_text()
    with pytest.raises(ValueError, match="no val/perplexity in its metrics.csv; a target above 1 is a perplexity"):
        compare([f"a={folder}"], [60.0], files(tmp_path, "x"))
    (folder / "metrics.csv").write_text(text.replace("val/top1", "val/perplexity"))
    rows = compare([f"a={folder}"], [100.0, 60.0, 30.0], files(tmp_path, "compare"))
    assert [(row.epochs, row.seconds, row.best, row.final) for row in rows] == [
        (2, 3.0, 60.0, 61.0), (2, 3.0, 60.0, 61.0), (None, None, 60.0, 61.0),
    ]  # fmt: skip


def test_runs_without_labels_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_log(tmp_path / name / "digits" / "version_0", [0.5], [1.0])
    runs = [str(tmp_path / name / "digits" / "version_0") for name in ("a", "b")]
    rows = compare(runs, [0.9], files(tmp_path))
    assert [row.label for row in rows] == ["a/digits/version_0", "b/digits/version_0"]
    with pytest.raises(ValueError, match="given twice"):
        compare([runs[0], f"x={runs[0]}"], [0.9], files(tmp_path, "y"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch,val/top1,train/epoch_seconds\n10,0.5,1\n", "begins with epoch 10, so it is of a resumed run"),
        ("a,b\n1,x\n", "not a metrics.csv"),
        ("epoch,val/top1\n0,0.5\n", "no train/epoch_seconds"),
        ("val/top1,train/epoch_seconds\n0.5,\n0.6,1\n", "2 validations but 1 epochs"),
    ],
)
def test_compare_refuses_other_logs(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        compare([str(tmp_path)], [0.9], files(tmp_path))


# ---- ablate

X, Y = Axis("model.net.init_args.rule.mu", ["0.3", "0.9"]), Axis("model.net.init_args.rule.gamma", ["0.5", "1.0"])


class Training:
    """Stands in for fit: top-1 is mu * gamma + seed / 100; stops after `limit` runs."""

    def __init__(self, limit: int = 100) -> None:
        self.commands, self.checked, self.limit = [], [], limit

    def fit(self, command: list[str]) -> dict[str, float]:
        if len(self.commands) == self.limit:
            raise RuntimeError("stopped")
        self.commands.append(command)
        values = dict(word[2:].split("=", 1) for word in command if "=" in word)
        score = float(values[X.key]) * float(values[Y.key]) + int(values["seed_everything"]) / 100
        loss = math.nan if score > 0.9 else 1 - score
        return {"val/top1": score, "val/loss": loss, "train/loss_epoch": 0.5, "epochs": 3}

    def check(self, command: list[str]) -> None:
        self.checked.append(command)


def run(training: Training, out: Path, options=("--config=c.yaml",), seeds=(0, 1)) -> list[dict[str, str]]:
    place = Files(str(out), "ablate", keep=True)
    return ablate(training.fit, training.check, list(options), X, Y, list(seeds), place)


def test_ablate_writes_a_row_a_run_and_continues(tmp_path: Path) -> None:
    first = Training(limit=3)
    with pytest.raises(RuntimeError, match="stopped"):
        run(first, tmp_path / "g")
    assert len(first.checked) == 4  # every pair once, before the first run
    assert len(rows_of(tmp_path / "g" / "ablate.csv")) == 3
    second = Training()
    run(second, tmp_path / "g")
    rows = rows_of(tmp_path / "g" / "ablate.csv")
    assert len(second.commands) == 5 and len(rows) == 8
    found = {(r[X.key], r[Y.key], r["seed"]): float(r["top1"]) for r in rows}
    assert found["0.3", "0.5", "1"] == pytest.approx(0.16) and len(found) == 8
    command = second.commands[0]
    assert command[0] == "--config=c.yaml" and "--data.seed=0" in command and "--seed_everything=0" in command
    names = {word for c in first.commands + second.commands for word in c if "logger.name" in word}
    assert len(names) == 8
    assert (tmp_path / "g" / "ablate.png").stat().st_size > 5_000
    third = Training()
    run(third, tmp_path / "g", seeds=(0, 1, 2))
    assert len(third.commands) == 4


@pytest.mark.parametrize("damage", ["cut", "empty", "no newline"])
def test_ablate_goes_on_after_a_damaged_file(damage: str, tmp_path: Path) -> None:
    run(Training(), tmp_path / "g")
    path = tmp_path / "g" / "ablate.csv"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-25], "empty": b"", "no newline": whole[:-1]}[damage])
    again = Training()
    run(again, tmp_path / "g")
    assert len(again.commands) == {"cut": 1, "empty": 8, "no newline": 0}[damage]
    assert sorted(path.read_text().splitlines()[1:])[0].startswith("0.3,0.5,0,0.15")
    assert len(rows_of(path)) == 8
    assert [row["epochs"] for row in rows_of(path)] == ["3"] * 8


def test_ablate_stopped_says_how_to_go_on(tmp_path: Path, capsys) -> None:
    def interrupted(command: list[str]) -> dict[str, float]:
        raise KeyboardInterrupt

    place = Files(str(tmp_path / "g"), "ablate", keep=True)
    with pytest.raises(KeyboardInterrupt):
        ablate(interrupted, lambda command: None, ["--config=c.yaml"], X, Y, [0], place)
    assert "the same command goes on" in capsys.readouterr().out
    assert len(run(Training(), tmp_path / "g", seeds=(0,))) == 4


def test_ablate_does_not_mix_runs_of_different_settings(tmp_path: Path) -> None:
    run(Training(), tmp_path / "g", seeds=(0,))
    with pytest.raises(ValueError, match="the runs there have options"):
        run(Training(), tmp_path / "g", options=("--config=other.yaml",))
    for content in ("{", "[]", "3"):
        (tmp_path / "g" / "ablate.json").write_text(content)
        with pytest.raises(ValueError, match="cannot be continued|the runs there have x None"):
            run(Training(), tmp_path / "g")


def test_one_bad_value_stops_a_grid_before_its_first_run(tmp_path: Path) -> None:
    training = Training()

    def check(command: list[str]) -> None:
        if any(word.endswith("mu=0.9") for word in command):
            raise ValueError("HeavyBall.mu=0.9 is not liked")

    with pytest.raises(ValueError, match="not liked"):
        ablate(training.fit, check, ["-"], X, Y, [0], Files(str(tmp_path), "ablate", keep=True))
    assert not training.commands and not list(tmp_path.iterdir())


def test_ablate_tells_the_settings_it_compares(tmp_path: Path) -> None:
    run(Training(), tmp_path / "g", seeds=(0,))
    told = json.loads((tmp_path / "g" / "ablate.json").read_text())
    assert told == {"x": X.key, "y": Y.key, "options": ["--config=c.yaml"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=0.3,0.5", Axis("a.b", ["0.3", "0.5"])),
        ("--a.b=x", Axis("a.b", ["x"])),
        ("m=[[5, 7], last2]", Axis("m", ["[5, 7]", "last2"])),
    ],
)
def test_axes(text: str, expected: Axis) -> None:
    assert parse_axis(text) == expected


@pytest.mark.parametrize("text", [
        "a", "a=", "=1", "a=1,,2", "a=1,1", "a=[1", "a=0.3,0.30", "a=[]", "a=[2020-01-01]", "seed_everything=1,2",
        "data.seed=1", "trainer.logger=x",
    ],
)  # fmt: skip
def test_bad_axes(text: str) -> None:
    with pytest.raises(ValueError, match="use KEY=VALUE|the same one twice|not a list of settings|ablate sets"):
        parse_axis(text)


# ---- files


def test_files_are_not_replaced_unasked(tmp_path: Path) -> None:
    one = [subject(tiny(), tmp_path)]
    place = tmp_path / "out"
    load(one, images(), Files(str(place), "load"))
    (place / "load_epochs.png").write_text("left by an earlier call")
    (place / "load_of_mine.csv").write_text("somebody else's")
    with pytest.raises(ValueError, match=r"load.csv, load.png, load_epochs.png exist there.*--overwrite"):
        Files(str(place), "load")
    load(one, images(), Files(str(place), "load", overwrite=True))
    assert sorted(path.name for path in place.iterdir()) == ["load.csv", "load.png", "load_of_mine.csv"]
    Files(str(place), "norms")
