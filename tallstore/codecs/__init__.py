"""Codecs: how the bytes of a chunk are written down. One small file each."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from tallstore.codecs.codec import Bytes, Codec
from tallstore.codecs.guided import GuidedCodec
from tallstore.codecs.planes import PlanesCodec
from tallstore.codecs.raw import RawCodec
from tallstore.codecs.sparse import SparseCodec
from tallstore.codecs.symbols import SymbolsCodec
from tallstore.codecs.zstd import ZstdCodec

__all__ = [
    "CODECS",
    "GUIDED",
    "PLANES",
    "RAW",
    "SPARSE",
    "SYMBOLS",
    "TEXT",
    "ZSTD",
    "Bytes",
    "Codec",
]

RAW: Final = RawCodec()
ZSTD: Final = ZstdCodec()
#: The same frames, looked for longer: documents are a sixth shorter.
TEXT: Final = ZstdCodec(level=16)
PLANES: Final = PlanesCodec()
SPARSE: Final = SparseCodec()
GUIDED: Final = GuidedCodec()
SYMBOLS: Final = SymbolsCodec()

#: Every codec by its number on disk. Static: a new codec is a file and a line here.
CODECS: Final = MappingProxyType[int, Codec](
    {c.number: c for c in (RAW, ZSTD, PLANES, SPARSE, GUIDED, SYMBOLS)}
)
