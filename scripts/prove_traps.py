"""Put each of ten known traps back into a copy of the package and see that a test fails for it.

    python scripts/prove_traps.py

A trap is an edit of one file; the tests named must pass without it and fail with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Trap:
    name: str
    file: str
    honest: str
    trapped: str
    tests: str  # files of tests/
    select: str  # pytest's -k


TRAPS = (
    Trap(
        name="1 backbone left in train mode",
        file="engines/replicas.py",
        honest="            yield network.eval()\n",
        trapped="            yield network.train()\n",
        tests="test_engines.py",
        select="train or statistics",
    ),
    Trap(
        name="2 one image and a batch pooled differently",
        file="engines/torch_eager.py",
        honest="return {key: value[:count].numpy() for key, value in vectors.items()}",
        trapped="return {k: (v[:1] - v[:1].mean() if count == 1 else v[:count]).numpy() for k, v in "
        "vectors.items()}",
        tests="test_predict.py",
        select="alone",
    ),
    Trap(
        name="3 squash instead of resize and crop",
        file="images/resize.py",
        honest="    if width <= height:\n        return shorter, int(shorter * height / width)\n"
        "    return int(shorter * width / height), shorter\n",
        trapped="    return shorter, shorter\n",
        tests="test_images_decode.py",
        select="torchvision or preset",
    ),
    Trap(
        name="4 one global mean and deviation",
        file="heads/standardize.py",
        honest="return cls(mean=np.asarray(mean), scale=np.where(constant | (scale == 0), 1.0, scale))",
        trapped="return cls(mean=np.full_like(mean, mean.mean()), scale=np.full_like(scale, scale.mean()))",
        tests="test_heads.py test_fit.py",
        select="scale or standardis",
    ),
    Trap(
        name='5 "False" is true',
        file="heads/parameters.py",
        honest="return _WORDS[text.strip().lower()]",
        trapped="return bool(text)",
        tests="test_heads.py test_fit.py",
        select="false or text or value",
    ),
    Trap(
        name="6 splits hashed on the path",
        file="fitting/rows.py",
        honest="hold_out(features.sha256[pool], features.y[pool], groups.take(pool) if groups else None)",
        trapped="hold_out(np.array([list(__import__('hashlib').sha256(features.ids[i].encode()).digest()) "
        "for i in pool], dtype=np.uint8), features.y[pool])",
        tests="test_fit.py",
        select="held_out_by_content",
    ),
    Trap(
        name="7 an HDF5 handle shared by forked workers",
        file="store/opening.py",
        honest="            return MappedFile.of(file.fileno())\n",
        trapped="            import h5py\n"
        '            globals().setdefault("_open", []).append(h5py.File(path, "r", locking=False))\n'
        "            return MappedFile.of(file.fileno())\n",
        tests="test_store.py",
        select="forked",
    ),
    Trap(
        name="8 a class missing from train but present in test",
        file="fitting/scoring.py",
        honest="            wide[:, known] = head",
        trapped="            wide[:, : len(known)] = head",
        tests="test_fit.py",
        select="only_in or without_any_training_row",
    ),
    Trap(
        name="9 a learning rate tied to the batch size",
        file="heads/minibatch.py",
        honest="            optimizer.step([",
        trapped="                optimizer.step([",
        tests="test_heads.py",
        select="batch_size",
    ),
    Trap(
        name="10 L2-normalised before storing",
        file="filling.py",
        honest='        with np.errstate(over="ignore"):\n',
        trapped="        array = array / np.linalg.norm(array, axis=1, keepdims=True)\n"
        '        with np.errstate(over="ignore"):\n',
        tests="test_embed.py",
        select="by_path",
    ),
)


def passes(package: Path, trap: Trap) -> bool:
    """Whether the trap's tests pass with the package in `package`."""
    tests = [str(ROOT / "tests" / name) for name in trap.tests.split()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *tests,
        "-k",
        trap.select,
    ]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    ran = subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True, check=False)
    if ran.returncode not in (0, 1):
        raise SystemExit(f"{trap.name}: pytest could not run\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return ran.returncode == 0


def main() -> int:
    missed = 0
    for trap in TRAPS:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "featcache")
            shutil.copytree(ROOT / "featcache", copy, ignore=shutil.ignore_patterns("__pycache__"))
            honest = passes(Path(folder), trap)
            file = copy / trap.file
            text = file.read_text()
            if text.count(trap.honest) != 1:
                raise SystemExit(f"{trap.name}: {trap.file} no longer has the line this trap replaces")
            prelude = "_open = []\n" if "_open" in trap.trapped else ""
            edited = text.replace(trap.honest, trap.trapped)
            future = "from __future__ import annotations\n"
            file.write_text(edited.replace(future, future + prelude))
            caught = honest and not passes(Path(folder), trap)
        missed += not caught
        print(f"{'caught' if caught else 'MISSED'}  {trap.name}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
