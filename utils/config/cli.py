"""The command line that training and evaluation share."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from yacs.config import CfgNode

from utils.config.dumping import annotate_config
from utils.config.keys import KEYS, require_known_key
from utils.config.loading import load_stored_config, load_with_sources
from utils.config.suggest import did_you_mean
from utils.errors import CheckpointError


class _Parser(argparse.ArgumentParser):
    """Parser that names the nearest known flag when it meets an unknown one, and reads ``-1e-4`` as a number."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf\b|nan\b)", re.IGNORECASE)  # no flag begins so

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """Parse all of ``args``; whatever is left over ends the program with status 2."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error("; ".join(f"unknown: {word}{self._hint(word)}" for word in unknown))
        return parsed

    def _hint(self, word: str) -> str:
        return did_you_mean(word.split("=", 1)[0], self._option_string_actions) if word.startswith("-") else ""


def build_parser(description: str = "", *, takes_checkpoint: bool = False) -> argparse.ArgumentParser:
    """Return a parser with the flags that training and evaluation share, and with CHECKPOINT if one is taken."""
    start = "(CHECKPOINT | --cfg FILE)" if takes_checkpoint else "--cfg FILE"
    usage = f"%(prog)s {start} [flags] [--opts KEY VALUE ...]; --help lists the flags"
    parser = _Parser(usage=usage, description=description or None, allow_abbrev=False)
    if takes_checkpoint:
        parser.add_argument(
            "checkpoint", nargs="?", metavar="CHECKPOINT", help="file to evaluate; it holds its own configuration"
        )
    parser.add_argument("--cfg", required=not takes_checkpoint, metavar="FILE", help="config file (.yaml)")
    parser.add_argument(
        "--opts",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY VALUE",
        help="set any key of docs/CONFIG.md: pairs KEY VALUE or words KEY=VALUE; a flag wins over them",
    )
    _add_key_flags(parser)
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="check the configuration, print it with the source of each value that is not the default, and stop",
    )
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


def _add_key_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the table of keys; what a flag is given is stored under the name of its key."""
    for key in KEYS.values():
        if not key.flag:
            continue
        flag, _, placeholder = key.flag.partition(" ")
        text = f"{key.help}: {', '.join(key.choices)}" if key.choices and placeholder else key.help
        if isinstance(key.default, bool):
            kind = {"action": "store_true", "default": None}
        else:
            kind = {"metavar": placeholder or key.allowed.strip("|")}
        parser.add_argument(flag, dest=key.name, help=f"{text} [{key.name}]", **kind)


def parse(
    argv: Sequence[str] | None = None,
    description: str = "",
    *,
    evaluation: bool = False,
    stored_config: Callable[[str], str] | None = None,
    add_flags: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
    recover: Callable[[Exception], CfgNode] | None = None,
) -> tuple[argparse.Namespace, CfgNode]:
    """Read the command line and the configuration that it names.

    An error in either ends the program with status 2 and a readable message, ``--print-config`` with status 0.

    Args:
        argv: the words after the program's name; None takes those of this process.
        description: first line of ``--help``.
        evaluation: the program only evaluates, as if ``--eval`` were given.
        stored_config: returns the configuration text in a checkpoint. Where it is given, the program takes CHECKPOINT,
            whose configuration is used unless ``--cfg`` names another.
        add_flags: adds the program's own flags to the parser.
        recover: returns what is used instead of a configuration with errors.

    Returns:
        (parsed flags, frozen configuration); a flag that was not given is None.
    """
    parser = build_parser(description, takes_checkpoint=stored_config is not None)
    add_flags(parser)
    args = parser.parse_args(argv)
    checkpoint = getattr(args, "checkpoint", None)
    if stored_config is not None:
        _require_one_source(parser, args)
    overrides = {name: value for name, value in vars(args).items() if name in KEYS and value is not None}
    overrides |= {"EVAL_MODE": True} if evaluation else {}
    overrides |= {"MODEL.RESUME": checkpoint} if checkpoint else {}
    try:
        for name in args.allow_change:
            require_known_key(name)
        if args.cfg:
            config, sources = load_with_sources(args.cfg, args.opts, overrides)
        else:
            config, sources = load_stored_config(stored_config(checkpoint), checkpoint, args.opts, overrides)
    except (ValueError, OSError, CheckpointError) as error:
        if recover is not None:
            return args, recover(error)
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if args.print_config:
        sys.stdout.write(annotate_config(config, sources))
        parser.exit()
    return args, config


def _require_one_source(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program if neither a checkpoint nor a config file is named, or two checkpoints are."""
    resume = getattr(args, "MODEL.RESUME")
    if not args.checkpoint and not args.cfg:
        alone = f"; if {resume} is a checkpoint of this project, name it without --resume" if resume else ""
        parser.error(f"name a CHECKPOINT, or a config file with --cfg{alone}")
    if args.checkpoint and resume:
        parser.error(f"CHECKPOINT {args.checkpoint} and --resume {resume}: name one file to evaluate")
