"""Python objects taken apart into a JSON tree, tensors and segments, and put together again.

`ObjectSource` takes an object apart; `build_tensor` and `assemble` put it together. Nothing of
it is pickle: the tree is strict JSON, the rest is raw bytes, and no code is ever run.

The tree **[contract]**
-----------------------

A JSON object none of whose keys begins with ``$`` is a ``dict`` with those keys, in that order
(a writer must not sort them). A JSON object with a key that begins with ``$`` is *tagged*: it
has exactly one key, except ``$odict``, which ``$metadata`` may accompany. ``i`` is an index into
the checkpoint's tensors, ``X`` stands for any tree.

=====================================  ==========================================================
JSON                                   object
=====================================  ==========================================================
``null``, ``true``, ``false``          ``None``, ``True``, ``False``
string                                 ``str`` (one that is valid Unicode)
integer                                ``int`` of at most 64 bits with its sign
number with ``.`` or ``e``             finite ``float``, in the shortest form that reads back
``[X, ...]``                           ``list``
``{"name": X, ...}``                   ``dict``, all of whose keys are valid Unicode without ``$``
                                       in front
``{"$tensor": i}``                     tensor ``i``; the same ``i`` twice is one object twice
``{"$dict": [K, X, K, X, ...]}``       any other ``dict``: keys and values by turns; a key is a
                                       scalar, or a tuple or frozenset of such
``{"$odict": {...}}``,                 ``OrderedDict``, like the two forms of ``dict``
``{"$odict": [K, X, ...]}``
``{"$odict": ..., "$metadata": X}``    the same with the attribute ``_metadata``
``{"$tuple": [X, ...]}``               ``tuple``
``{"$set": [X, ...]}``,                ``set``, ``frozenset``; written in the order of their
``{"$frozenset": [X, ...]}``           elements' JSON text
``{"$str": "base64"}``                 ``str`` that is not valid Unicode: UTF-8, in which lone
                                       surrogates are encoded like any other code point
``{"$str": i}``                        ``str`` of over 4096 characters, likewise, in tensor ``i``
``{"$bytes": "base64"}``               ``bytes``
``{"$bytes": i}``                      ``bytes`` of over 4096 bytes: those of tensor ``i``
``{"$int": "-0x1f..."}``               ``int`` of over 64 bits
``{"$float": "7ff8000000000000"}``     ``float`` that is not finite: its IEEE 754 bits
``{"$complex": [F, F]}``               ``complex``; F is a number or ``{"$float": ...}``
``{"$size": [n, ...]}``                ``torch.Size``
``{"$dtype": "float32"}``              ``torch.dtype``
``{"$device": "cuda:0"}``              ``torch.device``
``{"$scalar": [D, "base64"]}``,        numpy scalar of dtype D; its bytes, where over 4096, in
``{"$scalar": [D, i]}``                tensor ``i``; D is ``"S"`` for a ``numpy.bytes_`` and
                                       ``"U"`` for a ``numpy.str_``, in UTF-8 as in ``$str``
``{"$ndarray": [i, D, [n, ...], O]}``  numpy array of dtype D, shape and order O (``"C"`` or
                                       ``"F"``), whose bytes, in that order, are tensor ``i``
``{"$sparse": {...}}``                 sparse tensor: ``layout`` (``"sparse_coo"``, ...), ``size``,
                                       ``parts`` (tensor indices: indices, values; or compressed
                                       indices, plain indices, values) and, where true,
                                       ``coalesced``, ``parameter``, ``requires_grad``
=====================================  ==========================================================

``D`` is numpy's ``dtype.str`` (``"<f4"``, ``"<M8[ns]"``), or ``{"base": D, "shape": [n, ...]}``
for a subarray, or ``{"fields": [[name, D, offset], ...], "itemsize": n}`` for a structure, with
``"aligned": true`` where it is so flagged, and the title as a field's fourth item where it has
one. Objects (``O``) and dtypes of other packages are not stored.

Containers nest at most 200 deep, keys and ``_metadata`` counted like items.

Strings, bytes and scalars inside dict keys and sets are never moved into tensors. What is in a
tensor without being one (``$str``, ``$bytes``, ``$scalar``, ``$ndarray``) is a uint8 tensor of
one dimension, so that nothing that converts weights touches it; its *segment* may have the
dtype of the array, so that it compresses well.

Names
-----
A tensor is called by its path: str keys as they are, other keys and list indices by ``str()``,
joined by dots; ``"tensor"`` where that is empty; with the part's name behind (``".values"``)
for a part of a sparse tensor; what is not Unicode escaped by backslashes; then ``"~2"``,
``"~3"``, ... where the name is taken.

Segments
--------
Each torch storage gives one segment: the elements from the first to the last that any of its
tensors uses. The first is moved down to a multiple of the largest itemsize among them; if the
tensors have several dtypes, the segment is uint8 and its end is moved up likewise (beyond the
storage's end it is zeros). A tensor
without elements uses none; its stride is kept and its offset is 0.
"""

from __future__ import annotations

from tallstore.objects.assembling import assemble
from tallstore.objects.dismantling import flat_tree
from tallstore.objects.source import ObjectSource
from tallstore.objects.tensors import build_tensor

__all__ = ["ObjectSource", "assemble", "build_tensor", "flat_tree"]
