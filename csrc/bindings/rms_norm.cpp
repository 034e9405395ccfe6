// qwen_plugins/_rms_norm.py checks shapes and types.
#include "rms_norm.h"

#include <utility>

#include "arguments.h"
#include "kernels/rms_norm/rms_norm.h"

namespace py = pybind11;

namespace qwen_plugins {
namespace {

using Strides = std::pair<int64_t, int64_t>;  // outer, inner; in elements

// The operands that both functions have.
struct Operands {
  Address x;
  Strides x_strides;
  Address residual;
  Strides residual_strides;
  Address residual_out;
  Strides residual_out_strides;
  Address weight;
  std::pair<int64_t, int64_t> rows;  // in all, in the inner of the two leading dimensions
  int64_t hidden_size;
  int32_t dtype;
  int32_t weight_dtype;
  float eps;
  bool unit_offset;

  void fill(RmsNormParams& params) const {
    params.x = pointer<const void>(x);
    params.residual = pointer<const void>(residual);
    params.weight = pointer<const void>(weight);
    params.residual_out = pointer<void>(residual_out);
    params.x_strides = {x_strides.first, x_strides.second};
    params.residual_strides = {residual_strides.first, residual_strides.second};
    params.residual_out_strides = {residual_out_strides.first, residual_out_strides.second};
    params.rows = {rows.first, rows.second};
    params.hidden_size = hidden_size;
    params.dtype = static_cast<DataType>(dtype);
    params.weight_dtype = static_cast<DataType>(weight_dtype);
    params.eps = eps;
    params.unit_offset = unit_offset;
  }
};

void rms_norm(const Operands& operands, Address y, Strides y_strides, bool round_before_weight, Address stream) {
  RmsNormParams params;
  operands.fill(params);
  params.y = pointer<void>(y);
  params.y_strides = {y_strides.first, y_strides.second};
  params.round_before_weight = round_before_weight;
  check(launch_rms_norm(params, pointer<CUstream_st>(stream)), "rms_norm");
}

void rms_norm_quant(const Operands& operands, Address q, int32_t quant_dtype, Address smoothing,
                    int32_t smoothing_dtype, Address static_scale, Address scales, Address stream) {
  RmsNormQuantParams params;
  operands.fill(params);
  params.q = pointer<void>(q);
  params.quant_dtype = static_cast<DataType>(quant_dtype);
  params.smoothing = pointer<const void>(smoothing);
  params.smoothing_dtype = static_cast<DataType>(smoothing_dtype);
  params.static_scale = pointer<const float>(static_scale);
  params.scales = pointer<float>(scales);
  check(launch_rms_norm_quant(params, pointer<CUstream_st>(stream)), "rms_norm_quant");
}

}  // namespace

void bind_rms_norm(py::module_& module) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::enum_<DataType>(module, "DataType")
      .value("float32", DataType::kFloat32)
      .value("float16", DataType::kFloat16)
      .value("bfloat16", DataType::kBFloat16)
      .value("int8", DataType::kInt8)
      .value("float8_e4m3fn", DataType::kFloat8E4M3);
  py::class_<Operands>(module, "RmsNormOperands")
      .def(py::init<Address, Strides, Address, Strides, Address, Strides, Address, std::pair<int64_t, int64_t>, int64_t,
                    int32_t, int32_t, float, bool>(),
           py::arg("x"), py::arg("x_strides"), py::arg("residual"), py::arg("residual_strides"),
           py::arg("residual_out"), py::arg("residual_out_strides"), py::arg("weight"), py::arg("rows"),
           py::arg("hidden_size"), py::arg("dtype"), py::arg("weight_dtype"), py::arg("eps"), py::arg("unit_offset"));
  module.def("rms_norm", &rms_norm, Unlocked(), py::arg("operands"), py::arg("y"), py::arg("y_strides"),
             py::arg("round_before_weight"), py::arg("stream"));
  module.def("rms_norm_quant", &rms_norm_quant, Unlocked(), py::arg("operands"), py::arg("q"), py::arg("quant_dtype"),
             py::arg("smoothing"), py::arg("smoothing_dtype"), py::arg("static_scale"), py::arg("scales"),
             py::arg("stream"));
}

}  // namespace qwen_plugins
