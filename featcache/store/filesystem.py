"""Which file system a folder lies on, and whether a record lock taken there is seen by other machines.

Knows the kernel's table of mounts, no stores and no locks. What the table does not settle counts as a lock
that others do not see.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePath

MOUNTINFO = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class FileSystem:
    kind: str  # as the kernel calls it: ext4, nfs4, fuse.sshfs, …
    locks_reach_others: bool  # everybody who can write there sees a record lock


@dataclass(frozen=True)
class _Locking:
    """When the record locks of a network file system go through its server: by its mount options."""

    needs: frozenset[str] = frozenset()
    spoilt_by: frozenset[str] = frozenset()

    def reaches(self, options: frozenset[str]) -> bool:
        return self.needs <= options and not self.spoilt_by & options


_NFS = _Locking(spoilt_by=frozenset({"nolock", "local_lock=all", "local_lock=posix"}))
_SMB = _Locking(spoilt_by=frozenset({"nobrl", "nolock"}))
_NETWORK = {
    "ceph": _Locking(),
    "cifs": _SMB,
    "gfs2": _Locking(spoilt_by=frozenset({"localflocks"})),
    "gpfs": _Locking(),
    "lustre": _Locking(needs=frozenset({"flock"})),
    "nfs": _NFS,
    "nfs4": _NFS,
    "smb3": _SMB,
}
# Of one machine; its kernel sees every lock. Whatever is in neither table may be a network's: 9p, virtiofs,
# every fuse.*, and beegfs and ocfs2, whose record locks stay on the machine unless configured otherwise.
_LOCAL = frozenset({
    "apfs", "bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "fuseblk", "hfs", "hfsplus", "jfs",
    "msdos", "nilfs2", "ntfs", "ntfs3", "overlay", "ramfs", "reiserfs", "rootfs", "tmpfs", "ubifs", "udf",
    "vfat", "xfs", "zfs",
})  # fmt: skip


def filesystem_of(folder: Path) -> FileSystem:
    """What `folder` lies on. Off Linux there is no table to read, and locks are trusted to reach others."""
    device = os.stat(folder).st_dev
    try:
        mountinfo = MOUNTINFO.read_bytes().decode(errors="surrogateescape")
    except OSError:
        return FileSystem("unknown", locks_reach_others=not sys.platform.startswith("linux"))
    return find_filesystem(mountinfo, device=device, folder=PurePath(os.path.realpath(folder)))


def find_filesystem(mountinfo: str, *, device: int, folder: PurePath) -> FileSystem:
    """The row of `mountinfo` with this device number, or else with the deepest mount point above `folder`.

    btrfs gives its subvolumes device numbers that are not in the table.
    """
    mounts = [mount for line in mountinfo.split("\n") if (mount := _Mount.from_line(line))]
    found = [mount for mount in mounts if mount.device == f"{os.major(device)}:{os.minor(device)}"]
    if not found:
        above = [mount for mount in mounts if folder.is_relative_to(mount.point)]
        # The sort is stable: of two mounts on one point the later, which covers the other, stays last.
        found = sorted(above, key=lambda mount: len(mount.point.parts))[-1:]
    if not found:
        return FileSystem("unknown", locks_reach_others=False)
    kind, options = found[0].kind, found[0].options
    reaches = _NETWORK[kind].reaches(options) if kind in _NETWORK else kind in _LOCAL
    return FileSystem(kind, locks_reach_others=reaches)


@dataclass(frozen=True)
class _Mount:
    device: str  # major:minor
    point: PurePath
    kind: str
    options: frozenset[str]  # of the mount and of the file system

    @classmethod
    def from_line(cls, line: str) -> _Mount | None:
        """`36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`, see proc(5)."""
        mount, separator, filesystem = line.partition(" - ")
        left, right = mount.split(" "), filesystem.split(" ")
        if not separator or len(left) < 6 or len(right) < 3:
            return None
        options = frozenset(f"{left[5]},{right[2]}".split(","))
        return cls(device=left[2], point=PurePath(_unescape(left[4])), kind=right[0], options=options)


def _unescape(text: str) -> str:
    """The kernel writes a space, tab, newline and backslash as `\\040` and the like."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
