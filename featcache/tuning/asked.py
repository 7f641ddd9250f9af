"""What a run is asked for: as a command, and as what tells it from another run. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from featcache.engines import AUTO
from featcache.model import Model
from featcache.spec import StoreDtype
from featcache.tuning.settings import Settings
from featcache.words import shell_command

Cache = Literal["auto", "yes", "no"]

_NO_OPTIONS = ("model", "data", "output", "settings", "engine")  # arguments, or of Python alone


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What `finetune` was given, but for where and how fast it computes. Fields are options of the command.

    group_by: as `fit` takes it. max_failures: the share of the images that may be unusable. forget: whether
    classes of the model may lack images.
    """

    model: Path
    data: Path
    output: Path
    settings: Settings = field(default_factory=Settings)
    root: Path | None = None
    follow_links: bool = False
    weights: str | None = None
    backbone: str | None = None
    group_by: str | None = None
    cache: Cache = "auto"
    store_dtype: StoreDtype = "float16"
    engine: str = AUTO
    max_failures: float = 0.01
    forget: bool = False

    def __post_init__(self) -> None:
        if self.cache not in ("auto", "yes", "no"):
            raise ValueError(f"cache is auto, yes or no, not {self.cache!r}")
        if not 0 <= self.max_failures <= 1:
            raise ValueError(f"max_failures is a fraction from 0 to 1, not {self.max_failures!r}")

    def key(self, *, model: str, images: str, groups: str | None = None) -> dict[str, Any]:
        """What decides the result. model: sha256 of the file. images: `DataSet.digest`. groups: theirs."""
        return {
            "model": model,
            "images": images,
            "settings": self.settings.to_json(),
            "group_by": self.group_by,
            "groups": groups,
            "cache": self.cache,
            "store_dtype": self.store_dtype,
            "engine": self.engine,
        }

    def settings_for(self, model: Model) -> Settings:
        """A fine-tuned model's head was trained together with its network, and without the choice rows."""
        tuned = bool(model.network) and self.settings.start == "refit"
        return replace(self.settings, start="model") if tuned else self.settings

    def line(self, *, output: Path | None = None, **changes: Any) -> str:
        """The command, for a shell; `changes` are of settings."""
        settings = replace(self.settings, **changes)
        words: list[str | Path] = [
            "featcache",
            "finetune",
            self.model,
            self.data,
            "-o",
            output or self.output,
        ]
        return shell_command([*words, *_options(settings), *_options(self)])

    def predict_line(self, model: Path) -> str:
        """The command by which a model looks at the images, for a shell."""
        images = self.data if self.data.is_dir() else self.root or self.data.parent
        allowed = [] if self.backbone is None else ["--backbone", self.backbone]
        return shell_command(["featcache", "predict", model, images, *allowed])


def _options(given: Settings | Asked) -> Iterator[str | Path]:
    """The options that differ from their defaults."""
    for each in fields(given):
        value = getattr(given, each.name)
        if each.name in _NO_OPTIONS or value == each.default:
            continue
        yield "--" + each.name.replace("_", "-")
        if value is not True:
            yield value if isinstance(value, Path) else str(value)
