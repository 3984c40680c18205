"""Files that are whole or not there, digests of what they hold, and the user's cache folder.

What is written takes its name when it is complete and on the disk: a kill or a full disk leaves the
file of before, and of processes that write it at once the last one wins. A link is replaced, not
followed. Modes follow the umask, but for the cache, which is its owner's alone.
"""

import errno
import fcntl
import hashlib
import io
import itertools
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"
# What a file system answers that does not sync folders, or to who may not read one.
NO_SYNC = (errno.EINVAL, errno.EACCES, errno.ENOTSUP, errno.EBADF)


def as_path(name: str, value: object, expected: str = "a path") -> Path:
    """TypeError about the argument `name` for what names no file."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    return Path(value)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; it takes the name `path` only when the block ends without an error.

    OSError names `path`, also where a library in between turned it into another error."""
    writer = None
    try:
        with _temporary(path, lambda part: part.touch(exist_ok=False)) as part:
            with open(part, "r+b") as file:
                writer = _Writer(file)
                yield writer
                file.flush()
                os.fsync(file.fileno())
            _rename(part, path)
    except BaseException as error:  # Ctrl-C too leaves nothing half-written
        failed = error if isinstance(error, OSError) else writer and writer.failed
        if failed and failed.errno and failed.filename is None:
            raise OSError(failed.errno, failed.strerror, str(path)) from error
        raise


def write_picture(figure, path: Path, dpi: int = 120) -> None:
    """A figure of matplotlib's as a PNG of 48 colours, chosen to cover all that are there: a fifth
    of the bytes, and nothing that an eye would miss."""
    from PIL import Image  # comes with matplotlib

    whole, small = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", dpi=dpi)
    picture = Image.open(whole).convert("RGB")
    picture = picture.quantize(48, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(small, "png", optimize=True)
    with atomic_write(path) as file:
        file.write(small.getvalue())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """As `atomic_write`, for a library that opens its file itself: it gets another path to write
    to, in a folder of its own, since it may make temporary files beside it."""
    with _temporary(path, Path.mkdir) as folder:
        part = folder / path.name
        yield part
        part.chmod(folder.stat().st_mode & 0o666)  # as the umask has it
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        _rename(part, path)


def check_writable(name: str, path: Path) -> None:
    """ValueError about the setting `name` unless a file could be written at `path`, for before the
    work that it is to hold. It is found by trying, and nothing of that is left."""
    nearest = next((p for p in path.parents if os.path.lexists(p)), path.parent)
    if not nearest.is_dir():
        raise ValueError(f"{name}: expected a folder, {nearest} is none")
    if path.is_dir():
        raise ValueError(f"{name}: expected a file, {path} is a folder")
    made = [p for p in path.parents if not os.path.lexists(p)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}."):
            pass
    except OSError as error:
        raise ValueError(f"{name}: cannot write {path}: {error.strerror}") from error
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def alone_beside(name: str, path: Path) -> Iterator[None]:
    """Inside, one process works in the folder of `path`: ValueError about the setting `name` for
    the next one, and unless `path` could be written. The folder is made, and goes where nothing was
    put there. A file system without locks keeps nobody out."""
    check_writable(name, path)
    made = [p for p in path.parents if not os.path.lexists(p)]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = None
    try:
        try:
            handle = _lock(path.parent.resolve())
        except BlockingIOError as error:
            raise ValueError(
                f"{name}: another process is at work in {path.parent}; wait for its end, or choose "
                "another folder"
            ) from error
        except PermissionError:  # one may write there, but not read: as without locks
            pass
        yield
    finally:
        _close(handle)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _temporary(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new file or folder beside `path`, gone at the end. It is locked: what has no lock is what a
    killed process left, and goes; others that write `path` at the same time have another one."""
    if path.exists() and not path.is_file():  # a device would be replaced like a file
        number = errno.EISDIR if path.is_dir() else errno.EEXIST
        raise OSError(number, "expected a file or nothing there", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    for i in itertools.count():
        part = path.with_name(path.name + f".{i}" * bool(i) + TEMPORARY)
        try:
            left = _lock(part)
            try:
                _remove(part)
            finally:
                _close(left)
            make(part)
            lock = _lock(part)
        except (BlockingIOError, FileExistsError):
            continue
        if lock is not None:
            break
    try:
        yield part
    finally:
        if _is_at(lock, part):  # the name of a file that was renamed may be another's by now
            _remove(part)
        _close(lock)


def _lock(path: Path) -> int | None:
    """A handle that keeps others from removing what is there; None where nothing is, or a link.
    BlockingIOError where another one has it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(handle, path):
            raise BlockingIOError(errno.EAGAIN, "it was replaced", str(path))
    except OSError as error:
        if isinstance(error, BlockingIOError):
            os.close(handle)
            raise  # others: a file system without locks
    return handle


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


class _Writer:
    """A file that remembers why writing to it failed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failed: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.failed = error
            raise

    def __getattr__(self, name: str):
        return getattr(self._file, name)


def _rename(part: Path, path: Path) -> None:
    os.replace(part, path)
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # else a power cut may undo the renaming
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def _remove(path: Path) -> None:
    """Remove what a killed process left there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_regular(path: Path, most_bytes: int) -> bytes:
    """Contents of a file. ValueError where it is a folder, a device or a pipe, or too large."""
    # Opening a pipe would wait for its other end.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("expected a file")
        if about.st_size > most_bytes:
            raise ValueError(f"expected at most {most_bytes} bytes, got {about.st_size}")
        with open(file, "rb", closefd=False) as reader:
            return reader.read(most_bytes)
    finally:
        os.close(file)


# The cache: what the user's machine remembers, compiled kernels and measured crossovers.

DIGEST_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path:
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "sparsekern"
    try:
        return Path.home() / ".cache" / "sparsekern"
    except RuntimeError as error:
        raise FileNotFoundError("cache: there is no home folder, set XDG_CACHE_HOME") from error


def private_cache() -> Path:
    """The cache folder, made where it is missing, closed to writing by others where it is ours.
    PermissionError where it belongs to somebody else or is a link."""
    folder = cache_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        about = os.fstat(handle)
        if about.st_uid != os.geteuid():
            raise PermissionError(f"{folder} belongs to user {about.st_uid}, not to us")
        if about.st_mode & 0o022:
            os.fchmod(handle, 0o700)
    finally:
        os.close(handle)
    return folder


def write_cached(name: str, content: bytes) -> None:
    """Keep machine code in the cache, with a digest of it and of its name. OSError if it cannot.

    Processes may write the same file at the same time; none reads a part of it."""
    path = private_cache() / name
    part = path.with_name(f"{name}.{os.getpid()}{TEMPORARY}")
    _remove(part)
    try:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(handle, "wb") as file:
            file.write(_digest(name, content) + content)
            file.flush()
            os.fsync(file.fileno())
        _remove(path)  # a folder would not be replaced
        _rename(part, path)
    except BaseException:
        _remove(part)
        raise


def read_cached(name: str) -> bytes | None:
    """Bytes kept by `write_cached`: None where they are missing or damaged, where others could have
    written it, or where it is a link."""
    try:
        handle = os.open(private_cache() / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        about = os.fstat(handle)
        is_ours = about.st_uid == os.geteuid() and not about.st_mode & 0o022
        if not stat.S_ISREG(about.st_mode) or not is_ours:
            return None
        with open(handle, "rb", closefd=False) as file:
            whole = file.read()
    finally:
        os.close(handle)
    content = whole[DIGEST_BYTES:]
    return content if whole[:DIGEST_BYTES] == _digest(name, content) else None


def _digest(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + content).digest()
