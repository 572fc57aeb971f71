"""The device that a process computes on: the first GPU that torch sees, else the CPU; and what it can compute.

The launcher must not hold a GPU's memory while stages run, and must answer fast. So it asks a process of its own, and
only where the system lists a driver: `python -m pipeline.system.device` prints what torch sees.
"""

import contextlib
import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.system import kept
from pipeline.system.digests import digest

NO_GPU = "no GPU is visible"
USE_CPU = "ACCELERATE_USE_CPU"  # accelerate's own variable
_YES = ("1", "true", "t", "yes", "y", "on")  # as accelerate reads a variable
_DRIVERS = ("nvidia", "nvhost", "kfd", "dxg")  # NVIDIA, its small boards, AMD, Windows' subsystem
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86 and, the last one, of ARM
_CPU_INFO = Path("/proc/cpuinfo")
_KIND = "devices"  # of what is kept


@dataclass(frozen=True)
class Device:
    """A device, why it is this one, and what it can compute.

    `bf16`: by instructions of its own, without them (`slow`), or not at all (`none`). `tf32`: whether it has it.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    why: str
    bf16: Literal["native", "slow", "none"]
    tf32: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


def cpu(why: str) -> Device:
    """Return the CPU; every CPU computes in bf16, and few have instructions for it."""
    return Device("cpu", "CPU", why, "native" if _has_bf16_instructions() else "slow")


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wants_cpu() -> bool:
    """Tell whether the environment asks for the CPU."""
    return os.environ.get(USE_CPU, "").lower() in _YES


def of_torch() -> Device:
    """Return the device that torch would take in this process; it may take memory of a GPU."""
    import torch

    if not torch.cuda.is_available():
        return cpu(_why_no_gpu(torch.version.cuda or torch.version.hip))
    if wants_cpu():
        return cpu(f"{USE_CPU} is set")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    has_bf16 = "native" if torch.cuda.is_bf16_supported(including_emulation=False) else "slow"
    bf16 = has_bf16 if torch.cuda.is_bf16_supported() else "none"  # it can be emulated, which transformers accepts
    tf32 = torch.version.cuda is not None and properties.major >= 8  # as transformers asks
    return Device("cuda", properties.name, "a GPU is visible", bf16, tf32)


def of_stages() -> Device:
    """Return the device that torch would take in a process that this one starts."""
    if not _drivers():
        return cpu(NO_GPU)
    if wants_cpu():
        return cpu(f"{USE_CPU} is set")
    key = _key()
    found = None if key is None else kept.recall(_KIND, key)
    if found is None:
        found = _ask()
        if key is not None and found["kind"] != "cpu":  # a driver that does not work may work the next time
            kept.keep(_KIND, key, found)
    return Device(**found)


def _ask() -> dict[str, Any]:
    """Let a process of its own look at the GPU, so that this one takes none of its memory."""
    command = [sys.executable, "-m", __name__]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    with contextlib.suppress(ValueError):
        return json.loads(done.stdout.splitlines()[-1] if done.stdout else "")
    return dataclasses.asdict(cpu("torch cannot look for a GPU"))


def _key() -> str | None:
    """Return the digest of what decides which GPU there is; None where nothing says that this is the same machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        driver = Path("/proc/driver/nvidia/version")
        version = driver.read_text(encoding="utf-8") if driver.is_file() else ""
    except (OSError, ValueError):
        return None
    visible = {name: value for name, value in os.environ.items() if name.endswith("_VISIBLE_DEVICES")}
    return digest([kept.installation(), kept.environment(), visible, platform.node(), boot, version])


def _drivers() -> list[str]:
    """Return the devices of drivers of GPUs that torch's CUDA could use; the list is empty only where there are none.

    Only Linux lists them, and only there and on Windows torch has CUDA.
    """
    if sys.platform == "darwin":
        return []
    try:
        return [name for name in os.listdir("/dev") if name.startswith(_DRIVERS)]  # noqa: PTH208
    except OSError:
        return ["unknown"]


def _why_no_gpu(built_for: str | None) -> str:
    """Say why torch sees no GPU; `built_for`: the version of CUDA or ROCm that torch was built for."""
    if not _drivers():
        return NO_GPU
    if built_for is None:
        return "the installed torch is built for CPUs alone"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides the GPUs"
    return "there is a driver of GPUs, but torch cannot use one"


def _has_bf16_instructions() -> bool:
    """Tell whether the processor lists instructions for bf16; where nothing is listed it counts as having none."""
    try:
        text = _CPU_INFO.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return flags is not None and not _BF16_FLAGS.isdisjoint(flags[1].split())


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(of_torch())))
