"""What does the file calls of a sandbox, inside it (sandbox.md §11.2, §11.4).

It is started with nothing but the standard library (see `helpers`), goes into its view, lets go of all
capabilities, and then serves one request after the other, with the same functions as are used without a
sandbox. What the mounts of the view cannot refuse without leaving traces on the host, it refuses itself
(`GuardedNames`): it runs no code of any client, so its word counts.

A message is a header and a body: `<length of header><length of body>`, 32 bits each, little-endian, then
both. The header of a request is what `marshal` makes of a dict; that of an answer, which the server has no
reason to believe in, is JSON, written by hand since `json` would take a third of the time of a start. Paths
in it are text of which each character is a byte. An opened file comes with the first byte of the answer, by
SCM_RIGHTS.
"""

from __future__ import annotations

import _socket
import ctypes
import errno
import marshal
import os
import stat
import struct
from _json import encode_basestring_ascii
from contextlib import contextmanager, suppress

from execenv.local import disk
from execenv.local.stat import is_on_proc, libc, magic_of
from execenv.local.turn import Turn
from execenv.sandbox import landlock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Header = dict[str, Any]
    Reply = tuple[Header, bytes, int | None]

FRAME = struct.Struct("<II")

SMALL = 1024 * 1024
"""Files up to this size are answered with their content, larger ones with a descriptor."""

_MAX_LINKS = 40  # linux/namei.h
_CASE_COUNTS = frozenset((0x01021994, 0x794C7630, 0x6969, 0x2FC12FC1))
"""Of tmpfs, overlay, NFS and ZFS, which may not say whether they fold case, and usually don't."""

_GET_FLAGS = 0x80000000 | ctypes.sizeof(ctypes.c_long) << 16 | ord("f") << 8 | 1  # linux/fs.h
_CASEFOLD = 0x40000000
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4  # linux/prctl.h
_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
_PARENT = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class GuardedNames(disk.Names):
    """Refuses names that must not come into being.

    The directory that a name is in is opened first and is known by its inode, and what is done is done
    there, without following a link: whoever exchanges links on the way meanwhile wins nothing.

    Args:
        forbidden: device and inode of a directory, a name there, and whether it is denied, or else
            protected.
        pinned: directories with something inside that is mounted: moving one would take the mount with it,
            and what it covers would come to light under the new name.
        mounted: as `forbidden`, of names that are there and have something mounted over them. Who removes
            one on the host takes the mount along (rmdir(2)); it must not come back without.
    """

    def __init__(
        self,
        forbidden: dict[tuple[int, int, bytes], bool],
        pinned: frozenset[tuple[int, int]],
        mounted: dict[tuple[int, int, bytes], bool] | None = None,
    ) -> None:
        self._mounted = mounted or {}
        self._forbidden = self._mounted | forbidden
        self._variants = {(device, inode, _folded(name)) for device, inode, name in self._forbidden}
        self._pinned = pinned

    def open(self, path: bytes, flags: int, mode: int = 0o666, *, dir_fd: int | None = None) -> int:
        fd = self._open(path, flags, mode, dir_fd)
        try:
            _refuse_process_memory(fd, path, writing=bool(flags & os.O_ACCMODE))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _open(self, path: bytes, flags: int, mode: int, dir_fd: int | None) -> int:
        if not flags & os.O_CREAT:
            return os.open(path, flags, mode, dir_fd=dir_fd)
        place, own = dir_fd, -1
        try:
            for _ in range(_MAX_LINKS):
                with self._parent(path, place) as (parent, name):
                    try:
                        return os.open(name, flags | os.O_NOFOLLOW, mode, dir_fd=parent)
                    except OSError as error:
                        if error.errno != errno.ELOOP or flags & os.O_NOFOLLOW:
                            raise
                    try:
                        target = os.readlink(name, dir_fd=parent)
                    except OSError as error:
                        if error.errno != errno.EINVAL:  # it is no link any more
                            raise
                        target = name
                    if target.endswith(b"/"):
                        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
                    if own >= 0:
                        os.close(own)
                    place = own = os.dup(parent)  # what the link says is meant from where it is
                    path = target
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        finally:
            if own >= 0:
                os.close(own)

    def mkdir(self, path: bytes, *, dir_fd: int | None = None, recursive: bool = False) -> None:
        protected = None if recursive else errno.EEXIST
        with self._parent(path, dir_fd, protected, making_directory=True) as (parent, name):
            os.mkdir(name, dir_fd=parent)

    def symlink(self, target: bytes, path: bytes) -> None:
        with self._parent(path) as (parent, name):
            os.symlink(target, name, dir_fd=parent)

    def replace(self, source: bytes, destination: bytes) -> None:
        with (
            self._parent(source) as (source_parent, source_name),
            self._parent(destination) as (parent, name),
        ):
            found = os.stat(source_name, dir_fd=source_parent, follow_symlinks=False)
            if (found.st_dev, found.st_ino) in self._pinned:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), source)
            os.replace(source_name, name, src_dir_fd=source_parent, dst_dir_fd=parent)

    @contextmanager
    def _parent(
        self,
        path: bytes,
        dir_fd: int | None = None,
        protected: int | None = None,
        *,
        making_directory: bool = False,
    ) -> Iterator[tuple[int, bytes]]:
        """The directory that a name is in, and the name, if it may come into being.

        Args:
            protected: the errno for a protected name, if it is another than EROFS.
        """
        directory, name = os.path.split(path.rstrip(b"/"))
        try:
            parent = os.open(directory or (b"/" if path.startswith(b"/") else b"."), _PARENT, dir_fd=dir_fd)
        except FileNotFoundError:
            self._refuse_above(directory, dir_fd)
            raise
        try:
            self._refuse(parent, name, path, protected, making_directory=making_directory)
            # "." and "..": there already; the system says so. A slash behind it is for the system too.
            yield parent, (name or b".") + (b"/" if name and path.endswith(b"/") else b"")
        finally:
            os.close(parent)

    def _refuse(
        self,
        parent: int,
        name: bytes,
        path: bytes,
        protected: int | None = None,
        *,
        making_directory: bool = False,
    ) -> None:
        if not self._forbidden:
            return
        found = os.fstat(parent)
        place = (found.st_dev, found.st_ino)
        denied = self._forbidden.get((*place, name))
        if denied is None and (*place, _folded(name)) in self._variants and folds_case(parent):
            denied = True
        if denied is not None:
            number = errno.EACCES if denied else protected or errno.EROFS
            if making_directory and (*place, name) in self._mounted:
                number = errno.EEXIST
            raise OSError(number, os.strerror(number), path)

    def _refuse_above(self, path: bytes, dir_fd: int | None) -> None:
        """If what is missing on the way is such a name, say that instead."""
        while path.strip(b"/"):
            directory, name = os.path.split(path.rstrip(b"/"))
            try:
                parent = os.open(
                    directory or (b"/" if path.startswith(b"/") else b"."), _PARENT, dir_fd=dir_fd
                )
            except FileNotFoundError:
                path = directory
                continue
            try:
                self._refuse(parent, name, path)
            finally:
                os.close(parent)
            return


def _folded(name: bytes) -> bytes:
    return name.decode(errors="surrogateescape").casefold().encode(errors="surrogateescape")


def folds_case(directory: int) -> bool:
    """Whether names that differ in case only may be the same there; also where that is not known."""
    library = libc()
    assert library is not None
    flags = ctypes.c_long()
    fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        if not library.ioctl(fd, ctypes.c_ulong(_GET_FLAGS), ctypes.byref(flags)):
            return bool(flags.value & _CASEFOLD)
        return magic_of(fd) not in _CASE_COUNTS
    finally:
        os.close(fd)


def _refuse_process_memory(fd: int, path: bytes, *, writing: bool) -> None:
    """Files of /proc are about this very process: who could write its memory could make it do anything."""
    if not is_on_proc(fd) or stat.S_ISDIR(os.fstat(fd).st_mode):
        return
    try:
        name = os.path.basename(os.readlink(b"/proc/self/fd/%d" % fd))
    except OSError:
        name = b"mem"
    if writing or name == b"mem":
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)


# Going inside.


def enter(setup: Header) -> None:
    """Go into the view for ever, without any capability."""
    os.chroot(text_to_path(setup["view"]))
    os.chdir(b"/")
    drop_capabilities()
    writable = [text_to_path(path) for path in setup["writable"]]
    with suppress(OSError):  # it is the second layer: the mounts hold without it
        landlock.restrict([b"/"], writable)
    forbidden = {
        (device, inode, text_to_path(name)): denied for device, inode, name, denied in setup["forbidden"]
    }
    pinned = set()
    for path in setup["pinned"]:
        try:
            found = os.stat(text_to_path(path), follow_symlinks=False)
        except OSError:
            continue
        pinned.add((found.st_dev, found.st_ino))
    mounted = {}
    for text, denied in setup["mounted"]:
        above, name = os.path.split(text_to_path(text))
        try:
            found = os.stat(above, follow_symlinks=False)
        except OSError:
            continue
        mounted[found.st_dev, found.st_ino, name] = denied
    disk.use_names(GuardedNames(forbidden, frozenset(pinned), mounted))


def drop_capabilities() -> None:
    """Keep none, and see that it is so.

    Raises:
        OSError: the system refuses, or it isn't so.
    """
    library = libc()
    assert library is not None
    words = ctypes.c_uint32 * 6
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    library.prctl(_PR_CAP_AMBIENT, *map(ctypes.c_ulong, (_PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)))
    left = words()
    if library.capset(header, words()) or library.capget(header, left) or any(left):
        raise OSError(ctypes.get_errno() or errno.EPERM, "capabilities could not be dropped")


# Requests.


def path_to_text(path: bytes) -> str:
    return path.decode("latin-1")


def text_to_path(text: str) -> bytes:
    return text.encode("latin-1")


def _read(turn: Turn, path: bytes, body: bytes, arguments: Header) -> Reply:
    fd = disk.open_to_read(turn, path, follow=arguments["follow"])
    if os.fstat(fd).st_size <= SMALL:
        data = disk.read_at(turn, fd, 0, SMALL + 1)
        if len(data) <= SMALL:
            os.close(fd)
            return {}, data, None
    return {}, b"", fd


def _write_file(turn: Turn, path: bytes, body: bytes, arguments: Header) -> Reply:
    disk.write_file_waiting(turn, path, body, follow=arguments["follow"])
    return {}, b"", None


def _create_directory(turn: Turn, path: bytes, body: bytes, arguments: Header) -> Reply:
    disk.create_directory(turn, path, recursive=arguments["recursive"], follow=arguments["follow"])
    return {}, b"", None


def _get_metadata(turn: Turn, path: bytes, body: bytes, arguments: Header) -> Reply:
    found, is_symlink = disk.get_metadata(turn, path, follow=arguments["follow"])
    stat = (found.mode, found.size, found.created_ms, found.modified_ms)
    return {"stat": stat, "symlink": is_symlink}, b"", None


def _canonicalize(turn: Turn, path: bytes, body: bytes, arguments: Header) -> Reply:
    return {}, disk.canonicalize(turn, path), None


def _read_directory(turn: Turn, path: bytes, body: bytes, arguments: Header) -> Reply:
    entries = [
        (b"d" if is_directory else b"f" if is_file else b"o") + name
        for name, is_directory, is_file in disk.read_directory(turn, path)
    ]
    return {}, b"\0".join(entries), None


def _remove(turn: Turn, path: bytes, body: bytes, arguments: Header) -> Reply:
    disk.remove(turn, path, **arguments)
    return {}, b"", None


def _copy(turn: Turn, path: bytes, body: bytes, arguments: Header) -> Reply:
    disk.copy_waiting(turn, path, text_to_path(arguments["to"]), recursive=arguments["recursive"])
    return {}, b"", None


def _walk(turn: Turn, path: bytes, body: bytes, arguments: Header) -> Reply:
    found = disk.walk(turn, path, **arguments)
    parts = [(b"d" if is_directory else b"f") + path for path, is_directory in found.entries]
    parts += [b"%d:%b" % (number, path) for path, number in found.errors]
    return {"entries": len(found.entries), "truncated": found.truncated}, b"\0".join(parts), None


def _open(turn: Turn, path: bytes, body: bytes, arguments: Header) -> Reply:
    mode = arguments["mode"]
    if mode == "read":
        return {}, b"", disk.open_to_read(turn, path, follow=arguments["follow"])
    return {}, b"", disk.open_to_write(turn, path, keep=mode == "update")


def _rename(turn: Turn, path: bytes, body: bytes, arguments: Header) -> Reply:
    disk.rename(turn, path, text_to_path(arguments["to"]), sync=arguments["sync"])
    return {}, b"", None


def _set_metadata(turn: Turn, path: bytes, body: bytes, arguments: Header) -> Reply:
    disk.set_metadata(turn, path, arguments["mode"], arguments["modified_at_ms"])
    return {}, b"", None


OPERATIONS: dict[str, Callable[[Turn, bytes, bytes, Header], Reply]] = {
    "canonicalize": _canonicalize,
    "copy": _copy,
    "create_directory": _create_directory,
    "get_metadata": _get_metadata,
    "open": _open,
    "read": _read,
    "read_directory": _read_directory,
    "remove": _remove,
    "rename": _rename,
    "set_metadata": _set_metadata,
    "walk": _walk,
    "write_file": _write_file,
}


def answer(header: Header, body: bytes) -> Reply:
    """Do what a request says."""
    try:
        path = text_to_path(header["path"])
        reply, data, fd = OPERATIONS[header["op"]](Turn(), path, body, header["with"])
    except OSError as error:
        number = error.errno or errno.EIO
        return {"id": header["id"], "error": (number, error.strerror or os.strerror(number))}, b"", None
    return {"id": header["id"], **reply}, data, fd


# Messages.


def encode_json(value: Any) -> str:
    """What headers are made of, as JSON."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if isinstance(value, dict):
        members = (f"{encode_json(name)}:{encode_json(member)}" for name, member in value.items())
        return "{" + ",".join(members) + "}"
    return "[" + ",".join(map(encode_json, value)) + "]"


def encode_answer(header: Header, body: bytes) -> bytes:
    encoded = encode_json(header).encode()
    return FRAME.pack(len(encoded), len(body)) + encoded + body


def _receive(fd: int, size: int) -> bytes | None:
    """`None` at the end."""
    data = b""
    parts = []
    while size:
        data = os.read(fd, min(size, SMALL))
        if not data:
            return None
        parts.append(data)
        size -= len(data)
    return data if len(parts) == 1 else b"".join(parts)


def _receive_message(fd: int) -> tuple[Header, bytes] | None:
    frame = _receive(fd, FRAME.size)
    if frame is None:
        return None
    header_size, body_size = FRAME.unpack(frame)
    header, body = _receive(fd, header_size), _receive(fd, body_size)
    return None if header is None or body is None else (marshal.loads(header), body)  # noqa: S302 - from the server


def _send(channel: _socket.socket, reply: Reply) -> None:
    header, body, fd = reply
    data = memoryview(encode_answer(header, body))
    if fd is not None:
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("i", fd))]
        data = data[channel.sendmsg([data], rights) :]
        os.close(fd)
    while data:
        data = data[os.write(channel.fileno(), data) :]


def main(fd: int) -> None:
    """Serve until the other end is closed."""
    channel = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)
    first = _receive_message(fd)
    if first is None:
        return
    enter(first[0])
    _send(channel, ({"ready": True}, b"", None))
    while (message := _receive_message(fd)) is not None:
        _send(channel, answer(*message))
        message = None
