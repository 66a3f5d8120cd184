"""Run the studies of configs/studies/plan.yaml and sum up what they found.

    python tools/studies.py list                                             # each command, and whether it is done
    python tools/studies.py run 5pct --data cifar10=<folder>                 # a study; goes on where it was stopped
    python tools/studies.py keep                                             # what is needed later, to docs/results/
    python tools/studies.py tables                                           # from docs/results/ alone

A study trains some configurations with several seeds. Where it states learning rates, each configuration is first
trained once with each of them, on a part of the training images; the rest of these images choose. ``keep`` copies the
configuration, the metrics and the predictions of finished runs, small enough for the repository and in the form that
tools/compare.py and tools/seeds.py --runs read.
"""

import argparse
import json
import os
import shlex
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

import numpy as np
import yaml

from data import expanded_path
from tools import report
from tools.bench.scaling import size
from tools.common import make_folder, run_tool, write_bytes
from tools.figures import new_figure, png_bytes
from tools.measures import paired_difference
from tools.predictions import require_same_images
from tools.runs import FinishedRun, read_run
from tools.seeds import is_finished, mean_and_deviation, train
from utils.config import parse, run_folder

ROOT = Path(__file__).resolve().parents[1]
KEPT = ("epoch", "step", "lr", "train_loss", "val_loss", "val_acc1", "val_acc5", "images_per_second", "seconds")
_TIES = 2.5  # images on which the metrics and the predictions of a run may differ
RATE_SHARE = 0.2  # of the training images, on which the learning rate is chosen


@dataclass(frozen=True)
class Study:
    """One entry of the plan.

    Attributes:
        name: of the study.
        title: for people.
        data: name of the data set, of which ``--data`` gives the folder.
        configs: config files below configs/studies/, without ``.yaml``; the others are compared with the first.
        seeds: number of seeds, from 0.
        opts: keys that all runs set.
        rates: learning rates to choose from, or none.
        rates_of: the study that chose the rates of these configurations.
        rate_of: the configuration whose rate all of these take.
        pretrained: run of another study whose weights a configuration starts from, by the name of the configuration.
        tag: what the tags of its runs begin with; studies with the same tag share runs.
    """

    name: str
    title: str
    data: str
    configs: tuple[str, ...]
    seeds: int = 3
    opts: tuple[tuple[str, Any], ...] = ()
    rates: tuple[str, ...] = ()
    rates_of: str = ""
    rate_of: str = ""
    pretrained: tuple[tuple[str, str], ...] = ()
    tag: str = ""

    @property
    def prefix(self) -> str:
        """What the tags of the runs begin with."""
        return self.tag or self.name


@dataclass(frozen=True)
class Place:
    """Where things are: the plan and its configs, the data sets by name, the runs, and what is kept of them."""

    plan: Path
    data: dict[str, Path]
    output: Path
    kept: Path


@dataclass(frozen=True)
class Run:
    """One training: its study, configuration, tag, and the arguments of main.py."""

    study: Study
    config: str
    tag: str
    words: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The run's output folder, which follows from the configuration and the tag alone."""
        return run_folder(parse(self.words[: self.words.index("--opts")])[1])

    @property
    def counts(self) -> bool:
        """Whether the run is a result, of which the predictions are kept, and not a trial of a learning rate."""
        return "-rate-" not in self.tag

    @property
    def done(self) -> bool:
        """Whether the run is completed, with its predictions where they are kept."""
        reported = not self.counts or (self.folder / "report" / "predictions.npz").is_file()
        return reported and is_finished(parse(self.words)[1])


def read_plan(file: Path) -> dict[str, Study]:
    """Return the studies by name.

    Raises:
        ValueError, OSError: the file cannot be read, or an entry has unknown or missing keys.
    """
    studies = {}
    for name, entry in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        try:
            pairs = {key: tuple(entry.pop(key, {}).items()) for key in ("opts", "pretrained")}
            lists = {key: tuple(map(str, entry.pop(key, ()))) for key in ("configs", "rates")}
            studies[name] = Study(name, **pairs, **lists, **entry)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{file}: the study {name!r} is not understood: {error}") from error
    return studies


def rate_runs(study: Study, config: str, place: Place) -> dict[str, Run]:
    """Return the runs among which the learning rate of a configuration is chosen, by rate; the first seed's data."""
    opts = {"DATA.HOLDOUT": RATE_SHARE, "TEST.INTERVAL": 1000}
    images = place.data.get(study.data, Path(f"<{study.data}>")) / "train"
    return {
        rate: _run(study, config, f"rate-{rate}", images, opts | {"TRAIN.BASE_LR": rate}, place) for rate in study.rates
    }


def _run(study: Study, config: str, what: str, images: Path, opts: dict[str, Any], place: Place) -> Run:
    tag = f"{study.prefix}-{what}"
    merged = dict(study.opts) | opts
    words = ["--cfg", os.path.relpath(place.plan.parent / f"{config}.yaml"), "--data-path", str(images)]
    words += ["--output", str(place.output), "--tag", tag, "--opts"]
    return Run(study, config, tag, (*words, *(str(word) for pair in merged.items() for word in pair)))


def chosen_rate(studies: dict[str, Study], study: Study, config: str, place: Place) -> str | None:
    """Return the learning rate of a configuration, "" for the one in its file, None where none is chosen yet."""
    config = study.rate_of or config
    if study.rates_of:
        study = studies[study.rates_of]
    if not study.rates:
        return ""
    accuracies = {rate: _last_accuracy(run) for rate, run in rate_runs(study, config, place).items()}
    if None in accuracies.values():
        accuracies = _kept_rates(study, place).get(config, {})
    return max(accuracies, key=accuracies.get) if accuracies else None


def _last_accuracy(run: Run) -> float | None:
    return read_run(run.folder, run.tag).rows[-1]["val_acc1"] if run.done else None


def _kept_rates(study: Study, place: Place) -> dict[str, dict[str, float]]:
    file = place.kept / study.prefix / "rates.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def seed_runs(studies: dict[str, Study], study: Study, config: str, place: Place) -> list[Run]:
    """Return the runs of a configuration whose results count, one for each seed."""
    rate = chosen_rate(studies, study, config, place)
    opts = {} if rate == "" else {"TRAIN.BASE_LR": rate or "<chosen>"}
    images = place.data.get(study.data, Path(f"<{study.data}>"))
    runs = [_run(study, config, f"seed{seed}", images, opts | {"SEED": seed}, place) for seed in range(study.seeds)]
    source = dict(study.pretrained).get(config)
    if source:
        name, _, first = source.partition("/")
        weights = seed_runs(studies, studies[name], first, place)[0].folder / "checkpoint_last.pth"
        runs = [replace(run, words=("--pretrained", str(weights), *run.words)) for run in runs]
    return runs


def all_runs(studies: dict[str, Study], names: Sequence[str], place: Place) -> Iterator[Run]:
    """Yield the runs of some studies in the order in which they can be done."""
    for study in (studies[name] for name in names):
        for config in study.configs:
            yield from rate_runs(study, config, place).values()
    for study in (studies[name] for name in names):
        for config in study.configs:
            yield from seed_runs(studies, study, config, place)


def list_runs(studies: dict[str, Study], names: Sequence[str], place: Place) -> int:
    """Print each command, and whether it is done."""
    for run in all_runs(studies, names, place):
        known = not any(word.startswith("<") for word in run.words)
        state = "done" if known and run.done else "open"
        print(f"# {state}: {run.study.title}\npython main.py {shlex.join(run.words)}")
    return 0


def do_runs(studies: dict[str, Study], names: Sequence[str], place: Place) -> int:
    """Do what is not done; return 0, or the status of the run that failed."""
    missing = {studies[name].data for name in names} - set(place.data)
    if missing:
        raise ValueError(f"where are the images? Give --data {next(iter(missing))}=FOLDER")
    for run in all_runs(studies, names, place):
        done = run.done
        print(f"{run.config} {run.tag}{': finished before' if done else ''}", flush=True)
        if done:
            continue
        status = 0 if is_finished(parse(run.words)[1]) else train(run.words, 1)
        if not status and run.counts:  # a report from before the end would be of another checkpoint
            words = ["--data-path", str(place.data[run.study.data]), "--output", str(run.folder / "report")]
            status = report.command([str(run.folder / "checkpoint_last.pth"), *words])
        if status:
            print(f"{run.config} {run.tag} did not finish; the same command goes on with it", file=sys.stderr)
            return status
    return 0


def keep(studies: dict[str, Study], names: Sequence[str], place: Place) -> int:
    """Write what is needed of finished runs to the folder of kept results."""
    for study in (studies[name] for name in names):
        rates = _kept_rates(study, place)
        for config in study.configs:
            found = {rate: _last_accuracy(run) for rate, run in rate_runs(study, config, place).items()}
            if found and None not in found.values():
                rates[config] = found
            for run in seed_runs(studies, study, config, place):
                if not any(word.startswith("<") for word in run.words) and run.done:
                    _keep_run(run, kept_folder(place, study, config, run.tag), place)
        if rates:
            folder = make_folder(place.kept / study.prefix, "--kept")
            write_bytes(folder / "rates.json", (json.dumps(rates, indent=1) + "\n").encode())
    return 0


def kept_folder(place: Place, study: Study, config: str, tag: str) -> Path:
    """Return the folder for what is kept of a run."""
    return place.kept / study.prefix / f"{config.replace('/', '_')}-{tag.rpartition('-')[2]}"


def _keep_run(run: Run, folder: Path, place: Place) -> None:
    """Write the configuration, and the parts of metrics and predictions that statistics need.

    Raises:
        ValueError: the predictions are not those of the finished run.
    """
    finished = read_run(run.folder, run.tag)
    correct, accuracy = finished.predictions.correct, finished.rows[-1]["val_acc1"]
    if abs(correct.sum() - len(correct) * accuracy / 100) > _TIES:
        raise ValueError(
            f"{run.folder / 'report'} has {100 * correct.mean():.2f} % right, but the run ended with {accuracy:.2f} %; "
            "remove this folder, and the run command makes it anew"
        )
    make_folder(folder, "--kept")
    text = (run.folder / "config.yaml").read_text(encoding="utf-8")
    for path, name in ((place.output, "output"), *((path, name) for name, path in place.data.items())):
        text = text.replace(str(path), name)
    write_bytes(folder / "config.yaml", text.encode())
    rows = [{key: _rounded(row[key]) for key in KEPT if row.get(key) is not None} for row in finished.rows]
    write_bytes(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    found = finished.predictions
    slim = replace(
        found,
        labels=found.labels.astype(np.int16),
        top=found.top[:, :1].astype(np.int16),
        top_probability=found.top_probability[:, :1].round(1),
        label_probability=found.label_probability.round(1),
    )
    write_bytes(folder / "predictions.npz", slim.npz(zipfile.ZIP_LZMA))


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")


def kept_runs(study: Study, place: Place) -> dict[str, list[FinishedRun]]:
    """Return what is kept of a study, by configuration; those without a run are left out.

    Raises:
        ValueError: two runs were not evaluated on the same images.
    """
    found: dict[str, list[FinishedRun]] = {}
    for config in study.configs:
        folders = [kept_folder(place, study, config, f"seed{seed}") for seed in range(study.seeds)]
        runs = [read_run(folder, folder.name) for folder in folders if folder.is_dir()]
        if runs:
            found[config] = runs
    everything = [run for runs in found.values() for run in runs]
    for run in everything[1:]:
        require_same_images(everything[0].name, everything[0].predictions, run.name, run.predictions)
    return found


def table(study: Study, place: Place) -> str:
    """Return the results of a study as a table in Markdown."""
    lines = [
        "| | parameters | MACs | learning rate | seeds | top-1 (%) | difference (points), 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    runs = kept_runs(study, place)
    first = runs.get(study.configs[0], [])
    for config, own in runs.items():
        parameters, macs = size(own[0].config)
        hits = np.stack([run.predictions.correct for run in own])
        gap = ""
        if config != study.configs[0] and first:
            base = np.stack([run.predictions.correct for run in first[: len(own)]])
            difference, (low, high) = paired_difference(base, hits)
            gap = f"{100 * difference:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
        lines.append(
            f"| `{config}` | {parameters:,} | {macs / 1e6:.1f} M | {own[0].config.TRAIN.BASE_LR:g} | {len(own)} "
            f"| {mean_and_deviation([100 * share for share in hits.mean(axis=1).tolist()])} | {gap} |"
        )
    return "\n".join(lines)


def rates_table(study: Study, place: Place) -> str:
    """Return the accuracies among which the learning rates were chosen as a table in Markdown."""
    lines = [f"| | {' | '.join(study.rates)} |", "|---" * (1 + len(study.rates)) + "|"]
    for config, accuracies in _kept_rates(study, place).items():
        best = max(accuracies, key=accuracies.get)
        cells = (f"**{value:.2f}**" if rate == best else f"{value:.2f}" for rate, value in accuracies.items())
        lines.append(f"| `{config}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(runs: dict[str, list[FinishedRun]], title: str) -> bytes:
    """Return training loss and accuracy over the epochs as PNG: the mean of the seeds, in a band from least to most."""
    figure = new_figure(11, 4)
    panels = (("train_loss", "training loss (nats)"), ("val_acc1", "top-1 (%)"))
    for axes, (key, name) in zip(figure.subplots(1, 2), panels, strict=True):
        for number, (config, own) in enumerate(runs.items()):
            rows = [{row["epoch"]: row[key] for row in run.rows if row.get(key) is not None} for run in own]
            epochs = sorted(set(rows[0]).intersection(*rows))
            values = np.array([[row[epoch] for epoch in epochs] for row in rows])
            colour = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
            axes.plot(epochs, values.mean(axis=0), label=config.rpartition("/")[2], **colour)
            axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour["color"], alpha=0.2, lw=0)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))  # beside the curves
    figure.suptitle(title, parse_math=False)
    return png_bytes(figure)


def tables(studies: dict[str, Study], names: Sequence[str], place: Place, *, pictures: Path | None) -> int:
    """Print the tables of what is kept, and draw the curves into a folder."""
    for study in (studies[name] for name in names):
        runs = kept_runs(study, place)
        if not runs:
            print(f"## {study.title}\n\nnot run\n")
            continue
        print(f"## {study.title}\n\n{table(study, place)}\n")
        if study.rates:
            print(f"{rates_table(study, place)}\n")
        if pictures:
            write_bytes(make_folder(pictures, "--pictures") / f"study_{study.name}.png", curves(runs, study.title))
    return 0


def command(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args(argv)
    studies = read_plan(args.plan)
    unknown = set(args.studies) - set(studies)
    if unknown:
        raise ValueError(f"no study {sorted(unknown)[0]!r} in {args.plan}; known: {', '.join(studies)}")
    place = Place(args.plan, dict(args.data), args.output, args.kept)
    actions = {"list": list_runs, "run": do_runs, "keep": keep, "tables": partial(tables, pictures=args.pictures)}
    return actions[args.action](studies, args.studies or list(studies), place)


def named_folder(text: str) -> tuple[str, Path]:
    """Return the name and the folder of ``NAME=FOLDER``."""
    name, sign, folder = text.partition("=")
    if not (name and sign and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, expanded_path(folder)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("action", choices=("list", "run", "keep", "tables"))
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="names of the plan (all)")
    parser.add_argument(
        "--data", type=named_folder, action="append", default=[], metavar="NAME=FOLDER", help="images of a data set"
    )
    parser.add_argument("--output", type=expanded_path, default=Path("output/studies"), metavar="DIR", help="of runs")
    parser.add_argument("--kept", type=expanded_path, default=ROOT / "docs/results", metavar="DIR", help="docs/results")
    parser.add_argument("--pictures", type=expanded_path, metavar="DIR", help="draw learning curves into this folder")
    parser.add_argument("--plan", type=expanded_path, default=ROOT / "configs/studies/plan.yaml", metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(run_tool(command))
