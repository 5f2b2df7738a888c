"""Every engine gives the same numbers, even if one of its workers is killed in the middle."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smearlens._extras import MissingExtraError
from smearlens.cli import main
from smearlens.experiments.engines import chosen_engine, run_elsewhere, use_engine

SCRIPT = Path(__file__).with_name("engines.py")


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    return on("serial", tmp_path_factory.mktemp("grids"))


def on(engine, root):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(root), engine],
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    return root / engine / "runs"


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        "processes",
        pytest.param(
            "ray",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("ray") is None, reason="the extra ray is not installed"
            ),
        ),
    ],
)
def test_a_killed_worker_changes_no_byte(serial, engine, tmp_path):
    runs = on(engine, tmp_path)
    assert (runs / "killed").exists()
    cells = sorted(folder.name for folder in serial.iterdir())
    assert len(cells) == 3
    resumed, processes = [], set()
    for cell in cells:
        for file in ("measures.json", "metrics.jsonl", "checkpoints/step-000009/model.safetensors"):
            assert (serial / cell / file).read_bytes() == (runs / cell / file).read_bytes(), file
        rows = [line.split() for line in (runs / cell / "steps.txt").read_text().splitlines()]
        steps = [int(step) for step, _ in rows]
        resumed += [] if steps == list(range(10)) else [steps]
        processes |= {process for _, process in rows}
    assert resumed == [[*range(7), *range(4, 10)]]  # killed at 6, resumed at the checkpoint of 4
    assert len(processes) >= 2


WAITING = """
import subprocess
from smearlens.experiments.engines import run_elsewhere

if __name__ == "__main__":
    shells = ["sh", "sh", "-c", "-c", *(f"echo $PPID > {f}; exec sleep 99" for f in "ab")]
    run_elsewhere(subprocess.run, shells, jobs=2)
"""


def test_ctrl_c_ends_the_workers_in_silence(tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    process = subprocess.Popen(
        [sys.executable, "waiting.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    files = [tmp_path / "a", tmp_path / "b"]
    while not all(file.exists() and file.read_text() for file in files):
        assert process.poll() is None
        time.sleep(0.1)
    for file in files:  # a terminal tells all of them, in whatever order
        os.kill(int(file.read_text()), signal.SIGINT)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert said.count("Traceback") == said.count("KeyboardInterrupt") == 1  # of the script itself
    assert "Process" not in said
    assert "semaphore" not in said


def test_the_engine_is_chosen_for_a_time_and_by_a_right_name():
    assert chosen_engine() == "processes"
    with use_engine("serial"):
        assert chosen_engine() == "serial"
        run_elsewhere(pytest.fail, [2, 3, 5], jobs=2)
        with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
            run_elsewhere(pytest.fail, [2, 3, 5], jobs=0)
    assert chosen_engine() == "processes"
    with (
        pytest.raises(ValueError, match="one of serial, processes, ray, got 'threads'"),
        use_engine("threads"),
    ):
        pass


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    message = r"ray is not installed; .*pip install 'smearlens\[ray\]'"
    with pytest.raises(MissingExtraError, match=message), use_engine("ray"):
        pass
    for command in (["compare"], ["experiment", "mamba-induction"]):
        with pytest.raises(SystemExit, match="1"):
            main([*command, "--engine", "ray", "--out", str(tmp_path / "out")])
        assert "pip install 'smearlens[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
