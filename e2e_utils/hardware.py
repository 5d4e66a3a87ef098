"""What a run computes on and in: the device, and float32, bfloat16 or float16.

Copy: this file.

`amp="auto"` asks the hardware, once, and never a clock: two runs on like machines
compute alike. A GPU with units for bfloat16 (NVIDIA from Ampere on) takes it; an
older one with units for float16 (V100, T4) takes that with a gradient scaler; others
stay in float32. A CPU takes bfloat16 where it has it (AVX512-bf16, AMX) and
`CPU_BF16_SPEEDUP` tells that the architecture gains by it.

float32 is torch's: on a GPU its convolutions take TF32 from Ampere on, 10 of 23 bits,
until `torch.backends.cudnn.allow_tf32 = False`, as `engines.load_engine` sets it.
"""

from __future__ import annotations

import os
import platform
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

AMP = ("auto", "off", "bf16", "fp16")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# Steps a second of training in bf16 over those in fp32, by benchmarks/precision.py: on
# a core with AMX (Xeon, torch 2.11) and on one with AVX512-bf16 (EPYC, torch 2.14).
CPU_BF16_SPEEDUP = {
    "fasterrcnn_resnet50_fpn": (2.12, 1.65),
    "fasterrcnn_resnet50_fpn_v2": (2.28, 1.85),
    "fcos_resnet50_fpn": (2.15, 1.95),
    "retinanet_resnet50_fpn_v2": (2.45, 1.87),
    "ssd300_vgg16": (3.83, 2.13),
    "ssdlite320_mobilenet_v3_large": (0.84, 1.18),
    "resnet152_fasterrcnn_model": (2.13, 1.75),
    "resnet152_fpn_fasterrcnn": (2.15, 1.75),  # the same network
    "efficientnet_b4_fasterrcnn_model": (1.29, 1.43),
    "convnext_small_fasterrcnn_model": (1.58, 1.75),
    "convnext_large_fasterrcnn_model": (1.57, 1.76),
}
# fasterrcnn_small gains too (1.93, 1.58) and is left out on purpose: its runs take
# minutes anyway, and in float32 the notebooks' figures differ between CPUs by rounding.
# fasterrcnn_lite0_fpn, for the same reason, was not measured.
WORTH = 1.3  # a smaller gain is not worth 16 of 24 bits


def machine() -> dict[str, str]:
    """Python, system, cores, memory in GiB and GPUs that torch can use, in words.

    Example:
        >>> list(machine())
        ['Python', 'system', 'cores', 'memory', 'GPU']
    """
    import psutil  # here alone: servers copy this file without it

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = psutil.virtual_memory().total / 2**30
    return {
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": f"{os.cpu_count()}, torch uses {torch.get_num_threads()}",
        "memory": f"{memory:.0f} GiB",
        "GPU": ", ".join(gpus) or "none that torch can use; all runs without one",
    }


def find_device(name: str | None = None, index: int = 0) -> torch.device:
    """The device of that name; a GPU if there is one, if none is named.

    Args:
        name: "cpu", "cuda", "cuda:1", ...
        index: of the GPU that "cuda" means, such as the local rank.

    Raises:
        ValueError: no such device, or it is not there.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d?))?", name):
        raise ValueError(f"no device {name!r}; valid: cpu, cuda, cuda:0, cuda:1, ...")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.index is None:
        device = torch.device("cuda", index)
    if device.index >= count:
        raise ValueError(
            f"device {name!r}, but torch {torch.__version__} finds "
            f"{count or 'no'} GPU here: take 'cpu', or no device for what is there"
        )
    return device


def native_precisions(device: torch.device) -> tuple[str, ...]:
    """Those of `PRECISIONS` that the device has units for; "fp32" is always first.

    Example:
        >>> native_precisions(torch.device("cpu"))[0]  # then "bf16", with AMX
        'fp32'
    """
    bf16 = fp16 = False
    if device.type == "cuda":
        with torch.cuda.device(device):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        fp16 = torch.cuda.get_device_capability(device) >= (7, 0)  # from Volta on
    elif device.type == "cpu":
        bf16 = _cpu_has_bf16()
    return ("fp32", *("bf16",) * bf16, *("fp16",) * fp16)


def _cpu_has_bf16() -> bool:
    """Of x86-64; ARM's bfloat16 was not measured, so it is not asked for."""
    flags = ("avx512_bf16", "amx_bf16")
    if hasattr(torch.cpu, "get_capabilities"):  # not in torch 2.11
        able = torch.cpu.get_capabilities()
        return any(able.get(flag, False) for flag in flags)
    try:
        return bool(re.search(rf"\b({'|'.join(flags)})\b", _cpuinfo()))
    except OSError:  # no Linux
        return False


def _cpuinfo() -> str:
    return Path("/proc/cpuinfo").read_text()


def choose_precision(
    amp: str,
    architecture: str,
    device: torch.device,
    able: Iterable[str] | None = None,
    began: str | None = None,
) -> str:
    """The precision of a run, a key of `PRECISIONS`.

    Args:
        amp: one of `AMP`. "off" is float32; "bf16" and "fp16" are taken at their word,
            also where the device emulates them.
        architecture: the model's name.
        device: of this process.
        able: what the devices of all processes have units for, so that all of them
            choose alike; by default that of this one.
        began: the precision of the run that is continued. "auto" keeps it.

    Raises:
        ValueError: no such amp; the run began in another precision than asked, or in
            one that the devices have no units for.

    Example:
        >>> cpu, able = torch.device("cpu"), ("fp32", "bf16")
        >>> choose_precision("auto", "fasterrcnn_resnet50_fpn", cpu, able)
        'bf16'
        >>> choose_precision("auto", "fasterrcnn_small", cpu, able)
        'fp32'
    """
    if amp not in AMP:
        raise ValueError(f"amp must be one of {', '.join(AMP)}, got {amp!r}")
    able = set(native_precisions(device) if able is None else able)
    if amp != "auto":
        asked = "fp32" if amp == "off" else amp
        if began not in (None, asked):
            raise ValueError(f"it began in {began}, and amp={amp!r} is asked")
        return asked
    if began is not None:
        if began not in able:
            raise ValueError(
                f"it began in {began}, which {device.type} here has no units for; "
                f"amp={began!r} goes on all the same, slowly"
            )
        return began
    if device.type == "cpu":
        gains = min(CPU_BF16_SPEEDUP.get(architecture, (1.0,))) >= WORTH
        return "bf16" if gains and "bf16" in able else "fp32"
    return next(p for p in ("bf16", "fp16", "fp32") if p in able)


def memory_format(precision: str) -> torch.memory_format:
    """The layout of weights that suits what the convolutions compute in.

    Channels last is what matrix units of 16 bits want. In float32 on a CPU with
    AVX2 it costs: 6.9 against 6.3 CPU-s a step of two tiles of a ResNet-50 detector.

    Example:
        >>> memory_format("fp32"), memory_format("bf16")
        (torch.contiguous_format, torch.channels_last)
    """
    return torch.contiguous_format if precision == "fp32" else torch.channels_last


def grad_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Keeps small gradients from vanishing in float16; does nothing in the others.

    Example:
        >>> grad_scaler("bf16", torch.device("cpu")).is_enabled()
        False
    """
    if precision == "fp16":
        # it may leave out the first steps of the optimizer, not of the schedule, which
        # torch takes for a mistake
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
