"""Programs that try to get out of a sandbox, and what is to stop each of them.

`python -m tests.escapes` prints the table that is in docs/escapes.md.

Each program is Python, run inside by the system's interpreter, and takes one argument: JSON with what it
needs to know of the outside (`test_escapes.Outside`). `attempt` in front of a step lets the next one run
whatever became of it. What counts is what is seen from outside afterwards. Where nothing can be seen there,
a program says `ESCAPED`.
"""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import dedent
from typing import Literal

from attrs import frozen

PRELUDE = dedent("""\
    import ctypes, errno, fcntl, json, os, select, signal, socket, stat, struct, subprocess, sys, time
    facts = json.loads(sys.argv[1])
    globals().update(facts)
    libc = ctypes.CDLL(None, use_errno=True)
    def checked(value):
        if value == -1:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return value
    def attempt(step, *args):
        try:
            return step(*args)
        except OSError as error:
            print(step.__name__, errno.errorcode.get(error.errno, error), flush=True)
    def append(path):
        with open(path, "a") as file:
            file.write("escaped\\n")
    def show(path):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            print(os.read(fd, 100_000).decode(errors="replace"), flush=True)
        finally:
            os.close(fd)
    def both():
        attempt(append, canary)
        attempt(show, secret)
    def escaped(what):
        print("ESCAPED", what, flush=True)
    def everyone():
        # of a machine that is not ours only who is meant: this runs without a sandbox too
        return [int(name) for name in os.listdir("/proc") if name.isdigit()] if sandboxed else []
    def bytes_of(path):
        return os.fsencode(path)
""")

END = '\nprint("tried", flush=True)\n'
"""The last line: a program that stumbled over itself has shown nothing."""

Policy = Literal["workspace", "view"]
Codex = Literal["yes", "no", "not as root"]
Control = Literal["anyone", "root", None]


@frozen
class Escape:
    """One attempt.

    Attributes:
        name: what the table calls it.
        stopped: how it is stopped.
        source: the program.
        policy: "workspace": all may be read but one secret, the workspace may be written. "view": only the
            workspace and the system's programs are there. No network in either.
        control: who can do the harm without a sandbox: this is shown in each run.
        only: only a server of root is asked, or only one of nobody.
        codex: whether the exec-server of codex 0.169.0 stops it.
    """

    name: str
    stopped: str
    source: str
    policy: Policy = "workspace"
    control: Control = "anyone"
    only: Literal["root", "nobody", None] = None
    codex: Codex = "yes"

    @property
    def test(self) -> str:
        return "test_escape_is_stopped"

    @property
    def program(self) -> str:
        return PRELUDE + dedent(self.source) + END


READ_ONLY_MOUNT = "everything but the workspace is mounted read-only"
NOT_IN_VIEW = "what is not granted is not mounted"
MASKED = "a mask is mounted over it"
PIDS = "a process namespace of its own: nobody outside has a number"
NO_NET = "the filter refuses the family (EPERM), in a network namespace of its own"
FILTER = "the filter refuses the call"
NO_CAPS = "no capability, in a user namespace of its own"
LOCKED = "mounts of the outer namespace are locked for an inner one"

ESCAPES: tuple[Escape, ...] = (
    # names
    Escape("write outside by its name", READ_ONLY_MOUNT, "both()"),
    Escape("read and write outside of a narrow view", NOT_IN_VIEW, "both()", policy="view"),
    Escape(
        "write through a symlink",
        READ_ONLY_MOUNT,
        """
        os.symlink(canary, workspace + "/to-file")
        os.symlink(out, workspace + "/to-directory")
        attempt(append, workspace + "/to-file")
        attempt(append, workspace + "/to-directory/canary")
        attempt(append, workspace + "/to-directory/new")
        """,
    ),
    Escape(
        "read through a symlink",
        NOT_IN_VIEW,
        """
        os.symlink(secret, workspace + "/to-file")
        os.symlink(out, workspace + "/to-directory")
        attempt(show, workspace + "/to-file")
        attempt(show, workspace + "/to-directory/secret")
        """,
        policy="view",
    ),
    Escape(
        "a symlink that is swapped while it is used",
        READ_ONLY_MOUNT,
        """
        os.mkdir(workspace + "/real"); os.symlink(out, workspace + "/swapped")
        swapper = os.fork()
        if swapper == 0:
            while True:
                libc.renameat2(-100, bytes_of(workspace + "/real"), -100, bytes_of(workspace + "/swapped"), 2)
        for number in range(2000):
            try: append(f"{workspace}/real/new")
            except OSError: pass
            try: print(open(f"{workspace}/real/secret").read())
            except OSError: pass
        os.kill(swapper, 9); os.waitpid(swapper, 0)
        """,
    ),
    Escape(
        "a hard link to a file outside",
        "a link across mounts is refused",
        """
        def link(path, name): os.link(path, name)
        attempt(link, canary, workspace + "/linked")
        attempt(append, workspace + "/linked")
        def link_by_fd():
            fd = os.open(canary, os.O_RDONLY)
            checked(libc.linkat(fd, b"", -100, bytes_of(workspace + "/hard2"), 0x1000))
        attempt(link_by_fd)
        def link_by_proc():
            fd = os.open(canary, os.O_RDONLY)
            checked(libc.linkat(-100, b"/proc/self/fd/%d" % fd, -100, bytes_of(workspace + "/hard3"), 0x400))
        attempt(link_by_proc)
        for name in ("hard2", "hard3"):
            if os.path.exists(f"{workspace}/{name}"): attempt(append, f"{workspace}/{name}")
        """,
    ),
    Escape(
        "rename of a file from outside",
        "a rename across mounts is refused",
        """
        def move(): os.rename(canary, workspace + "/moved")
        attempt(move)
        def exchange():
            append(workspace + "/mine")
            checked(libc.renameat2(-100, bytes_of(workspace + "/mine"), -100, bytes_of(canary), 2))
        attempt(exchange)
        def remove(): os.unlink(canary)
        attempt(remove)
        """,
    ),
    Escape(
        "..",
        NOT_IN_VIEW,
        """
        os.chdir(workspace)
        attempt(append, "../out/canary")
        attempt(show, "../out/secret")
        attempt(show, workspace + "/sub/../../out/secret")
        fd = os.open(workspace, os.O_RDONLY)
        os.chdir("/")
        os.fchdir(fd)
        attempt(show, "../out/secret")
        """,
        policy="view",
    ),
    Escape(
        "mode and owner of a file outside",
        READ_ONLY_MOUNT,
        """
        def chmod(): os.chmod(canary, 0o600)
        def times(): os.utime(canary, (1, 1))
        def attribute(): os.setxattr(canary, "user.escaped", b"1")
        for one in (chmod, times, attribute): attempt(one)
        """,
    ),
    # /proc
    Escape(
        "/proc/self/root and /proc/1/root",
        "/proc is that of the inner namespace",
        """
        for pid in ("self", "thread-self", "1", victim, server):
            attempt(append, f"/proc/{pid}/root{canary}")
            attempt(show, f"/proc/{pid}/root{secret}")
        """,
    ),
    Escape(
        "/proc/*/cwd",
        PIDS,
        """
        for pid in {victim, server, *everyone()}:
            if os.path.exists(f"/proc/{pid}/cwd/canary"): attempt(append, f"/proc/{pid}/cwd/canary")
            attempt(show, f"/proc/{pid}/cwd/secret")
        """,
    ),
    Escape(
        "/proc/*/fd",
        PIDS,
        """
        for pid in {victim, *everyone()}:
            for fd in attempt(os.listdir, f"/proc/{pid}/fd") or ():
                if pid == os.getpid(): continue
                def reopen():
                    place = f"/proc/{pid}/fd/{fd}"
                    if stat.S_ISREG(os.stat(place).st_mode):
                        show(place)
                        append(place)
                attempt(reopen)
        """,
    ),
    Escape(
        "/dev/fd and descriptors beside 0, 1 and 2",
        "every other descriptor is closed before the program",
        """
        for fd in range(3, 1000):
            try: os.fstat(fd)
            except OSError: continue
            escaped(f"descriptor {fd} is {os.readlink(f'/proc/self/fd/{fd}')}")
        for fd in os.listdir("/dev/fd"):
            try: place = os.readlink("/dev/fd/" + fd)
            except OSError: continue
            if place.startswith(out): escaped(place)
        """,
        control=None,
    ),
    Escape(
        "the server's environment in /proc/*/environ",
        PIDS,
        """
        key = environment_key.encode() + b"="
        for pid in {server, *everyone()}:
            threads = attempt(os.listdir, f"/proc/{pid}/task") or ()
            for name in ("environ", "cmdline", *(f"task/{thread}/environ" for thread in threads)):
                def search():
                    data = open(f"/proc/{pid}/{name}", "rb").read()
                    if key in data: print(data.split(key)[1].split(b"\\0")[0].decode())
                attempt(search)
        """,
    ),
    Escape(
        "the server's environment in the memory of process 1",
        "bubblewrap gets the environment of the program, not that of the server",
        """
        def search(pid):
            key = environment_key.encode() + b"="
            memory = open(f"/proc/{pid}/mem", "rb")
            for line in open(f"/proc/{pid}/maps"):
                begin, end = (int(part, 16) for part in line.split()[0].split("-"))
                if "r" not in line.split()[1] or end - begin > 50_000_000 or "[v" in line: continue
                try:
                    memory.seek(begin)
                    data = memory.read(end - begin)
                except (OSError, ValueError, OverflowError): continue
                if key in data:
                    print(data.split(key, 1)[1].split(b"\\0")[0].decode(errors="replace"))
        for pid in {server, *everyone()} - {os.getpid()}: attempt(search, pid)
        """,
    ),
    Escape(
        "memory of a process outside: /proc/*/mem, process_vm_readv",
        PIDS + "; " + FILTER,
        """
        def vm_read():
            buffer = ctypes.create_string_buffer(64)
            local = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 64)
            remote = (ctypes.c_void_p * 2)(address, 64)
            checked(libc.process_vm_readv(victim, local, 1, remote, 1, 0))
            print(buffer.value.decode())
        attempt(vm_read)
        def proc_mem():
            with open(f"/proc/{victim}/mem", "rb", 0) as memory:
                memory.seek(address)
                print(memory.read(64).split(b"\\0")[0].decode())
        attempt(proc_mem)
        """,
    ),
    # other processes
    Escape(
        "kill of a process outside",
        PIDS,
        """
        for pid in (victim, server) if sandboxed else (victim,):
            attempt(os.kill, pid, signal.SIGKILL)
            attempt(os.killpg, pid, signal.SIGKILL)
        if sandboxed:
            mine = {int(name) for name in os.listdir("/proc") if name.isdigit()}
            for pid in range(1, 1 << 16):
                if pid in mine: continue
                try: os.kill(pid, 0)
                except ProcessLookupError: continue
                except PermissionError: pass
                escaped(f"there is a process {pid}")
        """,
    ),
    Escape(
        "pidfd_open and pidfd_send_signal",
        PIDS,
        """
        for pid in (victim, server) if sandboxed else (victim,):
            def by_pidfd():
                signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGKILL)
            attempt(by_pidfd)
        """,
    ),
    Escape(
        "pidfd_getfd",
        PIDS,
        """
        def steal():
            pidfd = os.pidfd_open(victim)
            fd = checked(libc.syscall(438, pidfd, victim_fd, 0))
            print(os.pread(fd, 1000, 0).decode())
        attempt(steal)
        """,
    ),
    Escape(
        "ptrace",
        PIDS + "; " + FILTER,
        """
        libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        for pid in (victim, server) if sandboxed else (victim,):
            def seize():
                checked(libc.ptrace(0x4206, pid, 0, 0))
                escaped("a traced process")
            attempt(seize)
        """,
    ),
    Escape(
        "priority, limits and scheduling of a process outside",
        PIDS,
        """
        import resource
        def nice():
            os.setpriority(os.PRIO_PROCESS, victim, 19)
            escaped("another priority")
        def limit():
            resource.prlimit(victim, resource.RLIMIT_CORE, (0, 0))
            escaped("another limit")
        attempt(nice)
        attempt(limit)
        """,
    ),
    Escape(
        "namespaces of a process outside: setns",
        PIDS,
        """
        for pid in (victim, server):
            for kind in ("user", "mnt", "pid", "net"):
                def enter():
                    checked(libc.setns(os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY), 0))
                attempt(enter)
        both()
        """,
    ),
    Escape(
        "System V shared memory of the host",
        "an IPC namespace of its own",
        """
        def attach():
            where = libc.shmget(shm_key, 0, 0)
            checked(where)
            libc.shmat.restype = ctypes.c_void_p
            place = libc.shmat(where, None, 0o10000)
            print(ctypes.string_at(place, 64).split(b"\\0")[0].decode())
        attempt(attach)
        """,
    ),
    # terminals
    Escape(
        "input for the terminal of the server: /dev/tty, TIOCSTI",
        "a session without a terminal, or with one of its own",
        """
        def push():
            fd = os.open("/dev/tty", os.O_RDWR)
            for byte in b"escaped\\n": fcntl.ioctl(fd, 0x5412, bytes([byte]))
        attempt(push)
        def every_terminal():
            for name in os.listdir("/dev/pts"):
                if not name.isdigit(): continue
                if terminal and f"/dev/pts/{name}" != terminal and not sandboxed: continue
                fd = os.open(f"/dev/pts/{name}", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
                if os.ttyname(fd) == terminal and sandboxed: escaped("the terminal can be opened")
                fcntl.ioctl(fd, 0x5412, b"x")
        attempt(every_terminal)
        """,
        control=None,
    ),
    # keyrings
    Escape(
        "keys of the server",
        "a session keyring of its own, or a filter of keyctl; the user's belongs to the outer namespace",
        """
        numbers = {"x86_64": (248, 249, 250), "aarch64": (217, 218, 219)}[os.uname().machine]
        def read_key(serial):
            buffer = ctypes.create_string_buffer(200)
            checked(libc.syscall(numbers[2], 11, serial, buffer, 200))
            print(buffer.value.decode())
        for ring in (-1, -2, -3, -4, -5):
            def search():
                read_key(checked(libc.syscall(numbers[2], 10, ring, b"user", key_name.encode(), 0)))
            attempt(search)
        def request():
            read_key(checked(libc.syscall(numbers[1], b"user", key_name.encode(), None, 0)))
        attempt(request)
        attempt(read_key, key_serial)
        """,
        codex="no",
    ),
    # the kernel
    Escape(
        "io_uring",
        FILTER,
        """
        def ring():
            params = ctypes.create_string_buffer(120)
            checked(libc.syscall(425, 4, params))
            escaped("a ring")
        attempt(ring)
        """,
        control=None,
    ),
    Escape(
        "a program executed from memory",
        "it is as confined as any other",
        """
        fd = os.memfd_create("program", 0)
        with open("/bin/sh", "rb") as program: os.write(fd, program.read())
        script = 'echo escaped >> "$1"; cat "$2"'
        subprocess.run([f"/proc/self/fd/{fd}", "-c", script, "sh", canary, secret], pass_fds=[fd])
        """,
    ),
    Escape(
        "device nodes: mknod",
        NO_CAPS,
        """
        def make(): os.mknod(workspace + "/node", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
        attempt(make)
        """,
        control="root",
    ),
    Escape(
        "a device node that lies in the workspace",
        "mounts are nodev",
        """
        def read():
            if os.read(os.open(workspace + "/device", os.O_RDONLY), 4) == bytes(4): escaped("zeros")
        attempt(read)
        """,
        control="root",
        only="root",
    ),
    Escape(
        "block devices of the host",
        "/dev is a small one",
        """
        for name in os.listdir("/dev"):
            try:
                status = os.stat("/dev/" + name)
            except OSError: continue
            if stat.S_ISBLK(status.st_mode): escaped(name)
        for name in ("mem", "kmsg", "port", "fuse", "kvm", "vsock", "loop-control", "mapper"):
            if os.path.exists("/dev/" + name): escaped(name)
        """,
        control="root",
    ),
    Escape(
        "setuid programs",
        "no_new_privs, and mounts are nosuid",
        """
        if "NoNewPrivs:\\t1" not in open("/proc/self/status").read(): escaped("new privileges")
        attempt(subprocess.run, [workspace + "/setuid-cat", root_secret])
        """,
        only="nobody",
    ),
    Escape(
        "/proc/sys, sysrq, core_pattern",
        "/proc/sys is mounted read-only, and bubblewrap covers the others",
        """
        for name in ("sys/kernel/core_pattern", "sys/kernel/modprobe", "sys/vm/drop_caches", "sysrq-trigger",
                     "sys/kernel/hostname", "sys/fs/binfmt_misc/register"):
            def open_it():
                os.close(os.open("/proc/" + name, os.O_WRONLY))
                escaped(name)
            attempt(open_it)
        """,
        control="root",
        codex="not as root",
    ),
    Escape(
        "/sys, cgroups and release_agent",
        READ_ONLY_MOUNT,
        """
        import glob
        places = glob.glob("/sys/fs/cgroup/**/release_agent", recursive=True)[:50]
        places += glob.glob("/sys/fs/cgroup/**/cgroup.procs", recursive=True)[:50]
        places += ["/sys/kernel/uevent_helper", "/sys/power/state", "/sys/kernel/mm/ksm/run"]
        for place in places:
            def open_it():
                os.close(os.open(place, os.O_WRONLY))
                escaped(place)
            attempt(open_it)
        """,
        control="root",
    ),
    Escape(
        "open_by_handle_at",
        NO_CAPS,
        """
        def by_handle():
            handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136)
            mount = ctypes.c_int()
            checked(libc.name_to_handle_at(-100, bytes_of(canary), handle, ctypes.byref(mount), 0))
            root = os.open(workspace, os.O_RDONLY)
            fd = checked(libc.open_by_handle_at(root, handle, os.O_WRONLY | os.O_APPEND))
            os.write(fd, b"escaped")
        attempt(by_handle)
        """,
        control="root",
    ),
    # namespaces inside
    Escape(
        "a user namespace inside: umount, remount, bind",
        LOCKED,
        """
        before = os.getuid(), os.getgid()
        def inner():
            checked(libc.unshare(0x10000000 | 0x00020000))
            maps = {"setgroups": "deny", "uid_map": f"0 {before[0]} 1", "gid_map": f"0 {before[1]} 1"}
            for name, text in maps.items():
                with open("/proc/self/" + name, "w") as file: file.write(text)
        attempt(inner)
        def umount(path, flags=2): checked(libc.umount2(bytes_of(path), flags))
        def mount(source, target, kind, flags): checked(
            libc.mount(source and bytes_of(source), bytes_of(target), kind and kind.encode(), flags, None))
        os.makedirs(workspace + "/mounted", exist_ok=True)
        if sandboxed:
            attempt(umount, secret)
            attempt(umount, out)
            attempt(mount, None, secret, None, 0x20 | 0x1000)
            attempt(mount, None, "/", None, 0x20 | 0x1000)
            attempt(mount, None, "/", None, 0x20)
            attempt(mount, "proc", workspace + "/mounted", "proc", 0)
            attempt(mount, "tmpfs", workspace + "/mounted", "tmpfs", 0)
            attempt(mount, "sysfs", workspace + "/mounted", "sysfs", 0)
            attempt(mount, out, workspace + "/mounted", None, 0x1000)
            attempt(append, workspace + "/mounted/canary")
            attempt(show, workspace + "/mounted/secret")
            attempt(mount, out, workspace + "/mounted", None, 0x1000 | 0x4000)
            attempt(append, workspace + "/mounted/canary")
            attempt(show, workspace + "/mounted/secret")
            attempt(mount, None, workspace + "/mounted", None, 0x20 | 0x1000)
            attempt(append, workspace + "/mounted/canary")
            def tree():
                fd = checked(libc.syscall(428, -100, bytes_of(out), 1))
                checked(libc.syscall(429, fd, b"", -100, bytes_of(workspace + "/mounted"), 4))
            attempt(tree)
            attempt(append, workspace + "/mounted/canary")
            attempt(show, workspace + "/mounted/secret")
        both()
        """,
    ),
    Escape(
        "a user namespace inside: chroot and pivot_root",
        LOCKED,
        """
        os.makedirs(workspace + "/root/old", exist_ok=True)
        def inner():
            checked(libc.unshare(0x10000000 | 0x00020000))
        if sandboxed: attempt(inner)
        def out_of_chroot():
            fd = os.open("/", os.O_RDONLY)
            os.chroot(workspace + "/root")
            os.fchdir(fd)
            for _ in range(50): os.chdir("..")
            os.chroot(".")
        if sandboxed: attempt(out_of_chroot)
        def pivot():
            root = bytes_of(workspace + "/root")
            checked(libc.mount(root, root, None, 0x1000, None))
            checked(libc.syscall({"x86_64": 155, "aarch64": 41}[os.uname().machine], root, root + b"/old"))
        if sandboxed: attempt(pivot)
        both()
        attempt(append, "/old" + canary)
        attempt(show, "/old" + secret)
        """,
    ),
    Escape(
        "a network namespace inside, and the host's loopback",
        NO_NET,
        """
        def inner(): checked(libc.unshare(0x10000000 | 0x40000000))
        if sandboxed: attempt(inner)
        def connect(): socket.create_connection(("127.0.0.1", tcp), 5).close()
        attempt(connect)
        """,
    ),
    # the network
    Escape(
        "TCP to the host's loopback",
        NO_NET,
        """
        def connect(family, address):
            with socket.socket(family, socket.SOCK_STREAM) as one:
                one.settimeout(5)
                one.connect((address, tcp))
        attempt(connect, socket.AF_INET, "127.0.0.1")
        attempt(connect, socket.AF_INET, "0.0.0.0")
        attempt(connect, socket.AF_INET6, "::ffff:127.0.0.1")
        """,
    ),
    Escape(
        "UDP to the host's loopback",
        NO_NET,
        """
        def send():
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
                one.sendmsg([b"escaped"], [], 0, ("127.0.0.1", udp))
        attempt(send)
        """,
    ),
    Escape(
        "other families: raw, packet, netlink, vsock, ICMP, Bluetooth, XDP, ALG",
        NO_NET,
        """
        kinds = [(socket.AF_INET, socket.SOCK_RAW, 1), (socket.AF_INET, socket.SOCK_DGRAM, 1),
                 (socket.AF_INET6, socket.SOCK_RAW, 58), (socket.AF_PACKET, socket.SOCK_RAW, 0),
                 (socket.AF_NETLINK, socket.SOCK_RAW, 0), (40, socket.SOCK_STREAM, 0),
                 (31, socket.SOCK_RAW, 1), (44, socket.SOCK_RAW, 0), (38, socket.SOCK_SEQPACKET, 0),
                 (30, socket.SOCK_SEQPACKET, 0), (43, socket.SOCK_STREAM, 0), (15, socket.SOCK_RAW, 2)]
        for kind in kinds:
            def make():
                socket.socket(*kind).close()
                escaped(f"family {kind[0]}")
            attempt(make)
        """,
    ),
    Escape(
        "a Unix stream socket by its path",
        "the filter refuses connect",
        """
        for path in unix_paths:
            def connect():
                with socket.socket(socket.AF_UNIX) as one: one.connect(path)
            attempt(connect)
        """,
    ),
    Escape(
        "an abstract Unix stream socket",
        "the filter refuses connect, in a network namespace of its own",
        """
        def connect():
            with socket.socket(socket.AF_UNIX) as one: one.connect("\\0" + abstract)
        attempt(connect)
        """,
    ),
    Escape(
        "a Unix datagram to a path or an abstract name: sendto, sendmsg",
        "the filter refuses datagram sockets and sendto",
        """
        for address in (*unix_datagrams, "\\0" + abstract_datagram):
            def by_sendto():
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one: one.sendto(b"escaped", address)
            def by_sendmsg():
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
                    one.sendmsg([b"escaped"], [], 0, address)
            attempt(by_sendto)
            attempt(by_sendmsg)
        """,
        codex="no",
    ),
    Escape(
        "a Unix datagram from one of a pair: sendmsg with an address",
        "the filter refuses pairs of datagram sockets",
        """
        for address in (*unix_datagrams, "\\0" + abstract_datagram):
            def from_pair():
                one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
                checked(libc.shutdown(one.fileno(), 0)) if not sandboxed else None
                one.sendmsg([b"escaped"], [], 0, address)
            attempt(from_pair)
            def raw_kind():
                one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_RAW)
                one.sendmsg([b"escaped"], [], 0, address)
            attempt(raw_kind)
        """,
        codex="no",
    ),
    Escape(
        "descriptors sent out by SCM_RIGHTS",
        "there is nobody to send them to",
        """
        fd = os.open(workspace, os.O_RDONLY)
        for address in unix_datagrams:
            def send():
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
                    rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd)
                    one.sendmsg([b"x"], [rights], 0, address)
            attempt(send)
        for path in unix_paths:
            def connect():
                with socket.socket(socket.AF_UNIX) as one:
                    one.connect(path)
                    socket.send_fds(one, [b"x"], [fd])
            attempt(connect)
        """,
        codex="no",
    ),
    Escape(
        "the 32-bit and x32 numbers of a system call",
        "the filter refuses other ABIs",
        """
        def x32():
            if checked(libc.syscall(0x40000000 + 41, 2, 1, 0)) >= 0: escaped("an x32 socket")
        if os.uname().machine == "x86_64":
            # Behind the filter an x32 call does not exist (ENOSYS), or it is refused; a bad one may kill
            child = os.fork()
            if child == 0:
                attempt(x32)
                os._exit(0)
            os.waitpid(child, 0)
        import mmap
        if os.uname().machine == "x86_64":
            # mov eax, 359 (socket); mov ebx, 2; mov ecx, 1; xor edx, edx; int 0x80; ret, with rbx saved
            code = bytes.fromhex("53b867010000bb02000000b90100000031d2cd805bc3")
            child = os.fork()
            if child == 0:
                memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
                memory.write(code)
                where = ctypes.addressof(ctypes.c_char.from_buffer(memory))
                fd = ctypes.CFUNCTYPE(ctypes.c_int)(where)()
                if fd >= 0: escaped("a 32-bit socket")
                os._exit(0)
            os.waitpid(child, 0)
        """,
        control=None,
    ),
    # masks
    Escape(
        "a denied file by another name in the workspace",
        MASKED,
        """
        attempt(show, workspace + "/private/key")
        def link(): os.link(workspace + "/private/key", workspace + "/linked")
        attempt(link)
        attempt(show, workspace + "/linked")
        def rename():
            os.rename(workspace + "/private", workspace + "/renamed")
        attempt(rename)
        for place in ("renamed", "private"):
            attempt(show, f"{workspace}/{place}/key")
        """,
    ),
    Escape(
        "the file and the memory of the bubblewrap inside: /proc/1/exe, /proc/1/mem",
        "an empty directory is mounted over /proc/1",
        """
        def change(path):
            fd = os.open(path, os.O_RDONLY)
            os.utime(fd, ns=(os.fstat(fd).st_atime_ns, os.fstat(fd).st_mtime_ns))
            escaped(path)
        def write(path):
            os.close(os.open(path, os.O_RDWR))
            escaped(path)
        if os.getpid() != 1:
            for task in ("/proc/1", "/proc/1/task/1", "/proc/self/../1", "/proc/self/root/proc/1"):
                attempt(change, task + "/exe")
                attempt(write, task + "/mem")
        """,
        control=None,
        only="root",
        codex="no",
    ),
    Escape(
        "protected names of the workspace",
        "they are mounted read-only, or a read-only directory is mounted in their place",
        """
        for name in (".git", ".codex", ".agents", ".aws"):
            place = f"{workspace}/{name}"
            for step in (lambda: os.mkdir(place), lambda: append(place + "/config"), lambda: os.rmdir(place),
                         lambda: os.rename(place, place + ".old"), lambda: os.symlink(out, place),
                         lambda: os.mkdir(place + "/hooks"), lambda: append(place + "/hooks/pre-commit")):
                attempt(step)
        """,
    ),
)


OTHERS: tuple[tuple[str, str, str, Codex], ...] = (
    (
        "a symlink that is swapped under calls about files",
        "they are done inside, where it leads nowhere else",
        "test_file_calls_do_not_follow_a_link_that_is_swapped_under_them",
        "yes",
    ),
    (
        "directories of nested entries swapped by a confined process",
        "what was mounted is compared with the plan before the program begins; empty mount points of "
        "bubblewrap may be left outside",
        "test_nested_entries_hold_while_a_confined_process_swaps_their_directories",
        "no",
    ),
    (
        "the root renamed between calls",
        "the plan is made for each call, and names inodes",
        "test_root_that_is_renamed_between_calls_is_not_written_to",
        "yes",
    ),
    (
        "a file that a pattern denies, made later",
        "patterns are looked up for each call",
        "test_file_that_a_pattern_denies_is_denied_though_it_came_later",
        "yes",
    ),
    (
        "the directory of a denied file renamed inside",
        "what leads to a denied path is a mount, which cannot be renamed",
        "test_denied_file_is_denied_though_its_directory_was_renamed_inside",
        "no",
    ),
    (
        "a mount made on the host after the start",
        "mounts of the host do not propagate into the sandbox",
        "test_mount_that_is_made_later_stays_outside",
        "no",
    ),
    (
        "LD_PRELOAD, LD_AUDIT, PATH and the like for bubblewrap",
        "the client's variables are for the program alone",
        "test_variables_of_the_client_do_nothing_to_bubblewrap",
        "no",
    ),
    (
        "variables of a program in command lines",
        "they are passed as an environment",
        "test_variables_of_the_client_are_in_no_command_line",
        "yes",
    ),
    (
        "setsid, double fork, ignored signals: after terminate",
        "the process namespace ends with its first process",
        "test_nothing_is_alive_after_terminate",
        "yes",
    ),
    (
        "setsid, double fork, ignored signals: after the end of the program",
        "the process namespace ends with its first process",
        "test_nothing_is_alive_after_the_program_has_ended",
        "yes",
    ),
    (
        "setsid, double fork, ignored signals: after SIGKILL of the server",
        "bubblewrap dies with its parent",
        "test_nothing_is_alive_after_the_server_was_killed",
        "yes",
    ),
    (
        "calls about a device or a FIFO",
        "only regular files are read",
        "test_calls_about_files_read_no_device_and_wait_for_no_fifo",
        "yes",
    ),
    (
        "calls about /proc: the server's environment and memory",
        "files about processes are read inside, also where all can be read",
        "test_calls_about_files_do_not_read_what_the_server_has",
        "no",
    ),
)
"""Attempts that are more than one program, with the names of their tests, and as `Escape.codex`."""


def rows() -> Iterator[tuple[str, str, str, Codex]]:
    """The table: attempt, what stops it, the test, and whether codex stops it."""
    for escape in ESCAPES:
        yield escape.name, escape.stopped, escape.test, escape.codex
    yield from OTHERS


def table() -> str:
    lines = ["| attempt | what stops it | test | codex 0.169.0 stops it |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {stopped} | `{test}` | {codex} |" for name, stopped, test, codex in rows()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
