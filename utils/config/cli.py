"""Command line of training and evaluation: one table says which flag sets which config key."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from yacs.config import CfgNode

from utils.config.facts import DATASETS
from utils.config.loading import load_config, require_known_key


@dataclass(frozen=True)
class Flag:
    """A flag of the command line that sets one config key.

    Attributes:
        name: the flag.
        key: the config key.
        help: one line for ``--help``.
        metavar: what follows the flag; '' for a switch that sets the key to True.
    """

    name: str
    key: str
    help: str
    metavar: str = ""

    @property
    def dest(self) -> str:
        """Name of the flag's attribute in the parsed arguments."""
        return self.name.lstrip("-").replace("-", "_")


FLAGS = (
    Flag("--batch-size", "DATA.BATCH_SIZE", "images per process and forward pass", "N"),
    Flag("--data-path", "DATA.DATA_PATH", "folder of the data set", "DIR"),
    Flag("--dataset", "DATA.DATASET", f"data set: {', '.join(DATASETS)}", "NAME"),
    Flag("--zip", "DATA.ZIP_MODE", "read train.zip and val.zip instead of folders"),
    Flag(
        "--cache-mode",
        "DATA.CACHE_MODE",
        "with --zip, images kept in memory: none, this process's part, or all",
        "no|part|full",
    ),
    Flag("--num-workers", "DATA.NUM_WORKERS", "loader processes per process; -1 = its share of the cores", "N"),
    Flag("--pretrained", "MODEL.PRETRAINED", "checkpoint whose weights start the training", "FILE"),
    Flag("--resume", "MODEL.RESUME", "checkpoint to continue from, or to evaluate", "FILE"),
    Flag("--epochs", "TRAIN.EPOCHS", "length of the training", "N"),
    Flag("--accumulation-steps", "TRAIN.ACCUMULATION_STEPS", "forward passes per update", "N"),
    Flag("--use-checkpoint", "TRAIN.USE_CHECKPOINT", "recompute activations: less memory, more time"),
    Flag("--amp", "TRAIN.AMP", "mixed precision", "off|bf16|fp16"),
    Flag(
        "--amp-opt-level",
        "AMP_OPT_LEVEL",
        "published name of the precision: O0 = off, O1 and O2 = fp16; prefer --amp",
        "O0|O1|O2",
    ),
    Flag("--seed", "SEED", "seed of weights, order and augmentation", "N"),
    Flag("--output", "OUTPUT", "parent folder of all runs; a run writes to OUTPUT/MODEL.NAME/TAG", "DIR"),
    Flag("--tag", "TAG", "name of this run's folder", "NAME"),
    Flag("--eval", "EVAL_MODE", "evaluate the checkpoint given with --resume, then stop"),
    Flag("--throughput", "THROUGHPUT_MODE", "measure images per second, then stop"),
)


class _Parser(argparse.ArgumentParser):
    """Parser that names the nearest known flag when it meets an unknown one."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """Parse all of ``args``; whatever is left over ends the program with status 2."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown: {', '.join(self._with_hint(word) for word in unknown)}")
        return parsed

    def _with_hint(self, word: str) -> str:
        flag = word.split("=", 1)[0]
        matches = get_close_matches(flag, self._option_string_actions, n=1) if flag.startswith("-") else []
        return f"{word} (did you mean {matches[0]}?)" if matches else word


def build_parser(description: str = "") -> argparse.ArgumentParser:
    """Return a parser with the flags that training and evaluation share."""
    usage = "%(prog)s --cfg FILE [flags] [--opts KEY VALUE ...]; --help lists the flags"
    parser = _Parser(usage=usage, description=description or None, allow_abbrev=False)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="config file (.yaml)")
    parser.add_argument(
        "--opts",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY VALUE",
        help="set any config key: pairs KEY VALUE or words KEY=VALUE; a flag wins over them",
    )
    for flag in FLAGS:
        kind = {"metavar": flag.metavar} if flag.metavar else {"action": "store_true", "default": None}
        parser.add_argument(flag.name, dest=flag.dest, help=f"{flag.help} [{flag.key}]", **kind)
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="on --resume, accept that this key differs from the checkpoint's config; may be repeated",
    )
    parser.add_argument(
        "--weights",
        choices=("model", "ema"),
        help="evaluate the weights or their moving average (default: the average if the file has one)",
    )
    parser.add_argument(
        "--local_rank",
        "--local-rank",
        dest="local_rank",
        type=int,
        metavar="N",
        help="accepted because launchers pass it; the environment variable LOCAL_RANK is what counts",
    )
    return parser


def parse(
    argv: Sequence[str] | None = None, description: str = "", *, evaluation: bool = False
) -> tuple[argparse.Namespace, CfgNode]:
    """Read the command line and the configuration that it names.

    A fault of either ends the program with status 2 and a readable message.

    Args:
        argv: the words after the program's name; None takes those of this process.
        description: first line of ``--help``.
        evaluation: the program only evaluates, as if ``--eval`` were given.

    Returns:
        (parsed flags, frozen configuration); a flag that was not given is None.
    """
    parser = build_parser(description)
    args = parser.parse_args(argv)
    given = {flag.key: getattr(args, flag.dest) for flag in FLAGS}
    overrides = {key: value for key, value in given.items() if value is not None}
    if evaluation:
        overrides["EVAL_MODE"] = True
    try:
        for key in args.allow_change:
            require_known_key(key)
        config = load_config(args.cfg, args.opts, overrides)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return args, config
