#include "attention.h"

#include "arguments.h"
#include "kernels/attention/decode.h"
#include "kernels/attention/prefill.h"

namespace py = pybind11;

namespace qwen_plugins {
namespace {

AttentionHeads make_heads(int32_t num_heads, int32_t num_kv_heads, int32_t head_size, int32_t rotary_dim,
                          DataType dtype, Address rotary_table, Address rotary_offsets, RotaryStyle rotary_style,
                          Address query_scale, Address q_norm_weight, Address k_norm_weight, float norm_eps) {
  AttentionHeads heads;
  heads.num_heads = num_heads;
  heads.num_kv_heads = num_kv_heads;
  heads.head_size = head_size;
  heads.rotary_dim = rotary_dim;
  heads.dtype = dtype;
  heads.rotary_table = pointer<const float>(rotary_table);
  heads.rotary_offsets = pointer<const int32_t>(rotary_offsets);
  heads.rotary_style = rotary_style;
  heads.query_scale = pointer<const float>(query_scale);
  heads.q_norm_weight = pointer<const void>(q_norm_weight);
  heads.k_norm_weight = pointer<const void>(k_norm_weight);
  heads.norm_eps = norm_eps;
  return heads;
}

KvCache make_cache(Address data, int32_t max_positions, CacheDataType dtype, Address pages, int32_t pages_row_stride) {
  return {pointer<void>(data), max_positions, dtype, pointer<const int32_t>(pages), pages_row_stride};
}

void prefill_attention(const AttentionHeads& heads, Address cache, int32_t max_positions, Address qkv,
                       int64_t qkv_row_stride, Address context, Address cu_seqlens, Address past_lengths,
                       int32_t sequences, int64_t tokens, float softmax_scale, Address stream,
                       CacheDataType cache_dtype, Address pages, int32_t pages_row_stride, DataType context_dtype,
                       Address context_scale, Address queries) {
  PrefillAttentionParams params;
  params.heads = heads;
  params.cache = make_cache(cache, max_positions, cache_dtype, pages, pages_row_stride);
  params.qkv = pointer<const void>(qkv);
  params.qkv_row_stride = qkv_row_stride;
  params.context = pointer<void>(context);
  params.cu_seqlens = pointer<const int32_t>(cu_seqlens);
  params.past_lengths = pointer<const int32_t>(past_lengths);
  params.sequences = sequences;
  params.tokens = tokens;
  params.context_dtype = context_dtype;
  params.context_scale = pointer<const float>(context_scale);
  params.queries = pointer<void>(queries);
  params.softmax_scale = softmax_scale;
  check(launch_prefill_attention(params, pointer<CUstream_st>(stream)), "prefill_attention");
}

void decode_attention(const AttentionHeads& heads, Address cache, int32_t max_positions, Address qkv,
                      int64_t qkv_row_stride, Address context, Address past_lengths, int32_t sequences,
                      float softmax_scale, Address workspace, Address semaphores, Address stream,
                      CacheDataType cache_dtype, Address pages, int32_t pages_row_stride, bool batch_invariant,
                      DataType context_dtype, Address context_scale) {
  DecodeAttentionParams params;
  params.heads = heads;
  params.cache = make_cache(cache, max_positions, cache_dtype, pages, pages_row_stride);
  params.qkv = pointer<const void>(qkv);
  params.qkv_row_stride = qkv_row_stride;
  params.context = pointer<void>(context);
  params.past_lengths = pointer<const int32_t>(past_lengths);
  params.sequences = sequences;
  params.softmax_scale = softmax_scale;
  params.workspace = pointer<void>(workspace);
  params.semaphores = pointer<int32_t>(semaphores);
  params.batch_invariant = batch_invariant;
  params.context_dtype = context_dtype;
  params.context_scale = pointer<const float>(context_scale);
  check(launch_decode_attention(params, pointer<CUstream_st>(stream)), "decode_attention");
}

int64_t workspace_bytes(const AttentionHeads& heads, int32_t sequences) {
  int64_t bytes = 0;
  check(decode_attention_workspace_bytes(heads, sequences, &bytes), "decode_attention_workspace_bytes");
  return bytes;
}

}  // namespace

void bind_attention(py::module_& module) {
  module.attr("PAGE_SIZE") = kPageSize;
  py::class_<AttentionHeads>(module, "AttentionHeads",
                             "The heads, their norms and their rotary embedding: kernels/attention/heads.h.")
      .def(py::init(&make_heads), py::kw_only(), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_size"),
           py::arg("rotary_dim"), py::arg("dtype"), py::arg("rotary_table"), py::arg("rotary_offsets"),
           py::arg("rotary_style"), py::arg("query_scale"), py::arg("q_norm_weight"), py::arg("k_norm_weight"),
           py::arg("norm_eps"));
  module.def("prefill_attention", &prefill_attention, Unlocked(), py::kw_only(), py::arg("heads"), py::arg("cache"),
             py::arg("max_positions"), py::arg("qkv"), py::arg("qkv_row_stride"), py::arg("context"),
             py::arg("cu_seqlens"), py::arg("past_lengths"), py::arg("sequences"), py::arg("tokens"),
             py::arg("softmax_scale"), py::arg("stream"), py::arg("cache_dtype") = CacheDataType::kSame,
             py::arg("pages") = 0, py::arg("pages_row_stride") = 0, py::arg("context_dtype") = DataType::kInt8,
             py::arg("context_scale") = 0, py::arg("queries") = 0,
             "Launch attention of prompts: kernels/attention/prefill.h.");
  module.def("decode_attention", &decode_attention, Unlocked(), py::kw_only(), py::arg("heads"), py::arg("cache"),
             py::arg("max_positions"), py::arg("qkv"), py::arg("qkv_row_stride"), py::arg("context"),
             py::arg("past_lengths"), py::arg("sequences"), py::arg("softmax_scale"), py::arg("workspace"),
             py::arg("semaphores"), py::arg("stream"), py::arg("cache_dtype") = CacheDataType::kSame,
             py::arg("pages") = 0, py::arg("pages_row_stride") = 0, py::arg("batch_invariant") = false,
             py::arg("context_dtype") = DataType::kInt8, py::arg("context_scale") = 0,
             "Launch attention of one new token a sequence: kernels/attention/decode.h.");
  module.def("decode_attention_workspace_bytes", &workspace_bytes, py::arg("heads"), py::kw_only(),
             py::arg("sequences"), "Return the size of the workspace that decode_attention needs, in bytes.");
}

}  // namespace qwen_plugins
