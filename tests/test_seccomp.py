"""Which system calls a sandbox refuses: by an interpreter of the program, and in real sandboxes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from execenv.errors import NotSupported
from execenv.sandbox.seccomp import ALWAYS, NUMBERS, WITHOUT_NETWORK, compile_filter

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
I386, ARM = 0x40000003, 0x40000028
MACHINES = tuple(ARCHITECTURES)
AF_UNIX, AF_INET, AF_NETLINK, AF_INET6, AF_PACKET, AF_ALG, AF_VSOCK = 1, 2, 16, 10, 17, 38, 40
STREAM, DGRAM, RAW, SEQPACKET = 1, 2, 3, 5
CLOEXEC, NONBLOCK = 0o2000000, 0o4000
TIOCSTI, TIOCLINUX, TIOCGWINSZ = 0x5412, 0x541C, 0x5413
HIGH = 1 << 32


def interpret(program: bytes, number: int, arguments: tuple[int, ...], architecture: int) -> str:
    """What the kernel would do with the call; it runs only what Linux' checker lets through."""
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, architecture, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    instructions = list(struct.iter_unpack("<HBBI", program))
    accumulator = position = 0
    while True:
        code, true, false, value = instructions[position]
        position += 1
        if code == 0x20:
            assert value % 4 == 0
            assert value < len(data)
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x15:
            position += true if accumulator == value else false
        elif code == 0x35:
            position += true if accumulator >= value else false
        else:
            assert code == 0x06
            return {0x7FFF0000: "allow", 0x00050001: "EPERM", 0x80000000: "kill"}[value]


def verdict(name: str | int, *arguments: int, network: bool = False, machine: str = "x86_64") -> str:
    number = NUMBERS[name][MACHINES.index(machine)] if isinstance(name, str) else name
    return interpret(
        compile_filter(network=network, machine=machine), number, arguments, ARCHITECTURES[machine]
    )


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("network", [False, True])
def test_program_is_one_that_the_kernel_takes(machine: str, network: bool) -> None:
    program = compile_filter(network=network, machine=machine)
    assert len(program) % 8 == 0
    instructions = list(struct.iter_unpack("<HBBI", program))
    assert instructions[0] == (0x20, 0, 0, 4)  # the architecture comes first
    assert instructions[-1][0] == 0x06
    for position, (code, true, false, _) in enumerate(instructions):
        if code in (0x15, 0x35):
            assert position + 1 + max(true, false) < len(instructions)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize("name", ALWAYS)
def test_call_is_always_refused(name: str, network: bool, machine: str) -> None:
    assert verdict(name, network=network, machine=machine) == "EPERM"


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", WITHOUT_NETWORK)
def test_call_is_refused_without_network_only(name: str, machine: str) -> None:
    assert verdict(name, network=False, machine=machine) == "EPERM"
    assert verdict(name, network=True, machine=machine) == "allow"


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("network", [False, True])
def test_only_calls_that_are_listed_are_refused(network: bool, machine: str) -> None:
    column = MACHINES.index(machine)
    refused = set(ALWAYS) if network else {*ALWAYS, *WITHOUT_NETWORK, "socket", "socketpair", "setsockopt"}
    numbers = {NUMBERS[name][column] for name in refused}
    found = {number for number in range(1000) if verdict(number, network=network, machine=machine) != "allow"}
    assert found == numbers


SOCKETS = [
    ("socket", AF_UNIX, STREAM, "allow"),
    ("socket", AF_UNIX, SEQPACKET, "allow"),
    ("socket", AF_UNIX, STREAM | CLOEXEC | NONBLOCK, "allow"),
    ("socket", AF_UNIX | HIGH, STREAM | HIGH, "allow"),  # the kernel takes an int
    ("socket", AF_UNIX, DGRAM, "EPERM"),
    ("socket", AF_UNIX, DGRAM | CLOEXEC, "EPERM"),
    ("socket", AF_UNIX, RAW, "EPERM"),  # becomes a datagram socket
    ("socket", AF_UNIX, DGRAM | HIGH, "EPERM"),
    ("socket", AF_INET, STREAM, "EPERM"),
    ("socket", AF_INET | HIGH, STREAM, "EPERM"),
    ("socket", AF_INET6, DGRAM, "EPERM"),
    ("socket", AF_NETLINK, RAW, "EPERM"),
    ("socket", AF_PACKET, RAW, "EPERM"),
    ("socket", AF_ALG, SEQPACKET, "EPERM"),
    ("socket", AF_VSOCK, STREAM, "EPERM"),
    ("socket", 0, STREAM, "EPERM"),
    ("socketpair", AF_UNIX, STREAM | CLOEXEC, "allow"),
    ("socketpair", AF_UNIX, SEQPACKET, "allow"),
    ("socketpair", AF_UNIX, DGRAM, "EPERM"),
    ("socketpair", AF_INET, STREAM, "EPERM"),
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("name", "family", "kind", "expected"), SOCKETS)
def test_sockets_without_network_are_connected_unix_ones(
    name: str, family: int, kind: int, expected: str, machine: str
) -> None:
    assert verdict(name, family, kind, machine=machine) == expected
    assert verdict(name, family, kind, network=True, machine=machine) == "allow"


ARGUMENTS = [
    ("ioctl", (0, TIOCSTI, 0), "EPERM"),
    ("ioctl", (0, TIOCSTI | HIGH, 0), "EPERM"),  # the kernel takes an unsigned int (CVE-2019-7303)
    ("ioctl", (0, TIOCLINUX | 0xFF << 32, 0), "EPERM"),
    ("ioctl", (TIOCSTI, TIOCGWINSZ, TIOCSTI), "allow"),
    ("sendto", (3, 1, 1, 0, 0, 0), "allow"),
    ("sendto", (3, 1, 1, 0, 0x7F00_0000_1000, 16), "EPERM"),
    ("sendto", (3, 1, 1, 0, HIGH, 16), "EPERM"),
    ("sendto", (3, 1, 1, 0, 1, 16), "EPERM"),
    ("setsockopt", (3, 1, 7, 0, 4), "allow"),
    ("setsockopt", (3, 1, 8, 0, 4), "allow"),
    ("setsockopt", (3, 1, 26, 0, 4), "EPERM"),  # SO_ATTACH_FILTER
    ("setsockopt", (3, 6, 7, 0, 4), "EPERM"),
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("name", "arguments", "expected"), ARGUMENTS)
def test_call_is_refused_by_its_arguments(
    name: str, arguments: tuple[int, ...], expected: str, machine: str
) -> None:
    assert verdict(name, *arguments, machine=machine) == expected
    with_network = expected if name == "ioctl" else "allow"
    assert verdict(name, *arguments, network=True, machine=machine) == with_network


@pytest.mark.parametrize("network", [False, True])
def test_call_by_numbers_of_another_architecture_ends_the_process(network: bool) -> None:
    for machine, other in (("x86_64", I386), ("aarch64", ARM)):
        program = compile_filter(network=network, machine=machine)
        for number in (0, 1, 26, 102, 0xFFFFFFFF):
            assert interpret(program, number, (), other) == "kill"
    assert verdict(0x40000000 | 41, AF_INET, STREAM, network=network) == "kill"  # x32
    assert verdict(0x40000000, network=network) == "kill"
    assert verdict(0xFFFFFFFE, network=network) == "kill"
    assert verdict(0x3FFFFFFF, network=network) == "allow"
    assert verdict(-1, network=network) == "allow"  # no call at all: the kernel says so


def test_unknown_machine_is_named() -> None:
    with pytest.raises(NotSupported, match="riscv64 are not known here"):
        compile_filter(network=False, machine="riscv64")


HEADERS = {
    "x86_64": ("x86_64-linux-gnu/asm/unistd_64.h", "asm/unistd_64.h"),
    "aarch64": ("asm-generic/unistd.h",),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_numbers_are_those_of_the_kernels_headers(machine: str) -> None:
    header = next((p for name in HEADERS[machine] if (p := Path("/usr/include", name)).exists()), None)
    if header is None:
        pytest.skip("the kernel's headers are not here")
    theirs = dict(re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", header.read_text(), re.MULTILINE))
    for name, numbers in NUMBERS.items():
        assert int(theirs[name]) == numbers[MACHINES.index(machine)], name


# Real ones.

needs_bubblewrap = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("bwrap") is None or os.uname().machine not in MACHINES,
    reason="needs bubblewrap",
)


def run_inside(*argv: str, network: bool = False) -> subprocess.CompletedProcess[str]:
    bubblewrap = shutil.which("bwrap")
    assert bubblewrap is not None
    fd = os.memfd_create("filter")
    try:
        os.write(fd, compile_filter(network=network))
        os.lseek(fd, 0, os.SEEK_SET)
        view = [
            "--ro-bind",
            "/",
            "/",
            "--dev",
            "/dev",
            "--tmpfs",
            "/var/tmp",  # not /tmp: this may be a checkout there
            "--setenv",
            "TMPDIR",
            "/var/tmp",
            "--unshare-user",
            "--unshare-pid",
            "--unshare-ipc",
        ]
        return subprocess.run(
            [bubblewrap, *view, "--proc", "/proc", "--seccomp", str(fd), "--", *argv],
            pass_fds=[fd],
            # without those by which coverage measures programs: there is nowhere to write to
            env={name: value for name, value in os.environ.items() if not name.startswith("COV")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd="/",
        )
    finally:
        os.close(fd)


PROBE = """
import ctypes, errno, json, os, platform, socket
libc = ctypes.CDLL(None, use_errno=True)
numbers = json.loads(%r)
def call(name, *args):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(numbers[name]), *[ctypes.c_long(arg) for arg in args])
    return "ok" if result >= 0 else errno.errorcode[ctypes.get_errno()]
def attempt(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"
found = {
    "ptrace": call("ptrace", 16, 1, 0, 0),
    "process_vm_readv": call("process_vm_readv", 1, 0, 0, 0, 0, 0),
    "process_vm_writev": call("process_vm_writev", 1, 0, 0, 0, 0, 0),
    "pidfd_getfd": call("pidfd_getfd", 0, 0, 0),
    "kcmp": call("kcmp", 1, 1, 0, 0, 0),
    "io_uring_setup": call("io_uring_setup", 1, 0),
    "io_uring_enter": call("io_uring_enter", -1, 0, 0, 0, 0, 0),
    "io_uring_register": call("io_uring_register", -1, 0, 0, 0),
    "keyctl": call("keyctl", 0, -3, 0),
    "add_key": call("add_key", 0, 0, 0, 0, 0),
    "request_key": call("request_key", 0, 0, 0, 0),
    "perf_event_open": call("perf_event_open", 0, 0, 0, 0, 0),
    "bpf": call("bpf", 0, 0, 0),
    "open_by_handle_at": call("open_by_handle_at", 0, 0, 0),
    "TIOCSTI": call("ioctl", 0, 0x5412, 0),
    "TIOCSTI, high bits": call("ioctl", 0, 0x5412 | 1 << 40, 0),
    "TIOCLINUX": call("ioctl", 0, 0x541C, 0),
    "AF_INET": attempt(socket.socket),
    "AF_INET6, datagrams": attempt(socket.socket, socket.AF_INET6, socket.SOCK_DGRAM),
    "AF_NETLINK": attempt(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW),
    "AF_VSOCK": attempt(socket.socket, 40, socket.SOCK_STREAM),
    "AF_ALG": attempt(socket.socket, 38, socket.SOCK_SEQPACKET),
    "AF_UNIX": attempt(socket.socket, socket.AF_UNIX),
    "AF_UNIX, datagrams": attempt(socket.socket, socket.AF_UNIX, socket.SOCK_DGRAM),
    "AF_UNIX, raw": attempt(socket.socket, socket.AF_UNIX, socket.SOCK_RAW),
    "pair": attempt(socket.socketpair),
    "pair of datagrams": attempt(socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM),
    "no call": "ok" if libc.syscall(ctypes.c_long(-1)) >= 0 else errno.errorcode[ctypes.get_errno()],
}
if found["AF_UNIX"] == "ok":
    plain = socket.socket(socket.AF_UNIX)
    plain.setblocking(False)
    found["connect"] = attempt(plain.connect, "/var/tmp/nobody")
    found["bind"] = attempt(plain.bind, "/var/tmp/somebody")
    found["listen"] = attempt(plain.listen)
    found["accept"] = attempt(plain.accept)
    left, right = socket.socketpair()
    found["send"] = attempt(left.send, b"x")
    found["sendto"] = attempt(left.sendto, b"x", "/var/tmp/nobody")
    found["recvfrom"] = attempt(right.recvfrom, 1)
    found["sendmsg"] = attempt(left.sendmsg, [b"x"])
    found["sendmsg to a path"] = attempt(left.sendmsg, [b"x"], [], 0, "/var/tmp/nobody")
    found["buffer"] = attempt(left.setsockopt, socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    found["shutdown"] = attempt(left.shutdown, socket.SHUT_WR)
print(json.dumps(found))
"""


def probe(*, network: bool) -> dict[str, str]:
    numbers = {name: both[MACHINES.index(os.uname().machine)] for name, both in NUMBERS.items()}
    code = PROBE % json.dumps(numbers)
    done = run_inside(os.path.realpath(sys.executable), "-I", "-S", "-c", code, network=network)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


EVER = {*ALWAYS, "TIOCSTI", "TIOCSTI, high bits", "TIOCLINUX"}
FAMILIES = {"AF_INET", "AF_INET6, datagrams", "AF_NETLINK", "AF_VSOCK", "AF_ALG"}
UNIX = {"AF_UNIX, datagrams", "AF_UNIX, raw", "pair of datagrams"}
CALLS = {"connect", "bind", "listen", "accept", "sendto"}
USUAL = {"AF_UNIX", "pair", "send", "recvfrom", "sendmsg", "buffer", "shutdown"}


@needs_bubblewrap
def test_sandbox_without_network_refuses_all_that_leads_out() -> None:
    found = probe(network=False)
    assert {name for name, answer in found.items() if answer == "EPERM"} == EVER | FAMILIES | UNIX | CALLS
    assert {name for name, answer in found.items() if answer == "ok"} == USUAL
    assert (found["no call"], found["sendmsg to a path"]) == ("ENOSYS", "EISCONN")


@needs_bubblewrap
def test_sandbox_with_network_refuses_what_is_about_other_processes() -> None:
    found = probe(network=True)
    assert {name for name, answer in found.items() if answer == "EPERM"} == EVER
    assert {"AF_INET", "AF_NETLINK", "AF_UNIX, datagrams", "bind", "listen", *USUAL} <= {
        name for name, answer in found.items() if answer == "ok"
    }
    assert found["connect"] == "ENOENT"


# mmap a page that can be executed, put the instructions there, and call them.
MACHINE_CODE = """
import ctypes, mmap, sys
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex(sys.argv[1]))
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
print("survived")
"""
GETPID_I386 = "b814000000 cd80 c3"  # mov eax, 20; int 0x80; ret
GETPID_X32 = "b827000040 0f05 c3"  # mov eax, 0x40000027; syscall; ret
GETPID = "b827000000 0f05 c3"


@needs_bubblewrap
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86_64 has two more sets of numbers")
@pytest.mark.parametrize(("code", "status"), [(GETPID_I386, 159), (GETPID_X32, 159), (GETPID, 0)])
@pytest.mark.parametrize("network", [False, True])
def test_process_that_calls_by_other_numbers_ends(code: str, status: int, network: bool) -> None:
    done = run_inside(os.path.realpath(sys.executable), "-I", "-S", "-c", MACHINE_CODE, code, network=network)
    assert done.returncode == status == (128 + signal.SIGSYS if status else 0), done.stderr
    assert done.stdout == ("" if status else "survived\n")


TRIO = """
import socket, subprocess, sys, trio
async def main():
    assert await trio.to_thread.run_sync(lambda: 7) == 7
    done = await trio.run_process([sys.executable, "-c", "print(input())"], stdin=b"hello\\n",
                                  capture_stdout=True)
    print(done.stdout.decode(), end="")
trio.run(main)
"""
ASYNCIO = """
import asyncio, sys
async def main():
    await asyncio.to_thread(len, "")
    child = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    out, _ = await child.communicate(b"hello\\n")
    print(out.decode(), end="")
asyncio.run(main())
"""
MULTIPROCESSING = """
import multiprocessing
context = multiprocessing.get_context("spawn")
if __name__ == "__main__":
    ours, theirs = context.Pipe()
    theirs.send("hello")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(abs, [-1, 2]) == [1, 2]
    print(ours.recv())
"""
NODE = """
const { spawn } = require("child_process");
const child = spawn("cat", [], { stdio: ["pipe", "pipe", "inherit"] });
child.stdout.pipe(process.stdout);
child.stdin.on("error", (error) => { console.log(String(error)); });
child.stdin.end("hello\\n");
"""


@needs_bubblewrap
@pytest.mark.parametrize("code", [TRIO, ASYNCIO, MULTIPROCESSING], ids=["trio", "asyncio", "multiprocessing"])
def test_event_loops_and_pools_of_python_work_without_network(code: str) -> None:
    done = run_inside(sys.executable, "-c", code)
    assert (done.stdout, done.stderr, done.returncode) == ("hello\n", "", 0)


@needs_bubblewrap
def test_node_works_without_network() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    done = run_inside(node, "-e", NODE)
    assert (done.stdout, done.stderr, done.returncode) == ("hello\n", "", 0)


@needs_bubblewrap
def test_git_and_a_compiler_work_without_network(tmp_path: Path) -> None:
    git, compiler = shutil.which("git"), shutil.which("cc")
    if git is None or compiler is None:
        pytest.skip("needs git and cc")
    script = f"""
        set -e; cd /var/tmp; {git} init -q w; cd w; export HOME=/var/tmp
        echo 'int main(void) {{ return 0; }}' > a.c; {compiler} -o a a.c; ./a
        {git} add .; {git} -c user.name=a -c user.email=a@b commit -qm one; {git} log --format=%s
    """
    done = run_inside("/bin/sh", "-c", script)
    assert (done.stdout, done.stderr, done.returncode) == ("one\n", "", 0)
