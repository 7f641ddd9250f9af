"""Cut the power of an ext4 on a loop device while `featcache embed` writes, and check what is left.

    python scripts/fault_power_cut.py [--rounds 1000] [--seed 0] [--jobs 2] [--folder DIR]
    python scripts/fault_power_cut.py --seed 0 --first 471 --rounds 1    # one round again

Needs root, loop devices and mkfs.ext4; exit code 2 without. tests/faults/power_cuts.py says what a cut is and
what is checked; every tenth round is a control without syncs, which is expected to break. Exit code 1 when a
promise was broken, or when the controls lose nothing. Ctrl-C prints what was done so far. All mounts are in a
namespace of their own, which ends with the script.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from faults.power_cuts import CONTROLS, cut_rounds, why_not
from faults.rounds import LongRun, parser_of_rounds


def main() -> int:
    options = parser_of_rounds(__doc__ or "", rounds=1_000).parse_args()
    if options.folder is None and os.path.isdir("/dev/shm"):
        options.folder = "/dev/shm"  # where an image lies decides how fast it is, not what a cut loses
    reason = why_not(options.folder)
    if reason:
        print(f"power cannot be cut here: {reason}", file=sys.stderr)
        return 2
    run = LongRun(options=options, stops="cuts", say=partial(print, flush=True))
    code = run.do(cut_rounds)
    for cuts, lost in CONTROLS:
        made, broken = (
            sum(outcome.figures.get(name, 0) for outcome in run.outcomes) for name in (cuts, lost)
        )
        print(f"{lost}: {broken} of {made}")
        if made >= 10 and broken < made / 3:
            print("  too few: these cuts prove nothing")
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
