"""Names of a model's tensors without the wrappers around it, which each peer chooses for itself.

``torch.compile`` puts ``_orig_mod.`` into the names of a state_dict, ``nn.DataParallel`` and
``DistributedDataParallel`` put ``module.``. A peer that compiles its model, or has two
accelerators, can learn with one that does not.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

# By the class' name: torch keeps the first in a private module that takes long to load.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}


def unwrapping(model: nn.Module) -> Callable[[str], str]:
    """A function from a name in the model's state_dict to the name without wrappers."""
    inner = []  # dotted paths that end with a wrapper's own attribute, outermost first
    for path, module in model.named_modules(remove_duplicate=False):
        attribute = _WRAPPERS.get(type(module).__name__)
        if attribute is not None and list(dict(module.named_children())) == [attribute]:
            inner.append(f"{path}.{attribute}." if path else f"{attribute}.")

    def unwrapped(name: str) -> str:
        for path in reversed(inner):  # from the inside, so that the outer paths still fit
            if name.startswith(path):
                outside = path.removesuffix(".").rpartition(".")[0]
                name = f"{outside}.{name[len(path) :]}" if outside else name[len(path) :]
        return name

    return unwrapped
