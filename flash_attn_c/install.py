"""`install_as("flash_attn")`: this library under the other package's name, for code that imports or probes for that one."""

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import bert_padding, compat

# The release of flash_attn whose functions compat.py follows.
VERSION = "2.8.3"

_METADATA = f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {VERSION}\nSummary: provided by flash_attn_c\n"
_FUNCTIONS = tuple(name for name in vars(compat) if name.startswith("flash_attn_"))
_HELPERS = ("index_first_axis", "index_put_first_axis", "pad_input", "unpad_input")


def install_as(name: str = "flash_attn", *, force: bool = False) -> None:
    """Make `import flash_attn` and what libraries do to find it give this library's functions, for the rest of the process.

    Refused where the real package is installed, unless force=True, which warns. Calling it again changes nothing.
    """
    if name != "flash_attn":
        raise ValueError(f"name: {name!r} must be 'flash_attn'")
    if isinstance(getattr(sys.modules.get(name), "__loader__", None), _Loader):
        return
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        if not force:
            raise RuntimeError("flash_attn is installed here; pass force=True to put flash_attn_c in its place in this process")
        warnings.warn("flash_attn_c takes the place of the installed flash_attn in this process", stacklevel=2)
    for loaded in [module for module in sys.modules if module == name or module.startswith(name + ".")]:
        del sys.modules[loaded]
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    importlib.invalidate_caches()
    for module in _CONTENTS:
        importlib.import_module(module)


_CONTENTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "flash_attn": (compat, _FUNCTIONS),
    "flash_attn.flash_attn_interface": (compat, _FUNCTIONS),
    "flash_attn.bert_padding": (bert_padding, _HELPERS),
}


class _Loader:
    """Fills a module with names of ours."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        source, names = _CONTENTS[module.__name__]
        for name in names:
            setattr(module, name, getattr(source, name))
        module.__doc__ = f"Provided by flash_attn_c: {source.__name__}."
        if module.__name__ == "flash_attn":
            module.__dict__["__version__"] = VERSION


class _Distribution(importlib.metadata.Distribution):
    def read_text(self, filename: str) -> str | None:
        return {"METADATA": _METADATA, "top_level.txt": "flash_attn\n"}.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


class _Finder(importlib.metadata.DistributionFinder):
    """Answers importlib.util.find_spec and importlib.metadata for the names above, and for nothing else."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _CONTENTS:
            return None
        loader: Any = _Loader()
        return importlib.machinery.ModuleSpec(fullname, loader, is_package=fullname == "flash_attn")

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        name = getattr(context, "name", None)
        return [_Distribution()] if name is None or name.lower().replace("-", "_") == "flash_attn" else []
