"""Programs in a sandbox do what programs do: the other contracts, under one that restricts little."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.contract import test_input, test_output, test_run, test_tty
from tests.fakes import requires_bubblewrap

DIFFERENT = {
    "test_run_waits_for_the_output_of_descendants": "what it leaves running inside ends with it",
    "test_exit_is_not_delayed_by_a_descendant_that_holds_the_output": "the same",
    "test_unknown_program_is_not_started": "it is looked for inside, when the start was answered: status 127",
    "test_unknown_program_is_not_started_on_a_terminal": "the same",
    "test_file_that_is_not_executable_is_not_started": "the same",
    "test_script_without_interpreter_line_is_not_started": "the same",
}
"""What does not hold in a sandbox, and why."""

pytestmark = [requires_bubblewrap, pytest.mark.parametrize("environment", ["sandboxed"], indirect=True)]


def _of(module: ModuleType) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(module).items()
        if name.startswith("test_") and callable(value) and name not in DIFFERENT
    }


for _module in (test_input, test_output, test_run, test_tty):
    globals().update(_of(_module))
