"""Runs signal_grid.py, to the same arguments.

Python looks for modules in this directory first when it runs a benchmark, and many of them import the `signal` of the
standard library, which this file's name hides: they get that one.
"""

import importlib
import os
import runpy
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != _HERE]

if __name__ == "__main__":
    runpy.run_path(os.path.join(_HERE, "signal_grid.py"), run_name="__main__")
else:
    del sys.modules[__name__]
    importlib.import_module(__name__)
