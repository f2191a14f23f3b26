"""Errors of the CUDA runtime."""

ERRORS = {
    "cudaErrorInvalidValue": (1, "invalid argument"),
    "cudaErrorMemoryAllocation": (2, "out of memory"),
    "cudaErrorInsufficientDriver": (35, "CUDA driver version is insufficient for CUDA runtime version"),
    "cudaErrorInvalidDevice": (101, "invalid device ordinal"),
    "cudaErrorDeviceUninitialized": (201, "invalid device context"),
    "cudaErrorMapBufferObjectFailed": (205, "mapping of buffer object failed"),
    "cudaErrorInvalidResourceHandle": (400, "invalid resource handle"),
    "cudaErrorNotReady": (600, "device not ready"),
    "cudaErrorIllegalAddress": (700, "an illegal memory access was encountered"),
    "cudaErrorHostMemoryAlreadyRegistered": (712, "part or all of the requested memory range is already mapped"),
    "cudaErrorHostMemoryNotRegistered": (713, "pointer does not correspond to a registered memory region"),
    "cudaErrorMisalignedAddress": (716, "misaligned address"),
}


class CUDARuntimeError(RuntimeError):
    def __init__(self, name: str) -> None:
        self.status = ERRORS[name][0]
        super().__init__(f"{name}: {ERRORS[name][1]}")
