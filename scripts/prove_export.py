"""Prove that exported files answer alike where there is no featcache: embed, fit, export, and read elsewhere.

    python scripts/prove_export.py DATA [--backbone NAME] [--weights random] [--images 100]

Two environments are made. One has onnxruntime, numpy and Pillow and nothing else, freshly installed. The
other sees the libraries of this one by a .pth file, to spare some gigabytes of torch, but not featcache,
which is looked for and must not be there. In each, the Python of the file's model card is run as it stands,
but for the name of the image; what it answers is compared with `featcache predict`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

ONNX_LIBRARIES = ("numpy", "onnxruntime", "pillow")
MOST_APART = 1e-4  # of a probability, where the store was embedded by the decoder `exact`

READER = """
import importlib.util, json, re, sys, warnings
warnings.simplefilter("ignore")
assert importlib.util.find_spec("featcache") is None, "featcache is here"
card, listing = sys.argv[1:]
code = re.search(r"```python\\n(.*?)```", open(card).read(), re.DOTALL)[1]
answers = []
for path in json.load(open(listing)):
    found = {}
    exec(code.replace('"image.jpg"', repr(path)), found)
    answers.append([found["label"], found["probability"]])
loaded = [name for name in ("torch", "torchvision", "timm", "onnxruntime") if name in sys.modules]
print(json.dumps({"answers": answers, "loaded": loaded, "prefix": sys.prefix}))
"""


def featcache(*arguments: object) -> str:
    command = [sys.executable, "-m", "featcache", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def plain_environment(folder: Path) -> Path:
    """The interpreter of a new environment with what an ONNX file needs."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *ONNX_LIBRARIES]
    subprocess.run(install, check=True)
    return python


def borrowing_environment(folder: Path) -> Path:
    """The interpreter of a new environment that finds the libraries installed here."""
    venv.create(folder, with_pip=False)
    own = next(folder.glob("lib/python*/site-packages"))
    # A path in a .pth file is searched, but the .pth files below it, an editable featcache, are not read.
    (own / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin" / "python"


def read_elsewhere(python: Path, card: Path, listing: Path, folder: Path) -> dict[str, Any]:
    reader = folder / "reader.py"
    reader.write_text(READER)
    ran = subprocess.run(
        [python, "-I", reader, card, listing], cwd=folder, check=True, capture_output=True, text=True
    )
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--weights", help="a file, or random")
    parser.add_argument("--head", default="logistic")
    parser.add_argument("--decoder", default="exact")
    parser.add_argument("--images", type=int, default=100)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, model = folder / "s.h5", folder / "s.model"
        weights = ["--weights", options.weights] if options.weights else []
        embed = ["embed", options.data.absolute(), "-o", store, "--backbone", options.backbone, *weights]
        featcache(*embed, "--decoder", options.decoder, "-q")
        print(featcache("fit", store, "-o", model, "--head", options.head, "-q").splitlines()[0])
        images = sorted(path for path in options.data.absolute().rglob("*.jpg"))
        chosen = [str(images[i * len(images) // options.images]) for i in range(options.images)]
        own = json.loads(featcache("predict", model, *chosen, "--json", "-q"))
        listing = folder / "listing.json"
        listing.write_text(json.dumps(chosen))
        passed = True
        for to, suffix, environment in (
            ("onnx", ".onnx", plain_environment),
            ("torchvision", ".safetensors", borrowing_environment),
        ):
            file = folder / f"model{suffix}"
            print(featcache("export", model, "--to", to, "-o", file, "-q").splitlines()[1])
            found = read_elsewhere(environment(folder / f"env-{to}"), Path(f"{file}.md"), listing, folder)
            pairs = list(zip(found["answers"], own, strict=True))
            same = sum(label == row["label"] for (label, _), row in pairs)
            apart = max(abs(p - row["probability"]) for (_, p), row in pairs)
            print(
                f"{to} without featcache, by {', '.join(found['loaded'])}: the same class for {same} of "
                f"{len(pairs)}, probabilities within {apart:.1e}"
            )
            exact = options.decoder == "exact"
            passed &= same == len(pairs) and (apart <= MOST_APART or not exact)
    print("identical" if passed else "NOT identical")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
