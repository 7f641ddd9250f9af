"""Every exception a user can meet.

    FeatcacheError               one line for the user, exit code 1
    ├── DataError                the images or the manifest are not what embedding needs
    │   ├── ManifestError        a CSV with bad lines
    │   └── TooManyFailures      more images failed than --max-failures allows
    ├── BackboneError            a backbone that cannot be had or built
    │   ├── UnknownBackbone
    │   ├── UnknownNode
    │   └── WeightsUnavailable
    ├── DeviceError              a device or precision this machine does not have
    ├── StoreError               a feature store that cannot be used
    │   ├── NotAStore            another kind of file, or one this version must not open
    │   ├── DamagedStore         checksums or structure disagree with the data
    │   ├── IncompleteStore      rows are still to be embedded
    │   ├── StoreLocked          another process is writing
    │   └── SpecMismatch         the store's features are not the ones asked for
    ├── DiskError                no space, no permission, an I/O error
    ├── HeadError                a head that cannot be fitted on these features
    ├── ModelError               a model file that cannot be used
    └── ExportError              a model that another format cannot hold, or does not hold alike

A caller's mistake in Python (a wrong type, a value out of range) stays `TypeError` or `ValueError`.
"""


class FeatcacheError(Exception):
    """A failure the user can act on: says what was met, what was expected and what to do next.

    told_elsewhere: by another process that works at the same and has it as well, so that it is said once.
    """

    told_elsewhere = False


class DataError(FeatcacheError):
    """The images or the manifest are not what embedding needs."""


class ManifestError(DataError):
    """A CSV manifest with bad lines; the message numbers the first of them."""


class TooManyFailures(DataError):
    """More images failed than `max_failures` allows; what was embedded is kept."""


class BackboneError(FeatcacheError):
    """A backbone that cannot be had or built."""


class UnknownBackbone(BackboneError):
    """No backbone has this name."""


class UnknownNode(BackboneError):
    """The backbone has no node of this name, or the node has no usable output."""


class WeightsUnavailable(BackboneError):
    """The pretrained weights are not on this machine and cannot be had."""


class DeviceError(FeatcacheError):
    """The device or precision asked for is not available on this machine."""


class StoreError(FeatcacheError):
    """A feature store that cannot be used."""


class NotAStore(StoreError):
    """The file is not a feature store, or one this version must not open."""


class DamagedStore(StoreError):
    """The checksums or the structure of a store disagree with its data."""


class IncompleteStore(StoreError):
    """Rows of the store are still to be embedded."""


class StoreLocked(StoreError):
    """Another process is writing the store."""


class SpecMismatch(StoreError):
    """The store holds features of another spec than the one asked for."""


class DiskError(FeatcacheError):
    """Writing failed: no space, no permission, or an I/O error. Everything acknowledged is kept."""


class HeadError(FeatcacheError):
    """A head that cannot be fitted on these features."""


class ModelError(FeatcacheError):
    """A model file that cannot be used."""


class ExportError(FeatcacheError):
    """A model that another format cannot hold, or that answers otherwise there than here."""
