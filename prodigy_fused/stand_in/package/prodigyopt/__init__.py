"""prodigy_fused in the place of prodigyopt, by ``prodigy_fused.install()`` or ``python -m prodigy_fused run``.

``prodigyopt.Prodigy`` is ``prodigy_fused.Prodigy``. The rest of prodigyopt is its own, where it is installed.
"""

import importlib
import sys
from pathlib import Path
from pkgutil import extend_path

__version__ = "1.1.2+prodigy.fused"  # the version of prodigyopt that it stands for
__path__ = extend_path(__path__, __name__)

try:
    from .prodigy import Prodigy
except ModuleNotFoundError as error:
    if error.name != "prodigy_fused":
        raise
    # A process of an environment without prodigy_fused, which inherited PYTHONPATH: as if this folder were not there.
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parents[1])]
    del sys.modules[__name__]
    importlib.import_module(__name__)  # the importer gets what is in sys.modules afterwards

__all__ = ["Prodigy"]
