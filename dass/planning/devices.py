"""The devices that a plan may name; add yours here."""

from dass.planning.device import Device

ESTIMATE = 0.4  # share of its peaks that real runs reach on a GPU

# Peaks are NVIDIA's (data sheets; for the RTX 4090 the Ada white paper): dense (halved where they are told with
# sparsity), 16-bit products summed in fp32, fp32 without TF32. The CPU's are no peaks but a rough measurement, so that
# its efficiency is 1: the pruning of results/benchmark.md, 43 s of Wanda on SmolLM2-135M, is 5.7 TFLOP by our counts;
# the bandwidth is a guess.
DEVICES = {
    device.name: device
    for device in (
        # name, memory [GB], 16-bit [TFLOP/s], fp32 [TFLOP/s], bandwidth [GB/s], efficiency
        Device("h100", 80, 989, 67, 3350, ESTIMATE),
        Device("h200", 141, 989, 67, 4800, ESTIMATE),
        Device("a100", 80, 312, 19.5, 2039, ESTIMATE),
        Device("a100_40gb", 40, 312, 19.5, 1555, ESTIMATE),
        Device("l40s", 48, 362, 91.6, 864, ESTIMATE),
        Device("rtx4090", 24, 165, 82.6, 1008, ESTIMATE),
        Device("v100", 32, 125, 15.7, 900, ESTIMATE),  # float16 only
        Device("cpu_2cores", 25.3, 0.13, 0.13, 10, 1.0),
    )
}
