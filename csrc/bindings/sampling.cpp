#include "sampling.h"

#include "arguments.h"
#include "kernels/sampling/sampling.h"

namespace py = pybind11;

namespace qwen_plugins {
namespace {

// What the launches for some slots have in common.
struct SlotsInMemory {
  int32_t vocab_size;
  Address settings, biases, marks, mask_rows, masks, last_tokens, workspace, semaphores;

  SamplingSlots state() const {
    return {pointer<SamplingSettings>(settings), pointer<SamplingBias>(biases), pointer<uint32_t>(marks)};
  }
};

void sample(const SlotsInMemory& memory, Address logits, int64_t logits_row_stride, int32_t sequences, DataType dtype,
            Address slots, bool largest, Address tokens, Address stream, Address past_lengths) {
  SamplingParams params;
  params.logits = pointer<const void>(logits);
  params.logits_row_stride = logits_row_stride;
  params.sequences = sequences;
  params.vocab_size = memory.vocab_size;
  params.dtype = dtype;
  params.slots = pointer<const int32_t>(slots);
  params.largest = largest;
  params.state = memory.state();
  params.mask_rows = pointer<const int32_t>(memory.mask_rows);
  params.masks = pointer<const uint32_t>(memory.masks);
  params.tokens = pointer<int32_t>(tokens);
  params.last_tokens = pointer<int32_t>(memory.last_tokens);
  params.past_lengths = pointer<int32_t>(past_lengths);
  params.workspace = pointer<void>(memory.workspace);
  params.semaphores = pointer<int32_t>(memory.semaphores);
  check(launch_sampling(params, pointer<CUstream_st>(stream)), "sampling");
}

void start_sampling(const SlotsInMemory& memory, Address starts, Address biases, Address tokens, int32_t sequences,
                    Address stream) {
  StartSamplingParams params;
  params.starts = pointer<const SamplingStart>(starts);
  params.biases = pointer<const SamplingBias>(biases);
  params.tokens = pointer<const int32_t>(tokens);
  params.sequences = sequences;
  params.vocab_size = memory.vocab_size;
  params.state = memory.state();
  check(launch_start_sampling(params, pointer<CUstream_st>(stream)), "start_sampling");
}

void logprobs(Address logits, int64_t logits_row_stride, int32_t sequences, int32_t vocab_size, DataType dtype,
              int32_t num_best, Address tokens, Address logprobs, Address best_tokens, Address best_logprobs,
              Address stream) {
  LogprobsParams params;
  params.logits = pointer<const void>(logits);
  params.logits_row_stride = logits_row_stride;
  params.sequences = sequences;
  params.vocab_size = vocab_size;
  params.dtype = dtype;
  params.num_best = num_best;
  params.tokens = pointer<const int32_t>(tokens);
  params.logprobs = pointer<float>(logprobs);
  params.best_tokens = pointer<int32_t>(best_tokens);
  params.best_logprobs = pointer<float>(best_logprobs);
  check(launch_logprobs(params, pointer<CUstream_st>(stream)), "logprobs");
}

int64_t workspace_bytes(int32_t max_sequences, int32_t vocab_size) {
  int64_t bytes = 0;
  check(sampling_workspace_bytes(max_sequences, vocab_size, &bytes), "sampling_workspace_bytes");
  return bytes;
}

}  // namespace

void bind_sampling(py::module_& module) {
  py::class_<SlotsInMemory>(module, "SamplingSlots",
                            "Where the state of the slots is in device memory: SamplingSlots and SamplingParams of "
                            "kernels/sampling/sampling.h. Memory that no launch uses may be 0.")
      .def(py::init([](int32_t vocab_size, Address settings, Address biases, Address marks, Address mask_rows,
                       Address masks, Address last_tokens, Address workspace, Address semaphores) {
             return SlotsInMemory{vocab_size, settings,    biases,    marks,     mask_rows,
                                  masks,      last_tokens, workspace, semaphores};
           }),
           py::kw_only(), py::arg("vocab_size"), py::arg("settings"), py::arg("biases"), py::arg("marks"),
           py::arg("mask_rows"), py::arg("masks"), py::arg("last_tokens"), py::arg("workspace"), py::arg("semaphores"));
  module.def("sample", &sample, Unlocked(), py::arg("memory"), py::kw_only(), py::arg("logits"),
             py::arg("logits_row_stride"), py::arg("sequences"), py::arg("dtype"), py::arg("slots"), py::arg("largest"),
             py::arg("tokens"), py::arg("stream"), py::arg("past_lengths") = 0,
             "Launch the choice of the next tokens: kernels/sampling/sampling.h.");
  module.def("start_sampling", &start_sampling, Unlocked(), py::arg("memory"), py::kw_only(), py::arg("starts"),
             py::arg("biases"), py::arg("tokens"), py::arg("sequences"), py::arg("stream"),
             "Launch the setting of the state of slots: kernels/sampling/sampling.h.");
  module.def("logprobs", &logprobs, Unlocked(), py::kw_only(), py::arg("logits"), py::arg("logits_row_stride"),
             py::arg("sequences"), py::arg("vocab_size"), py::arg("dtype"), py::arg("num_best"), py::arg("tokens"),
             py::arg("logprobs"), py::arg("best_tokens"), py::arg("best_logprobs"), py::arg("stream"),
             "Launch the computation of log-probabilities: kernels/sampling/sampling.h.");
  module.def("sampling_workspace_bytes", &workspace_bytes, py::arg("max_sequences"), py::arg("vocab_size"),
             "Return the size of the workspace that sample needs, in bytes.");
  module.attr("MAX_VOCAB_SIZE") = kMaxVocabSize;
  module.attr("MAX_BIASES") = kMaxBiases;
  module.attr("MAX_BEST") = kMaxBest;
  module.attr("SAMPLING_START_BYTES") = sizeof(SamplingStart);
}

}  // namespace qwen_plugins
