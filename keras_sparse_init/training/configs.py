"""Where gin configs lie: packaged in the wheel, at the root of a checkout, or in the user's working directory."""

from __future__ import annotations

from pathlib import Path


def find_config(name: str) -> Path:
    """Looks a gin file up: in the working directory, then among the packaged configs.

    Args:
        name: A path, such as "mine.gin", or a packaged config's name, such as "lenet5/scratch.gin".

    Returns:
        The file's path.

    Raises:
        FileNotFoundError: When there is no such file; the message says where it was looked for and what there is.
    """
    root = config_root()
    for path in (Path(name), root / name):
        if path.is_file():
            return path
    available = ", ".join(sorted(path.relative_to(root).as_posix() for path in root.rglob("*.gin")))
    raise FileNotFoundError(
        f"No gin file {name!r} in {Path.cwd()} or {root}. The packaged configs are {available or 'missing'}"
    )


def config_root() -> Path:
    """The directory of the packaged configs: in the wheel inside the package, in a checkout at its root."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "gin_configs"
    return packaged if packaged.is_dir() else package.parent / "gin_configs"
