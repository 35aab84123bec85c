"""Hugging Face transformers: models and tokenizers straight from a store, and back to a directory.

>>> from tallstore.integrations.transformers import from_store
>>> model, tokenizer = from_store("zoo.tall", "math")  # doctest: +SKIP

Nothing is downloaded, and no code that a store might hold is run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tallstore.errors import OptionError
from tallstore.store import StorePath, TallStore

if TYPE_CHECKING:
    import torch

    from tallstore.loading import Loader

__all__ = ["FromStore", "from_store", "save_pretrained", "tokenizer_from_store"]

_CONFIG: Final = "config.json"
_GENERATION: Final = "generation_config.json"
_TOKENIZERS: Final = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")


class FromStore(NamedTuple):
    """What `from_store` gives."""

    model: Any
    """A ``PreTrainedModel``."""
    tokenizer: Any
    """A tokenizer; None where the store has no files of one."""


def from_store(
    store: StorePath | TallStore,
    task: str | None = None,
    *,
    model_class: Any = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    fidelity: str | None = None,
    **options: Any,
) -> FromStore:
    """A task's model and tokenizer, with no checkpoint in between.

    Parameters
    ----------
    store
        A path, or an open store.
    task
        None: the base.
    model_class
        Such as ``AutoModelForSequenceClassification``; None: the class that the config names.
    device
        Where the model is put once it is loaded; None: the CPU.
    dtype
        To convert the weights to; None: as they are stored.
    fidelity
        See `tallstore.load`.
    options
        What else the class's ``from_pretrained`` takes, such as ``attn_implementation``.

    Returns
    -------
    FromStore
        (model in evaluation mode, tokenizer or None).

    Raises
    ------
    OptionError
        transformers is not installed, neither the task nor the base has a ``config.json``, or it
        names no class.
    UnknownTaskError, CorruptStoreError, DeviceError

    Examples
    --------
    >>> model, tokenizer = from_store("zoo.tall", "math", device="cuda")  # doctest: +SKIP
    >>> model(**tokenizer("1 + 1 =", return_tensors="pt").to("cuda"))  # doctest: +SKIP
    """
    transformers = _transformers()
    with _opened(store) as opened, _small_files(opened, task) as directory:
        config = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        kind = _concrete(transformers, model_class, config)
        state = opened.load(task, dtype=dtype, fidelity=fidelity)
        stored = next((t.dtype for t in state.values() if t.is_floating_point()), None)
        model = kind.from_pretrained(
            None, config=config, state_dict=state, **{"dtype": stored, **options}
        )
        del state
        # Not before: placing weights as they are loaded takes another library.
        model = model if device is None else model.to(device)
        if (directory / _GENERATION).is_file() and model.can_generate():
            model.generation_config = transformers.GenerationConfig.from_pretrained(
                directory, local_files_only=True
            )
        tokenizer = _tokenizer(transformers, directory)
    return FromStore(model, tokenizer)


def tokenizer_from_store(store: StorePath | TallStore, task: str | None = None) -> Any:
    """A task's tokenizer (None: the base's); None where neither has files of one.

    Raises
    ------
    OptionError
        transformers is not installed.
    UnknownTaskError, CorruptStoreError
    """
    transformers = _transformers()
    with _opened(store) as opened, _small_files(opened, task, needed=None) as directory:
        return _tokenizer(transformers, directory)


def save_pretrained(
    store: StorePath | TallStore,
    task: str | None,
    directory: StorePath,
    *,
    max_shard_size: int | None = None,
    device: torch.device | str | None = None,
) -> list[Path]:
    """Write a task (None: the base) as ``model.save_pretrained`` and its tokenizer would.

    Config, tokenizer and other files come out as they went in; weights go from the store into
    (sharded) safetensors, a piece at a time, without a model in memory.

    Returns
    -------
    list of Path
        The files made.

    Raises
    ------
    OptionError
        Neither the task nor the base has a ``config.json``.
    StoreExistsError
        The directory is not empty.
    UnknownTaskError, CorruptStoreError
    """
    with _opened(store) as opened:
        _needs_config(opened._loader(task))
        return opened.unpack(task, directory, max_shard_size=max_shard_size, device=device)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as exc:
        raise OptionError(
            "transformers is not installed: pip install 'tallstore[transformers]'"
        ) from exc
    return transformers


@contextmanager
def _opened(store: StorePath | TallStore) -> Iterator[TallStore]:
    if isinstance(store, TallStore):
        yield store
        return
    with TallStore(store) as opened:
        yield opened


def _has(loader: Loader, path: str | None) -> bool:
    return path is None or any(file.path == path for file in loader.contents.files)


def _needs_config(loader: Loader) -> None:
    if not _has(loader, _CONFIG):
        raise OptionError(
            f"{loader.what}: it has no {_CONFIG}; pack model directories, not weights alone"
        )


@contextmanager
def _small_files(
    store: TallStore, task: str | None, needed: str | None = _CONFIG
) -> Iterator[Path]:
    """The files beside the weights in a directory; the base's, where the task lacks the needed."""
    from tallstore.exporting import write_files

    loader = store._loader(task)
    if task is not None and (not _has(loader, needed) or not loader.contents.files):
        loader = store._loader(None)
    if needed is not None:
        _needs_config(loader)
    with tempfile.TemporaryDirectory(prefix="tallstore-") as name:
        write_files(loader, Path(name))
        yield Path(name)


def _concrete(transformers: Any, model_class: Any, config: Any) -> Any:
    """The class of the model; of an Auto class, the one that it stands for."""
    import torch

    if model_class is None:
        for name in getattr(config, "architectures", None) or ():
            found = getattr(transformers, name, None)
            if found is not None:
                return found
        model_class = transformers.AutoModel
    if not hasattr(model_class, "from_config"):
        if not hasattr(model_class, "from_pretrained"):
            raise OptionError(f"model_class={model_class!r}: a class of transformers is needed")
        return model_class
    try:
        with torch.device("meta"):
            return type(model_class.from_config(config))
    except ValueError as exc:
        raise OptionError(f"model_class={model_class.__name__}: {exc}") from exc


def _tokenizer(transformers: Any, directory: Path) -> Any:
    names = [path.name for path in directory.iterdir() if path.is_file()]
    if not any(fnmatchcase(name, pattern) for name in names for pattern in _TOKENIZERS):
        return None
    return transformers.AutoTokenizer.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False
    )
