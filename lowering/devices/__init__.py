"""The devices, one file each, and those that third parties add.

A distribution adds kernels and devices to fxq by entry points of the group `fxq.rules`. Each names
an instance, of `Rule` for a device that is there already or of `Device`:

    [project.entry-points."fxq.rules"]          # in its pyproject.toml
    foo_linear = "foo:FOO_LINEAR"               # a Rule, with devices = ("x86", "cpu")
    foo_npu = "foo.npu:DEVICE"                  # a Device

They are loaded once, at the first lowering. Devices of third parties come before ours, rules of
third parties before those of the device, both in the order of their entry points' names.
"""

import functools
import importlib.metadata
from dataclasses import replace

import torch

from fxq.lowering.devices.cuda import CUDA
from fxq.lowering.devices.other import CPU, OTHER
from fxq.lowering.devices.x86 import X86
from fxq.lowering.rule import Device, Rule

GROUP = "fxq.rules"
OURS = (CUDA, X86, CPU, OTHER)


def device_at(device: torch.device) -> Device:
    """Return the first device that `device` is."""
    return next(known for known in installed() if known.is_this(device))


@functools.cache
def installed() -> tuple[Device, ...]:
    """Return all devices, each with all rules for it, in the order in which they are tried.

    Raises:
        ImportError: an entry point cannot be loaded.
        TypeError: an entry point is neither a rule nor a device.
        ValueError: a rule is for no device there is.
    """
    points = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name)
    found = dict(map(_loaded, points))
    devices = [value for value in found.values() if isinstance(value, Device)] + list(OURS)
    rules = [value for value in found.values() if isinstance(value, Rule)]
    names = {device.name for device in devices}
    for where, value in found.items():
        if not isinstance(value, Rule | Device):
            raise TypeError(
                f"{where}: expected an instance of fxq.lowering.rule.Rule or Device, found "
                f"{value!r}; name an instance there, or uninstall its distribution"
            )
        if isinstance(value, Rule) and not (value.devices and names.issuperset(value.devices)):
            raise ValueError(
                f"{where}: expected in the rule's `devices` some of {sorted(names)}, found "
                f"{value.devices!r}; name devices there, or install the one that is missing"
            )
    return tuple(
        replace(device, rules=(*(r for r in rules if device.name in r.devices), *device.rules))
        for device in devices
    )


def _loaded(point: importlib.metadata.EntryPoint) -> tuple[str, object]:
    """Return where an entry point is, and what it names."""
    where = f"entry point {point.name!r} ({point.value}) of {GROUP!r}"
    try:
        return where, point.load()
    except Exception as error:  # of others: whatever their module raises when it is imported
        by = f" of distribution {point.dist.name!r}" if point.dist is not None else ""
        raise ImportError(
            f"{where}{by}: expected to load it, found {type(error).__name__}: {error}; repair or "
            "uninstall that distribution"
        ) from error
