"""Fine-tuning beside the PyTorch transfer-learning tutorial, from a random head, and without a cache.

    python scripts/bench_finetune.py hymenoptera FOLDER [--backbone efficientnet_lite0] [--epochs 25]
        [--only probe --only tail --only full --only fixed --only whole] [--unfreeze last:4]
    python scripts/bench_finetune.py heads FOLDER [--per-class 600] [--seeds 3] [--epochs 5]
    python scripts/bench_finetune.py cache FOLDER [--unfreeze last:4] [--epochs 3]

hymenoptera: the tutorial's two recipes of 25 epochs on the same backbone (fixed: a frozen network in training
mode with a new last layer; whole: all of it trained): SGD at 0.001 with momentum 0.9, divided by ten every 7
epochs, batches of 4, random resized crops and flips, the best epoch on val kept. featcache: probe is embed,
then fit; tail and full begin from there and choose on about a fifth of the training rows. All are scored on
val, from which the tutorial alone chooses. heads: fine-tuning of the blocks from --unfreeze on, from a fitted
head and from a random one, on so many training images a class; "tuned" is the share of the trained weights
that was kept, which from a random head is always all of them, and differences to the probe are on the same
rows. cache: seconds an epoch with cached activations and without. --setting KEY=VALUE, repeatable, is for
finetune.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from featcache.backbones import load_backbone
from featcache.commands.embed import embed
from featcache.commands.finetune import FinetuneResult, finetune
from featcache.commands.fit import fit
from featcache.progress import LogProgress, Progress, SilentProgress


def tutorial(folder: Path, backbone: str, *, epochs: int, whole: bool) -> float:
    """The best accuracy on val of the tutorial's recipe, as it reports it."""
    torch.manual_seed(0)
    made = load_backbone(backbone)
    pre = made.preprocessing
    mode = InterpolationMode(pre.interpolation)
    end = [transforms.ToTensor(), transforms.Normalize(pre.mean, pre.std)]
    crop = transforms.RandomResizedCrop(pre.crop_size, interpolation=mode)
    ways = {
        "train": [crop, transforms.RandomHorizontalFlip(), *end],
        "val": [transforms.Resize(pre.resize_size, mode), transforms.CenterCrop(pre.crop_size), *end],
    }
    sets = {
        split: datasets.ImageFolder(str(folder / split), transforms.Compose(way))
        for split, way in ways.items()
    }
    loaders = {
        split: torch.utils.data.DataLoader(images, batch_size=4, shuffle=True, num_workers=4)
        for split, images in sets.items()
    }
    with torch.no_grad():
        width = made.module(torch.zeros(1, 3, pre.crop_size, pre.crop_size)).shape[1]
    head = nn.Linear(width, len(sets["train"].classes))
    made.module.requires_grad_(whole)
    model = nn.Sequential(made.module, head)
    optimizer = torch.optim.SGD((model if whole else head).parameters(), lr=0.001, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    best, kept = 0.0, copy.deepcopy(model.state_dict())
    for _ in range(epochs):
        for split, loader in loaders.items():
            model.train(split == "train")
            right = 0
            for images, labels in loader:
                optimizer.zero_grad()
                with torch.set_grad_enabled(split == "train"):
                    scores = model(images)
                    loss = nn.functional.cross_entropy(scores, labels)
                if split == "train":
                    loss.backward()
                    optimizer.step()
                right += int((scores.argmax(1) == labels).sum())
            if split == "train":
                schedule.step()
        accuracy = right / len(sets["val"])
        if accuracy > best:
            best, kept = accuracy, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return best


class Bench:
    """A folder of its own for stores and models, and what all runs have in common."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.progress: Progress = LogProgress() if options.verbose else SilentProgress()

    def probe(self, folder: Path) -> float:
        """Embed and fit; the model is `self.model`."""
        store = self.work / "probe.h5"
        embed(folder, store, backbone=self.options.backbone, progress=self.progress)
        found = fit(store, self.model, head="logistic")
        return found.metrics.accuracy

    @property
    def model(self) -> Path:
        return self.work / "probe.model"

    def finetune(self, folder: Path, name: str, **options: Any) -> FinetuneResult:
        given = {key: value for key, _, value in (text.partition("=") for text in self.options.setting)}
        settings = {key: _number(value) for key, value in given.items()}
        output = self.work / f"{name}.model"
        return finetune(
            self.model, folder, output, progress=self.progress, restart=True, **{**settings, **options}
        )


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    found = work()
    return time.perf_counter() - begun, found


def hymenoptera(bench: Bench) -> None:
    options, folder = bench.options, bench.options.folder
    print(f"{'':>14}  {'accuracy':>8}  {'seconds':>8}")
    probe_seconds, accuracy = timed(lambda: bench.probe(folder))
    wanted = options.only or ["probe", "tail", "full", "fixed", "whole"]
    if "probe" in wanted:
        print(f"{'probe':>14}  {accuracy:8.4f}  {probe_seconds:8.1f}")
    for name, unfreeze in (("tail", options.unfreeze), ("full", "all")):
        if name in wanted:
            seconds, found = timed(
                lambda name=name, unfreeze=unfreeze: bench.finetune(
                    folder, name, unfreeze=unfreeze, epochs=options.epochs
                )
            )
            said = "the probe kept" if found.probe_kept else f"{found.alpha:.0%} tuned"
            print(
                f"{name:>14}  {found.metrics.accuracy:8.4f}  {seconds:8.1f}  + the probe; {said}, "
                f"{found.epochs} epochs, {found.why_ended}",
                flush=True,
            )
    for name, whole in (("fixed", False), ("whole", True)):
        if name in wanted:
            seconds, accuracy = timed(
                lambda whole=whole: tutorial(folder, options.backbone, epochs=options.epochs, whole=whole)
            )
            print(f"{'tutorial ' + name:>14}  {accuracy:8.4f}  {seconds:8.1f}", flush=True)


def subset(folder: Path, target: Path, *, per_class: int, per_test_class: int) -> Path:
    """Copies of the first images of each class, unless they are there."""
    if target.exists():
        return target
    for split, count in (("train", per_class), ("test", per_test_class)):
        for kind in sorted((folder / split).iterdir()):
            (target / split / kind.name).mkdir(parents=True)
            for image in sorted(kind.iterdir())[:count]:
                shutil.copyfile(image, target / split / kind.name / image.name)
    return target


def heads(bench: Bench) -> None:
    options = bench.options
    folder = subset(
        options.folder,
        bench.work / "images",
        per_class=options.per_class,
        per_test_class=options.per_test_class,
    )
    print(f"probe: {bench.probe(folder):.4f} on test")
    print(
        f"{'head':>8}  {'test accuracy':>16}  {'by seed':>24}  {'tuned by seed':>15}  {'loss in epoch 1':>15}"
    )
    for start in ("refit", "random"):
        runs = [
            bench.finetune(
                folder, start, unfreeze=options.unfreeze, start=start, seed=seed, epochs=options.epochs
            )
            for seed in range(options.seeds)
        ]
        accuracies = [found.metrics.accuracy for found in runs if found.metrics]
        losses = [statistics.fmean(found.losses[: len(found.losses) // found.epochs]) for found in runs]
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        by_seed = " ".join(f"{accuracy:.4f}" for accuracy in accuracies)
        tuned = " ".join(f"{found.alpha:.0%}" for found in runs)
        mean = f"{statistics.fmean(accuracies):.4f} ± {spread:.4f}"
        print(
            f"{start:>8}  {mean:>16}  {by_seed:>24}  {tuned:>15}  {statistics.fmean(losses):>15.3f}",
            flush=True,
        )
        for seed, found in enumerate(runs):
            compared = found.comparison and found.comparison.difference
            said = compared.describe() if compared else "the probe kept"
            print(f"{'':>8}  seed {seed} against the probe: {said}", flush=True)


def cache(bench: Bench) -> None:
    options, folder = bench.options, bench.options.folder
    bench.probe(folder)
    seconds = {}
    for cached in ("yes", "no"):
        found = bench.finetune(
            folder, f"cache-{cached}", unfreeze=options.unfreeze, epochs=options.epochs, cache=cached,
            patience=options.epochs,
        )  # fmt: skip
        rows = (bench.work / f"cache-{cached}.model.curve.csv").read_text().splitlines()
        seconds[cached] = float(rows[-1].rpartition(",")[2]) / found.epochs
        print(
            f"cache {cached:>3}: {seconds[cached]:.2f} s an epoch of {found.n_train:,} rows, "
            f"{found.seconds:.1f} s in all",
            flush=True,
        )
    print(f"an epoch without takes {seconds['no'] / seconds['yes']:.1f} times as long")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["hymenoptera", "heads", "cache"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--unfreeze", default="last:4")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--per-class", type=int, default=600)
    parser.add_argument("--per-test-class", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append")
    parser.add_argument("--setting", action="append", default=[], metavar="KEY=VALUE", help="of finetune")
    parser.add_argument("--work", type=Path, help="where stores and models stay; by default they go")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    run = {"hymenoptera": hymenoptera, "heads": heads, "cache": cache}[options.what]
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
        run(Bench(options, options.work))
        return
    with tempfile.TemporaryDirectory() as work:
        run(Bench(options, Path(work)))


if __name__ == "__main__":
    main()
