"""Let every I/O call of every kind of run fail, with every error, once and for ever, and during the recovery.

    python scripts/fault_io.py                          # every call, error, once and for ever; minutes
    python scripts/fault_io.py --pairs 5000 --seed 1    # and so many runs whose recovery fails as well
    python scripts/fault_io.py --only 'grow:EIO at 26'  # one case alone, as a violation is printed

Every case is a run with the fault, what it must have kept, and the same run without it, which must end in the
bytes of an undisturbed one. Exit code 1 on any violation.
"""

from __future__ import annotations

import argparse
import platform
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from faults.io_failures import (
    ERRORS,
    Case,
    Fault,
    Scenario,
    Workload,
    can_happen,
    numbers_of_sites,
    quick_collections,
    run_case,
)


def main() -> int:
    options = _options()
    found = Findings()
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            scenarios = Workload(Path(folder) / "work").scenarios()
            cases = list(_cases(scenarios, options))
            with quick_collections():
                for number, (scenario, faults) in enumerate(cases, 1):
                    found.add(run_case(scenario, *faults))
                    found.say_progress(number, len(cases))
    except KeyboardInterrupt:
        print("interrupted; so far:")
    found.summarise(options)
    return 1 if found.violations else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--errors", default=",".join(ERRORS), help="comma-separated; default: all")
    parser.add_argument("--scenario", action="append", help="only these, by name")
    parser.add_argument("--sites", action="store_true", help="only the first and last call of each call site")
    parser.add_argument("--pairs", type=int, default=0, help="runs whose recovery fails as well")
    parser.add_argument("--rounds", type=int, help="stop after so many cases")
    parser.add_argument("--seed", type=int, default=0, help="chooses the pairs")
    parser.add_argument("--only", help="one case: 'SCENARIO:ERROR at K' or 'from K', then ' + ' and the next")
    parser.add_argument("--folder", help="where to work; default: the system's temporary folder")
    return parser.parse_args()


def _cases(
    scenarios: Sequence[Scenario], options: argparse.Namespace
) -> Iterator[tuple[Scenario, list[Fault]]]:
    if options.only:
        yield _parse(options.only, scenarios)
        return
    chosen = [s for s in scenarios if not options.scenario or s.name in options.scenario]
    errors = options.errors.split(",")
    singles = [
        (scenario, [Fault(number, error, forever)])
        for scenario in chosen
        for number in (numbers_of_sites(scenario.calls) if options.sites else range(len(scenario.calls)))
        for error in errors
        if can_happen(error, scenario.calls[number])
        for forever in (False, True)
    ]
    yield from singles[: options.rounds]
    rng = random.Random(options.seed)
    for _ in range(options.pairs):
        scenario, faults = rng.choice(singles)
        # The recovery of a run may make more calls than the run did.
        second = Fault(rng.randrange(int(1.3 * len(scenario.calls))), rng.choice(errors), rng.random() < 0.5)
        yield scenario, [*faults, second]


def _parse(text: str, scenarios: Sequence[Scenario]) -> tuple[Scenario, list[Fault]]:
    name, _, faults = text.partition(":")
    scenario = next(s for s in scenarios if s.name == name)
    parsed = []
    for fault in faults.split(" + "):
        found = re.fullmatch(r"(.+) (at|from) (\d+)", fault.strip())
        if not found:
            raise SystemExit(f"a fault is 'ERROR at K' or 'ERROR from K', not {fault!r}")
        parsed.append(Fault(int(found[3]), found[1], found[2] == "from"))
    return scenario, parsed


class Findings:
    """What came of the cases so far."""

    def __init__(self) -> None:
        self.begun = self.said = time.monotonic()
        self.violations: list[Case] = []
        self.outcomes: Counter[str] = Counter()
        self.by_call: dict[tuple[str, str], Counter[str]] = {}
        self.by_scenario: dict[str, Counter[str]] = {}

    def add(self, case: Case) -> None:
        """Count a case; a violation is printed at once."""
        end = (
            "violations"
            if case.violations
            else "done all the same"
            if case.outcome == "succeeded"
            else "clean"
        )
        function = case.hit.name if case.hit else "none met"
        for table, key in (
            (self.by_call, (function, case.faults[0].error)),
            (self.by_scenario, case.scenario.name + (", and its recovery" if len(case.faults) > 1 else "")),
        ):
            table.setdefault(key, Counter())[end] += 1  # type: ignore[attr-defined]
        self.outcomes[case.outcome] += 1
        if case.violations:
            self.violations.append(case)
            print(f"VIOLATION --only '{case.scenario.name}:{' + '.join(map(str, case.faults))}'  {case}")
            for violation in case.violations:
                print(f"    {violation}")

    def say_progress(self, number: int, total: int) -> None:
        if time.monotonic() - self.said > 5:
            self.said = time.monotonic()
            print(
                f"{number:,} of {total:,} cases, {len(self.violations):,} violations",
                file=sys.stderr,
                flush=True,
            )

    def summarise(self, options: argparse.Namespace) -> None:
        seconds = time.monotonic() - self.begun
        ends = ("clean", "done all the same", "violations")
        heads = f"{'cases':>7} {'clean line':>11} {'done anyway':>12} {'violations':>11}"
        print(f"\n{'call':18} {'error':14} {heads}")
        for (function, error), counts in sorted(self.by_call.items()):
            print(f"{function:18} {error:14} {counts.total():7,} " + _columns(counts, ends))
        print(f"\n{'phase':33} {heads}")
        for name, counts in self.by_scenario.items():
            print(f"{name:33} {counts.total():7,} " + _columns(counts, ends))
        total = sum(self.by_scenario.values(), Counter())
        print(f"{'all':33} {total.total():7,} " + _columns(total, ends))
        print("\noutcomes: " + ", ".join(f"{name} {count:,}" for name, count in self.outcomes.most_common()))
        print(
            f"{seconds:.0f} s, seed {options.seed}, {platform.platform()}, Python {platform.python_version()}"
        )


def _columns(counts: Counter[str], ends: tuple[str, ...]) -> str:
    return " ".join(f"{counts[end]:{width},}" for end, width in zip(ends, (11, 12, 11), strict=True))


if __name__ == "__main__":
    sys.exit(main())
