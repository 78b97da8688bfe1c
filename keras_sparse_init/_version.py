"""The version, in its one place (read by the build, `__init__` and a run's summary)."""

__version__ = "0.1.0"
