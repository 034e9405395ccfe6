#include "gemm.h"

#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "arguments.h"
#include "kernels/gemm/choice.h"
#include "kernels/gemm/cublas_lt.h"
#include "kernels/gemm/gemm.h"
#include "kernels/gemm/measure.h"

namespace py = pybind11;

namespace qwen_plugins {
namespace {

// The choice of a name; throws what Python sees as a ValueError where there is none.
GemmChoice choice_of(const std::string& name) {
  GemmChoice choice = GemmChoice::kByRules;
  if (!gemm_choice_from_name(name, &choice)) {
    throw py::value_error("kernels: this build of qwen_plugins has no GEMM kernel '" + name + "'");
  }
  return choice;
}

// The most rows and the name of each choice, as Python gives them.
using NamedChoices = std::vector<std::pair<int64_t, std::string>>;

std::vector<GemmChoiceUpTo> choices_of(const NamedChoices& named) {
  std::vector<GemmChoiceUpTo> choices;
  int64_t rows_before = 0;
  for (const auto& [max_rows, name] : named) {
    if (max_rows <= rows_before) {
      throw py::value_error("kernels: the numbers of rows must increase from 1 on, but " + std::to_string(max_rows) +
                            " follows " + std::to_string(rows_before));
    }
    choices.push_back({max_rows, choice_of(name)});
    rows_before = max_rows;
  }
  return choices;
}

GemmShape make_shape(int64_t rows, int64_t in_features, int64_t out_features, Activation activation, DataType dtype,
                     const WeightFormat& weight_format, bool x_scale_per_row, bool quantized_y) {
  GemmShape shape;
  shape.rows = rows;
  shape.in_features = in_features;
  shape.out_features = out_features;
  shape.activation = activation;
  shape.dtype = dtype;
  shape.weight_format = weight_format;
  shape.x_scale_per_row = x_scale_per_row;
  shape.quantized_y = quantized_y;
  return shape;
}

// The parameters of a linear layer that are the same in each of its launches. Setting them once leaves a launch with
// few arguments, which matters: with a short prompt the GPU waits for Python to launch the kernels.
class LinearLayer {
 public:
  LinearLayer(Address weight, Address bias, int64_t in_features, int64_t out_features, Activation activation,
              DataType dtype, bool constant_weight, const NamedChoices& kernels, const WeightFormat& weight_format,
              Address scales, Address zeros, Address input_scale, Address output_scale)
      : choices_(choices_of(kernels)) {
    params_.weight = pointer<const void>(weight);
    params_.bias = pointer<const void>(bias);
    params_.scales = pointer<const void>(scales);
    params_.zeros = pointer<const void>(zeros);
    params_.x_scales = pointer<const float>(input_scale);
    params_.y_scale = pointer<const float>(output_scale);
    const bool x_scale_per_row = has_quantized_x(weight_format) && input_scale == 0;
    params_.shape =
        make_shape(0, in_features, out_features, activation, dtype, weight_format, x_scale_per_row, output_scale != 0);
    params_.constant_weight = constant_weight;
  }

  GemmParams params(int64_t rows) const {
    GemmParams params = params_;
    params.shape.rows = rows;
    params.choice = choice_for(choices_, rows);
    return params;
  }

  int64_t columns() const { return columns_of(params_.shape); }

  int64_t workspace_bytes(int64_t rows) const {
    int64_t bytes = 0;
    check(gemm_workspace_bytes(params(rows).shape, choices_, &bytes), "gemm_workspace_bytes");
    return bytes;
  }

 private:
  std::vector<GemmChoiceUpTo> choices_;
  GemmParams params_;
};

void gemm(const LinearLayer& layer, Address x, int64_t x_row_stride, Address y, int64_t rows, Address workspace,
          Address stream, Address x_scales) {
  GemmParams params = layer.params(rows);
  if (params.shape.x_scale_per_row) params.x_scales = pointer<const float>(x_scales);
  params.x = pointer<const void>(x);
  params.x_row_stride = x_row_stride;
  params.y = pointer<void>(y);
  params.workspace = pointer<void>(workspace);
  params.workspace_bytes = layer.workspace_bytes(rows);
  check(launch_gemm(params, pointer<CUstream_st>(stream)), "gemm");
}

std::string choice_by_rules(int64_t rows, int64_t in_features, int64_t out_features, Activation activation,
                            DataType dtype, const WeightFormat& weight_format, bool x_scale_per_row, bool quantized_y) {
  GemmChoice choice = GemmChoice::kByRules;
  const GemmShape shape =
      make_shape(rows, in_features, out_features, activation, dtype, weight_format, x_scale_per_row, quantized_y);
  check(gemm_choice_by_rules(shape, &choice), "gemm_choice_by_rules");
  return gemm_choice_name(choice);
}

std::vector<std::string> candidates(int64_t rows, int64_t in_features, int64_t out_features, Activation activation,
                                    DataType dtype, const WeightFormat& weight_format, bool x_scale_per_row,
                                    bool quantized_y) {
  std::vector<GemmChoice> choices;
  const GemmShape shape =
      make_shape(rows, in_features, out_features, activation, dtype, weight_format, x_scale_per_row, quantized_y);
  check(gemm_candidates(shape, &choices), "gemm_candidates");
  std::vector<std::string> names;
  for (const GemmChoice choice : choices) names.push_back(gemm_choice_name(choice));
  return names;
}

// Returns (name, microseconds) pairs of what can run.
std::vector<std::pair<std::string, float>> measure(const std::vector<std::string>& kernels, int64_t rows,
                                                   int64_t in_features, int64_t out_features, Activation activation,
                                                   DataType dtype, bool bias, const WeightFormat& weight_format,
                                                   bool x_scale_per_row, bool quantized_y) {
  std::vector<GemmChoice> choices;
  for (const std::string& name : kernels) choices.push_back(choice_of(name));
  GemmMeasurements measurements;
  const GemmShape shape =
      make_shape(rows, in_features, out_features, activation, dtype, weight_format, x_scale_per_row, quantized_y);
  const cudaError_t error = measure_gemm(shape, bias, choices, &measurements);
  if (error == cudaErrorMemoryAllocation) {
    throw std::runtime_error("measure_gemm: measuring " + std::to_string(rows) + " rows times [" +
                             std::to_string(out_features) + ", " + std::to_string(in_features) + "] takes " +
                             std::to_string(measurements.device_bytes) + " bytes of device memory, more than are free");
  }
  check(error, "measure_gemm");
  std::vector<std::pair<std::string, float>> times;
  for (size_t i = 0; i < kernels.size(); ++i) {
    if (measurements.microseconds[i] > 0.0F) times.emplace_back(kernels[i], measurements.microseconds[i]);
  }
  return times;
}

py::dict describe() {
  DeviceDescription device;
  check(describe_device(&device), "describe_device");
  py::dict described;
  described["gpu"] = device.name;
  described["multiprocessors"] = device.multiprocessors;
  described["driver"] = device.driver_version;
  return described;
}

}  // namespace

void bind_gemm(py::module_& module) {
  py::class_<LinearLayer>(module, "LinearLayer", "The parameters of a linear layer, the same in each of its launches.")
      .def(
          py::init<Address, Address, int64_t, int64_t, Activation, DataType, bool, const NamedChoices&,
                   const WeightFormat&, Address, Address, Address, Address>(),
          py::kw_only(), py::arg("weight"), py::arg("bias"), py::arg("in_features"), py::arg("out_features"),
          py::arg("activation"), py::arg("dtype"), py::arg("constant_weight"), py::arg("kernels") = NamedChoices(),
          py::arg("weight_format") = WeightFormat(), py::arg("scales") = Address{0}, py::arg("zeros") = Address{0},
          py::arg("input_scale") = Address{0}, py::arg("output_scale") = Address{0},
          "kernels: (max_rows, name) pairs, with more rows each; a name is one of gemm_candidates, for up to so many "
          "rows. More rows, and what a kernel cannot compute, go by the rules. ValueError for an unknown name.\n\n"
          "With x of codes, input_scale: the one scale of x; 0: gemm is given a scale for each row. output_scale: y is "
          "codes, too, with this scale.")
      .def_property_readonly("columns", &LinearLayer::columns, "The columns of y.")
      .def("workspace_bytes", &LinearLayer::workspace_bytes, py::arg("rows"),
           "Return the bytes of the workspace that gemm needs for that many rows; they never decrease with more rows.");
  module.def("gemm", &gemm, Unlocked(), py::arg("layer"), py::kw_only(), py::arg("x"), py::arg("x_row_stride"),
             py::arg("y"), py::arg("rows"), py::arg("workspace"), py::arg("stream"), py::arg("x_scales") = Address{0},
             "Launch the GEMM of a linear layer: kernels/gemm/gemm.h. The workspace has "
             "layer.workspace_bytes(rows). x_scales: one for each row, of x of codes in a layer without input_scale.");
  module.def("gemm_choice_by_rules", &choice_by_rules, py::kw_only(), py::arg("rows"), py::arg("in_features"),
             py::arg("out_features"), py::arg("activation"), py::arg("dtype"),
             py::arg("weight_format") = WeightFormat(), py::arg("x_scale_per_row") = false,
             py::arg("quantized_y") = false,
             "Return the name of the kernel that the rules choose on the current device, for aligned operands.");
  module.def("gemm_candidates", &candidates, py::kw_only(), py::arg("rows"), py::arg("in_features"),
             py::arg("out_features"), py::arg("activation"), py::arg("dtype"),
             py::arg("weight_format") = WeightFormat(), py::arg("x_scale_per_row") = false,
             py::arg("quantized_y") = false,
             "Return the names of the kernels that may be the fastest on the current device: kernels/gemm/choice.h.");
  module.def("measure_gemm", &measure, Unlocked(), py::arg("kernels"), py::kw_only(), py::arg("rows"),
             py::arg("in_features"), py::arg("out_features"), py::arg("activation"), py::arg("dtype"), py::arg("bias"),
             py::arg("weight_format") = WeightFormat(), py::arg("x_scale_per_row") = false,
             py::arg("quantized_y") = false,
             "Return pairs of the names that can run and their microseconds: kernels/gemm/measure.h.");
  module.def("describe_device", &describe, "Return name, number of multiprocessors and driver of the current device.");
  module.def("cublas_lt_version", &cublas_lt_version, "Return cuBLASLt's version, such as 130100; 0 for none.");
  module.attr("GEMM_KERNELS_VERSION") = kGemmKernelsVersion;
  module.def(
      "gemm_choice_number", [](const std::string& name) { return static_cast<int32_t>(choice_of(name)); },
      py::arg("name"),
      "Return the number of a kernel's name, which the Gemm plug-in takes; ValueError for an unknown name.");
  module.def(
      "gemm_choice_name", [](int32_t number) { return gemm_choice_name(static_cast<GemmChoice>(number)); },
      py::arg("number"), "Return the name of a kernel's number; empty for a number that this build does not have.");
  module.def("cublas_lt_status", &cublas_lt_status, "Return the file of cuBLASLt in use, or why none is in use.");
  module.def("has_hopper_kernels", &has_hopper_kernels, "Return whether the kernels for Hopper alone were built in.");
}

}  // namespace qwen_plugins
