"""Find the device of each stage, and refuse what it cannot compute before anything is trained."""

from collections.abc import Mapping

from pipeline.config import precision
from pipeline.config.schema import RunConfig
from pipeline.launch import sharding
from pipeline.system import device
from pipeline.system.device import Device
from pipeline.system.errors import all_of


def of_stages(config: RunConfig, launch_files: Mapping[str, str | None]) -> dict[str, Device]:
    """Return the device of each stage, by the accelerate config that it is launched with (None: none).

    Raises:
        UserError: with a line for everything that a stage asks of its device and that it does not have.
    """
    if not launch_files:
        return {}
    visible = device.of_stages()
    devices: dict[str, Device] = {}
    problems: list[str] = []
    for name, file in launch_files.items():
        chosen = precision.device_of(config, name, visible)
        if file is not None and chosen.kind != "cpu" and sharding.asks_for_cpu(file):
            chosen = device.cpu(f"{file} says `use_cpu: true`")
        devices[name] = chosen
        problems += [f"stages.{name}: {fault}" for fault in precision.faults(config, name, chosen)]
    if problems:
        raise all_of(config.source, "stage option", "cannot work on this device", problems)
    return devices
