#!/usr/bin/env python3
"""Stands in for the interpreter of a contender: speaks the protocol of ``benchmarks.worker``, and starts at once.

It leaves its process id in the folder FASTVIT_STUB. What its provider is called decides what it does.
"""

import json
import os
import pathlib
import signal
import sys
import time

ANSWERS = {
    "reference": {"flops": 1000, "bytes": 1000},
    "prepare": {"seconds": 0.1, "floor": False, "notes": {}},
    "check": {"accurate": True, "error": 1e-7, "plain_error": 1e-7},
    "slot": {"seconds": 1e-3},
    "rates": {"product": 1e9, "copy": 1e9},
}
pathlib.Path(os.environ["FASTVIT_STUB"], str(os.getpid())).touch()
provider, slots = "", 0
for line in sys.stdin:
    command = json.loads(line)
    provider = command.get("provider", provider)
    slots += command["do"] == "slot"
    if provider == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if provider == "hangs":
        time.sleep(600)
    if provider == "exits" or (slots > 2 and provider == "exits later"):
        sys.stderr.write("a word\ngoodbye\n")
        sys.exit(3)
    print(json.dumps(ANSWERS[command["do"]]), flush=True)
