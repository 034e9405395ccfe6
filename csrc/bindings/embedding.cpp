#include "embedding.h"

#include "arguments.h"
#include "kernels/embedding/gather_rows.h"

namespace py = pybind11;

namespace qwen_plugins {
namespace {

void gather_rows(Address table, Address ids, Address y, int64_t table_rows, int64_t row_size, int64_t rows,
                 DataType dtype, Address stream) {
  GatherRowsParams params;
  params.table = pointer<const void>(table);
  params.ids = pointer<const int32_t>(ids);
  params.y = pointer<void>(y);
  params.table_rows = table_rows;
  params.row_size = row_size;
  params.rows = rows;
  params.dtype = dtype;
  check(launch_gather_rows(params, pointer<CUstream_st>(stream)), "gather_rows");
}

}  // namespace

void bind_embedding(py::module_& module) {
  module.def("gather_rows", &gather_rows, Unlocked(), py::kw_only(), py::arg("table"), py::arg("ids"), py::arg("y"),
             py::arg("table_rows"), py::arg("row_size"), py::arg("rows"), py::arg("dtype"), py::arg("stream"),
             "Launch y = table[ids]: kernels/embedding/gather_rows.h.");
}

}  // namespace qwen_plugins
