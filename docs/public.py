"""The public names of fastopt: those that users may rely on.

    python docs/public.py          print them

A name is public if it stands in the ``__all__`` of one of MODULES, or if it is one of
RESULTS, the types of what public functions return. Each of them, and each of their
methods and properties without an underscore, has a docstring with an example, or is
part of a class that has one; ``tests/project/test_docstrings.py`` runs the examples.
"""

import importlib
import inspect

MODULES = {
    "fastopt": "Optimizers of NumPy arrays, and all that belongs to them.",
    "fastopt.schedules": "Hyperparameters as functions of the step.",
    "fastopt.training": "A loop that minimizes, and its callbacks.",
    "fastopt.tune": "Learning rates and batch sizes.",
    "fastopt.multitask": "Weights of several tasks.",
    "fastopt.rule": "What rules of your own are made of.",
    "fastopt.torch": "Optimizers for torch.",
    "fastopt.jax": "Optimizers inside ``jax.jit``.",
    "fastopt.scipy": "Methods of ``scipy.optimize.minimize``.",
    "fastopt.keras": "Optimizers for Keras.",
    "fastopt.thinc": "An optimizer for thinc.",
    "fastopt.deepspeed": "The functions of DeepSpeed's CPU optimizers.",
    "fastopt.njit": "Steps in code that Numba compiles.",
    "fastopt.native": "What callers from C need.",
}

# Where they are defined, and the function or attribute that returns one.
RESULTS = {
    "fastopt.optimizer.groups.Group": "Optimizer.groups",
    "fastopt.optimizer.storage.Usage": "Optimizer.memory",
    "fastopt.torch.flat.Flat": "fastopt.torch.flatten_",
    "fastopt.torch.release.Released": "fastopt.torch.release_gradients_",
}

# The names that stand first on the page of their module.
FIRST = {"fastopt": ("Optimizer", "Rule", "FlatBuffer", "flatten")}

# Classes with methods for fastopt's own use, and the methods that are for users.
MEMBERS = {
    "fastopt.rule.Rule": ("in_passes", "hyperparameters"),
    "fastopt.language.Word": (),
    "fastopt.optimizer.groups.Group": ("frozen", "schedules", "update"),
    "fastopt.optimizer.storage.Usage": ("total", "per_parameter"),
}

# What modules need beside fastopt's own dependencies, and the examples of some names.
NEEDS = {
    "fastopt.torch": ["torch"],
    "fastopt.jax": ["jax"],
    "fastopt.scipy": ["scipy"],
    "fastopt.keras": ["torch", "keras"],
    "fastopt.thinc": ["thinc"],
    "fastopt.deepspeed": ["torch"],
    "fastopt.deepspeed.install": ["deepspeed"],
    "fastopt.deepspeed.uninstall": ["deepspeed"],
    "fastopt.njit": ["numba"],
}


def names(module):
    """The public names of a module, which is imported, in the order of the docs."""
    everything = importlib.import_module(module).__all__
    return list(dict.fromkeys((*FIRST.get(module, ()), *everything)))


def objects(module):
    """The public objects of a module by their full names. What another public module
    exports, such as ``fastopt.schedules``, is listed there."""
    imported = importlib.import_module(module)
    found = {name: getattr(imported, name) for name in names(module)}
    return {
        f"{module}.{name}": value
        for name, value in found.items()
        if not inspect.ismodule(value)
    }


def results(module):
    """The types of RESULTS that belong to a public module."""
    owner = {"fastopt.optimizer": "fastopt", "fastopt.torch": "fastopt.torch"}
    found = {}
    for full in RESULTS:
        where, _, name = full.rpartition(".")
        if owner[where.rpartition(".")[0]] == module:
            found[full] = getattr(importlib.import_module(where), name)
    return found


def members(kind):
    """The public methods and properties of a class, which fastopt defines, by name."""
    found = {}
    for name in MEMBERS.get(f"{kind.__module__}.{kind.__qualname__}", dir(kind)):
        value = inspect.getattr_static(kind, name)
        unwrapped = getattr(value, "__func__", getattr(value, "fget", value))
        unwrapped = getattr(unwrapped, "method", unwrapped)
        where = getattr(unwrapped, "__module__", None) or ""
        callable_ = callable(unwrapped) and not inspect.isclass(unwrapped)
        if not name.startswith("_") and callable_ and where.startswith("fastopt"):
            found[name] = value
    return found


if __name__ == "__main__":
    for module, about in MODULES.items():
        print(f"{module}: {about}")
        for name in [*objects(module), *results(module)]:
            print(f"    {name}")
