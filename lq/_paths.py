"""Where configuration lives: in the checkout beside the package, in a wheel inside it."""

from pathlib import Path

__all__ = ["home"]


def home() -> Path:
    """Folder that holds ``conf`` and ``recipes``.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: where neither place has them, as in a broken installation.
    """
    package = Path(__file__).resolve().parent
    # the checkout first: an editable installation may carry a stale copy inside the package
    for folder in (package.parent, package):
        if (folder / "conf" / "config.yaml").is_file() and (folder / "recipes").is_dir():
            return folder
    raise FileNotFoundError(f"conf and recipes must lie in {package} or beside it: install lq again")
