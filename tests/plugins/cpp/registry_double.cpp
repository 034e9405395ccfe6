// Stands in for TensorRT 10 or 11 behind NVIDIA's Python bindings: a registry that loads plug-in libraries, and the
// other entry points that the bindings are linked against, which do nothing.
#include <dlfcn.h>

#include <cstring>
#include <vector>

#include "plugins/tensorrt_api.h"

namespace {

using nvinfer1::IPluginCreatorInterface;
using nvinfer1::IPluginCreatorV3One;

// The virtual functions of IPluginRegistry in their order. Those that nothing calls here only keep their place.
class Registry {
 public:
#if QWEN_PLUGINS_TENSORRT_MAJOR < 11
  virtual bool register_v2_creator(void*, char const*) noexcept { return false; }
  virtual void* const* v2_creators(int32_t* count) const noexcept {
    *count = 0;
    return nullptr;
  }
  virtual void* find_v2_creator(char const*, char const*, char const*) noexcept { return nullptr; }
#endif
  virtual ~Registry() = default;
  virtual void set_error_recorder(void*) noexcept {}
  virtual void* error_recorder() const noexcept { return nullptr; }
#if QWEN_PLUGINS_TENSORRT_MAJOR < 11
  virtual bool deregister_v2_creator(void const*) noexcept { return false; }
#endif
  virtual bool is_parent_search_enabled() const { return false; }
  virtual void enable_parent_search(bool) {}

  virtual void* load_library(char const* path) noexcept {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return nullptr;
    auto* const creators =
        reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    if (creators == nullptr) return nullptr;
    int32_t count = 0;
    IPluginCreatorInterface* const* const first = creators(count);
    creators_.insert(creators_.end(), first, first + count);
    return library;
  }

  virtual void deregister_library(void*) noexcept {}
  virtual bool register_creator(IPluginCreatorInterface&, char const*) noexcept { return false; }
  virtual IPluginCreatorInterface* const* all_creators(int32_t* count) const noexcept {
    *count = static_cast<int32_t>(creators_.size());
    return creators_.data();
  }

  virtual IPluginCreatorInterface* find_creator(char const* name, char const* version, char const* space) noexcept {
    for (IPluginCreatorInterface* const creator : creators_) {
      auto* const one = static_cast<IPluginCreatorV3One*>(creator);
      if (std::strcmp(one->getPluginName(), name) == 0 && std::strcmp(one->getPluginVersion(), version) == 0 &&
          std::strcmp(one->getPluginNamespace(), space) == 0) {
        return creator;
      }
    }
    return nullptr;
  }

  virtual bool deregister_creator(IPluginCreatorInterface const&) noexcept { return false; }
  virtual void* acquire_resource(char const*, void*) noexcept { return nullptr; }
  virtual int32_t release_resource(char const*) noexcept { return 0; }
  virtual IPluginCreatorInterface* const* all_creators_recursively(int32_t* count) noexcept {
    return all_creators(count);
  }

 private:
  std::vector<IPluginCreatorInterface*> creators_;
};

}  // namespace

extern "C" {

void* getPluginRegistry() noexcept {
  static Registry registry;
  return &registry;
}
void* getBuilderPluginRegistry(int32_t) noexcept { return getPluginRegistry(); }
void* createInferBuilder_INTERNAL(void*, int32_t) noexcept { return nullptr; }
void* createInferRefitter_INTERNAL(void*, void*, int32_t) noexcept { return nullptr; }
void* createInferRuntime_INTERNAL(void*, int32_t) noexcept { return nullptr; }
void* createNvOnnxParser_INTERNAL(void*, void*, int32_t) noexcept { return nullptr; }
void* createNvOnnxParserRefitter_INTERNAL(void*, void*, int32_t) noexcept { return nullptr; }
int32_t getNvOnnxParserVersion() noexcept { return 0; }
bool initLibNvInferPlugins(void*, char const*) noexcept { return true; }

}  // extern "C"
