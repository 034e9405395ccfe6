#include "kernels.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/programmatic_launch.cuh"
#include "sampling.h"

namespace qwen_plugins {
namespace {

constexpr int kThreads = 256;

// The half of a word of two counts that a token has.
struct Half {
  uint32_t* word;
  int shift;

  __device__ __forceinline__ Half(uint16_t* counts, int32_t token)
      : word(reinterpret_cast<uint32_t*>(counts) + token / 2), shift(token % 2 * 16) {}

  __device__ __forceinline__ void set_in_prompt() const { atomicOr(word, kInPrompt << shift); }

  __device__ __forceinline__ void count() const {
    uint32_t found = *word, expected = 0;
    do {
      expected = found;
      if ((expected >> shift & kMostCounted) == kMostCounted) return;
      found = atomicCAS(word, expected, expected + (1U << shift));
    } while (found != expected);
  }
};

// A block sets the state of a slot.
__global__ void __launch_bounds__(kThreads) start_sampling(const __grid_constant__ StartSamplingParams p) {
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const SamplingStart& start = p.starts[blockIdx.x];
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t words = words_of(p.vocab_size), num_biases = start.settings.num_biases;
  uint16_t* counts = start.settings.counts;
  if (thread == 0) p.state.settings[start.slot] = start.settings;
  if (num_biases == 0 && counts == nullptr) return;

  uint32_t* marks = p.state.marks + static_cast<int64_t>(start.slot) * words;
  for (int32_t i = thread; i < words; i += kThreads) marks[i] = 0;
  if (counts != nullptr) {
    for (int32_t i = thread; i < words * 16; i += kThreads) reinterpret_cast<uint32_t*>(counts)[i] = 0;
  }
  __syncthreads();
  const auto mark = [&](int32_t token) { atomicOr(marks + token / 32, 1U << (token % 32)); };
  for (int32_t i = thread; i < num_biases; i += kThreads) {
    const SamplingBias bias = p.biases[start.first_bias + i];
    p.state.biases[static_cast<int64_t>(start.slot) * kMaxBiases + i] = bias;
    if (bias.token >= 0 && bias.token < p.vocab_size) mark(bias.token);
  }
  if (counts == nullptr) return;
  for (int32_t i = thread; i < start.prompt_length + start.output_length; i += kThreads) {
    const int32_t token = p.tokens[start.first_token + i];
    if (token < 0 || token >= p.vocab_size) continue;
    mark(token);
    const Half half(counts, token);
    if (i < start.prompt_length) {
      half.set_in_prompt();
    } else {
      half.count();
    }
  }
}

}  // namespace

cudaError_t launch_start_sampling(const StartSamplingParams& p, cudaStream_t stream) {
  if (p.sequences < 0 || p.vocab_size <= 0 || p.vocab_size > kMaxVocabSize) return cudaErrorInvalidValue;
  if (p.sequences == 0) return cudaSuccess;
  if (p.starts == nullptr || p.state.settings == nullptr || p.state.biases == nullptr || p.state.marks == nullptr) {
    return cudaErrorInvalidValue;
  }
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  return launch_kernel(start_sampling, dim3(p.sequences), dim3(kThreads), 0, device, stream, p);
}

}  // namespace qwen_plugins
