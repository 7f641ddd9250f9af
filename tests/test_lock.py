"""One writer at a time: on one machine, across machines, and whatever lies where the lock file goes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

import pytest

from featcache.errors import DiskError, StoreLocked
from featcache.store import lock
from featcache.store.filesystem import FileSystem, filesystem_of, find_filesystem
from featcache.store.lock import write_lock

IMPORTS = """
import json, multiprocessing, os, signal, subprocess, sys, time
from pathlib import Path
from featcache.errors import StoreLocked
from featcache.store.lock import write_lock
"""


@contextmanager
def python(code: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has printed its first line. It and its children are killed on leaving."""
    command = [sys.executable, "-c", IMPORTS + code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def can_lock(path: Path) -> bool:
    """Whether another process may write the store."""
    code = (
        "try:\n with write_lock(Path(sys.argv[1])):\n  print('free', flush=True)\n"
        "except StoreLocked:\n print('held', flush=True)"
    )
    with python(code, path) as process:
        return {"free": True, "held": False}[first_line(process)]


HOLD = "with write_lock(Path(sys.argv[1])):\n print('locked', flush=True); time.sleep(60)"


def test_the_second_writer_is_told_who_writes_and_kill_9_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    with python(HOLD, path) as other:
        assert first_line(other) == "locked"
        told = f"process {other.pid} on {os.uname().nodename} since 20.* Wait until it ends, or stop it"
        with pytest.raises(StoreLocked, match=told), write_lock(path):
            pass
        other.kill()
        other.wait()
        assert (tmp_path / "s.h5.lock").exists()
        with write_lock(path):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "child",
    [
        "pid = os.fork()\nif pid == 0: time.sleep(60)",
        "pid = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,)); pid.start()",
        "pid = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(60,)); pid.start()",
        "pid = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], close_fds=False)",
    ],
    ids=["fork", "fork worker", "spawned worker", "subprocess"],
)
def test_a_child_that_outlives_the_writer_does_not_hold_the_lock(tmp_path: Path, child: str) -> None:
    code = (
        f"lock = write_lock(Path(sys.argv[1])); lock.__enter__()\n{child}\n"
        "print(getattr(pid, 'pid', pid), flush=True); time.sleep(60)"
    )
    with python(code, tmp_path / "s.h5") as writer:
        pid = int(first_line(writer))
        assert not can_lock(tmp_path / "s.h5")
        writer.kill()
        writer.wait()
        os.kill(pid, 0)
        assert can_lock(tmp_path / "s.h5")
        os.kill(pid, 0)


def test_a_forked_child_that_leaves_the_block_does_not_release_its_parent(tmp_path: Path) -> None:
    code = (
        "lock = write_lock(Path(sys.argv[1])); lock.__enter__()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        " told = f'process {os.getppid()} on'\n"
        " for leave in (lambda: lock.__exit__(None, None, None), lambda: os._exit(0)):\n"
        "  try:\n"
        "   with write_lock(Path(sys.argv[1])): os._exit(1)\n"
        "  except StoreLocked as exc:\n"
        "   leave() if told in str(exc) else os._exit(2)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True); time.sleep(60)"
    )
    with python(code, tmp_path / "s.h5") as writer:
        assert first_line(writer) == "0"
        assert not can_lock(tmp_path / "s.h5")


@pytest.mark.parametrize("spelling", ["same", "relative", "linked folder", "linked store", "hard link"])
def test_two_paths_to_one_store_are_one_and_asking_keeps_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    """Trap: closing any descriptor of a locked file drops the lock, so the second must not open it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "s.h5").touch()
    (tmp_path / "linked").symlink_to(folder)
    (tmp_path / "linked.h5").symlink_to(folder / "s.h5")
    os.link(folder / "s.h5", tmp_path / "hard.h5")
    monkeypatch.chdir(tmp_path)
    other = {
        "same": folder / "s.h5",
        "relative": Path("folder/../folder/s.h5"),
        "linked folder": tmp_path / "linked" / "s.h5",
        "linked store": tmp_path / "linked.h5",
        "hard link": tmp_path / "hard.h5",
    }[spelling]
    with write_lock(folder / "s.h5"):
        with pytest.raises(StoreLocked, match="by this process already"), write_lock(other):
            pass
        assert not can_lock(folder / "s.h5")
        # To other processes a lock is known by the name of the store's own folder entry.
        assert can_lock(other) == (spelling == "hard link")
    assert can_lock(other)


def test_a_lock_file_that_is_held_is_not_opened_under_another_name(tmp_path: Path) -> None:
    """As it has one where its folder is mounted twice."""
    with write_lock(tmp_path / "s.h5"):
        os.link(tmp_path / "s.h5.lock", tmp_path / "t.h5.lock")
        with pytest.raises(StoreLocked, match="by this process already"), write_lock(tmp_path / "t.h5"):
            pass
        assert not can_lock(tmp_path / "s.h5")


def test_two_locks_of_one_process_on_two_stores_are_two(tmp_path: Path) -> None:
    with write_lock(tmp_path / "a.h5"):
        with write_lock(tmp_path / "b.h5"):
            assert not can_lock(tmp_path / "a.h5")
            assert not can_lock(tmp_path / "b.h5")
        assert not can_lock(tmp_path / "a.h5")
        assert can_lock(tmp_path / "b.h5")


# Children that count together in a file, one by one. Each counts `turns` times; two at once show as an
# `inside` that exists or as a count that is lost.
COUNT = """
def count(folder, turns):
    done = 0
    while done < turns:
        try:
            with write_lock(folder / "s.h5"):
                os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
                number = int((folder / "count").read_text())
                time.sleep(0.0002)
                (folder / "count").write_text(str(number + 1))
                os.unlink(folder / "inside")
                done += 1
        except StoreLocked:
            time.sleep(0.0001)

def run(jobs):
    pids = []
    for job in jobs:
        pid = os.fork()
        if pid == 0:
            try:
                job()
                os._exit(0)
            except BaseException as exc:
                print(repr(exc), file=sys.stderr, flush=True)
                os._exit(1)
        pids.append(pid)
    print(sum(os.waitpid(pid, 0)[1] != 0 for pid in pids), flush=True)

folder = Path(sys.argv[1])
"""


def counted(folder: Path, code: str, *arguments: str) -> int:
    """The count that the children of `code` reach, none of which failed."""
    (folder / "count").write_text("0")
    with python(COUNT + code, folder, *arguments) as process:
        assert first_line(process) == "0"
    assert sorted(path.name for path in folder.iterdir()) == ["count"]
    return int((folder / "count").read_text())


def test_eight_processes_are_never_inside_at_once(tmp_path: Path) -> None:
    assert counted(tmp_path, "run([lambda: count(folder, 60)] * 8)") == 8 * 60


LEFT = [
    b"",
    b"\x00" * 200,
    b"\xff\xfe{",
    b"[" * 4096,
    b'{"pid": 1}',
    b'{"pid": 1, "host": "\\u001b[31m", "since": "", "kernel": "", "locks_reach_others": true}',
    json.dumps({"pid": 7, "host": "elsewhere", "since": "2026-01-01T00:00:00+00:00"}).encode(),
]


@pytest.mark.parametrize("content", LEFT, ids=range(len(LEFT)))
def test_whatever_a_lock_file_contains_is_no_obstacle(tmp_path: Path, content: bytes) -> None:
    left = tmp_path / "s.h5.lock"
    left.write_bytes(content)
    with write_lock(tmp_path / "s.h5"):
        assert json.loads(left.read_bytes())["pid"] == os.getpid()


@pytest.mark.parametrize("content", LEFT[:6], ids=range(6))
def test_a_holder_that_cannot_be_read_is_another_process(tmp_path: Path, content: bytes) -> None:
    code = (
        "with write_lock(Path(sys.argv[1])):\n"
        " fd = next(int(fd) for fd in os.listdir('/proc/self/fd') if os.readlink(f'/proc/self/fd/{fd}')"
        " == sys.argv[1] + '.lock')\n"
        " os.ftruncate(fd, 0); os.pwrite(fd, bytes.fromhex(sys.argv[2]), 0)\n"
        " print('locked', flush=True); time.sleep(60)"
    )
    with python(code, tmp_path / "s.h5", content.hex()) as other:
        assert first_line(other) == "locked"
        with (
            pytest.raises(StoreLocked, match="written by another process. Wait"),
            write_lock(tmp_path / "s.h5"),
        ):
            pass


def test_what_is_no_lock_file_is_refused_and_kept(tmp_path: Path) -> None:
    path, precious = tmp_path / "s.h5.lock", tmp_path / "precious"
    precious.write_text("precious")

    def refused(reason: str) -> None:
        with (
            pytest.raises(DiskError, match=f"s.h5.lock cannot be locked: {reason}.*removed if no process"),
            write_lock(tmp_path / "s.h5"),
        ):
            pass

    path.mkdir()
    refused("Is a directory")
    path.rmdir()
    path.symlink_to(precious)
    refused("Too many levels of symbolic links")
    path.unlink()
    os.mkfifo(path)
    refused("it is something else than a lock file")
    path.unlink()
    path.write_bytes(b"x" * 5000)
    refused("it is something else than a lock file")
    assert (path.read_bytes(), precious.read_text()) == (b"x" * 5000, "precious")


def deny_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, flags: int, mode: int = 0o777) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)


def test_a_lock_file_of_another_user_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.h5.lock").touch()
    deny_opening(monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    told = r"s.h5.lock \(of user \w+\) cannot be locked: Permission denied.*removed if no process"
    with pytest.raises(DiskError, match=told), write_lock(tmp_path / "s.h5"):
        pass


def test_a_folder_that_cannot_be_written_or_is_missing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DiskError, match="locking .*make the folder"), write_lock(tmp_path / "no" / "s.h5"):
        pass

    deny_opening(monkeypatch)
    with pytest.raises(DiskError, match="locking .*allow writing there"), write_lock(tmp_path / "s.h5"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_cannot_lock_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", refuse)
        with (
            pytest.raises(DiskError, match="this file system cannot lock.*another disk and move it there"),
            write_lock(tmp_path / "s.h5"),
        ):
            pass
    assert can_lock(tmp_path / "s.h5")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskError, match="locking .*free space"), write_lock(tmp_path / "s.h5"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_goes_stale_while_it_is_locked_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS answers when the holder has removed the file since."""
    real, calls = fcntl.lockf, []

    def stale(fd: int, operation: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        real(fd, operation)

    monkeypatch.setattr(fcntl, "lockf", stale)
    with write_lock(tmp_path / "s.h5"):
        assert len(calls) == 2


def test_a_lock_file_that_was_deleted_and_made_anew_by_another_is_left_to_it(tmp_path: Path) -> None:
    left = tmp_path / "s.h5.lock"
    with write_lock(tmp_path / "s.h5"):
        left.unlink()
        left.write_text("another's")
    assert left.read_text() == "another's"


# Where record locks stay on one machine

SSHFS = FileSystem("fuse.sshfs", locks_reach_others=False)
NFS = FileSystem("nfs4", locks_reach_others=True)


@pytest.fixture
def on_sshfs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "filesystem_of", lambda folder: SSHFS)


@contextmanager
def machine(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_running_kernel", lambda: f"boot of {name}")
        patch.setattr(lock.socket, "gethostname", lambda: name)
        yield


def leave_lock(path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    """The lock file as a process killed on the machine `name` leaves it."""
    left = path.with_name(path.name + ".lock")
    with machine(monkeypatch, name), write_lock(path):
        content = left.read_bytes()
    left.write_bytes(content)
    return left


@pytest.mark.usefixtures("on_sshfs")
def test_a_lock_of_another_machine_is_refused_until_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = leave_lock(tmp_path / "s.h5", monkeypatch, "alice")
    content = left.read_bytes()
    told = f"process {os.getpid()} on alice since 20.*not seen from here.*runs no more, delete {left}"
    with machine(monkeypatch, "bob"):
        for _ in range(2):
            with pytest.raises(StoreLocked, match=told), write_lock(tmp_path / "s.h5"):
                pass
        assert left.read_bytes() == content
        left.unlink()
        with write_lock(tmp_path / "s.h5"):
            assert json.loads(left.read_bytes())["host"] == "bob"
        assert not left.exists()


@pytest.mark.usefixtures("on_sshfs")
def test_a_lock_left_on_the_same_machine_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_lock(tmp_path / "s.h5", monkeypatch, "alice")
    with machine(monkeypatch, "alice"), write_lock(tmp_path / "s.h5"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("on_sshfs")
def test_two_machines_of_one_name_and_a_restarted_one_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_lock(tmp_path / "s.h5", monkeypatch, "localhost")
    with machine(monkeypatch, "localhost"):
        monkeypatch.setattr(lock, "_running_kernel", lambda: "another boot")
        with pytest.raises(StoreLocked, match="on localhost since"), write_lock(tmp_path / "s.h5"):
            pass


@pytest.mark.usefixtures("on_sshfs")
@pytest.mark.parametrize("content", LEFT, ids=range(len(LEFT)))
def test_a_lock_file_that_nobody_signed_is_refused_there(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.h5.lock").write_bytes(content)
    with pytest.raises(StoreLocked, match="an unnamed process.*delete"), write_lock(tmp_path / "s.h5"):
        pass


def test_a_lock_that_does_not_reach_others_is_respected_where_locks_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One export, mounted with and without `nolock`; or the server of an sshfs mount, on its own disk."""
    monkeypatch.setattr(lock, "filesystem_of", lambda folder: SSHFS)
    leave_lock(tmp_path / "s.h5", monkeypatch, "alice")
    monkeypatch.setattr(lock, "filesystem_of", lambda folder: NFS)
    with pytest.raises(StoreLocked, match="on alice"), write_lock(tmp_path / "s.h5"):
        pass


def test_where_locks_reach_others_what_another_machine_left_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "filesystem_of", lambda folder: NFS)
    leave_lock(tmp_path / "s.h5", monkeypatch, "alice")
    with machine(monkeypatch, "bob"), write_lock(tmp_path / "s.h5"):
        pass
    assert list(tmp_path.iterdir()) == []


# Each machine locks a file of its own in place of the shared one, so that its record locks stay its own.
MACHINES = """
import fcntl, socket
from featcache.store import lock
from featcache.store.filesystem import FileSystem
lockf, close, shadows = fcntl.lockf, os.close, {}

def on(machine):
    own = folder.parent / f"locks of {machine}"
    own.mkdir(exist_ok=True)
    def lock_there(fd, operation):
        shadow = os.open(own / str(os.fstat(fd).st_ino), os.O_RDWR | os.O_CREAT)
        shadows[fd] = shadow
        lockf(shadow, operation)
    def close_there(fd):
        if fd in shadows:
            close(shadows.pop(fd))
        close(fd)
    fcntl.lockf, os.close = lock_there, close_there
    lock._running_kernel = socket.gethostname = lambda: machine
    lock.filesystem_of = lambda folder: FileSystem("fuse.sshfs", locks_reach_others=False)
    if sys.argv[2] == "no hard links":
        os.link = lambda source, target: os.unlink(folder / "no such file")
    count(folder, 30)

run([lambda machine=machine: on(machine) for machine in "aaabbbcc"])
"""


@pytest.mark.parametrize("links", ["hard links", "no hard links"])
def test_processes_of_three_machines_are_never_inside_at_once(tmp_path: Path, links: str) -> None:
    (tmp_path / "shared").mkdir()
    assert counted(tmp_path / "shared", MACHINES, links) == 8 * 30


def test_the_server_of_such_a_mount_meets_a_new_lock_only_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own locks reach others, so to it an unsigned file is a stale one."""
    real, seen = os.link, []

    def link(source: Path, target: Path) -> None:
        assert not target.exists()
        real(source, target)
        seen.append(json.loads(target.read_bytes())["pid"])

    monkeypatch.setattr(lock, "filesystem_of", lambda folder: SSHFS)
    monkeypatch.setattr(os, "link", link)
    with write_lock(tmp_path / "s.h5"):
        assert seen == [os.getpid()]
        assert [path.name for path in tmp_path.iterdir()] == ["s.h5.lock"]


# What lies under a folder

MOUNTS = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
25 24 0:23 / /dev/shm rw,nosuid,nodev - tmpfs tmpfs rw,size=24684100k
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
50 27 0:60 / /home rw,relatime shared:2 master:3 - nfs4 nas:/home rw,vers=4.2,rsize=1048576,local_lock=none
51 27 0:61 / /nfs3 rw,relatime - nfs nas:/export rw,vers=3,mountproto=tcp,local_lock=none,addr=10.0.0.1
52 27 0:62 / /nfs\040nolock rw,relatime - nfs nas:/ex\040port rw,vers=3,nolock,local_lock=all,addr=10.0.0.1
74 27 0:83 / /nfs-nolock rw,relatime - nfs nas:/export rw,vers=3,nolock,local_lock=none
75 27 0:84 / /nfs-all rw,relatime - nfs nas:/export rw,vers=3,local_lock=all
53 27 0:63 / /nfs-posix rw,relatime - nfs nas:/export rw,vers=3,local_lock=posix
54 27 0:64 / /nfs-flock rw,relatime - nfs nas:/export rw,vers=3,local_lock=flock
55 27 0:65 / /smb rw,relatime - cifs //nas/share rw,vers=3.1.1,cache=strict,username=me,nosharesock
56 27 0:66 / /smb-nobrl rw,relatime - cifs //nas/share rw,vers=3.1.1,nobrl,username=me
57 27 0:67 / /lustre rw,noatime - lustre 10.0.0.1@tcp:/scratch rw,flock,lazystatfs
58 27 0:68 / /lustre-local rw,noatime - lustre 10.0.0.1@tcp:/scratch rw,localflock,lazystatfs
59 27 0:69 / /lustre-none rw,noatime - lustre 10.0.0.1@tcp:/scratch rw,lazystatfs
60 27 0:70 / /ceph rw,relatime - ceph 10.0.0.1:6789:/ rw,name=admin,acl
61 27 0:71 / /gpfs rw,relatime - gpfs gpfs0 rw
62 27 0:72 / /beegfs rw,relatime - beegfs beegfs_nodev rw,cfgFile=/etc/beegfs/beegfs-client.conf
63 27 0:73 / /host rw,relatime - 9p host rw,access=client,trans=virtio
64 27 0:74 / /Users rw,relatime - virtiofs share rw
65 27 0:75 / /ssh rw,nosuid,nodev - fuse.sshfs me@there:/data rw,user_id=0,group_id=0,allow_other
66 27 0:76 / /bucket rw,nosuid - fuse.gcsfuse bucket rw,user_id=0
67 27 0:77 / /odd rw,relatime - strangefs odd rw
68 27 8:17 / /ntfs rw,relatime - fuseblk /dev/sdb1 rw,user_id=0
69 27 0:78 /@data /btrfs rw,relatime - btrfs /dev/sdc rw,subvolid=258,subvol=/@data
70 27 0:79 / /cover rw,relatime - ext4 /dev/sdd rw
71 70 0:80 / /cover rw,relatime - fuse.s3fs s3fs rw
72 50 0:81 / /home/me\134x/on\011tab rw - xfs /dev/sde rw
73 27 0:82 / /nosource rw - fuse.rclone  rw
short line - with
"""


@pytest.mark.parametrize(
    ("folder", "kind", "reaches"),
    [
        ("/", "ext4", True),
        ("/dev/shm/x", "tmpfs", True),
        ("/home/me", "nfs4", True),
        ("/homes", "ext4", True),
        ("/nfs3/a", "nfs", True),
        ("/nfs nolock/a", "nfs", False),
        ("/nfs-nolock", "nfs", False),
        ("/nfs-all", "nfs", False),
        ("/nfs-posix", "nfs", False),
        ("/nfs-flock", "nfs", True),
        ("/smb/a", "cifs", True),
        ("/smb-nobrl/a", "cifs", False),
        ("/lustre/a", "lustre", True),
        ("/lustre-local/a", "lustre", False),
        ("/lustre-none/a", "lustre", False),
        ("/ceph", "ceph", True),
        ("/gpfs", "gpfs", True),
        ("/beegfs", "beegfs", False),
        ("/host/a", "9p", False),
        ("/Users/a", "virtiofs", False),
        ("/ssh/a/b", "fuse.sshfs", False),
        ("/bucket", "fuse.gcsfuse", False),
        ("/odd", "strangefs", False),
        ("/ntfs", "fuseblk", True),
        ("/btrfs/a", "btrfs", True),
        ("/cover/a", "fuse.s3fs", False),
        ("/home/me\\x/on\ttab/a", "xfs", True),
        ("/nosource", "fuse.rclone", False),
    ],
)
def test_the_mount_under_a_folder_says_whether_its_locks_reach_others(
    folder: str, kind: str, reaches: bool
) -> None:
    unlisted = os.makedev(0, 999)  # as btrfs gives its subvolumes
    found = find_filesystem(MOUNTS, device=unlisted, folder=PurePath(folder))
    assert found == FileSystem(kind, locks_reach_others=reaches)


def test_the_device_number_goes_before_the_path() -> None:
    """A path may lead elsewhere than it seems, as under a bind mount that is not in this table."""
    found = find_filesystem(MOUNTS, device=os.makedev(0, 75), folder=PurePath("/home/me"))
    assert found.kind == "fuse.sshfs"


def test_an_empty_table_is_a_network() -> None:
    assert not find_filesystem("", device=1, folder=PurePath("/")).locks_reach_others


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's table of mounts")
def test_this_machine_has_a_table() -> None:
    assert filesystem_of(Path("/proc")) == FileSystem("proc", locks_reach_others=False)
