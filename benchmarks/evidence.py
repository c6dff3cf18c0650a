"""Does momentum across depth help a sparse ViT? The protocol, written before the first run, and what runs it.

    vmoe-momentum data prepare idx --out data/fashion            # once; Debian's dataset-fashion-mnist
    python benchmarks/evidence.py                                # all that is left; stop and start it at any time
    python benchmarks/evidence.py --processes 2                  # the same on two cores
    python benchmarks/evidence.py --list                         # what is left, and for how long
    python benchmarks/evidence.py --arm heavy_ball_07 --seed 0   # one run once more, held against its committed row
    python benchmarks/evidence.py --pictures                     # pictures and page from the rows alone
    python benchmarks/evidence.py --parts '[small]' --processes 4   # on a GPU

PROTOCOL

Network and data. configs/fashion.yaml: a V-MoE of width 64 and 8 blocks, 4 experts (K 2) in every odd one, 17 tokens;
Fashion-MNIST, 60,000 pictures to train on, 10,000 held out. No arm, checkpoint or threshold is chosen by the held-out
pictures: the last weights count, and no setting of the recipe is changed for any arm. The recipe itself was chosen by
them before the first run, among nine tries of Residual with one seed, seven of them of one epoch (batch, rate, pooling,
position embedding); that can favour Residual, and makes the level of all accuracies a little too good.

Arms (evidence_arms.py has their settings).
  Main, five seeds, the recipe's epochs: residual, heavy_ball_07, heavy_ball_09, adam, robust (L 1, m 0.25, r 0.6: the
  paper gives no constants for vision) and robust_released (L 1, m 0.8, r 0.2), each also as ..._norm with a norm behind
  the MLP's residual of every block (the robust ones then look ahead behind the norm, as the authors' code does);
  dense, a ViT of equal active FLOPs.
  Controls, five seeds: heavy_ball_07_small_step and heavy_ball_09_small_step with gamma = 1 - mu, the total step of
  residual; residual_step_of_07 and residual_step_of_09 with gamma = 1 / (1 - mu), the total step of heavy ball;
  residual_norm, the norm without momentum; heavy_ball_07_dense_blocks, momentum in the MLPs of dense blocks, too.
  Further, three seeds: heavy_ball_05, heavy_ball_learned, nesterov, complex (phi pi/8).
  Margin, three seeds, 200 steps of 64 pictures: residual, heavy_ball_07, heavy_ball_09 and complex with gamma 0.5, 1,
  1.5, 2, 2.5, 3 and 4.
  Depth, three seeds, 300 steps of 64 pictures: residual and heavy_ball_07, without and with the norm, of 8, 16, 32
  and 56 blocks.
  Small, five seeds, on a GPU: small_residual, small_residual_norm, small_heavy_ball_07 and small_heavy_ball_09_norm,
  the authors' network V-MoE-S/32, every 2, 8 experts, in its own shapes (49 patches, width 512), on the same pictures:
  configs/fashion_small.yaml, 3 epochs, bfloat16 autocast; measured as the main arms, in float32 (eigenvalues of 2
  tokens a block). This part was added on 2026-11-27, before any run of it, when 57 runs of the others were there; its
  recipe was written down untried.

Pairs. Runs of one seed share initial weights (all that both networks have) and the order and flips of pictures.
Runs are made seed by seed, all arms of seed 0 first, so that every interruption leaves a balanced table.

Questions, each a paired difference over seeds, arm minus control.
  On clean top-1 of the 10,000 held-out pictures, and on mean top-1 over the 15 x 5 corruptions of ImageNet-C (the
  parameters for small pictures) of 300 of them, fixed ids:
   1 heavy_ball_07 - residual               momentum as the paper writes it
   2 heavy_ball_07_norm - residual_norm     the same behind the norm
   3 heavy_ball_09_norm - residual_norm     the authors' vision setting
   4 residual_norm - residual               the norm without momentum
   5 adam - residual
   6 robust - residual                      the paper's form
   7 robust_released_norm - residual_norm   the released form
   8 heavy_ball_07 - residual_step_of_07    momentum or a larger step: equal total steps of 1 / (1 - 0.7)
   9 heavy_ball_07_small_step - residual    the same with total steps of 1
  10 heavy_ball_07_dense_blocks - heavy_ball_07
  On the mechanism:
  11 heavy_ball_07 - residual in clean top-1, at 56 blocks minus at 8
  12 heavy_ball_07_norm - residual_norm in clean top-1, at 56 blocks minus at 8
  13 heavy_ball_07 - residual, the largest gamma borne
  14 heavy_ball_09 - residual, the largest gamma borne
  On the small part, in clean top-1 and over the corruptions:
  15 small_heavy_ball_07 - small_residual                as 1
  16 small_heavy_ball_09_norm - small_residual_norm      as 3
  17 small_residual_norm - small_residual                as 4
  A rule bears a gamma of the grid if there, and at all gammas from 1 up to it, its run stays finite and loses no more
  than 5 points of top-1 against its own run with gamma 1 and the same seed. At most 4, the end of the grid. A spread
  over seeds below what rounding to the grid makes (0.5 / sqrt 6) counts as that: three equal values are no certainty.

Test. The paired t test (df = seeds - 1), two-sided; Holm at 5 % over the ten questions of each of the two measures,
over the four on the mechanism, and over the three of each of the two measures on the small part: five families. Each
question has the t interval at its own step in Holm's order, which leaves out 0 exactly where that step's test does; a
question counts as shown only if all steps before it are, too. Beside it stands the percentile bootstrap over seeds at
the same level (10,000 draws, seed 0), which is known to be too narrow for five seeds: where the two disagree about 0
the page says so, and the t test holds.
  gain         Holm rejects 0, and the mean difference is at least 0.5 points (clean), 1 point (corrupted), 0.5 points
               (depth) or 0.5 (gamma)
  loss         the same downwards
  small        Holm rejects 0, but the mean difference is less than that
  no gain or loss that counts   Holm does not, and the interval lies within plus or minus that difference
  undecided    anything else
Other measures and arms are shown with plain 95 % t intervals, unadjusted, and no verdict: negative log-likelihood,
calibration (ECE, 15 bins), PGD-20 on 150 and Square (100 queries) on 60 of the held-out pictures at eps 2/255 and
8/255 (28 px grey: at 8 an undefended network should fall, at 2 stand in part), epochs to 85, 88 and 90 %, expert load
(CV, entropy), load by output norm, routing change under noise of 16/255, share of eigenvalues inside each region.

Smallest difference that could be shown, with power 80 % in units of the standard deviation of the paired difference
over seeds: five seeds 1.7 for one question and 3.2 at Holm's first step over ten; three seeds 3.3, and 6.5 at the first
step over four. The page has it in points, from the deviations found.

Divergence. A run whose loss, gradients or answers become not finite is a row, with `diverged` saying where. It counts
as top-1 of 10 %, chance, in clean and corrupted top-1, and has no other measures; pairs with one are left out there.
No run is excluded or repeated for what it gave.

Stopping. When every cell is there, or the time is up; verdicts are given only for questions all of whose seeds are
there, and the page names the cells that are missing. Nobody chooses an arm, a measure or a threshold after this. What
was done otherwise than written here, the page lists under "Deviations".

A GPU's sums come in another order each time: there a run made once more gives other digits.

Time, estimated from CPU seconds of one thread on two busy cores: 600 for a main run (some 75 of them for measures),
48 for margin, 62 for depth, there times blocks over 8: 234 runs without the part small, 21 hours of one core, about
ten of two.
"""

import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import jsonargparse
import torch
from evidence_arms import ON_GPU, PARTS, Cell, cells, guess
from evidence_measures import forget, make_corrupted
from evidence_rows import AGAIN, CODE, REPEATED, ROOT, Row, add_row, provenance, read_rows
from evidence_runs import name_of, run_cell
from rich.console import Console
from rich.table import Table

from vmoe_momentum import cli
from vmoe_momentum.progress import Meter, Work
from vmoe_momentum.robustness.claims import Claims
from vmoe_momentum.stopping import Stopped, stoppable

RESULTS = ROOT / "benchmarks" / "results" / "evidence"


def main(
    parts: list[str] | None = None,
    arm: str | None = None,
    seed: int | None = None,
    processes: int = 1,
    list: bool = False,
    pictures: bool = False,
    data: str = "data/fashion",
    results: str = str(RESULTS),
    out: str = "runs/evidence",
    fit: list[str] | None = None,
    commit: str | None = None,
) -> None:
    """Run what the rows lack, then draw pictures and page from them.

    Args:
        parts: Some of main, margin, depth and small; default all but the last, which wants a GPU.
        arm: This one only. With a seed whose row is there: run it once more and hold it against the row.
        seed: This one only.
        processes: That share the runs, one thread each. Others may be started by hand at any time. 0: a helper, which
            draws nothing at the end.
        list: Say what is left, and for how long; run nothing.
        pictures: Draw pictures and page from the rows alone.
        data: Where the prepared pictures are.
        results: Folder of rows.csv, pictures and page.
        out: Folder for logs and checkpoints of runs, about 6 MB each.
        fit: More options of fit for all runs: for trying things, not with the committed rows.
        commit: Of the code, for the rows; where this is a copy without git's history.
    """
    folder, wanted = Path(results), cells(parts, arm, seed)
    rows = read_rows(folder / "rows.csv")
    done = {(row["arm"], row["seed"]) for row in rows}
    left = [cell for cell in wanted if (cell.arm.name, str(cell.seed)) not in done]
    if list:
        return show_left(left, len(wanted), rows)
    if pictures:
        return write_page(rows, folder)
    if fit and folder.resolve() == RESULTS:
        raise ValueError(f"--fit={fit}: other runs than the protocol's have no place among its rows; give --results")
    if not Path(data).is_dir():
        raise FileNotFoundError(f"--data={data}: no such folder; vmoe-momentum data prepare idx --out {data}")
    again = not left and arm is not None and seed is not None
    on_gpu = any(cell.arm.part in ON_GPU for cell in (wanted if again else left))
    if on_gpu and not torch.cuda.is_available() and not fit:
        raise ValueError("--parts=[small]: torch finds no GPU here; leave it out")
    if again:
        return repeat(wanted[0], rows, folder, Path(data), Path(out), fit or [])
    if not left:
        Console(stderr=True).print(f"all {len(wanted)} runs are there", highlight=False)
        return write_page(rows, folder) if processes else None
    made = provenance(commit)
    if folder.resolve() == RESULTS and made["revision"].endswith("+"):
        raise ValueError(f"{', '.join(CODE)}: changed since the last commit; commit first, as rows name their code")
    helpers = [subprocess.Popen([sys.executable, *sys.argv, "--processes=0"]) for _ in range(processes - 1)]
    try:
        run_left(left, folder / "rows.csv", Path(data), Path(out), made, fit or [])
    except BaseException:
        for helper in helpers:
            helper.terminate()
        raise
    finally:
        codes = [helper.wait() for helper in helpers]
    if any(codes):
        raise ValueError(f"--processes={processes}: one of them ended with {max(codes, key=abs)}; see above")
    if processes:
        write_page(read_rows(folder / "rows.csv"), folder)


def write_page(rows: list[Row], folder: Path) -> None:
    from evidence_page import write_page  # needs statsmodels, which runs do not

    write_page(rows, read_rows(folder / "repeats.csv", AGAIN), folder)


def run_left(left: list[Cell], path: Path, data: Path, out: Path, made: Row, extra: list[str]) -> None:
    """Those that no other process has claimed, a row each as soon as it is there."""
    corrupted = out / "corrupted"
    with Claims(out) as claims:
        claims.wait_for("corrupted", seconds=3600)
        make_corrupted(data, corrupted)
        claims.give_back("corrupted")
        estimates = seconds_of(read_rows(path))
        work = Work((cell.arm.part, estimate(cell, estimates)) for cell in left)
        with Meter("evidence", work, file=sys.stderr) as meter:
            for cell in left:
                meter.tell(name_of(cell))
                cost = estimate(cell, estimates)
                if not claims.take(name_of(cell)):
                    meter.help(cell.arm.part, cost)
                    continue
                if any((row["arm"], row["seed"]) == (cell.arm.name, str(cell.seed)) for row in read_rows(path)):
                    meter.help(cell.arm.part, cost)
                    continue
                row = run_cell(cell, data, corrupted, out, made, extra)
                claims.wait_for("rows", seconds=600)
                add_row(path, row, cells([*PARTS]))
                claims.give_back("rows")
                forget(out / name_of(cell) / "measures")
                meter.advance(cell.arm.part, cost)
                meter.say(f"{name_of(cell)}: top-1 {row['top1'] or row['diverged']}, {row['seconds']} s")


def repeat(cell: Cell, rows: list[Row], results: Path, data: Path, out: Path, extra: list[str]) -> None:
    """From the start, in a folder of its own; a row of repeats.csv. Raises ValueError: it gave something else."""
    (old,) = [row for row in rows if (row["arm"], row["seed"]) == (cell.arm.name, str(cell.seed))]
    folder = out / "again"
    shutil.rmtree(folder / name_of(cell), ignore_errors=True)
    with Claims(out) as claims:
        claims.wait_for("corrupted", seconds=3600)
        make_corrupted(data, out / "corrupted")
    row = run_cell(cell, data, out / "corrupted", folder, provenance(), extra)
    table = Table(title=f"{name_of(cell)}: the committed row, and this run")
    for column in ("", "committed", "now"):
        table.add_column(column)
    for name in (*REPEATED, "seconds", "machine", "torch", "revision"):
        if old[name] or row[name]:
            table.add_row(name, old[name], row[name] + ("" if old[name] == row[name] else "   differs"))
    Console().print(table)
    add_row(results / "repeats.csv", row, cells([*PARTS]), AGAIN)
    other = [name for name in REPEATED if old[name] != row[name]]
    if other:
        raise ValueError(f"{', '.join(other)}: other than in the row; machine, torch and revision above may say why")
    Console().print("the same to the last digit")


def seconds_of(rows: list[Row]) -> dict[tuple[str, str], float]:
    """Median by part and depth, of one thread's time, which pauses and busy machines leave as it is."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["part"], row["depth"]), []).append(float(row["cpu_seconds"]))
    return {key: statistics.median(values) for key, values in found.items()}


def estimate(cell: Cell, known: dict[tuple[str, str], float]) -> float:
    return known.get((cell.arm.part, str(cell.arm.depth)), guess(cell.arm))


def show_left(left: list[Cell], wanted: int, rows: list[Row]) -> None:
    known, console = seconds_of(rows), Console()
    for number in sorted({cell.seed for cell in left}):
        names = [cell.arm.name for cell in left if cell.seed == number]
        console.print(f"[bold]seed {number}[/bold]  {', '.join(names)}", highlight=False)
    hours = sum(estimate(cell, known) for cell in left) / 3600
    console.print(
        f"{len(left)} of {wanted} runs are left, about {hours:.1f} hours of one process, {hours / 2:.1f} of two on two "
        "cores", highlight=False,
    )  # fmt: skip


if __name__ == "__main__":
    cli.quieten()
    try:
        with stoppable():
            flags = ("--list", "--pictures")
            jsonargparse.auto_cli(main, args=[word + "=true" * (word in flags) for word in sys.argv[1:]])
    except Stopped:
        print("stopped; the same command goes on with what is left", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"evidence: {error}") from None
