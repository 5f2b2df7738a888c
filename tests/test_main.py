"""`python -m smearlens` is the command line."""

import subprocess
import sys


def test_the_package_runs_as_the_command_does():
    command = [sys.executable, "-m", "smearlens", "experiment", "no-such-study"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("ValueError: no study 'no-such-study'; nearest: ")
    help_text = subprocess.run([*command[:3], "--help"], capture_output=True, text=True)
    assert help_text.returncode == 0
    assert help_text.stdout.startswith("usage: smearlens ")
