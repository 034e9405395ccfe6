#include "rms_norm.h"

#include <utility>

#include "arguments.h"
#include "kernels/rms_norm/rms_norm.h"

namespace py = pybind11;

namespace qwen_plugins {
namespace {

// The parameters of an RMSNorm layer that are the same in each of its launches.
struct RmsNormLayer {
  Address weight;
  int64_t hidden_size;
  DataType dtype;
  DataType weight_dtype;
  float eps;
  bool unit_offset;
  bool batch_invariant;
};

using Strides = std::pair<int64_t, int64_t>;  // of RowStrides: outer, inner

RowStrides row_strides(Strides strides) { return {strides.first, strides.second}; }

// Where the rows of the operands lie; with inner_rows = 0 they are contiguous. Contiguous rows are not a null pointer
// because pybind11 accepts None only at its second attempt to match the arguments, which doubles the time of a call.
struct RowLayout {
  int64_t inner_rows = 0;
  Strides x{};
  Strides residual{};
  Strides residual_out{};
  Strides y{};
};

// Sets the parameters that both launches take.
void fill(RmsNormParams& params, const RmsNormLayer& layer, const RowLayout& layout, int64_t rows, Address x,
          Address residual, Address residual_out) {
  params.x = pointer<const void>(x);
  params.residual = pointer<const void>(residual);
  params.weight = pointer<const void>(layer.weight);
  params.residual_out = pointer<void>(residual_out);
  params.hidden_size = layer.hidden_size;
  params.dtype = layer.dtype;
  params.weight_dtype = layer.weight_dtype;
  params.eps = layer.eps;
  params.unit_offset = layer.unit_offset;
  params.batch_invariant = layer.batch_invariant;
  if (layout.inner_rows == 0) {
    const RowStrides contiguous{0, layer.hidden_size};
    params.rows = {rows, rows};
    params.x_strides = params.residual_strides = params.residual_out_strides = params.y_strides = contiguous;
  } else {
    params.rows = {rows, layout.inner_rows};
    params.x_strides = row_strides(layout.x);
    params.residual_strides = row_strides(layout.residual);
    params.residual_out_strides = row_strides(layout.residual_out);
    params.y_strides = row_strides(layout.y);
  }
}

void rms_norm(const RmsNormLayer& layer, Address x, Address residual, Address residual_out, Address y, int64_t rows,
              Address stream, bool round_before_weight, const RowLayout& layout) {
  RmsNormParams params;
  fill(params, layer, layout, rows, x, residual, residual_out);
  params.y = pointer<void>(y);
  params.round_before_weight = round_before_weight;
  check(launch_rms_norm(params, pointer<CUstream_st>(stream)), "rms_norm");
}

void rms_norm_quant(const RmsNormLayer& layer, Address x, Address residual, Address residual_out, Address q,
                    DataType quant_dtype, Address static_scale, Address scales, int64_t rows, Address stream,
                    Address smoothing, DataType smoothing_dtype, const RowLayout& layout) {
  RmsNormQuantParams params;
  fill(params, layer, layout, rows, x, residual, residual_out);
  params.q = pointer<void>(q);
  params.quant_dtype = quant_dtype;
  params.smoothing = pointer<const void>(smoothing);
  params.smoothing_dtype = smoothing_dtype;
  params.static_scale = pointer<const float>(static_scale);
  params.scales = pointer<float>(scales);
  check(launch_rms_norm_quant(params, pointer<CUstream_st>(stream)), "rms_norm_quant");
}

}  // namespace

void bind_rms_norm(py::module_& module) {
  py::class_<RmsNormLayer>(module, "RmsNormLayer",
                           "The parameters of an RMSNorm layer, the same in each of its launches.")
      .def(py::init<Address, int64_t, DataType, DataType, float, bool, bool>(), py::kw_only(), py::arg("weight"),
           py::arg("hidden_size"), py::arg("dtype"), py::arg("weight_dtype"), py::arg("eps"), py::arg("unit_offset"),
           py::arg("batch_invariant") = false);
  py::class_<RowLayout>(
      module, "RowLayout",
      "The strides of rows in two levels, each (outer, inner) in elements: kernels/rms_norm/rms_norm.h. "
      "Without arguments: contiguous rows.")
      .def(py::init<>())
      .def(py::init<int64_t, Strides, Strides, Strides, Strides>(), py::kw_only(), py::arg("inner_rows"), py::arg("x"),
           py::arg("residual"), py::arg("residual_out"), py::arg("y"));
  module.def("rms_norm", &rms_norm, Unlocked(), py::arg("layer"), py::kw_only(), py::arg("x"), py::arg("residual"),
             py::arg("residual_out"), py::arg("y"), py::arg("rows"), py::arg("stream"),
             py::arg("round_before_weight") = false, py::arg("layout") = RowLayout{},
             "Launch RMSNorm: kernels/rms_norm/rms_norm.h. Without a layout all rows are contiguous.");
  module.def("rms_norm_quant", &rms_norm_quant, Unlocked(), py::arg("layer"), py::kw_only(), py::arg("x"),
             py::arg("residual"), py::arg("residual_out"), py::arg("q"), py::arg("quant_dtype"),
             py::arg("static_scale"), py::arg("scales"), py::arg("rows"), py::arg("stream"), py::arg("smoothing") = 0,
             py::arg("smoothing_dtype") = DataType::kFloat32, py::arg("layout") = RowLayout{},
             "Launch RMSNorm with quantization: kernels/rms_norm/rms_norm.h. q is contiguous in any layout.");
}

}  // namespace qwen_plugins
