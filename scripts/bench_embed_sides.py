"""One turn of one side of `bench_embed.py`, in a process of its own: `bench_embed_sides.py SIDE JSON`.

The last line printed is a JSON object. Every side reads the same weights and, but for the peers that have a
preprocessing of their own, resizes alike. The sides of others import nothing of featcache: they run in the
interpreter that has them installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from bench_embed_limit import decoding_seconds, image_paths, measure

Job = dict[str, Any]
WORKERS = (0, 1, 2, 4)  # of the DataLoader
LIST = 32  # images handed at a time to a peer that takes a list


def result(seconds: float, paths: Sequence[str], vectors: Any, job: Job) -> Job:
    """What a side that embeds has to say; its vectors go into a file, in the order of `paths`."""
    vectors = np.asarray(vectors, dtype=np.float32).reshape(len(paths), -1)
    names = [os.path.relpath(path, job["folder"]) for path in paths]
    np.savez(job["vectors"], names=names, vectors=vectors)
    return {"images_per_second": len(paths) / seconds}


# The weights that all sides load, and the words each wants for them.


def prepare(job: Job) -> Job:
    """Write the weights of a network where every side looks for them; say how it is preprocessed."""
    import torch
    from torchvision import models

    from featcache.backbones import load_backbone

    folder = Path(job["weights"])
    checkpoints = folder / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    name = job["name"].partition("@")[0]
    if job["torchvision"]:
        torch.manual_seed(0)
        whole = models.get_model(name, weights=None).state_dict()
        file = folder / f"{name}.pth"
        torch.save(whole, file)
        for entry in models.get_model_weights(name):  # torch.hub takes what it finds under the file's name
            (checkpoints / entry.url.rpartition("/")[2]).unlink(missing_ok=True)
            os.link(file, checkpoints / entry.url.rpartition("/")[2])
        backbone = load_backbone(job["name"], weights=str(file))
    else:
        backbone = load_backbone(job["name"])
        whole = backbone.module.state_dict()
        file = Path(backbone.weights.path or "")
    how = vars(backbone.preprocessing)
    _write_for_timm(folder / f"timm-{name}", job["timm"], whole, how)
    values = {key: how[key] for key in ("resize_size", "crop_size", "interpolation", "mean", "std")}
    return {"preprocessing": values, "file": str(file) if job["torchvision"] else None}


def _write_for_timm(folder: Path, architecture: str, whole: dict[str, Any], how: Any) -> None:
    """A folder that timm loads as `local-dir:FOLDER`, with the preprocessing of the other sides."""
    import timm
    import torch

    folder.mkdir(exist_ok=True)
    renames = _RENAMES.get(architecture, ())
    tensors = {}
    for key, value in whole.items():
        for theirs, timms in renames:
            key = key.replace(theirs, timms)
        tensors[key] = value
    model = timm.create_model(architecture, pretrained=False)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or any(not key.startswith("classifier") for key in missing):
        raise ValueError(f"{architecture}: missing {missing}, unexpected {unexpected}")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    settings = {
        "input_size": [3, how["crop_size"], how["crop_size"]],
        "crop_pct": how["crop_size"] / how["resize_size"],
        "interpolation": how["interpolation"],
        "mean": how["mean"],
        "std": how["std"],
        "classifier": model.default_cfg["classifier"],
    }
    config = {"architecture": architecture, "num_classes": model.num_classes, "pretrained_cfg": settings}
    (folder / "config.json").write_text(json.dumps(config))


_RENAMES = {
    "vit_base_patch16_224": (
        ("class_token", "cls_token"),
        ("conv_proj", "patch_embed.proj"),
        ("encoder.pos_embedding", "pos_embed"),
        ("encoder.layers.encoder_layer_", "blocks."),
        ("self_attention.in_proj_", "attn.qkv."),
        ("self_attention.out_proj", "attn.proj"),
        ("ln_1", "norm1"),
        ("ln_2", "norm2"),
        ("mlp.0", "mlp.fc1"),
        ("mlp.3", "mlp.fc2"),
        ("encoder.ln", "norm"),
        ("heads.head", "head"),
    )
}


# (a) The loop of PyTorch's transfer learning tutorial, with the network's own preprocessing.


def loop(job: Job) -> Job:
    network, data = _network(job), _image_folder(job)
    seconds, vectors = _run_loop(network, data, batch=job["batch"], workers=job["workers"])
    return result(seconds, [path for path, _ in data.samples], vectors, job)


def tune_loop(job: Job) -> Job:
    """{batch size: the number of workers with which the loop is fastest}."""
    network, data = _network(job), _image_folder(job)
    best = {}
    for batch in job["batches"]:
        times = {workers: _run_loop(network, data, batch=batch, workers=workers)[0] for workers in WORKERS}
        best[str(batch)] = min(times, key=lambda workers: times[workers])
    return best


def _run_loop(network: Any, data: Any, *, batch: int, workers: int) -> tuple[float, Any]:
    import torch

    loader = torch.utils.data.DataLoader(data, batch_size=batch, num_workers=workers)
    vectors = []
    with torch.no_grad():
        network(torch.zeros(batch, *data[0][0].shape))
        begun = time.perf_counter()
        for images, _ in loader:
            vectors.append(network(images))
        seconds = time.perf_counter() - begun
    return seconds, torch.cat(vectors).numpy()


def _network(job: Job) -> Any:
    import torch

    if job["torchvision"]:
        from torchvision import models

        network = models.get_model(job["name"].partition("@")[0], weights=None)
        network.load_state_dict(torch.load(job["file"], weights_only=True))
        network.set_submodule(job["classifier"], torch.nn.Identity())
    else:
        import timm

        network = timm.create_model(_local(job), pretrained=True, num_classes=0)
    return network.eval()


def _local(job: Job) -> str:
    return f"local-dir:{job['weights']}/timm-{job['name'].partition('@')[0]}"


def _image_folder(job: Job) -> Any:
    from torchvision import datasets, transforms

    how = job["preprocessing"]
    mode = transforms.InterpolationMode(how["interpolation"])
    steps = [
        transforms.Resize(how["resize_size"], interpolation=mode),
        transforms.CenterCrop(how["crop_size"]),
        transforms.ToTensor(),
        transforms.Normalize(how["mean"], how["std"]),
    ]
    return datasets.ImageFolder(job["folder"], transforms.Compose(steps))


# (b) Peers from pip, driven as their own documentation says for a folder of images, on the CPU.


def peers(job: Job) -> Job:
    """{name: version} of the peers that this interpreter has."""
    found = {}
    for name in PEERS:
        with contextlib.suppress(ImportError):
            found[name] = version(name)
    return found


def img2vec_pytorch(job: Job) -> Job:
    """Told: model="resnet18", cuda=False; lists of PIL images, so many at a time.

    Its weights are the file that torch.hub finds. It squashes images to a square, so its vectors differ.
    """
    from img2vec_pytorch import Img2Vec
    from PIL import Image

    peer, paths = Img2Vec(cuda=False, model=job["img2vec"]), image_paths(job["folder"])
    vectors = []
    begun = time.perf_counter()
    for some in _batches(paths, LIST):
        vectors.append(peer.get_vec([Image.open(path).convert("RGB") for path in some]))
    return result(time.perf_counter() - begun, paths, np.concatenate(vectors), job)


def embetter(job: Job) -> Job:
    """Told: the pipeline ImageLoader, TimmEncoder(name), of all paths at once, as its guide does.

    It takes timm's networks, here from a folder with the weights and the preprocessing of the other sides. It
    leaves the network in training mode.
    """
    from embetter.vision import ImageLoader, TimmEncoder
    from sklearn.pipeline import make_pipeline

    pipe, paths = make_pipeline(ImageLoader(), TimmEncoder(name=_local(job))), image_paths(job["folder"])
    begun = time.perf_counter()
    vectors = pipe.fit_transform(paths)
    return result(time.perf_counter() - begun, paths, vectors, job)


def thingsvision(job: Job) -> Job:
    """Told: source, model and module by name, flatten_acts=True, batch_size=32 as its README has it.

    Of torchvision's networks it takes the weights that torch.hub finds and their preset; of timm's the file.
    """
    from thingsvision import get_extractor
    from thingsvision.utils.data import DataLoader, ImageDataset

    how = {"weights": "IMAGENET1K_V1"}
    if job["tokens"]:
        how["token_extraction"] = "cls_token"
    source = (
        {"source": "torchvision", "pretrained": True, "model_parameters": how}
        if job["torchvision"]
        else {"source": "timm", "pretrained": False, "model_path": f"{_local(job)[10:]}/pytorch_model.bin"}
    )
    name = job["name"].partition("@")[0] if job["torchvision"] else job["timm"]
    extractor = get_extractor(model_name=name, device="cpu", **source)
    begun = time.perf_counter()
    data = ImageDataset(
        root=job["folder"],
        out_path=job["scratch"],
        backend=extractor.get_backend(),
        transforms=extractor.get_transformations(),
    )
    batches = DataLoader(dataset=data, batch_size=32, backend=extractor.get_backend())
    vectors = extractor.extract_features(batches=batches, module_name=job["module"], flatten_acts=True)
    return result(time.perf_counter() - begun, data.samples, vectors, job)


def _batches(paths: Sequence[str], size: int) -> Iterable[Sequence[str]]:
    return (paths[start : start + size] for start in range(0, len(paths), size))


# Memory and features.


def network_alone(job: Job) -> Job:
    """The engine of that name made, and one image embedded: its peak is the network's own memory."""
    from featcache.backbones import load_backbone
    from featcache.engines import make_engine
    from featcache.engines.agreement import noise

    backbone = load_backbone(job["name"], weights=job["file"])
    how = {name: job[name] for name in ("engine", "batch_size", "precision")}
    engine = make_engine(backbone, device="cpu", **how)
    engine.embed(noise(1, job["preprocessing"]["crop_size"]))
    return {}


def read_store(job: Job) -> Job:
    """The engine that a store records, and its vectors under the names of its images."""
    from featcache.store.reader import FeatureStore

    store = FeatureStore.open(job["store"])
    features = store.features()
    np.savez(job["vectors"], names=list(features.ids), vectors=features.X)
    return {name: store.provenance[name] for name in ("engine", "batch_size")}


def lowest_cosine(job: Job) -> Job:
    """Of the vectors of one side against another's, over the images that both have."""
    ours, theirs = (_vectors(job[name]) for name in ("vectors", "reference"))
    both = sorted(ours.keys() & theirs.keys())
    a, b = (np.stack([side[name] for name in both]).astype(float) for side in (ours, theirs))
    if a.shape != b.shape:
        return {"cosine": None, "images": 0}
    cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return {"cosine": float(cosines.min()), "images": len(both)}


def _vectors(path: str) -> dict[str, Any]:
    held = np.load(path)
    return dict(zip(held["names"].tolist(), held["vectors"], strict=True))


# Three backbones in one pass: seconds of all passes, and of what decoding one pass does without.


def three_runs(job: Job) -> Job:
    return {"seconds": sum(_pass_seconds([name], job) for name in job["names"])}


def one_pass(job: Job) -> Job:
    return {"seconds": _pass_seconds(job["names"], job)}


def _pass_seconds(names: Sequence[str], job: Job) -> float:
    """Of one pass over the images, into a new store for each network."""
    from featcache.commands.embed import embed_together

    stores = {name: Path(job["scratch"], f"{name}.h5") for name in names}
    for store in stores.values():
        store.unlink(missing_ok=True)
    how = {"weights": "random", "device": "cpu", "engine": job["engine"]}
    results = embed_together(job["folder"], stores, **how)
    return max(one.embedded / one.images_per_second for one in results)


def decoding_saved(job: Job) -> Job:
    """Of every image decoded for each network alone, less every image decoded once for all of them."""
    from featcache.backbones import load_backbone
    from featcache.spec import Picture

    pictures = [
        Picture(preprocessing=load_backbone(name, weights="random").preprocessing) for name in job["names"]
    ]
    paths = image_paths(job["folder"])
    apart = sum(decoding_seconds(paths, [picture]) for picture in pictures)
    return {"seconds": apart - decoding_seconds(paths, list(dict.fromkeys(pictures)))}


PEERS = {"img2vec_pytorch": img2vec_pytorch, "embetter": embetter, "thingsvision": thingsvision}
SIDES = {
    **PEERS,
    "decoding_saved": decoding_saved,
    "limit": measure,
    "loop": loop,
    "lowest_cosine": lowest_cosine,
    "network_alone": network_alone,
    "one_pass": one_pass,
    "peers": peers,
    "prepare": prepare,
    "read_store": read_store,
    "three_runs": three_runs,
    "tune_loop": tune_loop,
}

if __name__ == "__main__":
    print(json.dumps(SIDES[sys.argv[1]](json.loads(sys.argv[2]))))
