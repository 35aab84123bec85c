"""Every refusal of tallstore, as one tree.

::

    TallstoreError
    |-- OptionError               (also ValueError)         an argument that makes no sense
    |-- StoreNotFoundError        (also FileNotFoundError)  nothing at that path
    |-- StoreExistsError          (also FileExistsError)    something is there already
    |-- NotAStoreError            (also ValueError)         something else at that path
    |-- NewerFormatError          (also ValueError)         written by a later tallstore
    |-- CorruptStoreError         (also ValueError)         bytes are not what was written
    |   |-- TruncatedStoreError                              the file is shorter than its content
    |   `-- ChecksumError                                    a chunk fails its checksum
    |-- StoreLockedError          (also BlockingIOError)    another writer is at work
    |-- StoreReadOnlyError        (also PermissionError)    the store cannot be written
    |-- StoreFullError            (also OSError)            no room left on the device
    |-- StoreIOError              (also OSError)            the system failed a read or write
    |-- StoreClosedError          (also ValueError)         the handle was closed
    |-- UnknownTaskError          (also KeyError)           no task of that name
    |-- TaskExistsError           (also ValueError)         a task of that name is there already
    |-- TaskNameError             (also ValueError)         a name that cannot be a task's
    |-- UnknownTensorError        (also KeyError)           no tensor of that name
    |-- MismatchError             (also ValueError)         shapes, dtypes or layouts clash
    |   `-- WrongBaseError                                   not the base it was written with
    |-- EmptyZooError             (also ValueError)         nothing to pack
    |-- UnsupportedObjectError    (also TypeError)          an object that cannot be stored
    |-- CheckpointError           (also ValueError)         a checkpoint that cannot be read
    |   `-- UnsafePickleError                                a pickle that would run code
    `-- DeviceError                (also RuntimeError)       a device that is absent or too small

`StoreWarning` (a UserWarning) is no refusal: what was asked for is done, at a risk it names.

Each message names the file, tensor or task, what is wrong, and what to do. Errors of
libraries below are wrapped with ``raise ... from exc``.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ChecksumError",
    "CorruptStoreError",
    "DeviceError",
    "EmptyZooError",
    "MismatchError",
    "NewerFormatError",
    "NotAStoreError",
    "OptionError",
    "StoreClosedError",
    "StoreExistsError",
    "StoreFullError",
    "StoreIOError",
    "StoreLockedError",
    "StoreNotFoundError",
    "StoreReadOnlyError",
    "StoreWarning",
    "TallstoreError",
    "TaskExistsError",
    "TaskNameError",
    "TruncatedStoreError",
    "UnknownTaskError",
    "UnknownTensorError",
    "UnsafePickleError",
    "UnsupportedObjectError",
    "WrongBaseError",
]


class TallstoreError(Exception):
    """Root of every error that tallstore raises on purpose."""

    def __str__(self) -> str:
        # KeyError's own __str__ would print the repr, quotes and escapes included.
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class OptionError(TallstoreError, ValueError):
    """An argument or option that makes no sense."""


class StoreNotFoundError(TallstoreError, FileNotFoundError):
    """There is nothing at the path."""


class StoreExistsError(TallstoreError, FileExistsError):
    """There is something at the path already."""


class NotAStoreError(TallstoreError, ValueError):
    """There is something at the path, but it is not a tallstore file."""


class NewerFormatError(TallstoreError, ValueError):
    """The store was written in a format version that this tallstore does not know."""


class CorruptStoreError(TallstoreError, ValueError):
    """The store's bytes are not what was written."""


class TruncatedStoreError(CorruptStoreError):
    """The store's file is shorter than what was committed to it."""


class ChecksumError(CorruptStoreError):
    """A chunk's bytes do not match its checksum."""


class StoreLockedError(TallstoreError, BlockingIOError):
    """Another writer holds the store."""


class StoreReadOnlyError(TallstoreError, PermissionError):
    """The store, its file or its file system cannot be written."""


class StoreFullError(TallstoreError, OSError):
    """The device, the quota or the map has no room left."""


class StoreIOError(TallstoreError, OSError):
    """The operating system failed a read or a write."""


class StoreClosedError(TallstoreError, ValueError):
    """The handle was closed, or crossed a fork."""


class UnknownTaskError(TallstoreError, KeyError):
    """The store holds no task of that name."""


class TaskExistsError(TallstoreError, ValueError):
    """The store holds a task of that name already."""


class TaskNameError(TallstoreError, ValueError):
    """The string cannot be a task's name."""


class UnknownTensorError(TallstoreError, KeyError):
    """The object holds no tensor of that name."""


class MismatchError(TallstoreError, ValueError):
    """Shapes, dtypes or layouts clash."""


class WrongBaseError(MismatchError):
    """The base is not the one that the task was written against."""


class EmptyZooError(TallstoreError, ValueError):
    """There is no checkpoint to pack."""


class UnsupportedObjectError(TallstoreError, TypeError):
    """An object that cannot be stored; the message gives its path."""


class CheckpointError(TallstoreError, ValueError):
    """A checkpoint that cannot be read."""


class UnsafePickleError(CheckpointError):
    """A pickled checkpoint that asks for code; it was refused, nothing was run."""


class DeviceError(TallstoreError, RuntimeError):
    """A device that is absent or too small."""


class StoreWarning(UserWarning):
    """The store lies where its promises hold only in part; the message says which."""
