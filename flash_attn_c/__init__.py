"""Exact attention, forward and backward, without the n x n matrix: a C core, with a torch and a NumPy front.

`attention`, `explain` and `merge` take torch tensors or NumPy arrays, and importing this package imports neither. The other names
work on torch tensors only; they are loaded, and torch with them, when first used.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .api import Plan, attention, explain, merge

if TYPE_CHECKING:
    from .compat import (
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
    )
    from .install import install_as
    from .sdpa import scaled_dot_product_attention, sdpa_patched
    from .torch_impl import register_torch_impl

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "attention",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "install_as",
    "merge",
    "register_torch_impl",
    "scaled_dot_product_attention",
    "sdpa_patched",
]

_LAZY = {
    "flash_attn_func": "compat",
    "flash_attn_kvpacked_func": "compat",
    "flash_attn_qkvpacked_func": "compat",
    "flash_attn_varlen_func": "compat",
    "flash_attn_varlen_kvpacked_func": "compat",
    "flash_attn_varlen_qkvpacked_func": "compat",
    "install_as": "install",
    "register_torch_impl": "torch_impl",
    "scaled_dot_product_attention": "sdpa",
    "sdpa_patched": "sdpa",
}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if sys.modules.get("torch") is not None:
    importlib.import_module(".autograd", __name__)  # registers the custom ops, so that saved graphs and policies find them
