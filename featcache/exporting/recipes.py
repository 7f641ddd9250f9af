"""What the recipes of several formats have in common: how a picture is prepared, what the classes are."""

from __future__ import annotations

from featcache.spec import Preprocessing

READ_CLASSES = """with safe_open(%(name)s, framework="pt") as file:
    classes = json.loads(file.metadata()["classes"])"""

# Upright, and what is transparent laid over white, as featcache opens a picture.
OPEN_IMAGE = """def open_image(path):
    image = ImageOps.exif_transpose(Image.open(path))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")"""

# torchvision's own transform, as its presets of weights have it.
TRANSFORM = """transform = transforms.Compose(
    [
        transforms.Resize(%(resize)d, interpolation=InterpolationMode("%(interpolation)s")),
        transforms.CenterCrop(%(crop)d),
        transforms.ToTensor(),
        transforms.Normalize(%(mean)s, %(std)s),
    ]
)"""

# The same up to the crop, by Pillow alone.
_PREPARE = """def prepare(path):
    image = open_image(path)
    short, long = sorted(image.size)
    size = {short: %(resize)d, long: int(%(resize)d * long / short)}
    image = image.resize((size[image.width], size[image.height]), Image.Resampling.%(resampling)s)
    left, top = (int(round((side - %(crop)d) / 2)) for side in image.size)
    return np.asarray(image.crop((left, top, left + %(crop)d, top + %(crop)d)))"""


# Where the pixels are made by a transform of the user's own.
_PREPARE_OWN = """def prepare(path):
    return np.asarray(%(function)s(open_image(path)))"""


def fill_from_pixels(template: str, preprocessing: Preprocessing, *, name: str, given: str) -> str:
    """A recipe of a file that begins with pixels. given: an expression of what it is handed."""
    code = template % {"name": python_text(name), "prepare": _prepare_code(preprocessing), "given": given}
    return code.strip()


def _prepare_code(preprocessing: Preprocessing) -> str:
    """A function `prepare` that makes uint8 pixels (S, S, 3) of a file, without torchvision."""
    if not preprocessing.transform:
        return f"{OPEN_IMAGE}\n\n\n{fill(_PREPARE, preprocessing)}"
    module, _, function = preprocessing.transform.partition("@")[0].partition(":")
    parts = (f"from {module} import {function}", OPEN_IMAGE, _PREPARE_OWN % {"function": function})
    return "\n\n\n".join(parts)


def python_text(text: str) -> str:
    """A string as Python has it, whatever is in it; a plain one in double quotes, as all the others are."""
    quoted = repr(text)
    return f'"{text}"' if quoted == f"'{text}'" and '"' not in text else quoted


def fill(template: str, preprocessing: Preprocessing) -> str:
    """The template for this preprocessing."""
    return template % {
        "resize": preprocessing.resize_size,
        "crop": preprocessing.crop_size,
        "interpolation": preprocessing.interpolation,
        "resampling": preprocessing.interpolation.upper(),
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
    }
