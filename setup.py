"""Says in one line what a copy without symbolic links lacks; everything else about the package is in pyproject.toml."""

import runpy
import sys

from setuptools import setup

try:
    runpy.run_path("dgfast/__init__.py")
except ImportError as error:
    sys.exit(str(error))
setup()
