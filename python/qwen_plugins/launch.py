"""Launch the CUDA kernels on device addresses, for code that has checked its operands already.

The functions of `qwen_plugins` on PyTorch tensors check everything and then call these. Call them directly where the
operands are right by construction and the time of the checks counts, or where there is no PyTorch.

Device memory and streams are integers: what ``Tensor.data_ptr()``, ``cuda_stream`` or the CUDA runtime give. 0 is no
tensor, or the default stream. Everything else a kernel requires (shapes, alignment, workspaces) is in the header that
a function's docstring names, in ``csrc/``; a wrong address is not detected. A launcher enqueues its kernels on the
stream, which belongs to the current device, and returns; it can be captured in a CUDA graph. Where CUDA reports an
error, such as for parameters that the header does not allow, it raises RuntimeError.

What stays the same from launch to launch is an object, made once for each layer of a network: `LinearLayer`,
`RmsNormLayer`, `SamplingSlots` and, for all layers that share a rotary table, `AttentionHeads`. All other arguments are
keywords.

    layer = launch.LinearLayer(
        weight=weight.data_ptr(), bias=0, in_features=4096, out_features=1024, activation=launch.Activation.none,
        dtype=launch.DataType.float16, constant_weight=True,
    )
    launch.gemm(layer, x=x.data_ptr(), x_row_stride=4096, y=y.data_ptr(), rows=1, workspace=0, stream=0)
"""

from qwen_plugins._core import (
    CUDA_VERSION,
    GEMM_KERNELS_VERSION,
    MAX_BEST,
    MAX_BIASES,
    MAX_VOCAB_SIZE,
    PAGE_SIZE,
    SAMPLING_START_BYTES,
    Activation,
    AttentionHeads,
    CacheDataType,
    DataType,
    LinearLayer,
    RmsNormLayer,
    RotaryStyle,
    RowLayout,
    SamplingSlots,
    WeightFormat,
    WeightKind,
    cublas_lt_status,
    cublas_lt_version,
    decode_attention,
    decode_attention_workspace_bytes,
    describe_device,
    gather_rows,
    gemm,
    gemm_candidates,
    gemm_choice_by_rules,
    gemm_choice_name,
    gemm_choice_number,
    has_hopper_kernels,
    logprobs,
    measure_gemm,
    pack_weight,
    prefill_attention,
    quantize,
    rms_norm,
    rms_norm_quant,
    sample,
    sampling_workspace_bytes,
    start_sampling,
    swiglu,
    unpack_weight,
)

__all__ = [
    "CUDA_VERSION",
    "GEMM_KERNELS_VERSION",
    "MAX_BEST",
    "MAX_BIASES",
    "MAX_VOCAB_SIZE",
    "PAGE_SIZE",
    "SAMPLING_START_BYTES",
    "Activation",
    "AttentionHeads",
    "CacheDataType",
    "DataType",
    "LinearLayer",
    "RmsNormLayer",
    "RotaryStyle",
    "RowLayout",
    "SamplingSlots",
    "WeightFormat",
    "WeightKind",
    "cublas_lt_status",
    "cublas_lt_version",
    "decode_attention",
    "decode_attention_workspace_bytes",
    "describe_device",
    "gather_rows",
    "gemm",
    "gemm_candidates",
    "gemm_choice_by_rules",
    "gemm_choice_name",
    "gemm_choice_number",
    "has_hopper_kernels",
    "logprobs",
    "measure_gemm",
    "pack_weight",
    "prefill_attention",
    "quantize",
    "rms_norm",
    "rms_norm_quant",
    "sample",
    "sampling_workspace_bytes",
    "start_sampling",
    "swiglu",
    "unpack_weight",
]
