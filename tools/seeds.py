"""Train one configuration with several seeds and summarise the runs, or summarise runs that are finished.

    python tools/seeds.py --seeds 5 --cfg configs/<leaf>.yaml --data-path <folder> [flags of main.py]
    python tools/seeds.py --runs output/tiny/a output/tiny/b output/tiny/c

The runs follow each other, with seeds 0, 1, ... (from ``--first-seed``) in the folders TAG-seed0, TAG-seed1, ... The
same command goes on where it was stopped. The result is one row of a table: mean and standard deviation of the accuracy
after the last epoch, and of the best epoch, which was chosen on the set that it is reported on.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from yacs.config import CfgNode

from data import expanded_path
from tools.common import run_tool, whole_number
from tools.runs import FinishedRun, read_run, short_names
from utils.config import config_differences, parse, parse_config, recipe_differences, run_folder

MAIN = Path(__file__).resolve().parents[1] / "main.py"
OWN_KEYS = {"SEED", "TAG", "EVAL_MODE", "THROUGHPUT_MODE"}  # in which runs of one recipe may differ


def is_finished(config: CfgNode) -> bool:
    """Return whether the run of a configuration is completed, with this recipe."""
    folder = run_folder(config)
    try:
        state = json.loads((folder / "status.json").read_text(encoding="utf-8"))["state"]
        stored = parse_config((folder / "config.yaml").read_text(encoding="utf-8"), str(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False  # main.py decides what to do with the folder, and reports what is wrong with it
    return state == "completed" and not recipe_differences(stored, config)


def train(words: Sequence[str], processes: int) -> int:
    """Run main.py and return its exit status; a signal to stop reaches it, and it saves."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    program = subprocess.Popen([sys.executable, *launcher, str(MAIN), *words])

    def pass_on(number: int, _frame: object) -> None:
        if number != signal.SIGINT:  # the terminal sends Ctrl-C to both
            program.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return program.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_all(words: Sequence[str], seeds: Sequence[int], processes: int) -> tuple[list[Path], int]:
    """Train with each seed that is not finished; return the folders, and 0 or the status of the one that failed."""
    tag = parse(words)[1].TAG
    folders = []
    for number, seed in enumerate(seeds, start=1):
        own = [*words, "--seed", str(seed), "--tag", f"{tag}-seed{seed}"]
        config = parse(own)[1]
        folders.append(run_folder(config))
        done = is_finished(config)
        print(f"seed {seed} ({number} of {len(seeds)}): {folders[-1]}{', finished before' if done else ''}", flush=True)
        status = 0 if done else train(own, processes)
        if status or not is_finished(config):
            print(f"the run with seed {seed} did not finish; the same command goes on with it", file=sys.stderr)
            return folders, status or 1
    return folders, 0


def summary_table(runs: Sequence[FinishedRun]) -> str:
    """Return a table in Markdown, with one row that sums up the runs.

    Raises:
        ValueError: a run is not finished, or was not evaluated after its last epoch.
    """
    last, best = [], []
    for run in runs:
        epochs = run.config.TRAIN.EPOCHS
        accuracies = {row["epoch"]: row["val_acc1"] for row in run.rows if row.get("val_acc1") is not None}
        if epochs not in accuracies:
            raise ValueError(f"{run.name} is not finished: no accuracy of epoch {epochs} in its metrics.jsonl")
        last.append(accuracies[epochs])
        best.append(max(accuracies.values()))
    seeds = ", ".join(str(run.config.SEED) for run in runs)
    return (
        "| config | data set | runs | seeds | top-1 last epoch (%) | top-1 best epoch (%)* |\n"
        "|---|---|---|---|---|---|\n"
        f"| {runs[0].config.MODEL.NAME} | {runs[0].config.DATA.DATASET} | {len(runs)} | {seeds} "
        f"| {mean_and_deviation(last)} | {mean_and_deviation(best)} |\n\n"
        "Mean ± sample standard deviation. * The best epoch was chosen on the set that it is reported on."
    )


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return ``mean ± sample standard deviation``; a single value has no deviation."""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def command(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = build_parser()
    args, words = parser.parse_known_args(argv)
    if bool(args.runs) == bool(args.seeds) or (args.runs and words):
        parser.error("give --seeds N with --cfg FILE and other flags of main.py, or --runs RUN ... alone")
    if any(word.partition("=")[0] == "--seed" for word in words):
        parser.error("--seed is given by --seeds and --first-seed; leave it out")
    folders = args.runs
    if args.seeds:
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        folders, status = train_all(words, seeds, args.processes)
        if status:
            return status
    runs = [read_run(*pair) for pair in zip(folders, short_names(folders), strict=True)]
    other = {key for run in runs for key in config_differences(runs[0].config, run.config)} - OWN_KEYS
    if other:
        print(f"warning: the runs differ in more than the seed: {', '.join(sorted(other))}", file=sys.stderr)
    print(summary_table(runs))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=whole_number(1, 1000), metavar="N", help="number of runs")
    parser.add_argument(
        "--first-seed", type=whole_number(0, 2**31 - 1000), default=0, metavar="N", help="seed of the first run (0)"
    )
    parser.add_argument(
        "--processes", type=whole_number(1, 1024), default=1, metavar="N", help="processes (GPUs) of each run (1)"
    )
    parser.add_argument("--runs", nargs="+", type=expanded_path, metavar="RUN", help="output folders to summarise")
    return parser


if __name__ == "__main__":
    sys.exit(run_tool(command))
