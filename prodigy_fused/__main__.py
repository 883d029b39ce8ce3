"""The command ``python -m prodigy_fused``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .report import report
from .run import run

HELP = """python -m prodigy_fused
    prints versions, devices and backends, and what would be chosen for a parameter and why: for bug reports

python -m prodigy_fused run script.py [its arguments]
python -m prodigy_fused run -m module [its arguments]
    runs a script that uses prodigyopt, unchanged, with prodigy_fused in its place, there and in the processes that it
    starts; under a launcher: torchrun -m prodigy_fused run script.py, accelerate launch -m prodigy_fused run script.py
"""


def main(arguments: Sequence[str]) -> None:
    """Does what the command line says.

    Raises:
        SystemExit: status 2, after one line to stderr, if it says nothing known; or the script's own.
    """
    if not arguments:
        print(report())
    elif arguments[0] in ("-h", "--help") or list(arguments[:2]) in (["run", "-h"], ["run", "--help"]):
        print(HELP, end="")
    elif arguments[0] == "run":
        run(arguments[1:])
    else:
        print(f"prodigy_fused: unknown command {arguments[0]}: see python -m prodigy_fused --help", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
