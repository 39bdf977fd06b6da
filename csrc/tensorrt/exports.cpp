// The ways by which TensorRT finds the plugin.
//
//   registry.load_library(path)   TensorRT opens this library and asks getCreators (10 and newer) or getPluginCreators
//   (8.6) dlopen, LD_PRELOAD, ctypes    on load the creator registers itself with every TensorRT that the process holds
//   adder2d_register_plugin()     does the same on demand: for TensorRT 8.5, or where this library was opened first
//
// TensorRT is looked up at run time, in the process; this library is linked against none. A creator that registered
// itself makes room when the same TensorRT asks for it through load_library, so both ways work in either order.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "attributes.h"
#include "plugins.h"

namespace adder2d {
namespace {

using namespace nvinfer1;

constexpr int32_t kMaxHosts = 8;

// One TensorRT library in the process.
struct Host {
  void* registry = nullptr;
  int32_t version = 0;
};

// The registries that hold the creator through us; null entries are free.
std::atomic<void*> registered[kMaxHosts];

// ---- finding TensorRT

// The TensorRT library that `handle` is or depends on; version 0 where there is none.
Host host_of(void* handle) {
  auto const version = reinterpret_cast<int32_t (*)()>(dlsym(handle, "getInferLibVersion"));
  auto const registry = reinterpret_cast<void* (*)()>(dlsym(handle, "getPluginRegistry"));
  return {registry ? registry() : nullptr, version ? version() : 0};
}

// A handle of a loaded object by its path; the program itself has an empty one.
void* open_loaded(char const* path) { return dlopen(*path ? path : nullptr, RTLD_LAZY | RTLD_NOLOAD); }

Host host_of_path(char const* path) {
  void* const handle = open_loaded(path);
  if (handle == nullptr) return {};
  Host const host = host_of(handle);
  dlclose(handle);
  return host;
}

// The path under which the object that holds `address` was loaded, or null.
char const* path_of(void const* address) {
  Dl_info info;
  link_map* map = nullptr;
  if (dladdr1(address, &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP) == 0 || map == nullptr) return nullptr;
  return map->l_name;
}

Host host_of_caller(void const* address) {
  char const* const path = path_of(address);
  return path ? host_of_path(path) : Host{};
}

// libnvinfer, its lean and dispatch runtimes, libtensorrt_rtx, each registry once.
std::vector<Host> loaded_hosts() {
  std::vector<std::string> paths;  // opened after the walk: dlopen inside it could wait for the walk's own lock
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        char const* const slash = std::strrchr(info->dlpi_name, '/');
        char const* const name = slash ? slash + 1 : info->dlpi_name;
        if (std::strncmp(name, "libnvinfer", 10) == 0 || std::strncmp(name, "libtensorrt_rtx", 15) == 0)
          static_cast<std::vector<std::string>*>(data)->push_back(info->dlpi_name);
        return 0;
      },
      &paths);
  std::vector<Host> hosts;
  for (std::string const& path : paths) {
    Host const host = host_of_path(path.c_str());
    bool known = host.registry == nullptr || host.version == 0;
    for (Host const& other : hosts) known = known || other.registry == host.registry;
    if (!known) hosts.push_back(host);
  }
  return hosts;
}

// ---- registering ourselves

void* creator_for(RegistrySlots const& slots) {
  return slots.v3 ? static_cast<void*>(&plugin_v3_creator()) : static_cast<void*>(&plugin_v2_creator());
}

bool holds_creator(Host const& host, RegistrySlots const& slots) {
  return call_slot<void*>(host.registry, slots.getCreator, kPluginName, kPluginVersion, kPluginNamespace) != nullptr;
}

// Keeps this library mapped while a registry points into it; every call adds one reference.
void* pin_self() {
  char const* const path = path_of(reinterpret_cast<void const*>(&pin_self));
  return path ? open_loaded(path) : nullptr;
}

// Whether the host's registry holds an Adder2d creator afterwards.
bool register_with(Host const& host) {
  RegistrySlots slots;
  if (!registry_slots(host.version, &slots)) {
    report("TensorRT's version number %d is not known to this library: use load_library of its plugin registry",
           host.version);
    return false;
  }
  if (holds_creator(host, slots)) return true;
  for (std::atomic<void*>& entry : registered) {
    void* free_entry = nullptr;
    if (!entry.compare_exchange_strong(free_entry, host.registry)) continue;
    void* const self = pin_self();
    if (self != nullptr && call_slot<bool>(host.registry, slots.registerCreator, creator_for(slots), kPluginNamespace))
      return true;  // the pin stays until make_room
    entry = nullptr;
    if (self) dlclose(self);
    break;
  }
  return holds_creator(host, slots);  // another thread may have been first
}

// Takes the creator that we registered out of the host's registry again, so that load_library can add it.
void make_room(Host const& host) {
  RegistrySlots slots;
  if (host.registry == nullptr || !registry_slots(host.version, &slots)) return;
  for (std::atomic<void*>& entry : registered) {
    void* expected = host.registry;
    if (!entry.compare_exchange_strong(expected, nullptr)) continue;
    call_slot<bool>(host.registry, slots.deregisterCreator, creator_for(slots));
    void* const self = pin_self();
    if (self) {
      dlclose(self);  // the reference just taken
      dlclose(self);  // the one that register_with kept
    }
  }
}

// On load. Without TensorRT in the process there is nothing to do; nothing may fail.
__attribute__((constructor)) void register_on_load() {
  try {
    for (Host const& host : loaded_hosts()) {
      RegistrySlots slots;
      if (registry_slots(host.version, &slots)) register_with(host);
    }
  } catch (std::exception const& error) {
    report("could not register the plugin on load: %s", error.what());
  }
}

// Creators of TensorRT 8 go to TensorRT 8 alone: TensorRT 10.0 may ask for them too, but would read them by another
// layout.
bool wants_v2(Host const& caller) {
  if (caller.version > 0) return is_trt8(caller.version);
  for (Host const& host : loaded_hosts())
    if (is_trt10_or_rtx(host.version)) return false;
  return true;
}

}  // namespace
}  // namespace adder2d

// ---- what the library exports for TensorRT

extern "C" {

#define ADDER2D_EXPORT __attribute__((visibility("default")))

// Registers the plugin with every TensorRT library in the process, where none is registered yet. Returns the number of
// registries that hold an Adder2d creator afterwards, 0 where no TensorRT is loaded, -1 where one refused.
ADDER2D_EXPORT int32_t adder2d_register_plugin() {
  try {
    int32_t count = 0;
    bool refused = false;
    for (adder2d::Host const& host : adder2d::loaded_hosts())
      adder2d::register_with(host) ? void(++count) : void(refused = true);
    return refused ? -1 : count;
  } catch (std::exception const& error) {
    adder2d::report("could not register the plugin: %s", error.what());
    return -1;
  }
}

// For TensorRT 10 and newer.
ADDER2D_EXPORT nvinfer1::v_1_0::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) {
  static nvinfer1::v_1_0::IPluginCreatorInterface* const creators[] = {&adder2d::plugin_v3_creator()};
  adder2d::make_room(adder2d::host_of_caller(__builtin_return_address(0)));
  nbCreators = 1;
  return creators;
}

// For TensorRT 8.6 to 9.x.
ADDER2D_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& nbCreators) {
  static nvinfer1::IPluginCreator* const creators[] = {&adder2d::plugin_v2_creator()};
  nbCreators = 0;
  try {
    adder2d::Host const caller = adder2d::host_of_caller(__builtin_return_address(0));
    if (adder2d::wants_v2(caller)) {
      adder2d::make_room(caller);
      nbCreators = 1;
    }
  } catch (std::exception const& error) {
    adder2d::report("could not offer the plugin: %s", error.what());
  }
  return creators;
}

// TensorRT loads no library without it. The finder is ignored: where log() lies differs between versions.
ADDER2D_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder*) {}

}  // extern "C"
