#include "packed_weight.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "arguments.h"
#include "kernels/gemm/packed_weight.h"

namespace py = pybind11;

namespace qwen_plugins {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
T* data_of(const Array<T>& array) {
  return const_cast<T*>(array.data());
}
uint8_t* data_of(const std::optional<Array<uint8_t>>& array) { return array ? data_of(*array) : nullptr; }

// Sizes come from the shapes of the arrays, which qwen_plugins.quantized has checked.
py::tuple pack(const WeightFormat& format, const Array<uint8_t>& codes, const Array<uint16_t>& scales,
               const std::optional<Array<uint8_t>>& zeros, int threads) {
  const int64_t rows = codes.shape(0), k = codes.shape(1);
  const PackedSizes sizes(format, rows, k);
  const int64_t blocks = sizes.rows / kPackedRows;
  Array<int32_t> packed_codes({sizes.k / kPackedK, blocks, int64_t{superblock_bytes_of(format.kind) / 4}});
  Array<uint16_t> packed_scales({sizes.groups, sizes.rows});
  std::optional<Array<uint8_t>> packed_zeros;
  if (format.has_zeros) packed_zeros.emplace(std::vector<int64_t>{sizes.groups, sizes.rows});
  const UnpackedWeight from{data_of(codes), data_of(scales), data_of(zeros)};
  const PackedWeight to{reinterpret_cast<uint8_t*>(packed_codes.mutable_data()), packed_scales.mutable_data(),
                        data_of(packed_zeros)};
  {
    const py::gil_scoped_release unlocked;
    pack_weight(format, rows, k, from, to, threads);
  }
  return py::make_tuple(packed_codes, packed_scales, packed_zeros);
}

py::tuple unpack(const WeightFormat& format, int64_t rows, int64_t k, const Array<int32_t>& codes,
                 const Array<uint16_t>& scales, const std::optional<Array<uint8_t>>& zeros, int threads) {
  const int64_t groups = format.group_size == 0 ? 1 : k / format.group_size;
  Array<uint8_t> all_codes({rows, k});
  Array<uint16_t> all_scales({rows, groups});
  std::optional<Array<uint8_t>> all_zeros;
  if (format.has_zeros) all_zeros.emplace(std::vector<int64_t>{rows, groups});
  const PackedWeight from{reinterpret_cast<uint8_t*>(data_of(codes)), data_of(scales), data_of(zeros)};
  const UnpackedWeight to{all_codes.mutable_data(), all_scales.mutable_data(), data_of(all_zeros)};
  {
    const py::gil_scoped_release unlocked;
    unpack_weight(format, rows, k, from, to, threads);
  }
  return py::make_tuple(all_codes, all_scales, all_zeros);
}

}  // namespace

void bind_packed_weight(py::module_& module) {
  module.def(
      "pack_weight", &pack, py::arg("format"), py::kw_only(), py::arg("codes"), py::arg("scales"), py::arg("zeros"),
      py::arg("threads"),
      "Return the packed codes (int32), scales (as uint16) and zeros of a weight: kernels/gemm/packed_weight.h.");
  module.def("unpack_weight", &unpack, py::arg("format"), py::kw_only(), py::arg("rows"), py::arg("k"),
             py::arg("codes"), py::arg("scales"), py::arg("zeros"), py::arg("threads"),
             "Return the codes, scales (as uint16) and zeros of a packed weight.");
}

}  // namespace qwen_plugins
