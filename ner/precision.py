"""The number type that a model computes in on a device."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(precision: str, device: torch.device | str) -> tuple[torch.dtype, str]:
    """Return the type to compute in and the reason for it, as a log line says it.

    precision: a key of DTYPES, or "auto" for the fastest type that the device multiplies natively.
    """
    if precision != "auto":
        return DTYPES[precision], "as configured"
    device = torch.device(device)
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU multiplies bfloat16 natively"
        return torch.float16, "this GPU has no native bfloat16"
    if device.type == "cpu":
        if cpu_has_bfloat16():
            return torch.bfloat16, "this CPU multiplies bfloat16 natively"
        return torch.float32, "this CPU has no native bfloat16"
    return torch.float32, f"nothing faster is known to be safe on {device.type}"


def cpu_has_bfloat16() -> bool:
    """Return whether the CPU has instructions for bfloat16 products; emulated ones are slower than float32."""
    avx512 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(avx512() or amx())
