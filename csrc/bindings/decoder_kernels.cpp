// Device pointers and streams come as integers, as every framework can give them; the Python functions in
// qwen_plugins/decoder.py check shapes and types.
#include "decoder_kernels.h"

#include <stdexcept>
#include <string>

#include "kernels/decode_attention.h"
#include "kernels/rotary_cache.h"
#include "kernels/swiglu.h"

namespace py = pybind11;

namespace qwen_plugins {
namespace {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

void swiglu(Address gate_up, Address y, int64_t gate_up_row_stride, int64_t rows, int64_t size, int32_t dtype,
            Address stream) {
  SwigluParams params;
  params.gate_up = pointer<const void>(gate_up);
  params.y = pointer<void>(y);
  params.gate_up_row_stride = gate_up_row_stride;
  params.rows = rows;
  params.size = size;
  params.dtype = static_cast<DataType>(dtype);
  check(launch_swiglu(params, pointer<CUstream_st>(stream)), "swiglu");
}

AttentionHeads make_heads(int32_t num_heads, int32_t num_kv_heads, int32_t head_size, int32_t rotary_dim, int32_t dtype,
                          Address rotary_table, Address rotary_rows, Address query_scale, Address q_norm_weight,
                          Address k_norm_weight, float norm_eps) {
  AttentionHeads heads;
  heads.num_heads = num_heads;
  heads.num_kv_heads = num_kv_heads;
  heads.head_size = head_size;
  heads.rotary_dim = rotary_dim;
  heads.dtype = static_cast<DataType>(dtype);
  heads.rotary_table = pointer<const float>(rotary_table);
  heads.rotary_rows = pointer<const int32_t>(rotary_rows);
  heads.query_scale = pointer<const float>(query_scale);
  heads.q_norm_weight = pointer<const void>(q_norm_weight);
  heads.k_norm_weight = pointer<const void>(k_norm_weight);
  heads.norm_eps = norm_eps;
  return heads;
}

void rotary_cache(const AttentionHeads& heads, Address cache, int32_t max_positions, Address qkv,
                  int64_t qkv_row_stride, Address sequences, Address positions, int64_t tokens, Address stream) {
  RotaryCacheParams params;
  params.heads = heads;
  params.cache = {pointer<void>(cache), max_positions};
  params.qkv = pointer<void>(qkv);
  params.qkv_row_stride = qkv_row_stride;
  params.sequences = pointer<const int32_t>(sequences);
  params.positions = pointer<const int32_t>(positions);
  params.tokens = tokens;
  check(launch_rotary_cache(params, pointer<CUstream_st>(stream)), "rotary_cache");
}

void decode_attention(const AttentionHeads& heads, Address cache, int32_t max_positions, Address qkv,
                      int64_t qkv_row_stride, Address context, Address past_lengths, int32_t sequences,
                      float softmax_scale, Address workspace, int32_t workspace_sequences, Address stream) {
  DecodeAttentionParams params;
  params.heads = heads;
  params.cache = {pointer<void>(cache), max_positions};
  params.qkv = pointer<const void>(qkv);
  params.qkv_row_stride = qkv_row_stride;
  params.context = pointer<void>(context);
  params.past_lengths = pointer<const int32_t>(past_lengths);
  params.sequences = sequences;
  params.softmax_scale = softmax_scale;
  params.workspace = pointer<void>(workspace);
  params.workspace_sequences = workspace_sequences;
  check(launch_decode_attention(params, pointer<CUstream_st>(stream)), "decode_attention");
}

int64_t workspace_bytes(const AttentionHeads& heads, int32_t max_sequences) {
  DecodeAttentionWorkspace workspace;
  check(decode_attention_workspace(heads, max_sequences, &workspace), "decode_attention_workspace");
  return workspace.bytes;
}

}  // namespace

void bind_decoder_kernels(py::module_& module) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<AttentionHeads>(module, "AttentionHeads")
      .def(py::init(&make_heads), py::kw_only(), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_size"),
           py::arg("rotary_dim"), py::arg("dtype"), py::arg("rotary_table"), py::arg("rotary_rows"),
           py::arg("query_scale"), py::arg("q_norm_weight"), py::arg("k_norm_weight"), py::arg("norm_eps"));
  module.def("swiglu", &swiglu, Unlocked(), py::kw_only(), py::arg("gate_up"), py::arg("y"),
             py::arg("gate_up_row_stride"), py::arg("rows"), py::arg("size"), py::arg("dtype"), py::arg("stream"));
  module.def("rotary_cache", &rotary_cache, Unlocked(), py::kw_only(), py::arg("heads"), py::arg("cache"),
             py::arg("max_positions"), py::arg("qkv"), py::arg("qkv_row_stride"), py::arg("sequences"),
             py::arg("positions"), py::arg("tokens"), py::arg("stream"));
  module.def("decode_attention", &decode_attention, Unlocked(), py::kw_only(), py::arg("heads"), py::arg("cache"),
             py::arg("max_positions"), py::arg("qkv"), py::arg("qkv_row_stride"), py::arg("context"),
             py::arg("past_lengths"), py::arg("sequences"), py::arg("softmax_scale"), py::arg("workspace"),
             py::arg("workspace_sequences"), py::arg("stream"));
  module.def("decode_attention_workspace_bytes", &workspace_bytes, py::arg("heads"), py::arg("max_sequences"));
}

}  // namespace qwen_plugins
