// Stands before tests/cuda_emulator/emulator.h: the library's host code runs as it is, but a launch is handed to
// Python, which executes the kernel's PTX instead of what g++ makes of it.
#pragma once
#include <dlfcn.h>
#include <stdint.h>

#define launch emulated_launch
#include "../cuda_emulator/emulator.h"
#undef launch

using Capture = int (*)(const char* kernel, int blocks, int cluster, int threads, int shared_bytes,
                        const void* parameters, int parameter_bytes);
inline Capture& capture() {
  static Capture one = nullptr;
  return one;
}
extern "C" __attribute__((visibility("default"))) void capture_with(Capture function) { capture() = function; }

namespace port {
template <class Parameters>
int launch(void (*kernel)(Parameters), int blocks, int cluster, int threads, int shared_bytes, Stream,
           const Parameters& parameters) {
  Dl_info info{};
  if (!dladdr(reinterpret_cast<void*>(kernel), &info) || !info.dli_sname) return 1;
  return capture()(info.dli_sname, blocks, cluster, threads, shared_bytes, &parameters, int(sizeof(parameters)));
}
}  // namespace port
