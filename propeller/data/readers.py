"""`load_dataset`: data sets by name, out of local files in their original format, or by your own function.

    train_ds, dev_ds = load_dataset("lcqmc", splits=("train", "dev"), data_root="/data")
    train_ds, dev_ds = load_dataset("squad", data_files=("my_train.json", "my_dev.json"))
    train_ds = load_dataset(read, data_path="train.txt", lazy=False)

Nothing is downloaded. Who knows a data set by name registers a `DatasetReader`: an installed package by the
entry point group `propeller.readers`, each entry of which is a dict of name to reader, a module that was
imported by `register_reader`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from propeller.data.dataset import Dataset
from propeller.data.datasets import IterDataset, MapDataset
from propeller.data.sources import PathLike
from propeller.errors import ConfigError, DataError, did_you_mean

ENTRY_POINTS = "propeller.readers"
ROOT_ENV = "PROPELLER_DATA"

DataFiles: TypeAlias = PathLike | Sequence[PathLike] | Mapping[str, PathLike]


@dataclasses.dataclass(frozen=True)
class DatasetReader:
    """How the original files of a data set are found and read.

    Attributes:
        read: gives the examples of a file; its second argument is the split, for those whose files differ.
        files: split -> what a file of it is called, relative to the data root. The first that is there is
            taken, gzipped (`.gz`) or not.
        label_list: the names of the classes, in the order of their ids.
    """

    read: Callable[[Path, str], Dataset]
    files: Mapping[str, Sequence[str]]
    label_list: Sequence[str] | None = None


# A data set, or several under one name (`glue`).
Readers: TypeAlias = DatasetReader | Mapping[str, DatasetReader]

_registered: dict[str, Readers] = {}


def register_reader(name: str, reader: Readers) -> None:
    """Makes a data set known by a name in this process; a later one of that name takes its place.

    Args:
        name: for `load_dataset`.
        reader: how its files are read, or name -> reader where it has several data sets.
    """
    _registered[name] = reader


def load_dataset(
    path_or_read_func: str | Callable[..., Any],
    name: str | None = None,
    data_files: DataFiles | None = None,
    splits: str | Sequence[str] | None = None,
    lazy: bool | None = None,
    *,
    data_root: PathLike | None = None,
    **kwargs: Any,
) -> Any:
    """Reads data sets.

    Args:
        path_or_read_func: the name of a data set; case, `-` and `_` do not count. Or a function that returns
            examples (best a generator function); it gets each of `data_files` as its first argument.
        name: which one, of several under one name (`glue` has `cola`, ...).
        data_files: a file, several, or split -> file.
        splits: a split or several. Without `data_files`, which files of the data set are looked for in the
            data root; with them, as what each is read (some test files have no labels), by default as the
            data set's first split, `train`.
        lazy: gives an `IterDataset`, else (also for None) a `MapDataset`, which holds all examples in memory.
        data_root: a folder with a folder for each data set; None: the environment variable `PROPELLER_DATA`.
        kwargs: more arguments for the function.

    Returns:
        A `MapDataset` or `IterDataset`; a tuple of them where several files or splits are named.

    Raises:
        ConfigError: there is no such data set, name, split or argument.
        DataError: there is no such file, or it cannot be read.
    """
    if callable(path_or_read_func):
        if name is not None or splits is not None or data_root is not None:
            raise ConfigError("name, splits and data_root are for data sets by name, not for a function")
        return _by_function(path_or_read_func, data_files, bool(lazy), kwargs)
    if kwargs:
        known = ("name", "data_files", "splits", "lazy", "data_root")
        wrong = next(iter(kwargs))
        raise ConfigError(
            f"load_dataset({path_or_read_func!r}) got {wrong!r}; known are {', '.join(known)}."
            f"{did_you_mean(wrong, known)}"
        )
    reader, title = _find_reader(path_or_read_func, name)
    if data_files is None:
        if not splits:
            raise ConfigError(
                f"{title} got neither data_files nor splits; splits are {', '.join(reader.files)}"
            )
        names = [splits] if isinstance(splits, str) else list(splits)
        found = [(_located(reader, split, data_root, title), split) for split in names]
    else:
        found = _named_files(reader, data_files, splits, title)
    return _one_or_all([_opened(reader, path, split, bool(lazy)) for path, split in found])


def _by_function(
    func: Callable[..., Any], data_files: DataFiles | None, lazy: bool, kwargs: dict[str, Any]
) -> Any:
    calls = [[]] if data_files is None else [[path] for path, _ in _as_files(data_files)]
    loaded: list[Dataset] = []
    for arguments in calls:
        try:
            inspect.signature(func).bind(*arguments, **kwargs)
        except TypeError as error:
            raise ConfigError(
                f"the function takes {inspect.signature(func)}, which does not fit what load_dataset() has "
                f"for it: {error}"
            ) from error
        read = functools.partial(func, *arguments, **kwargs)
        functools.update_wrapper(read, func)
        loaded.append(IterDataset(read) if lazy else _in_memory(Dataset.of(read())))
    return _one_or_all(loaded)


def _opened(reader: DatasetReader, path: Path, split: str, lazy: bool) -> Dataset:
    if not path.exists():
        raise DataError("there is no such file", path=path)
    dataset = reader.read(path, split)
    if lazy:
        return IterDataset(dataset, label_list=reader.label_list)
    return _in_memory(dataset, label_list=reader.label_list)


def _in_memory(dataset: Dataset, label_list: Sequence[str] | None = None) -> MapDataset:
    return MapDataset(list(dataset), label_list=label_list)


def _one_or_all(loaded: list[Dataset]) -> Any:
    return loaded[0] if len(loaded) == 1 else tuple(loaded)


def _as_files(data_files: DataFiles) -> list[tuple[PathLike, str | None]]:
    """Files, with their splits where these are named."""
    if isinstance(data_files, Mapping):
        return [(path, split) for split, path in data_files.items()]
    paths = [data_files] if isinstance(data_files, (str, os.PathLike)) else list(data_files)
    if not paths:
        raise ConfigError("data_files is empty; expected at least one file")
    return [(path, None) for path in paths]


def _named_files(
    reader: DatasetReader, data_files: DataFiles, splits: str | Sequence[str] | None, title: str
) -> list[tuple[Path, str]]:
    files = _as_files(data_files)
    names = [splits] if isinstance(splits, str) else list(splits or ())
    if names and (isinstance(data_files, Mapping) or len(names) != len(files)):
        raise ConfigError(
            f"{title} got {len(files)} data_files and the splits {', '.join(names)}; expected one split for "
            "each file, and none where data_files names them itself"
        )
    found = [split or next(iter(reader.files)) for _, split in files]
    for split in names or found:
        _check_split(reader, split, title)
    return [(Path(path), split) for (path, _), split in zip(files, names or found, strict=True)]


def _check_split(reader: DatasetReader, split: str, title: str) -> None:
    if split not in reader.files:
        raise ConfigError(
            f"{title} has no split {split!r}.{did_you_mean(split, reader.files)} There are: "
            f"{', '.join(reader.files)}."
        )


def _located(reader: DatasetReader, split: str, data_root: PathLike | None, title: str) -> Path:
    """Returns the file of a split in the data root."""
    _check_split(reader, split, title)
    wanted = " or ".join(reader.files[split])
    root = data_root or os.environ.get(ROOT_ENV)
    if not root:
        raise ConfigError(
            f"{title}: nothing is downloaded. Name the file of {split} by data_files, or the folder that "
            f"holds {wanted} by data_root or {ROOT_ENV}."
        )
    found = _first_there(Path(root), reader.files[split])
    if found is None:
        raise DataError(f"there is no {wanted} (.gz or not) in it, for {split} of {title}", path=Path(root))
    return found


def _first_there(folder: Path, names: Sequence[str]) -> Path | None:
    paths = (folder / f"{name}{packed}" for name in names for packed in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def split_files(split: str, folder: PathLike) -> list[Path]:
    """Finds the file of a split in the folder of one data set, whose name need not be known.

    Args:
        split: `train`, for example.
        folder: where the files of the data set lie.

    Returns:
        What each data set known by name calls this file, as far as it is there.
    """
    found = set()
    for readers in _known().values():
        for reader in [readers] if isinstance(readers, DatasetReader) else readers.values():
            names = [Path(name).name for name in reader.files.get(split, ())]
            found.add(_first_there(Path(folder), names))
    return sorted(path for path in found if path is not None)


def _known() -> dict[str, Readers]:
    """All data sets by name."""
    readers = dict(_registered)
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        readers = {**point.load(), **readers}
    return readers


def _find_reader(dataset: str, name: str | None) -> tuple[DatasetReader, str]:
    """Returns the reader of a data set, and what to call that in messages."""
    readers = _registered if _match(dataset, _registered) else _known()
    known = _match(dataset, readers)
    if known is None:
        names = sorted(readers)
        raise ConfigError(
            f"there is no data set {dataset!r}.{did_you_mean(dataset, names)} Known here: "
            f"{', '.join(names) or 'none'}. A function that reads your files can stand in its place."
        )
    found = readers[known]
    if isinstance(found, DatasetReader):
        if name is not None:
            raise ConfigError(f"{known} is one data set, but name={name!r} asks for one of several")
        return found, known
    chosen = None if name is None else _match(name, found)
    if chosen is None:
        raise ConfigError(
            f"{known} has several data sets, and name={name!r} is none of them."
            f"{did_you_mean(name or '', found)} There are: {', '.join(found)}."
        )
    return found[chosen], f"{known}/{chosen}"


def _match(name: str, known: Mapping[str, Any]) -> str | None:
    """The one of some names that is the same but for case, `-` and `_`."""
    if name in known:
        return name
    plain = {other.lower().replace("-", "").replace("_", ""): other for other in known}
    return plain.get(name.lower().replace("-", "").replace("_", ""))
