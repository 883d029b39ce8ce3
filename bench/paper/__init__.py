"""The paper's experiments: `run.py` finds them in `experiments/`, one module each; see docs/paper.md."""
