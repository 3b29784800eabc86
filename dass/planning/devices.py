"""Devices, and from counts of operations and bytes the expected time on them; add your device here."""

from dataclasses import dataclass, replace

from dass.errors import DassError

ESTIMATE = 0.4  # share of its peaks that real runs reach on a GPU


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
    efficiency: float = ESTIMATE
    """Share of these peaks that is reached, above 0 and at most 1."""
    launch_us: float = 5
    """Microseconds of an operation so small that only its launch counts, an estimate for a GPU."""
    disk_gb_s: float = 1
    """Speed at which weights are read, an estimate."""

    def __post_init__(self) -> None:
        """Refuse what would make no time."""
        if not 0 < self.efficiency <= 1:
            raise DassError(f"efficiency={self.efficiency} must be above 0 and at most 1.")
        if self.launch_us < 0 or self.disk_gb_s <= 0:
            raise DassError(
                f"launch_us={self.launch_us} must be at least 0, and disk_gb_s={self.disk_gb_s} must be above 0."
            )


# Peaks are NVIDIA's (data sheets; for the RTX 4090 the Ada white paper): dense (halved where they are told with
# sparsity), 16-bit products summed in fp32, fp32 without TF32. The CPU's are no peaks but a rough measurement, so that
# its efficiency is 1: the pruning of results/benchmark.md, 43 s of Wanda on SmolLM2-135M, is 5.7 TFLOP and 120 GB
# between the products by our counts; the bandwidth is a guess.
DEVICES = {
    device.name: device
    for device in (
        # name, memory [GB], 16-bit [TFLOP/s], fp32 [TFLOP/s], bandwidth [GB/s]
        Device("h100", 80, 989, 67, 3350),
        Device("h200", 141, 989, 67, 4800),
        Device("a100", 80, 312, 19.5, 2039),
        Device("a100_40gb", 40, 312, 19.5, 1555),
        Device("l40s", 48, 362, 91.6, 864),
        Device("rtx4090", 24, 165, 82.6, 1008),
        Device("v100", 32, 125, 15.7, 900),  # float16 only
        Device("cpu_2cores", 25.3, 0.18, 0.18, 10, efficiency=1),
    )
}


@dataclass
class Stage:
    """What one stage takes, whatever the device."""

    name: str
    peak_bytes: float = 0
    """The device's memory at the worst moment, weights included."""
    flops: float = 0
    moved_bytes: float = 0
    """To and from the device's memory."""
    in_fp32: bool = False
    """Whether the operations are in fp32 whatever the model's dtype."""
    launches: float = 0
    """Operations too small to fill a device, one after the other."""
    disk_bytes: float = 0
    alone_bytes: float = 0
    """Moved by operations that do hardly anything else, in turn with the rest: their time is added to it."""

    def add(
        self,
        flops: float,
        moved_bytes: float = 0,
        peak_bytes: float = 0,
        launches: float = 0,
        alone_bytes: float = 0,
    ) -> None:
        """Add a part of it, which needs the memory of its peak while it runs."""
        self.flops += flops
        self.moved_bytes += moved_bytes
        self.peak_bytes = max(self.peak_bytes, peak_bytes)
        self.launches += launches
        self.alone_bytes += alone_bytes

    def shared(self, count: int) -> "Stage":
        """Its share on each of so many devices, were all but the disk divided evenly among them."""
        parts = ("flops", "moved_bytes", "launches", "alone_bytes", "peak_bytes")
        return replace(self, **{name: getattr(self, name) / count for name in parts})

    def seconds(self, device: Device, dtype: str) -> float:
        """The largest of the times for arithmetic, memory, launches and disk, and what is moved alone."""
        tflops = device.tflops_fp32 if self.in_fp32 or dtype == "float32" else device.tflops_16bit
        bytes_per_second = device.bandwidth_gb_s * 1e9 * device.efficiency
        longest = max(
            self.flops / (tflops * 1e12 * device.efficiency),
            self.moved_bytes / bytes_per_second,
            self.launches * device.launch_us / 1e6,
            self.disk_bytes / (device.disk_gb_s * 1e9),
        )
        return longest + self.alone_bytes / bytes_per_second
