"""Records every call by which a command changes a folder, in order, with what it acknowledged in between.

The functions of `os` are replaced while the command runs; the calls still happen, but for the syncs, which
cost time and change nothing that a run can see. Knows files, names and bytes, and the promises a store makes
("created", "these blocks are kept"); not what a crash does to them. What changes the folder by a way that is
not recorded is found at the end, when what was recorded is compared with what is there.
"""

from __future__ import annotations

import builtins
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from featcache.store.creating import create_store
from featcache.store.writer import StoreWriter


@dataclass(frozen=True, slots=True)
class Write:
    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Resize:
    inode: int
    size: int


@dataclass(frozen=True, slots=True)
class Allocate:
    inode: int
    size: int  # bytes from the file's beginning that are there afterwards


@dataclass(frozen=True, slots=True)
class Sync:
    """Everything done to the file so far is on the disk; its name may not be."""

    inode: int


@dataclass(frozen=True, slots=True)
class Enter:
    name: str
    inode: int


@dataclass(frozen=True, slots=True)
class Rename:
    source: str
    target: str
    inode: int


@dataclass(frozen=True, slots=True)
class Remove:
    name: str


@dataclass(frozen=True, slots=True)
class SyncNames:
    pass


@dataclass(frozen=True, slots=True)
class Created:
    """Acknowledged: a whole store has this name."""

    name: str
    inode: int


@dataclass(frozen=True, slots=True)
class Kept:
    """Acknowledged: these blocks of the file survive everything."""

    inode: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """Acknowledged: the command returned."""


DataOp = Write | Resize | Allocate
NameOp = Enter | Rename | Remove
Mark = Created | Kept | Finished
Op = DataOp | NameOp | Sync | SyncNames | Mark


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A folder as it was, {name: inode} and {inode: bytes}, and what was done to it."""

    names: Mapping[str, int]
    contents: Mapping[int, bytes]
    ops: tuple[Op, ...]

    @property
    def disk_ops(self) -> int:
        return sum(not isinstance(op, Mark) for op in self.ops)


def apply_names(names: dict[str, int], op: NameOp) -> None:
    """What a name operation leaves, in `names`; one whose forerunners were lost still has its effect."""
    if isinstance(op, Enter):
        names[op.name] = op.inode
    elif isinstance(op, Remove):
        names.pop(op.name, None)
    else:
        names.pop(op.source, None)
        names[op.target] = op.inode


def apply_data(image: bytearray, op: DataOp) -> None:
    end = op.offset + len(op.data) if isinstance(op, Write) else op.size
    image.extend(bytes(max(0, end - len(image))))
    if isinstance(op, Write):
        image[op.offset : end] = op.data
    elif isinstance(op, Resize):
        del image[end:]


def record(command: Callable[[], object], folder: Path) -> Recording:
    """Run the command and tell what it did to `folder`, which has no folders within."""
    recorder = _Recorder(folder.absolute())
    names, contents = dict(recorder.names), {i: bytes(image) for i, image in recorder.images.items()}
    with recorder.in_place():
        command()
    recorder.ops.append(Finished())
    recorder.compare()
    return Recording(names=names, contents=contents, ops=tuple(recorder.ops))


def go_on(first: Recording, at: int, names: Mapping[str, int], second: Recording) -> Recording:
    """One recording of a run killed after `at` operations and of the run that followed, without a power cut.

    names: those the killed run left. What it did not sync, the second run finds in the page cache.
    """
    beyond = 1 + max((*first.contents, *(op.inode for op in first.ops if isinstance(op, Enter))), default=0)
    known = {second.names[name]: inode for name, inode in names.items()}

    def renumber(op: Op) -> Op:
        if not hasattr(op, "inode"):
            return op
        return replace(op, inode=known.get(op.inode, beyond + op.inode))

    return replace(first, ops=(*first.ops[:at], *map(renumber, second.ops)))


@dataclass
class _Recorder:
    folder: Path
    ops: list[Op] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    images: dict[int, bytearray] = field(default_factory=dict)
    _numbers: dict[int, int] = field(default_factory=dict)  # st_ino -> our number, which is never reused
    _files: dict[int, int] = field(default_factory=dict)  # descriptor -> our number
    _folders: set[int] = field(default_factory=set)  # descriptors of the folder
    _unkept: dict[int, tuple[int, list[int]]] = field(default_factory=dict)  # id(writer) -> inode, blocks

    def __post_init__(self) -> None:
        for path in sorted(self.folder.iterdir()):
            number = self._numbers.setdefault(path.stat().st_ino, len(self._numbers))
            self.names[path.name] = number
            self.images[number] = bytearray(path.read_bytes())
        self._calls = {name: getattr(os, name) for name in (*self._seen(), *_UNSEEN)}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, seen in self._seen().items():
                stack.enter_context(patch.object(os, name, seen))
            for name in _UNSEEN:
                stack.enter_context(patch.object(os, name, self._refusing(name)))
            plain = builtins.open
            for module in (builtins, io):
                stack.enter_context(patch.object(module, "open", self._reading_only(plain)))
            for owner, name, replacement in self._promises():
                stack.enter_context(patch.object(owner, name, replacement))
            yield

    def compare(self) -> None:
        """AssertionError where the folder is not what the recorded operations make of it."""
        there = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        ours = {name: bytes(self.images[inode]) for name, inode in self.names.items()}
        different = sorted(name for name in there.keys() | ours.keys() if there.get(name) != ours.get(name))
        if different:
            raise AssertionError(f"{', '.join(different)} changed by a way that was not recorded")

    def _do(self, op: Op) -> None:
        self.ops.append(op)
        if isinstance(op, NameOp):
            apply_names(self.names, op)
        elif isinstance(op, DataOp):
            apply_data(self.images[op.inode], op)

    def _name(self, path: Any) -> str | None:
        """The name within the folder; None for what is elsewhere."""
        if isinstance(path, int):
            return None
        whole = Path(os.path.abspath(os.fsdecode(path)))
        return whole.name if whole.parent == self.folder else None

    def _seen(self) -> dict[str, Callable[..., Any]]:
        return {
            "open": self._open,
            "close": self._close,
            "dup": self._dup,
            "write": self._write,
            "pwrite": self._pwrite,
            "ftruncate": self._ftruncate,
            "posix_fallocate": self._fallocate,
            "fsync": self._sync,
            "fdatasync": self._sync,
            "replace": self._rename,
            "rename": self._rename,
            "unlink": self._unlink,
            "remove": self._unlink,
        }

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is not None:
            raise AssertionError("a path beside a descriptor is not recorded")
        name = self._name(path)
        new = name is not None and not os.path.lexists(path)
        fd: int = self._calls["open"](path, flags, mode)
        self._files.pop(fd, None)
        self._folders.discard(fd)
        if name is not None:
            number = os.fstat(fd).st_ino
            if new:
                self._numbers[number] = len(self.images)
                self.images[len(self.images)] = bytearray()
                self._do(Enter(name, self._numbers[number]))
            elif flags & os.O_TRUNC:
                self._do(Resize(self._numbers[number], 0))
            self._files[fd] = self._numbers[number]
        elif not isinstance(path, int) and Path(os.path.abspath(os.fsdecode(path))) == self.folder:
            self._folders.add(fd)
        return fd

    def _close(self, fd: int) -> None:
        self._files.pop(fd, None)
        self._folders.discard(fd)
        self._calls["close"](fd)

    def _dup(self, fd: int) -> int:
        twin: int = self._calls["dup"](fd)
        self._files.pop(twin, None)
        if fd in self._files:
            self._files[twin] = self._files[fd]
        return twin

    def _write(self, fd: int, data: Any) -> int:
        if fd not in self._files:
            return int(self._calls["write"](fd, data))
        return self._pwrite(fd, data, os.lseek(fd, 0, os.SEEK_CUR), call=self._calls["write"])

    def _pwrite(self, fd: int, data: Any, offset: int, call: Callable[..., int] | None = None) -> int:
        written = call(fd, data) if call else self._calls["pwrite"](fd, data, offset)
        if fd in self._files:
            self._do(Write(self._files[fd], offset, bytes(memoryview(data).cast("B")[:written])))
        return int(written)

    def _ftruncate(self, fd: int, length: int) -> None:
        self._calls["ftruncate"](fd, length)
        if fd in self._files:
            self._do(Resize(self._files[fd], length))

    def _fallocate(self, fd: int, offset: int, length: int) -> None:
        self._calls["posix_fallocate"](fd, offset, length)
        if fd in self._files:
            self._do(Allocate(self._files[fd], offset + length))

    def _sync(self, fd: int) -> None:
        if fd in self._folders:
            self._do(SyncNames())
        elif fd in self._files:
            self._do(Sync(self._files[fd]))

    def _rename(self, source: Any, target: Any, **where: Any) -> None:
        names = self._name(source), self._name(target)
        self._calls["replace"](source, target, **where)
        if names == (None, None):
            return
        if None in names or where:
            raise AssertionError(f"{source} -> {target} leaves the folder")
        # POSIX: of two names of one file a rename makes nothing.
        if self.names[names[0]] != self.names.get(names[1]):
            self._do(Rename(*names, self.names[names[0]]))

    def _unlink(self, path: Any, **where: Any) -> None:
        name = self._name(path)
        self._calls["unlink"](path, **where)
        if name is not None:
            self._do(Remove(name))

    def _refusing(self, name: str) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if any(self._is_ours(arg) for arg in args[:2]):
                raise AssertionError(f"os.{name} changes the folder and is not recorded")
            return self._calls[name](*args, **kwargs)

        return refuse

    def _is_ours(self, arg: Any) -> bool:
        if isinstance(arg, int):
            return arg in self._files
        return isinstance(arg, str | bytes | os.PathLike) and self._name(arg) is not None

    def _reading_only(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def open_to_read(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if set(mode) & set("wax+") and self._is_ours(file):
                raise AssertionError(f"open({file!r}, {mode!r}) changes the folder and is not recorded")
            return plain(file, mode, *args, **kwargs)

        return open_to_read

    def _promises(self) -> Iterator[tuple[Any, str, Any]]:
        """What is replaced so that acknowledgements are noted: (owner, name, replacement)."""
        begin, write, commit = StoreWriter.__init__, StoreWriter.write_block, StoreWriter.commit

        def begin_noted(writer: StoreWriter, layout: Any, *args: Any, **kwargs: Any) -> None:
            self._unkept[id(writer)] = self._numbers.get(os.stat(layout.path).st_ino, -1), []
            begin(writer, layout, *args, **kwargs)

        def write_noted(writer: StoreWriter, block: int, *args: Any, **kwargs: Any) -> None:
            # Noted before it is written: the writer may commit within.
            self._unkept[id(writer)][1].append(block)
            write(writer, block, *args, **kwargs)

        def commit_noted(writer: StoreWriter) -> None:
            commit(writer)
            inode, blocks = self._unkept[id(writer)]
            if blocks:
                self._do(Kept(inode, tuple(blocks)))
                blocks.clear()

        def create_noted(path: Path, **kwargs: Any) -> Any:
            made = create_store(path, **kwargs)
            if (name := self._name(path)) is not None:
                self._do(Created(name, self.names[name]))
            return made

        yield StoreWriter, "__init__", begin_noted
        yield StoreWriter, "write_block", write_noted
        yield StoreWriter, "commit", commit_noted
        for module in list(sys.modules.values()):
            # Whoever imported the function has it under a name of its own.
            if module is not sys.modules[__name__] and vars(module).get("create_store") is create_store:
                yield module, "create_store", create_noted


_UNSEEN = (
    "truncate", "writev", "pwritev", "sendfile", "copy_file_range", "link", "symlink", "mkdir", "rmdir",
    "mkfifo", "renames", "dup2",
)  # fmt: skip
