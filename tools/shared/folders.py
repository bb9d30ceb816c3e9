"""Folders of results, which are written whole or not at all; of one to which files are added, each
file is."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError


def new_folder(path: Path) -> Path:
    """`path`, if a folder can be made there; it is not made yet.

    Raises:
        UserError: something is there already, or it cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} exists: choose another --output")
    return writable_folder(path)


def writable_folder(path: Path) -> Path:
    """`path`, if a folder can be made there, or in its place; it is not made yet.

    Raises:
        UserError: it cannot be written, or is a file.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is no folder: choose another --output")
    parent = next(p for p in path.absolute().parents if p.exists())
    try:  # now: an error after minutes of work would be too late
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another "
                        "--output") from None
    return path


@contextmanager
def written_whole(folder: Path, keep: bool = False) -> Iterator[Path]:
    """`with written_whole(folder) as new:` what the block writes into `new` becomes `folder`.

    Whatever ends the block by an error leaves `folder` as it was, or not there.

    Args:
        keep: files that `folder` holds under other names stay there; else it is replaced.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place:
        new, old = Path(place) / "new", Path(place) / "old"
        new.mkdir()
        yield new
        if keep and folder.is_dir():
            for path in [p for p in new.rglob("*") if p.is_file()]:
                target = folder / path.relative_to(new)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
            return
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except BaseException:  # such as Ctrl-C in between
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
