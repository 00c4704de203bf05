"""All checks, each in an environment of its own: `nox` for those before a commit, `nox -l` for their list.

Needs nothing but nox. Environments are kept between runs; `nox -r no` builds them anew.
"""

from __future__ import annotations

import os

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests", "examples"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
# Files of tests, two more than there are processors: half of the time goes to waiting for processes.
# Those that take long begin first (tests/conftest.py), and not those with most tests.
SIDE_BY_SIDE = ("-n", str(min((os.cpu_count() or 1) + 2, 4)), "--dist=loadfile", "--no-loadscope-reorder")
EVERYTHING = ".[httpx,httpx2,jwt,noise,redis,speedups]"


def install(session: nox.Session, *groups: str, package: bool = True) -> None:
    """Install dependency groups, and this package from its sources with all its extras."""
    wanted = nox.project.dependency_groups(PYPROJECT, *groups) if groups else ()
    session.install(*(["-e", EVERYTHING] if package else []), *wanted)


@nox.session
def lint(session: nox.Session) -> None:
    """Rules and layout of the code."""
    install(session, "lint", package=False)
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Types, strictly."""
    install(session, "types")
    session.run("mypy", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that need nothing but Python, with branch coverage. Words behind `--` go to pytest."""
    install(session, "test")
    whole = (*SIDE_BY_SIDE, "--cov", "--cov-report=term")
    session.run("pytest", "-m", "not interop", *(session.posargs or whole))


@nox.session
def interop(session: nox.Session) -> None:
    """Tests with a released codex, which npm gets unless it is there. EXECENV_REQUIRE_TOOLS=1: never skip."""
    install(session, "test")
    session.run("pytest", "-m", "interop", "tests/interop", *(session.posargs or SIDE_BY_SIDE))


@nox.session
def soak(session: nox.Session) -> None:
    """10,000 lost connections, or `-- --cuts N --seed SEED`: nothing lost, nothing twice, no wrong word.

    Without words, then a relay whose parts are killed; `python -m tests.relay_chaos -h` for more of that.
    """
    install(session, "test")
    session.run("python", "-m", "tests.soak", *session.posargs)
    if not session.posargs:
        session.run("python", "-m", "tests.relay_chaos")


@nox.session
def examples(session: nox.Session) -> None:
    """The examples, and the programs and commands of README.md."""
    install(session, "test")
    session.run("pytest", "tests/test_examples.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """How fast this server is, beside a released codex where there is one."""
    install(session)
    session.run("python", "bench/compare.py", *session.posargs)
