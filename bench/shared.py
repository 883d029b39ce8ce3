"""The folders, and the modules that the benchmarks share with the demo in examples/shakespeare.

Imported before the package, which it lets a script find in a tree that was built in place, but not installed.
"""

import sys
from pathlib import Path

# Second, after the folder of the script: `machine` or `corpus` of an installed distribution must not come first.
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples" / "shakespeare"))
sys.path.append(str(Path(__file__).resolve().parents[1]))

import machine
import palette
from corpus import Corpus, load_text
from gpt import GPT

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

__all__ = ["GPT", "RESULTS", "ROOT", "Corpus", "load_text", "machine", "palette"]
