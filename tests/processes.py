"""Python in a process of its own, in which Triton compiles instead of interpreting."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python(code, *arguments, **environment):
    """Returns the output of some code, which may import this source tree; ``environment`` is added to our own."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    cache = str(ROOT / "build" / "triton")
    environment = {**inherited, "PYTHONPATH": path, "TRITON_CACHE_DIR": cache, **environment}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
