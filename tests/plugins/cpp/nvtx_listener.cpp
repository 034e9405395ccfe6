// A minimal profiler: NVTX loads this library where NVTX_INJECTION64_PATH names it, and it prints the ranges.
#include <nvtx3/nvToolsExt.h>

#include <cstdio>
#include <deque>
#include <string>

namespace {

// Handles are addresses of these.
std::deque<std::string>& names() {
  static std::deque<std::string> stored;
  return stored;
}

std::string const& name_of(void const* handle) { return *static_cast<std::string const*>(handle); }

nvtxDomainHandle_t create_domain(char const* name) {
  return reinterpret_cast<nvtxDomainHandle_t>(&names().emplace_back(name));
}

nvtxStringHandle_t register_string(nvtxDomainHandle_t, char const* string) {
  return reinterpret_cast<nvtxStringHandle_t>(&names().emplace_back(string));
}

int push(nvtxDomainHandle_t domain, nvtxEventAttributes_t const* event) {
  std::printf("push %s@%s\n", name_of(event->message.registered).c_str(), name_of(domain).c_str());
  return 0;
}

int pop(nvtxDomainHandle_t) {
  std::printf("pop\n");
  return 0;
}

template <typename Function>
void replace(NvtxFunctionTable table, int id, Function function) {
  *table[id] = reinterpret_cast<NvtxFunctionPointer>(function);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_table) {
  auto const* callbacks = static_cast<NvtxExportTableCallbacks const*>(get_table(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned int size = 0;
  if (callbacks == nullptr || callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size) == 0) {
    return 0;
  }
  replace(table, NVTX_CBID_CORE2_DomainCreateA, create_domain);
  replace(table, NVTX_CBID_CORE2_DomainRegisterStringA, register_string);
  replace(table, NVTX_CBID_CORE2_DomainRangePushEx, push);
  replace(table, NVTX_CBID_CORE2_DomainRangePop, pop);
  return 1;
}
