"""Peak arithmetic rate and memory bandwidth of known GPUs, for model FLOPs utilisation (MFU). Vendor datasheets, dense, no sparsity."""

# name as in torch.cuda.get_device_name, lower case, matched in order: (dense bf16 FLOP/s, bytes/s)
GPUS = (
    ("b200", 2.25e15, 8.0e12),
    ("h200", 989e12, 4.8e12),
    ("h100 nvl", 835e12, 3.9e12),
    ("h100 pcie", 756e12, 2.0e12),
    ("gh200", 989e12, 4.0e12),
    ("h100", 989e12, 3.35e12),
    ("a100", 312e12, 2.0e12),
    ("a10g", 70e12, 0.6e12),
    ("a10", 125e12, 0.6e12),
    ("a6000", 155e12, 0.77e12),
    ("l40s", 362e12, 0.86e12),
    ("l4", 121e12, 0.3e12),
    ("t4", 65e12, 0.32e12),
    ("4090", 165e12, 1.0e12),
    ("3090", 71e12, 0.94e12),
)


def peak_flops(device_name):
    """Dense bf16 FLOP/s of a GPU by its name, or None for one not in the table: then no MFU is reported rather than a wrong one."""
    return next((flops for key, flops, _ in GPUS if key in device_name.lower()), None)


def peak_bandwidth(device_name):
    """Memory bandwidth in bytes/s, or None."""
    return next((bandwidth for key, _, bandwidth in GPUS if key in device_name.lower()), None)
