"""Show what is installed, what each back end lacks, and what mends it: the command `qwen-model doctor`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from .command_line import number_above_zero, run_command


def main(arguments: list[str] | None = None) -> None:
    """Print the installation as text or as one JSON object; exit with 1 if no back end can run or build."""
    options = make_parser().parse_args(arguments)

    from .diagnosis.installation import examine
    from .diagnosis.report import text

    installation = examine(options.timeout)
    print(json.dumps(asdict(installation), indent=1) if options.json else text(installation))
    if not installation.can_run:
        sys.stdout.flush()
        sys.exit(1)


def make_parser() -> argparse.ArgumentParser:
    """Describe the command's options."""
    description = "Show what is installed, what each back end lacks, and the command that mends it."
    parser = argparse.ArgumentParser(
        prog="qwen-model doctor",
        description=description,
        epilog="The exit status is 0 if any back end can run or build engines, else 1.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--timeout",
        type=number_above_zero,
        default=90.0,
        metavar="SECONDS",
        help="give up what takes longer, such as an import that never ends (default: %(default)g)",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
