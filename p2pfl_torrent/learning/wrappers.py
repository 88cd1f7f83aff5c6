"""A model and its tensors' names without the wrappers around it, which each peer chooses itself.

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


def without_wrappers(model: nn.Module) -> nn.Module:
    """The module that is in the wrappers around the whole model."""
    while (inner := _inner_of(model)) is not None:
        model = inner[1]
    return model


def _inner_of(module: nn.Module) -> tuple[str, nn.Module] | None:
    """A wrapper's attribute and what it wraps; None for what is no wrapper."""
    attribute = _WRAPPERS.get(type(module).__name__)
    children = list(module.named_children())
    return (
        children[0] if attribute is not None and [attribute] == [n for n, _ in children] else None
    )


def unwrapping(model: nn.Module) -> Callable[[str], str]:
    """A function from a name in the model's state_dict to the name without wrappers."""
    inner = []  # dotted paths that end with a wrapper's own attribute, outermost first
    for path, module in model.named_modules(remove_duplicate=False):
        found = _inner_of(module)
        if found is not None:
            inner.append(f"{path}.{found[0]}." if path else f"{found[0]}.")

    def unwrapped(name: str) -> str:
        for path in reversed(inner):  # from the inside, so that the outer paths still fit
            if name.startswith(path):
                outside = path.removesuffix(".").rpartition(".")[0]
                name = f"{outside}.{name[len(path) :]}" if outside else name[len(path) :]
        return name

    return unwrapped
