"""Makes the top-level folder kernels/ importable as `fastkl.kernels`.

The operators live beside the package, in their own folder, but a top-level module called `kernels` belongs to another
distribution. This module turns itself into a package whose path is whichever of the two places exists: fastkl/kernels
(an installed wheel) or ../kernels (a checkout). Neither has an __init__.py, so that this
module is found before the folder.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(folder) for folder in (_here / "kernels", _here.parent / "kernels") if folder.is_dir()]
