"""Which sizes the kernels take and how they number their options, as csrc/kernels/ has it. Imports nothing."""

HEAD_SIZES = (32, 64, 80, 96, 128, 256)  # with_type_and_head_size
ROTARY_STYLES = {"neox": 0, "gptj": 1}  # RotaryStyle
ACTIVATIONS = {None: 0, "swiglu": 1}  # Activation
