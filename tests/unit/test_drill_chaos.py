"""What a drill sees of the processes that it strikes."""

import subprocess
import sys
import time

import psutil

from mimiclab.drill.chaos import start_time


def test_the_start_of_a_process_is_told_on_the_clock_of_everything_else() -> None:
    before = time.time()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        # A tick of the kernel's clock is a hundredth of a second.
        assert before - 0.02 < start_time(psutil.Process(process.pid)) < time.time() + 0.02
    finally:
        process.kill()
        process.communicate()
