"""Numbers that the kernels and plug-ins are compiled with, for code that runs without the compiled modules."""

HEAD_SIZES = (32, 64, 80, 96, 128, 256)  # those of the attention kernels
ACTIVATIONS = {None: 0, "swiglu": 1}  # csrc/kernels/gemm/gemm.h: Activation, which the Gemm plug-in takes as a field
