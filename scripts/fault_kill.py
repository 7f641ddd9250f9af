"""Kill `featcache embed` with kill -9 at random instants, many times, and check what is left each time.

    python scripts/fault_kill.py [--rounds 10000] [--seed 0] [--jobs 2] [--folder DIR]
    python scripts/fault_kill.py --seed 0 --first 4711 --rounds 1    # one round again

A round is a chain of runs on one store, all but the last killed; tests/faults/kills.py says what is checked.
Exit code 1 when a promise was broken. Ctrl-C prints what was done so far.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from faults.kills import SABOTAGES, kill_rounds
from faults.rounds import LongRun, parser_of_rounds


def main() -> int:
    parser = parser_of_rounds(__doc__ or "", rounds=10_000)
    parser.add_argument(
        "--sabotage", choices=SABOTAGES, help="put this fault into featcache and see it found"
    )
    options = parser.parse_args()
    run = LongRun(options=options, stops="kills", say=partial(print, flush=True))
    return run.do(partial(kill_rounds, sabotage=options.sabotage))


if __name__ == "__main__":
    sys.exit(main())
