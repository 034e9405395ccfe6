"""These numbers are compiled into the kernels and plug-ins; code that runs without the compiled modules needs them."""

HEAD_SIZES = (32, 64, 80, 96, 128, 256)  # those of the attention kernels
MAX_KERNELS = 32  # pairs in the Gemm plug-in's field: csrc/plugins/attributes.h: Int32Array::kMaxSize / 2
KV_CACHE_TYPES = {"auto": 0, "int8": 1, "fp8": 2}  # csrc/kernels/attention/heads.h: CacheDataType, GptAttention's field
ACTIVATIONS = {None: 0, "swiglu": 1}  # csrc/kernels/gemm/gemm.h: Activation, which the Gemm plug-in takes as a field
CODE_TYPES = {"int8": 2, "fp8": 6}  # csrc/kernels/common/data_type.h, of the types of codes that are int32 to TensorRT
SCALE_TYPES = {"float16": 1, "bfloat16": 7}  # csrc/kernels/common/data_type.h, of the Gemm plug-in's scale_type_id
