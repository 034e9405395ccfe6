// The entry points of a plug-in library, found through the registry of a real TensorRT 10, 11 or TensorRT-RTX:
// life_cycle_v3.cpp with this file drives the creators that TensorRT registered. QWEN_PLUGINS_TEST_TENSORRT names
// TensorRT's library, QWEN_PLUGINS_TEST_LIBRARY the plug-ins', and QWEN_PLUGINS_TEST_WRONG one that must be refused.
#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "tensorrt_double.h"

using nvinfer1::IPluginCreatorInterface;
using nvinfer1::IPluginCreatorV3One;
using nvinfer1::IPluginV3;

// The virtual functions of IPluginRegistry in their order. Those that nothing calls here only keep their place.
class PluginRegistry {
 public:
#if QWEN_PLUGINS_TENSORRT_MAJOR < 11
  virtual bool register_v2_creator(void*, char const*) noexcept = 0;
  virtual void* const* v2_creators(int32_t*) const noexcept = 0;
  virtual void* find_v2_creator(char const*, char const*, char const*) noexcept = 0;
#endif
  virtual ~PluginRegistry() = default;
  virtual void set_error_recorder(void*) noexcept = 0;
  virtual void* error_recorder() const noexcept = 0;
#if QWEN_PLUGINS_TENSORRT_MAJOR < 11
  virtual bool deregister_v2_creator(void const*) noexcept = 0;
#endif
  virtual bool is_parent_search_enabled() const = 0;
  virtual void enable_parent_search(bool) = 0;
  virtual void* load_library(char const* path) noexcept = 0;
  virtual void deregister_library(void* library) noexcept = 0;
  virtual bool register_creator(IPluginCreatorInterface&, char const*) noexcept = 0;
  virtual IPluginCreatorInterface* const* all_creators(int32_t* count) const noexcept = 0;
  virtual IPluginCreatorInterface* find_creator(char const* name, char const* version, char const* space) noexcept = 0;
};

namespace {

char const* path_of(char const* variable) {
  char const* const path = std::getenv(variable);
  CHECK(path != nullptr);
  return path;
}

PluginRegistry& open_registry() {
  void* const tensorrt = dlopen(path_of("QWEN_PLUGINS_TEST_TENSORRT"), RTLD_NOW | RTLD_LOCAL);
  CHECK(tensorrt != nullptr);
  auto* const registry = reinterpret_cast<PluginRegistry* (*)()>(dlsym(tensorrt, "getPluginRegistry"));
  CHECK(registry != nullptr);
  return *registry();
}

// Runs `body` in several threads at once.
template <typename Body>
void in_threads(Body const& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back(body);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

class LoadedLibrary {
 public:
  LoadedLibrary() : registry_(open_registry()) {
    CHECK(registry_.load_library(path_of("QWEN_PLUGINS_TEST_WRONG")) == nullptr);
    CHECK(creators().empty());
    char const* const path = path_of("QWEN_PLUGINS_TEST_LIBRARY");
    std::atomic<int> handles{0};
    in_threads([&] { handles += registry_.load_library(path) != nullptr ? 1 : 0; });
    CHECK(handles == 1);
    CHECK(registry_.load_library(path) == nullptr);  // it is there already
    creators_ = creators();
    library_ = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    CHECK(library_ != nullptr);
    in_threads([this] { create_often(); });
  }

  std::vector<IPluginCreatorInterface*>& registered() { return creators_; }

  void set_logger_finder(nvinfer1::ILoggerFinder* finder) {
    auto* const set = reinterpret_cast<void (*)(nvinfer1::ILoggerFinder*)>(dlsym(library_, "setLoggerFinder"));
    CHECK(set != nullptr);
    set(finder);
  }

 private:
  std::vector<IPluginCreatorInterface*> creators() const {
    int32_t count = 0;
    IPluginCreatorInterface* const* const all = registry_.all_creators(&count);
    std::vector<IPluginCreatorInterface*> ours;
    for (int32_t i = 0; i < count; ++i) {
      bool const is_v3 = std::strcmp(all[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0;
      if (is_v3 && std::strcmp(static_cast<IPluginCreatorV3One*>(all[i])->getPluginNamespace(), "qwen_plugins") == 0) {
        ours.push_back(all[i]);
      }
    }
    return ours;
  }

  IPluginV3* create(char const* name) {
    IPluginCreatorInterface* const creator = registry_.find_creator(name, "1", "qwen_plugins");
    CHECK(creator != nullptr);
    Fields fields = Fields().add("type_id", 1);
    IPluginV3* const plugin = static_cast<IPluginCreatorV3One*>(creator)->createPlugin("layer", fields.collection(),
                                                                                       nvinfer1::TensorRTPhase::kBUILD);
    CHECK(plugin != nullptr);
    return plugin;
  }

  void create_often() {
    for (int i = 0; i < 100; ++i) {
      IPluginV3* const plugin = create(i % 2 == 0 ? "RmsNorm" : "Gemm");
      delete plugin->clone();
      delete plugin;
    }
  }

  PluginRegistry& registry_;
  void* library_ = nullptr;
  std::vector<IPluginCreatorInterface*> creators_;
};

LoadedLibrary& loaded() {
  static LoadedLibrary library;
  return library;
}

}  // namespace

extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { loaded().set_logger_finder(finder); }

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count) {
  count = static_cast<int32_t>(loaded().registered().size());
  return loaded().registered().data();
}
