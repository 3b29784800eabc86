"""From counts of operations and bytes to an expected time on a named device."""

from dataclasses import dataclass

from dass.errors import DassError


@dataclass(frozen=True)
class Device:
    """A device as its maker describes it."""

    name: str
    memory_gb: float
    """GB are 10^9 bytes here and everywhere."""
    tflops_16bit: float
    """Peak of bfloat16 or float16 matrix products, dense."""
    tflops_fp32: float
    """Peak of fp32 products (TF32 off)."""
    bandwidth_gb_s: float
    efficiency: float
    """Share of these that is reached, unless the plan says otherwise."""

    def __post_init__(self) -> None:
        """Refuse sizes that no device has."""
        for name in ("memory_gb", "tflops_16bit", "tflops_fp32", "bandwidth_gb_s"):
            if not getattr(self, name) > 0:
                raise DassError(f"device.{name}={getattr(self, name)} must be above 0.")


@dataclass(frozen=True)
class Assumptions:
    """What an estimate of time assumes, beside the device."""

    efficiency: float
    """Share of the peak and of the bandwidth that is reached, above 0 and at most 1."""
    launch_us: float
    """Microseconds of an operation so small that only its launch counts."""
    disk_gb_s: float
    """Speed at which weights are read."""

    def __post_init__(self) -> None:
        """Refuse what would make no time."""
        if not 0 < self.efficiency <= 1:
            raise DassError(f"efficiency={self.efficiency} must be above 0 and at most 1.")
        if not (self.launch_us >= 0 and self.disk_gb_s > 0):
            raise DassError(
                f"launch_us={self.launch_us} must be at least 0, and disk_gb_s={self.disk_gb_s} must be above 0."
            )


@dataclass(frozen=True)
class Stage:
    """What one stage takes, whatever the device."""

    name: str
    peak_bytes: float
    """The device's memory at the worst moment, weights included."""
    flops: float = 0
    moved_bytes: float = 0
    """To and from the device's memory."""
    in_fp32: bool = False
    """Whether the operations are in fp32 whatever the model's dtype."""
    launches: float = 0
    """Operations too small to fill a device, one after the other."""
    disk_bytes: float = 0


def seconds(stage: Stage, device: Device, dtype: str, assumed: Assumptions) -> float:
    """The expected time of a stage: the largest of the times for arithmetic, memory, launches and disk."""
    tflops = device.tflops_fp32 if stage.in_fp32 or dtype == "float32" else device.tflops_16bit
    return max(
        stage.flops / (tflops * 1e12 * assumed.efficiency),
        stage.moved_bytes / (device.bandwidth_gb_s * 1e9 * assumed.efficiency),
        stage.launches * assumed.launch_us / 1e6,
        stage.disk_bytes / (assumed.disk_gb_s * 1e9),
    )
