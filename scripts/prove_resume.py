"""Prove on a real data set that a killed run loses nothing: embed once undisturbed, once killed and resumed.

    python scripts/prove_resume.py DATA [--backbone NAME] [--kills 2]

Each kill is SIGKILL at a moment spread over the run. The features of both stores must be equal byte for byte,
and no acknowledged row may be computed twice: the resumed run says how many it reused.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from featcache.store.reader import FeatureStore


def start(data: str, store: Path, backbone: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "featcache", "embed", data, "-o", str(store), "--backbone", backbone]
    return subprocess.Popen([*command, "--json", "-q"], stdout=subprocess.PIPE, text=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="where the undisturbed store is kept")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        calm, store = Path(folder, "calm.h5"), Path(folder, "killed.h5")
        begun = time.monotonic()
        out, _ = start(options.data, calm, options.backbone).communicate()
        seconds = time.monotonic() - begun
        print(f"undisturbed: {out.strip()}")
        for kill in range(options.kills):
            run = start(options.data, store, options.backbone)
            time.sleep(seconds / (options.kills + 1))
            run.kill()
            run.communicate()
            done = int(FeatureStore.open(store).done.sum())
            print(f"kill -9 number {kill + 1}: {done:,} rows are acknowledged and sound")
        out, _ = start(options.data, store, options.backbone).communicate()
        print(f"resumed: {out.strip()}")
        resumed = json.loads(out)
        a, b = FeatureStore.open(calm), FeatureStore.open(store)
        same = all(a.map(node.key).tobytes() == b.map(node.key).tobytes() for node in a.spec.nodes)
        kept = resumed["reused"] + resumed["failed"] >= done
        print(f"features byte-identical: {same}; every acknowledged row kept: {kept}")
        if options.keep:
            calm.rename(options.keep)
    return 0 if same and kept else 1


if __name__ == "__main__":
    sys.exit(main())
