"""Ctrl-C and SIGTERM: the first is a flag, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from uni3d.training.stop import StopFlag

LOOP = """
import sys, time
from uni3d.errors import Interrupted
from uni3d.training.stop import StopFlag
try:
    with StopFlag() as stop:
        print("ready", flush=True)
        while not stop.is_set:
            time.sleep(0.01)
        if sys.argv[1] == "slow":
            print("saving", flush=True)
            time.sleep(60)
        raise stop.interruption("saved; go on with --resume outputs/x")
except Interrupted as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def start(mode: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_lets_the_loop_save(number: signal.Signals, code: int) -> None:
    process = start("quick")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert "--resume" in out
    assert "stopping after this step" in err and "Traceback" not in err


def test_the_second_signal_leaves_at_once() -> None:
    process = start("slow")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "saving\n"
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - begun < 5
    assert "leaving at once" in err


def test_the_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopFlag() as stop:
        assert signal.getsignal(signal.SIGINT) != before[0]
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set and stop.signal_number == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_it_can_be_requested() -> None:
    codes: list[int] = []

    def work() -> None:
        with StopFlag() as stop:
            assert not stop.is_set
            stop.request()
            assert stop.is_set
            codes.append(stop.interruption("cancelled").exit_code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [130]
