"""What XLA's compiler is told of a GPU that is not there: a GpuTargetConfigProto."""

from moe_jax.plan.chips import Chip

# Limits of CUDA that are the same on all of these GPUs.
_TEMPLATE = """\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_bytes_per_core}
  threads_per_core_limit: 2048
  core_count: {gpu.num_cores}
  fpus_per_core: {gpu.units_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  shared_memory_per_block_optin: {gpu.shared_bytes_per_block}
  cuda_compute_capability {{
    major: {major}
    minor: {minor}
    feature_extension: {extension}
  }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  ecc_enabled: true
  name: "{name}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
  device_interconnect_info {{
    active_links: {links}
  }}
}}
platform_name: "CUDA"
dnn_version_info {{
  major: 9
  minor: 10
}}
device_description_str: "{name}"
"""


def text(chip: Chip) -> str:
    """Returns the description of a GPU as text."""
    assert chip.gpu is not None
    major, minor = chip.gpu.capability
    return _TEMPLATE.format(
        gpu=chip.gpu,
        bandwidth=int(chip.memory_bandwidth),
        major=major,
        minor=minor,
        # Instructions of one generation alone, "9.0a": there are none before Hopper.
        extension="ACCELERATED_FEATURES" if major >= 9 else "NONE",
        name=chip.kinds[0],
        links=18 if major >= 9 else 12,
    )
