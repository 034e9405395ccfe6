// Names the launches of a plug-in for nsys and ncu by a range in the NVTX domain "qwen_plugins". Without a profiler a
// range costs two checks of null function pointers. NVTX's C interface: its C++ one is not in every CUDA 12 toolkit.
#pragma once

#include <nvtx3/nvToolsExt.h>

namespace qwen_plugins {

inline nvtxDomainHandle_t nvtx_domain() {
  static const nvtxDomainHandle_t domain = nvtxDomainCreateA("qwen_plugins");
  return domain;
}

// `Name` has a static string `message`, which is registered once, so that a range carries only a handle.
template <typename Name>
class NvtxRange {
 public:
  NvtxRange() {
    static const nvtxStringHandle_t message = nvtxDomainRegisterStringA(nvtx_domain(), Name::message);
    nvtxEventAttributes_t event{};
    event.version = NVTX_VERSION;
    event.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
    event.messageType = NVTX_MESSAGE_TYPE_REGISTERED;
    event.message.registered = message;
    nvtxDomainRangePushEx(nvtx_domain(), &event);
  }
  ~NvtxRange() { nvtxDomainRangePop(nvtx_domain()); }
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;
};

}  // namespace qwen_plugins
