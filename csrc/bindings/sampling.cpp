#include "sampling.h"

#include "arguments.h"
#include "kernels/sampling/sampling.h"

namespace py = pybind11;

namespace qwen_plugins {
namespace {

void sample(Address logits, int64_t logits_row_stride, int32_t sequences, int32_t vocab_size, DataType dtype,
            Address settings, bool greedy, Address seen, Address tokens, Address input_ids, Address past_lengths,
            Address workspace, Address semaphores, Address stream) {
  SamplingParams params;
  params.logits = pointer<const void>(logits);
  params.logits_row_stride = logits_row_stride;
  params.sequences = sequences;
  params.vocab_size = vocab_size;
  params.dtype = dtype;
  params.settings = pointer<SamplingSettings>(settings);
  params.greedy = greedy;
  params.seen = pointer<uint32_t>(seen);
  params.tokens = pointer<int32_t>(tokens);
  params.input_ids = pointer<int32_t>(input_ids);
  params.past_lengths = pointer<int32_t>(past_lengths);
  params.workspace = pointer<void>(workspace);
  params.semaphores = pointer<int32_t>(semaphores);
  check(launch_sampling(params, pointer<CUstream_st>(stream)), "sampling");
}

void mark_seen(Address tokens, Address cu_seqlens, int32_t sequences, int32_t vocab_size, Address seen,
               Address stream) {
  MarkSeenParams params;
  params.tokens = pointer<const int32_t>(tokens);
  params.cu_seqlens = pointer<const int32_t>(cu_seqlens);
  params.sequences = sequences;
  params.vocab_size = vocab_size;
  params.seen = pointer<uint32_t>(seen);
  check(launch_mark_seen(params, pointer<CUstream_st>(stream)), "mark_seen");
}

py::bytes settings_bytes(float temperature, int32_t top_k, float top_p, float repetition_penalty, uint64_t seed,
                         uint64_t step) {
  SamplingSettings settings;
  settings.temperature = temperature;
  settings.top_p = top_p;
  settings.repetition_penalty = repetition_penalty;
  settings.top_k = top_k;
  settings.seed = seed;
  settings.step = step;
  return {reinterpret_cast<const char*>(&settings), sizeof(settings)};
}

int64_t workspace_bytes(int32_t max_sequences, int32_t vocab_size) {
  int64_t bytes = 0;
  check(sampling_workspace_bytes(max_sequences, vocab_size, &bytes), "sampling_workspace_bytes");
  return bytes;
}

}  // namespace

void bind_sampling(py::module_& module) {
  module.def("sample", &sample, Unlocked(), py::kw_only(), py::arg("logits"), py::arg("logits_row_stride"),
             py::arg("sequences"), py::arg("vocab_size"), py::arg("dtype"), py::arg("settings"), py::arg("greedy"),
             py::arg("seen"), py::arg("tokens"), py::arg("input_ids"), py::arg("past_lengths"), py::arg("workspace"),
             py::arg("semaphores"), py::arg("stream"),
             "Launch the choice of the next tokens: kernels/sampling/sampling.h.");
  module.def("mark_seen", &mark_seen, Unlocked(), py::kw_only(), py::arg("tokens"), py::arg("cu_seqlens"),
             py::arg("sequences"), py::arg("vocab_size"), py::arg("seen"), py::arg("stream"),
             "Launch the marking of tokens as seen: kernels/sampling/sampling.h.");
  module.def("sampling_settings_bytes", &settings_bytes, py::kw_only(), py::arg("temperature"), py::arg("top_k"),
             py::arg("top_p"), py::arg("repetition_penalty"), py::arg("seed"), py::arg("step"),
             "Return the bytes of SamplingSettings, as they lie in device memory: kernels/sampling/sampling.h.");
  module.def("sampling_workspace_bytes", &workspace_bytes, py::arg("max_sequences"), py::arg("vocab_size"),
             "Return the size of the workspace that sample needs, in bytes.");
  module.attr("MAX_VOCAB_SIZE") = kMaxVocabSize;
}

}  // namespace qwen_plugins
