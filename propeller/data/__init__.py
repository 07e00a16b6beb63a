"""Data: pipelines with positions (`Dataset`), tables (`FeatureColumns`), record files. Pure numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from propeller.lazy import attach

if TYPE_CHECKING:
    from propeller.data.batching import pad_batch as pad_batch
    from propeller.data.cache import default_folder as default_folder
    from propeller.data.cache import prepare_files as prepare_files
    from propeller.data.cache import source_files as source_files
    from propeller.data.collate import Dict as Dict
    from propeller.data.collate import Pad as Pad
    from propeller.data.collate import Stack as Stack
    from propeller.data.collate import Tuple as Tuple
    from propeller.data.columns import Column as Column
    from propeller.data.columns import LabelColumn as LabelColumn
    from propeller.data.columns import RawColumn as RawColumn
    from propeller.data.columns import TextColumn as TextColumn
    from propeller.data.columns import TextIDColumn as TextIDColumn
    from propeller.data.dataset import Dataset as Dataset
    from propeller.data.datasets import IterDataset as IterDataset
    from propeller.data.datasets import MapDataset as MapDataset
    from propeller.data.feature_column import FeatureColumns as FeatureColumns
    from propeller.data.feature_column import Layout as Layout
    from propeller.data.node import Context as Context
    from propeller.data.node import Entries as Entries
    from propeller.data.node import Node as Node
    from propeller.data.node import Origin as Origin
    from propeller.data.node import Position as Position
    from propeller.data.node import Transform as Transform
    from propeller.data.node import as_index as as_index
    from propeller.data.node import as_parts as as_parts
    from propeller.data.node import fail as fail
    from propeller.data.readers import DatasetReader as DatasetReader
    from propeller.data.readers import load_dataset as load_dataset
    from propeller.data.readers import register_reader as register_reader
    from propeller.data.readers import split_files as split_files
    from propeller.data.record import RecordFile as RecordFile
    from propeller.data.record import RecordWriter as RecordWriter
    from propeller.data.signature import Signature as Signature
    from propeller.data.signature import difference as difference
    from propeller.data.signature import file_entry as file_entry
    from propeller.data.sources import PathLike as PathLike
    from propeller.data.sources import decode_line as decode_line
    from propeller.data.sources import first_line as first_line
    from propeller.data.sources import open_text_file as open_text_file

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "propeller.data.batching": ["pad_batch"],
        "propeller.data.cache": ["default_folder", "prepare_files", "source_files"],
        "propeller.data.collate": ["Dict", "Pad", "Stack", "Tuple"],
        "propeller.data.columns": ["Column", "LabelColumn", "RawColumn", "TextColumn", "TextIDColumn"],
        "propeller.data.dataset": ["Dataset"],
        "propeller.data.datasets": ["IterDataset", "MapDataset"],
        "propeller.data.feature_column": ["FeatureColumns", "Layout"],
        "propeller.data.node": [
            "Context",
            "Entries",
            "Node",
            "Origin",
            "Position",
            "Transform",
            "as_index",
            "as_parts",
            "fail",
        ],
        "propeller.data.readers": ["DatasetReader", "load_dataset", "register_reader", "split_files"],
        "propeller.data.record": ["RecordFile", "RecordWriter"],
        "propeller.data.signature": ["Signature", "difference", "file_entry"],
        "propeller.data.sources": ["PathLike", "decode_line", "first_line", "open_text_file"],
    },
)
