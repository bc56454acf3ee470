"""How transformers learns of mxtorq's checkpoints: by ``import mxtorq``, in whatever order.

transformers has a table of quantizers and no entry points, so somebody has to put ours there. Where
its table is there already, that is done at once. Otherwise a finder waits in `sys.meta_path` for
the one module that holds the table, `TABLE`, lets the others find and load it, and adds our row
when it has been executed. Importing transformers here instead would cost every ``import mxtorq``
seconds.

The finder looks at one name and says nothing about all others. It keeps no state, so threads and
reloads need no care: a table that is made anew gets its row anew. The row of compressed-tensors
stays for all checkpoints but ours with transforms. When the module is loaded it has
the loader that it would have had, and no trace of ours. A row called ``mxtorq`` that is there
already stays.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from threading import local
from types import ModuleType
from typing import Any

from mxtorq.export.compressed_tensors import OWN, STOCK

TABLE = "transformers.quantizers.auto"
"""The module with transformers' tables of quantizers and their configurations."""

_ADAPTER = "mxtorq.serving.transformers"


def announce() -> None:
    """Register with transformers, now or when it is imported; a second call changes nothing."""
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
    if TABLE in sys.modules:
        register(import_module(TABLE))  # import_module waits for a thread that executes it


def register(table: ModuleType) -> None:
    """Add our quantizer to transformers' tables, unless it is there."""
    ours = import_module(_ADAPTER)
    if not hasattr(table, "register_quantizer") or not hasattr(ours, "MxtorqQuantizer"):
        return  # one of them imports the other, and comes back here at its end
    if OWN not in table.AUTO_QUANTIZATION_CONFIG_MAPPING:
        table.register_quantization_config(OWN)(ours.MxtorqConfig)
    if OWN not in table.AUTO_QUANTIZER_MAPPING:
        table.register_quantizer(OWN)(ours.MxtorqQuantizer)
    stock = table.AUTO_QUANTIZATION_CONFIG_MAPPING.get(STOCK)
    if stock is not None and not hasattr(stock, "ours"):
        table.AUTO_QUANTIZATION_CONFIG_MAPPING[STOCK] = ours.carrying(stock)


class _Watch:  # no subclass of importlib.abc's: importing that is most of what this costs
    def __init__(self) -> None:
        self._asking = local()  # against another finder that asks all the others, as this one does

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            others = [finder for finder in sys.meta_path if finder is not self]
            found = (_asked(finder, fullname, path, target) for finder in others)
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            self._asking.now = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            loader: Any = _Registering(spec.loader)
            spec.loader = loader
        return spec


def _asked(finder: Any, *question: Any) -> ModuleSpec | None:
    found: ModuleSpec | None = finder.find_spec(*question) if hasattr(finder, "find_spec") else None
    return found


class _Registering:
    """Another loader, and `register` after it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._inner.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        register(module)
